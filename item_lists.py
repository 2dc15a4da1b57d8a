"""Rankings made over items rather than SIDs: transition counts, predictions files and metrics."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from fileio import InputError
from metrics import score_predictions
from records import Catalogue, Row


def transition_counts(rows: Sequence[Row]) -> dict[int, Counter]:
    """{item: how often each item was the target right after it in the train rows}."""
    follows: dict[int, Counter] = defaultdict(Counter)
    for row in rows:
        follows[row.history_ids[-1]][row.item_id] += 1
    return follows


def transition_scores(history: Sequence[int], follows: dict[int, Counter]) -> dict[int, float]:
    """{candidate: sum over the history, newest first (j = 0, 1, ...), of 0.5**j * count(item -> candidate)}."""
    scores: dict[int, float] = defaultdict(float)
    for age, item in enumerate(reversed(history)):
        for candidate, count in follows.get(item, {}).items():
            scores[candidate] += 0.5**age * count
    return scores


def check_items(rows: Sequence[Row], path: str, catalogue: Catalogue, info_file: str) -> None:
    """Every item of the rows, history and target, must be in the catalogue.

    Raises:
        InputError: at the first row with another item.
    """
    known = set(catalogue.item_ids)
    for number, row in enumerate(rows, 1):
        for item in (row.item_id, *row.history_ids):
            if item not in known:
                raise InputError(f"{path}, row {number}: item {item} is not in {info_file}")


def item_predictions(
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


def score_item_lists(
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
