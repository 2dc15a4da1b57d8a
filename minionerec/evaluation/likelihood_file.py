"""A predictions file as a baseline of --fuse, of which no more is held than where its rows stand."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from minionerec.common.files import InputError
from minionerec.common.json_lists import iterate_json_list
from minionerec.common.records import Catalogue, Row


class LikelihoodFile:
    """{item: p} of the rows of a predictions file with log-probabilities, read when they are asked for.

    By item ids where the file has them, else by SIDs.

    Args:
        path: of the file.
        rows: those of the split, which it must be of.
        catalogue: the items.

    Raises:
        InputError: not such a file, one of other rows, or one with an item outside the catalogue.
    """

    def __init__(self, path: str, rows: Sequence[Row], catalogue: Catalogue):
        self.path, self.catalogue = path, catalogue
        # First byte and bytes of every row, since a file of all rows as Python objects may not fit into memory.
        self._starts, self._sizes = array("q"), array("q")
        expected = f"a predictions file of these {len(rows)} rows"
        elements = iterate_json_list(path, "fuse", expected)
        for number, (row, element) in enumerate(zip_longest(rows, elements), 1):
            if row is None or element is None:
                raise InputError(f"--fuse: {path}: expected {expected}")
            prediction, start, size = element
            self._check(prediction, row, f"--fuse {path}, row {number}")
            self._starts.append(start)
            self._sizes.append(size)

    def _check(self, prediction: Any, row: Row, where: str) -> None:
        target = (row.user_id, row.item_id)
        if not isinstance(prediction, dict) or (prediction.get("user_id"), prediction.get("item_id")) != target:
            raise InputError(f"{where}: expected user {row.user_id} and item {row.item_id}, as in the test file")
        names = prediction.get("predict_items", prediction.get("predict"))
        scores = prediction.get("score")
        if not isinstance(names, list) or not isinstance(scores, list) or len(scores) != len(names):
            raise InputError(f"{where}: expected a score for every recommendation")
        if any(not isinstance(score, float | int) or not score <= 1e-6 for score in scores):
            raise InputError(f"{where}: the scores must be log-probabilities, which are never above 0")
        known = self.catalogue.sid_of if "predict_items" in prediction else self.catalogue.items_of_sid
        unknown = [name for name in names if name not in known]
        if unknown:
            raise InputError(f"{where}: {unknown[0]} is not in the info file")

    def read(self, numbers: Sequence[int]) -> list[dict[int, float]]:
        """{item: p} of rows by their numbers."""
        likelihoods = []
        with Path(self.path).open("rb") as file:
            for number in numbers:
                file.seek(self._starts[number])
                prediction = json.loads(file.read(self._sizes[number]))
                if "predict_items" in prediction:
                    groups = [[item] for item in prediction["predict_items"]]
                else:
                    groups = [self.catalogue.items_of_sid[sid] for sid in prediction["predict"]]
                pairs = zip(groups, prediction["score"], strict=True)
                likelihoods.append({item: math.exp(score) for group, score in pairs for item in group})
        return likelihoods
