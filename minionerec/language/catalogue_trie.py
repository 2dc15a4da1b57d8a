"""The trie over a catalogue's semantic IDs in the tokens of one model, with the text of every SID."""

from __future__ import annotations

import torch

from minionerec.common.records import Catalogue
from minionerec.language.prompts import Encoder
from minionerec.search.trie import SidTrie


def build_catalogue_trie(
    catalogue: Catalogue, encoder: Encoder, device: torch.device | str
) -> tuple[SidTrie, list[str]]:
    """(trie over the catalogue's SIDs with their end token, SID text of every sequence number).

    The texts are decoded from the tokens the trie holds, so that what is reported is what was searched.
    """
    trie = SidTrie(encoder.sid_ids(catalogue.sids), device)
    texts = [
        "".join(encoder.tokenizer.convert_ids_to_tokens(tokens[: len(tokens) - len(encoder.end)]))
        for tokens in trie.sequences()
    ]
    return trie, texts
