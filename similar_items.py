"""Items whose texts are most like those of a history: what a content-based recommender would say, to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from data import SidSFTDataset
from prompts import Encoder
from records import Catalogue, Row

MAX_CHARACTERS = 400  # of a description
CANDIDATES = 50  # a history; further ones would be drawn hardly ever
DRAWS = 2  # targets a row and epoch
DECAY = 0.7  # of an item's weight with every newer item
TEMPERATURE = 0.05  # of cosine similarities
CHUNK = 512  # histories at once; bounds the memory of their similarities to all items


def texts_of(titles: Sequence[str], descriptions: Sequence[str]) -> list[str]:
    """What each item is about: its title and the beginning of its description."""
    return [f"{title} {description[:MAX_CHARACTERS]}" for title, description in zip(titles, descriptions, strict=True)]


def tfidf_table(texts: Sequence[str]) -> sparse.csr_matrix:
    """[N, words] TF-IDF of texts, rows of length 1; words that only one text has are left out. No column if all are."""
    words = TfidfVectorizer(sublinear_tf=True, min_df=min(2, len(texts)), stop_words="english", dtype=np.float32)
    try:
        return words.fit_transform(texts)
    except ValueError:  # no word that two texts share
        return sparse.csr_matrix((len(texts), 0), dtype=np.float32)


def similar_items(table: sparse.csr_matrix, histories: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
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


class SimilarSidDataset(SidSFTDataset):
    """History SIDs -> SID of an item whose text is like those of the history; two draws a row, anew in every epoch.

    What a content-based recommender knows, said in SIDs: also of items that nobody in the train split has taken. Drawn by
    `similar_items`; a row whose history shares no word with another item has no example.

    Args:
        catalogue, texts: the items, and what each is about, in the same order.
    """

    task = "similar_sid"

    def __init__(
        self,
        rows: Sequence[Row],
        encoder: Encoder,
        catalogue: Catalogue,
        texts: Sequence[str],
        cutoff_len: int = 512,
        cut_histories: bool = False,
        seed: int = 42,
    ):
        place = {item: number for number, item in enumerate(catalogue.item_ids)}
        found, probability = similar_items(
            tfidf_table(texts), [[place[item] for item in row.history_ids] for row in rows]
        )
        kept = np.flatnonzero(probability.any(axis=1))
        self._similar, self._up_to = found[kept], probability[kept].cumsum(axis=1)
        self._catalogue = catalogue
        self._targets = [encoder.prompts.target(self.task, sid) for sid in catalogue.sids]
        self._target_ids = encoder.target_ids(self._targets)
        super().__init__([rows[number] for number in kept], encoder, cutoff_len, cut_histories, seed)
        self.left_out["like no other item"] += len(rows) - len(kept)
        if not cut_histories:  # else done already
            self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose cuts and targets of this epoch; a function of the seed and the epoch alone."""
        super().set_epoch(epoch)
        shown = self.examples if self.cut_histories else self._whole
        generator = np.random.default_rng([self.seed, epoch])
        self.examples = []
        for _ in range(DRAWS):
            draws = generator.random((len(shown), 1)) * self._up_to[:, -1:]
            places = (draws >= self._up_to).sum(axis=1)
            items = self._similar[np.arange(len(shown)), places].tolist()
            self.examples += [
                replace(
                    example,
                    target=self._targets[item],
                    target_ids=self._target_ids[item],
                    sid=self._catalogue.sids[item],
                    item_id=self._catalogue.item_ids[item],
                )
                for example, item in zip(shown, items, strict=True)
            ]
