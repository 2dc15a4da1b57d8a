"""Where the rows of new SID tokens start: what the items that use a code are about, as directions in embedding space."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from sklearn.decomposition import TruncatedSVD
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from similar_items import tfidf_table

COMPONENTS = 128  # of latent semantic analysis


def tfidf_vectors(texts: Sequence[str], width: int, seed: int) -> np.ndarray:
    """[N, width]: latent semantic analysis of the texts (Deerwester et al. 1990), randomly rotated into `width` dimensions.

    For a model without any knowledge of words: its dimensions mean nothing yet, but like items get like vectors. All zeros
    if the texts have too few words in common.
    """
    table = tfidf_table(texts)
    components = min(COMPONENTS, width, *(size - 1 for size in table.shape))
    if components < 1:
        return np.zeros((len(texts), width))
    with np.errstate(invalid="ignore"):  # where all texts are alike it divides by a variance of zero
        vectors = TruncatedSVD(components, random_state=seed).fit_transform(table)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))
    return vectors @ rotation[:components]


def embedding_vectors(texts: Sequence[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """[N, hidden]: mean of the model's own embeddings of a text's tokens, rare tokens counting more (idf)."""
    rows = model.get_input_embeddings().weight.detach().float().cpu().numpy()
    tokens = [np.unique(ids) for ids in tokenizer(list(texts), add_special_tokens=False).input_ids]
    times = np.bincount(np.concatenate(tokens).astype(np.int64), minlength=len(rows))
    weight = np.log(len(texts) / np.maximum(times, 1) + 1)
    vectors = np.zeros((len(texts), rows.shape[1]))
    for place, ids in enumerate(tokens):
        if len(ids):
            vectors[place] = np.average(rows[ids], axis=0, weights=weight[ids])
    return vectors


def code_directions(sids: Sequence[Sequence[str]], vectors: np.ndarray) -> dict[str, np.ndarray]:
    """{SID token: mean vector of the items that use it, less the mean of its level}, of standard deviation 1 in all.

    Empty if the vectors say nothing: all equal, or one code a level.

    Args:
        sids: SID tokens of each item. vectors [N, hidden]: of the same items.
    """
    users: dict[tuple[int, str], list[int]] = defaultdict(list)
    for item, sid in enumerate(sids):
        for level, token in enumerate(sid):
            users[level, token].append(item)
    means = {key: vectors[items].mean(axis=0) for key, items in users.items()}
    centre = {
        level: np.mean([mean for (own, _), mean in means.items() if own == level], axis=0)
        for level in {level for level, _ in means}
    }
    directions = {token: mean - centre[level] for (level, token), mean in means.items()}
    scale = np.stack(list(directions.values())).std()
    return {token: vector / scale for token, vector in directions.items()} if scale > 0 else {}
