"""Which next tokens keep requests of different progress inside the catalogue: the core of the logits processor."""

from __future__ import annotations

import torch

from minionerec.search.trie import SidTrie


def mask_illegal(logits: torch.Tensor, trie: SidTrie, tokens: torch.Tensor, counts: torch.Tensor, end: int) -> None:
    """Set the logits of tokens that would leave the catalogue to -inf, in place.

    Args:
        logits: [R, vocab], before the next token of every request.
        trie: the catalogue.
        tokens: [R, depth] int64, what the requests have written so far; beyond `counts` anything.
        counts: [R], how many tokens they have written.
        end: the token that alone may follow a finished sequence.
    """
    nodes = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    legal = torch.zeros_like(logits, dtype=torch.bool)
    for level in range(trie.depth):
        here = (counts == level).nonzero().squeeze(1)
        legal[here] = trie.mask(nodes[here], logits.shape[1], level)
        further = (counts > level).nonzero().squeeze(1)
        nodes[further] = trie.advance(nodes[further], tokens[further, level], level).long()
    legal[~legal.any(dim=1), end] = True
    logits.masked_fill_(~legal, float("-inf"))
