"""Predictions files: where they are, what stands in them, and those of rankings over items rather than SIDs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minionerec.common.files import InputError, read_json
from minionerec.common.records import Catalogue, Row
from minionerec.evaluation.metrics import score_predictions

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


def read_predictions(path: str, flag: str) -> list[dict]:
    """A predictions file of evaluate.py or baselines.py: a JSON list of rows, in the order of the test file.

    Raises:
        InputError: not such a list, or a row without one of the keys that are used here.
    """
    rows = read_json(path, flag)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"--{flag}: {path}: expected a JSON list of predictions, as evaluate.py writes it")
    for number, row in enumerate(rows, 1):
        missing = [key for key in REQUIRED_KEYS if not isinstance(row, dict) or key not in row]
        if missing:
            raise InputError(f"{path}, row {number}: expected a prediction with {', '.join(missing)}")
    return rows


def build_sid_predictions(rows: Sequence[Row], prompts: Sequence[str], results: Sequence[dict]) -> list[dict]:
    """Predictions in the file format of `evaluate.py`.

    Args:
        rows: what was ranked for.
        prompts: what the model was shown.
        results: `predict` and `score` of every row.
    """
    return [
        {
            "user_id": row.user_id,
            "item_id": row.item_id,
            "input": prompt,
            "output": row.sid,
            "predict": result["predict"],
            "score": result["score"],
        }
        for row, prompt, result in zip(rows, prompts, results, strict=True)
    ]


def build_item_predictions(
    rows: Sequence[Row],
    rankings: Sequence[Sequence[int]],
    catalogue: Catalogue,
    scores: Sequence[Sequence[float]] | None = None,
) -> list[dict]:
    """Predictions in the file format of `evaluate.py`, with the ranked item ids beside their SIDs.

    Args:
        rows: what was ranked for.
        rankings: items of every row, best first.
        catalogue: the items.
        scores: those of the ranked items, where there are any.
    """
    predictions = [
        {
            "user_id": row.user_id,
            "item_id": row.item_id,
            "input": " ".join(row.history_sids),
            "output": row.sid,
            "predict": [catalogue.sid_of[item] for item in ranked],
            "predict_items": list(ranked),
        }
        for row, ranked in zip(rows, rankings, strict=True)
    ]
    if scores is not None:
        for prediction, values in zip(predictions, scores, strict=True):
            prediction["score"] = [round(value, 6) for value in values]
    return predictions


def score_item_predictions(predictions: list[dict], rows: Sequence[Row], catalogue: Catalogue, k: int) -> dict:
    """Metrics of rankings made over items: the item level is read off the item ids, not through shared SIDs.

    Args:
        predictions: of `build_item_predictions`.
        rows: what was ranked for.
        catalogue: the items, with their popularity in the train split.
        k: length of the lists.
    """
    # Every item under a name that is its alone.
    by_item = [
        {**row, "predict": [str(item) for item in row["predict_items"]], "output": str(row["item_id"])}
        for row in predictions
    ]
    histories = [[str(item) for item in row.history_ids] for row in rows]
    renamed = replace(catalogue, sids=[str(item) for item in catalogue.item_ids])
    return score_predictions(by_item, renamed, k, histories)
