"""Long timelines cut at random positions: which part of each history an epoch's prompts show."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from minionerec.common.records import Row
from minionerec.common.row_table import count_history_items, number_users


class TimelineCuts:
    """The cuts of an epoch, for users with more rows than the longest history has items; the others are not touched.

    A timeline is cut into pieces of the longest history, from a random position on.

    Args:
        rows: of a split, those of a user in the order of time.
        shown_items: [rows], how many items of its history each prompt may show.
        seed: of the positions.

    Attributes:
        pieces: [rows] int32, the number of the piece that a row stands in; -1 where its user's timeline is not cut.
        shown: [rows] int32, items of its history that its prompt shows in this epoch.
    """

    def __init__(self, rows: Sequence[Row], shown_items: np.ndarray, seed: int):
        self.seed, self._shown_items = seed, shown_items
        self._longest = int(count_history_items(rows).max(initial=1))
        users = number_users(rows)[1]
        is_long = (np.bincount(users) > self._longest)[users]
        self._long_rows = np.flatnonzero(is_long)
        _, first, self._timeline = np.unique(users[is_long], return_index=True, return_inverse=True)
        self._drawing_order = np.argsort(first)  # of the timelines: that in which they begin
        order = np.argsort(self._timeline, kind="stable")
        begins = np.cumsum([0, *np.bincount(self._timeline, minlength=len(first))])
        self._position = np.empty(len(order), np.int64)
        self._position[order] = np.arange(len(order)) - begins[self._timeline[order]]
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the cuts of this epoch; a function of the seed and the epoch alone."""
        generator = random.Random(f"{self.seed}-{epoch}")
        phase = np.zeros(len(self._drawing_order), np.int64)
        phase[self._drawing_order] = [generator.randrange(self._longest) for _ in self._drawing_order]
        piece, position_in_piece = np.divmod(self._position + phase[self._timeline], self._longest)
        self.pieces = np.full(len(self._shown_items), -1, np.int32)
        self.pieces[self._long_rows] = piece
        self.shown = self._shown_items.copy()
        self.shown[self._long_rows] = np.minimum(position_in_piece + 1, self._shown_items[self._long_rows])
