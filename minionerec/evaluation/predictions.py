"""Rankings made over items rather than SIDs: transition counts, predictions files and metrics."""

from __future__ import annotations

from collections.abc import Sequence

from minionerec.common.files import InputError, read_json
from minionerec.common.records import Catalogue, Row
from minionerec.evaluation.metrics import (
    score_predictions,
)


def read_predictions(path: str, flag: str) -> list[dict]:
    """A predictions file of evaluate.py or baselines.py: a JSON list of rows, in the order of the test file.

    Raises:
        InputError: not such a list, or a row without one of the keys that are used here.
    """
    rows = read_json(path, flag)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"--{flag}: {path}: expected a JSON list of predictions, as evaluate.py writes it")
    for number, row in enumerate(rows, 1):
        missing = [
            key for key in ("user_id", "item_id", "output", "predict") if not isinstance(row, dict) or key not in row
        ]
        if missing:
            raise InputError(f"{path}, row {number}: expected a prediction with {', '.join(missing)}")
    return rows


def build_item_predictions(
    rows: Sequence[Row],
    ranked_items: Sequence[Sequence[int]],
    catalogue: Catalogue,
    scores: Sequence[Sequence[float]] | None = None,
) -> list[dict]:
    """Predictions in the file format of `evaluate.py`, with the ranked item ids beside their SIDs.

    Args:
        ranked_items: items of every row, best first. scores: theirs, where there are any.
    """
    sid_of = dict(zip(catalogue.item_ids, catalogue.sids))
    predictions = [
        {
            "user_id": row.user_id,
            "item_id": row.item_id,
            "input": " ".join(row.history_sids),
            "output": row.sid,
            "predict": [sid_of[item] for item in ranked],
            "predict_items": list(ranked),
        }
        for row, ranked in zip(rows, ranked_items, strict=True)
    ]
    if scores is not None:
        for prediction, values in zip(predictions, scores, strict=True):
            prediction["score"] = [round(value, 6) for value in values]
    return predictions


def score_item_predictions(
    predictions: list[dict], rows: Sequence[Row], catalogue: Catalogue, counts: dict[int, int], k: int
) -> dict:
    """Metrics of rankings made over items: the item level is read off the item ids, not through shared SIDs."""
    by_item = [
        {**row, "predict": [str(item) for item in row["predict_items"]], "output": str(row["item_id"])}
        for row in predictions
    ]
    names = [str(item) for item in catalogue.item_ids]
    histories = [[str(item) for item in row.history_ids] for row in rows]
    return score_predictions(by_item, names, catalogue.item_ids, counts, k, histories)
