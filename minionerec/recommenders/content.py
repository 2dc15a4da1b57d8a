"""Items whose texts are most like those of a history: what a content-based recommender would say, to learn from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from sklearn.preprocessing import normalize

CANDIDATES = 50  # a history; further ones would be drawn hardly ever


DECAY = 0.7  # of an item's weight with every newer item


TEMPERATURE = 0.05  # of cosine similarities


CHUNK = 512  # histories at once; bounds the memory of their similarities to all items


def find_similar_items(table: sparse.csr_matrix, histories: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """For every history, the items most like it and how likely each is to be drawn.

    A history is the sum of its items' rows, newest first times 1, 0.7, 0.7 ** 2, ...; likelihoods are proportional to
    exp(cosine / 0.05). Items of the history itself are left out, and so are items that share no word with it.

    Args:
        table [N, words]: rows of length 1. histories: places of items in the table, oldest first.

    Returns:
        (items [H, k], probabilities [H, k]) with k = min(50, N), most similar first; all probabilities of a row are 0 if
        no item is like its history.
    """
    items, k = table.shape[0], min(CANDIDATES, table.shape[0])
    lengths = np.fromiter(map(len, histories), dtype=np.int64, count=len(histories))
    rows = np.repeat(np.arange(len(histories)), lengths)
    columns = np.fromiter((item for history in histories for item in history), dtype=np.int64, count=len(rows))
    age = np.concatenate([np.arange(length)[::-1] for length in lengths]) if len(rows) else np.zeros(0)
    taken = sparse.csr_matrix((DECAY**age, (rows, columns)), shape=(len(histories), items), dtype=np.float32)
    queries = taken @ table
    queries = normalize(queries) if queries.shape[1] else queries
    found = np.empty((len(histories), k), dtype=np.int64)
    probability = np.empty((len(histories), k))
    for start in range(0, len(histories), CHUNK):
        part = slice(start, start + CHUNK)
        cosine = (queries[part] @ table.T).toarray()
        cosine[taken[part].nonzero()] = 0
        best = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(cosine, best, axis=1), axis=1, kind="stable")
        found[part] = np.take_along_axis(best, order, axis=1)
        cosine = np.take_along_axis(cosine, found[part], axis=1)
        weight = np.where(cosine > 0, np.exp((cosine - cosine[:, :1]) / TEMPERATURE), 0)
        probability[part] = weight / np.maximum(weight.sum(axis=1, keepdims=True), 1e-9)
    return found, probability
