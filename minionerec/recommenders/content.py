"""Items whose texts are most like those of a history: what a content-based recommender would say, to learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import sparse
from sklearn.preprocessing import normalize

from minionerec.common.records import Catalogue
from minionerec.common.texts import shorten_title
from minionerec.common.tfidf import compute_tfidf

SIMILAR_ITEMS = 50  # of a history; further ones would be drawn hardly ever
DECAY = 0.7  # of an item's weight with every newer item
TEMPERATURE = 0.05  # of cosine similarities
HISTORIES_AT_ONCE = 512  # bounds the memory of what is computed for them and all items
LARGEST_TABLE = 2**24  # histories x items computed at once, where the items are many
TITLE_SHARE = 0.7  # of the likeness of two items that both have descriptions


def compute_item_texts(titles: Sequence[str], descriptions: Sequence[str]) -> sparse.csr_matrix:
    """What items say of themselves, as vectors whose products are likenesses.

    Args:
        titles: N of them.
        descriptions: of the same items; if all are empty, the titles decide alone.

    Returns:
        float32 [N, words], rows of length 1 at most: .7 of the product of two rows is the cosine of the titles, .3 that
        of the descriptions.
    """
    vectors = compute_tfidf(titles)
    if not any(descriptions):
        return vectors
    shares = (TITLE_SHARE**0.5, (1 - TITLE_SHARE) ** 0.5)
    tables = (vectors, compute_tfidf(descriptions))
    return sparse.hstack([share * table for share, table in zip(shares, tables, strict=True)], format="csr")


def find_similar_items(texts: sparse.csr_matrix, histories: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """For every history, the items most like it and how likely each is to be drawn.

    A history is the sum of its items' rows, newest first times 1, 0.7, 0.7 ** 2, ...; likelihoods are proportional to
    exp(cosine / 0.05). Items of the history itself are left out, and so are items that share no word with it.

    Args:
        texts: [N, words] TF-IDF vectors of the items' texts, rows of length 1 (`compute_tfidf`).
        histories: row numbers of items in `texts`, oldest first.

    Returns:
        (row numbers [H, k], probabilities [H, k]) with k = min(50, N), most similar first; all probabilities of a row
        are 0 if no item is like its history.
    """
    count, k = texts.shape[0], min(SIMILAR_ITEMS, texts.shape[0])
    weights = _weigh_histories(histories, count)
    queries = weights @ texts
    queries = normalize(queries) if queries.shape[1] else queries
    similar = np.empty((len(histories), k), dtype=np.int64)
    probabilities = np.empty((len(histories), k))
    at_once = max(1, min(HISTORIES_AT_ONCE, LARGEST_TABLE // max(1, count)))
    for start in range(0, len(histories), at_once):
        chunk = slice(start, start + at_once)
        cosine = (queries[chunk] @ texts.T).toarray()
        cosine[weights[chunk].nonzero()] = 0
        nearest = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(cosine, nearest, axis=1), axis=1, kind="stable")
        similar[chunk] = np.take_along_axis(nearest, order, axis=1)
        cosine = np.take_along_axis(cosine, similar[chunk], axis=1)
        gains = np.where(cosine > 0, np.exp((cosine - cosine[:, :1]) / TEMPERATURE), 0)
        probabilities[chunk] = gains / np.maximum(gains.sum(axis=1, keepdims=True), 1e-9)
    return similar, probabilities


def _weigh_histories(histories: Sequence[Sequence[int]], count: int) -> sparse.csr_matrix:
    """[H, count] weights of the items of each history: 1 for the newest, DECAY times as much for every older one."""
    lengths = np.fromiter(map(len, histories), dtype=np.int64, count=len(histories))
    rows = np.repeat(np.arange(len(histories)), lengths)
    columns = np.fromiter((item for history in histories for item in history), dtype=np.int64, count=len(rows))
    age = np.concatenate([np.arange(length)[::-1] for length in lengths]) if len(rows) else np.zeros(0)
    return sparse.csr_matrix((DECAY**age, (rows, columns)), shape=(len(histories), count), dtype=np.float32)


def explain_content(
    catalogue: Catalogue, descriptions: dict[int, str]
) -> Callable[[Sequence[int], Sequence[int]], list[str]]:
    """Why items are like a history: `like Y`, Y being the item of the history with the largest part in the likeness.

    Args:
        catalogue: the items.
        descriptions: {item id: text}, where they are looked at.

    Returns:
        (history of item ids, oldest first; items) -> a text for each item, empty where it shares no word with them.
    """
    texts = compute_item_texts(catalogue.titles, [descriptions.get(item, "") for item in catalogue.item_ids])
    number_of = {item: number for number, item in enumerate(catalogue.item_ids)}

    def explain(history: Sequence[int], items: Sequence[int]) -> list[str]:
        if not items:
            return []
        newest_first = [number_of[item] for item in reversed(history)]
        likeness = (texts[newest_first] @ texts[[number_of[item] for item in items]].T).toarray()
        likeness *= DECAY ** np.arange(len(newest_first))[:, None]
        titles = [shorten_title(catalogue.titles[newest_first[place]]) for place in likeness.argmax(axis=0)]
        return [f"like {title}" if p > 0 else "" for title, p in zip(titles, likeness.max(axis=0), strict=True)]

    return explain
