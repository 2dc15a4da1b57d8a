"""Predictions files: where they are, what stands in them, and those of rankings over items rather than SIDs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from minionerec.common.files import InputError
from minionerec.common.json_lists import iterate_json_list, write_json_list
from minionerec.common.records import Catalogue, Row
from minionerec.evaluation.metrics import PredictionScorer

REQUIRED_KEYS = ("user_id", "item_id", "output", "predict")


@dataclass(frozen=True)
class EvaluationFiles:
    """The files of an evaluation: the predictions, NAME.json, and what is written beside them.

    Attributes:
        predictions: NAME.json.
    """

    predictions: Path

    def _beside(self, end: str) -> Path:
        return self.predictions.with_name(self.predictions.stem + end)

    @property
    def metrics(self) -> Path:
        """NAME.metrics.json."""
        return self._beside(".metrics.json")

    @property
    def picture(self) -> Path:
        """NAME.png, the page of plots."""
        return self._beside(".png")

    @property
    def record(self) -> Path:
        """NAME.stage.json."""
        return self._beside(".stage.json")

    @property
    def fused(self) -> Path:
        """NAME.fused.json, the lists of --fuse."""
        return self._beside(".fused.json")

    @property
    def fused_metrics(self) -> Path:
        """NAME.fused.metrics.json."""
        return self._beside(".fused.metrics.json")

    @property
    def partial(self) -> Path:
        """NAME.partial/, the finished batches of a run under way."""
        return self._beside(".partial")

    @property
    def valid_partial(self) -> Path:
        """NAME.valid.partial/, those of the validation rows."""
        return self._beside(".valid.partial")


def read_predictions(path: str, flag: str) -> Iterator[dict]:
    """The rows of a predictions file of evaluate.py or baselines.py, in the order of the test file, one at a time.

    Raises:
        InputError: not a list of predictions, or a row without one of the keys that are used here.
    """
    expected = "a JSON list of predictions, as evaluate.py writes it"
    number = 0
    for number, (row, _, _) in enumerate(iterate_json_list(path, flag, expected), 1):
        missing = [key for key in REQUIRED_KEYS if not isinstance(row, dict) or key not in row]
        if missing:
            raise InputError(f"{path}, row {number}: expected a prediction with {', '.join(missing)}")
        yield row
    if not number:
        raise InputError(f"--{flag}: {path}: expected {expected}")


def write_sid_predictions(
    path: Path, rows: Iterable[Row], prompts: Iterable[str], results: Iterable[dict], catalogue: Catalogue, k: int
) -> dict:
    """Write predictions as they come, in the file format of `evaluate.py`.

    Args:
        path: of the file.
        rows: what was ranked for.
        prompts: what the model was shown.
        results: `predict` and `score` of every row.
        catalogue: the items, with their popularity in the train split.
        k: length of the lists.

    Returns:
        Their metrics, see `PredictionScorer`.
    """
    scorer = PredictionScorer(catalogue, k)

    def build() -> Iterator[dict]:
        for row, prompt, result in zip(rows, prompts, results, strict=True):
            prediction = {
                "user_id": row.user_id,
                "item_id": row.item_id,
                "input": prompt,
                "output": row.sid,
                "predict": result["predict"],
                "score": result["score"],
            }
            scorer.add(prediction, row.history_sids)
            yield prediction

    write_json_list(path, build())
    return scorer.summarise()


class RankedItems(NamedTuple):
    """A list of item ids, best first, with the scores of all and the reasons of the first where there are any."""

    items: Sequence[int]
    scores: Sequence[float] | None = None
    reasons: Sequence[str] | None = None


def write_item_predictions(
    path: Path,
    rows: Iterable[Row],
    rankings: Iterable[RankedItems],
    catalogue: Catalogue,
    k: int,
) -> dict:
    """Write predictions as they come, in the file format of `evaluate.py` with the item ids beside their SIDs.

    Args:
        path: of the file.
        rows: what was ranked for.
        rankings: of every row.
        catalogue: the items, with their popularity in the train split.
        k: length of the lists.

    Returns:
        Their metrics, see `PredictionScorer`; the item level is read off the item ids, not through shared SIDs.
    """
    # Every item under a name that is its alone.
    scorer = PredictionScorer(replace(catalogue, sids=[str(item) for item in catalogue.item_ids]), k)

    def build() -> Iterator[dict]:
        for row, (ranked, scores, reasons) in zip(rows, rankings, strict=True):
            prediction = {
                "user_id": row.user_id,
                "item_id": row.item_id,
                "input": " ".join(row.history_sids),
                "output": row.sid,
                "predict": [catalogue.sid_of[item] for item in ranked],
                "predict_items": list(ranked),
            }
            if scores is not None:
                prediction["score"] = [round(value, 6) for value in scores]
            if reasons is not None:
                prediction["reasons"] = reasons
            renamed = {"item_id": row.item_id, "output": str(row.item_id), "predict": [str(item) for item in ranked]}
            scorer.add(renamed, [str(item) for item in row.history_ids])
            yield prediction

    write_json_list(path, build())
    return scorer.summarise()
