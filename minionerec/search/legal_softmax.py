"""Softmax over the tokens that may follow: tokens of a catalogue are normalised over their siblings alone.

The search of semantic IDs never leaves the catalogue, so the only probabilities that it compares are those of the
children of a prefix. A model that is trained on these (a hierarchical softmax, Morin and Bengio 2005) spends nothing on
telling legal tokens from illegal ones, and a node costs as much as it has children, not as much as the vocabulary: with
tokens that belong to single items that is a hundredth. Forced tokens, such as the end token, are certain and free.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel

from minionerec.search.prefix_tree import SoftLabels, TreeBatch, restrict_logits

CONFIG_NAME = "legal_softmax"  # in the config of a model that was trained so


def is_normalised_over_legal(model: object) -> bool:
    """Whether a model was trained with probabilities over legal tokens only, so that a search must normalise too."""
    return bool(getattr(getattr(model, "config", None), CONFIG_NAME, False))


class LegalTokens:
    """The children of every prefix of a catalogue's sequences; a prefix and its children are a group.

    Args:
        sequences: the token ids of every item, end token included. No sequence may be the beginning of another.

    Attributes:
        start: [G + 1] int64, where the tokens of each group begin in `tokens`.
        tokens: [M] int64, the children of each group, ascending.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]):
        children: dict[tuple[int, ...], set[int]] = {}
        for sequence in sequences:
            for level, token in enumerate(sequence):
                children.setdefault(tuple(sequence[:level]), set()).add(token)
        self._number_of = {prefix: number for number, prefix in enumerate(children)}
        sizes = np.array([len(tokens) for tokens in children.values()])
        self.start = np.concatenate(([0], sizes.cumsum()))
        self.tokens = np.array([token for tokens in children.values() for token in sorted(tokens)], dtype=np.int64)
        self._span = int(self.tokens.max()) + 1
        self._keys = np.repeat(np.arange(len(sizes)), sizes) * self._span + self.tokens

    def find_groups(self, target: Sequence[int]) -> np.ndarray:
        """The group of every token of a sequence [length] int64."""
        return np.array([self._number_of[tuple(target[:level])] for level in range(len(target))])

    def find_places(self, groups: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The place of each token among the tokens of its group."""
        return np.searchsorted(self._keys, groups * self._span + tokens) - self.start[groups]

    def make_row(
        self, prompt: Sequence[int], target: Sequence[int], labels: SoftLabels | None
    ) -> tuple[Sequence[int], Sequence[int], SoftLabels]:
        """A row of `batch_trees` without the labels that are certain, nor the tokens behind the last one that is not.

        Where all are certain, the first one stays, whose log-probability is 0.
        """
        if labels is None:
            labels = SoftLabels(np.arange(len(target)), np.asarray(target), np.ones(len(target)))
        groups = self.find_groups(target)
        is_open = (self.start[groups + 1] - self.start[groups] > 1)[labels.level]
        if not is_open.any():
            is_open = labels.level == labels.level.min()
        labels = SoftLabels(
            labels.level[is_open], labels.token[is_open], labels.weight[is_open], groups[labels.level[is_open]]
        )
        return prompt, target[: labels.level.max() + 1], labels


def compute_legal_log_probs(model: torch.nn.Module, batch: TreeBatch, legal: LegalTokens) -> torch.Tensor:
    """Log-probabilities [K] (float32) of the labels of a batch, each over the tokens of its group, differentiable.

    Args:
        model: plain or wrapped by DDP; its output layer has no bias.
        batch: made of rows of `LegalTokens.make_row`.
        legal: the groups.
    """
    inner: PreTrainedModel = getattr(model, "module", model)
    with restrict_logits(model, batch.node, logits_of=1) as read:
        first = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.build_mask(inner),
            use_cache=False,
        ).logits
    device = batch.input_ids.device
    label_group, label_row = batch.label_group.cpu().numpy(), batch.label_row.cpu().numpy()
    node_group = np.empty(len(batch.node), dtype=np.int64)
    node_group[label_row] = label_group  # labels of a node have its group
    order = np.argsort(node_group, kind="stable")
    groups, counts = np.unique(node_group, return_counts=True)
    sizes = legal.start[groups + 1] - legal.start[groups]
    tokens = np.concatenate([legal.tokens[legal.start[group] : legal.start[group + 1]] for group in groups])
    hidden = read[0][torch.from_numpy(order).to(device)]
    rows = inner.get_output_embeddings().weight[torch.from_numpy(tokens).to(device)]
    logits = [
        linear(of_nodes, of_tokens).float()
        for of_nodes, of_tokens in zip(hidden.split(counts.tolist()), rows.split(sizes.tolist()), strict=True)
    ]
    normaliser = torch.cat([part.logsumexp(dim=-1) for part in logits])
    flat = torch.cat([part.reshape(-1) for part in logits])
    # Where the logits of each node stand in `flat`, and each node in the order of groups.
    size_of_node = np.repeat(sizes, counts)
    begin = np.concatenate(([0], size_of_node.cumsum()[:-1]))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    of_label = place[label_row]
    chosen = begin[of_label] + legal.find_places(label_group, batch.label_token.cpu().numpy())
    log_probs = flat[torch.from_numpy(chosen).to(device)] - normaliser[torch.from_numpy(of_label).to(device)]
    # DDP looks for what the forward pass returned among what the loss depends on.
    return log_probs + 0.0 * first.float().sum()
