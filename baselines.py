"""The two floors every model has to clear: popularity and item-to-item transition counts.

python baselines.py --train_file ... --test_data_path ... --info_file ... --output_dir output/baselines
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Sequence

import cli
from fileio import InputError, write_json
from metrics import popularity, score_predictions, table
from records import Catalogue, Row, read_info, read_rows


def popularity_order(item_ids: Sequence[int], counts: dict[int, int]) -> list[int]:
    """Items by their count as a target in the train rows, ties by id."""
    return sorted(item_ids, key=lambda item: (-counts.get(item, 0), item))


def transition_counts(rows: Sequence[Row]) -> dict[int, Counter]:
    """{item: how often each item was the target right after it in the train rows}."""
    follows: dict[int, Counter] = defaultdict(Counter)
    for row in rows:
        follows[row.history_ids[-1]][row.item_id] += 1
    return follows


def rank_by_transitions(
    history: Sequence[int], follows: dict[int, Counter], by_popularity: list[int], k: int
) -> list[int]:
    """The k best items by the sum over the history, newest first (j = 0, 1, ...), of 0.5**j * count(item -> candidate).

    Popularity breaks ties, and so also orders the items that never followed.
    """
    scores: dict[int, float] = defaultdict(float)
    for age, item in enumerate(reversed(history)):
        for candidate, count in follows.get(item, {}).items():
            scores[candidate] += 0.5**age * count
    place = {item: position for position, item in enumerate(by_popularity)}
    ranked = sorted((item for item in scores if item in place), key=lambda item: (-scores[item], place[item]))[:k]
    chosen = set(ranked)
    for item in by_popularity:
        if len(ranked) >= k:
            break
        if item not in chosen:
            ranked.append(item)
    return ranked


def item_predictions(rows: Sequence[Row], ranked_items: Sequence[Sequence[int]], sid_of: dict[int, str]) -> list[dict]:
    """Predictions in the file format of `evaluate.py`, with the ranked item ids beside their SIDs."""
    return [
        {
            "user_id": row.user_id,
            "item_id": row.item_id,
            "input": " ".join(row.history_sids),
            "output": row.sid,
            "predict": [sid_of[item] for item in ranked],
            "predict_items": list(ranked),
        }
        for row, ranked in zip(rows, ranked_items)
    ]


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


def baselines(
    train_file: str,
    test_data_path: str,
    info_file: str,
    output_dir: str,
    K: int = 50,
    shared_sids: bool = False,
    force: bool = False,
) -> None:
    """Popularity and transition counts on a test split; writes predictions and metrics of both.

    Args:
        K: length of the recommendation lists.
        shared_sids: accept an info file in which items share a SID.
    """
    settings = {"train_file": train_file, "test_data_path": test_data_path, "info_file": info_file, "K": K}
    names = ("popularity", "transitions")
    outputs = [Path(output_dir) / f"{name}.metrics.json" for name in names]
    stage = cli.Stage(
        "baselines",
        settings,
        [train_file, test_data_path, info_file],
        outputs,
        Path(output_dir) / "baselines.stage.json",
        force,
    )
    if stage.finished:
        return
    catalogue = read_info(info_file, shared_sids)
    train, test = read_rows(train_file, "train_file"), read_rows(test_data_path, "test_data_path")
    sid_of = dict(zip(catalogue.item_ids, catalogue.sids))
    for number, row in enumerate(test, 1):
        if row.item_id not in sid_of:
            raise InputError(f"{test_data_path}, row {number}: item {row.item_id} is not in {info_file}")
    counts = popularity(row.item_id for row in train)
    by_popularity = popularity_order(catalogue.item_ids, counts)
    follows = transition_counts(train)
    rankings = {
        "popularity": [by_popularity[:K]] * len(test),
        "transitions": [rank_by_transitions(row.history_ids, follows, by_popularity, K) for row in test],
    }
    results = {}
    for name, output in zip(names, outputs):
        predictions = item_predictions(test, rankings[name], sid_of)
        results[name] = score_item_lists(predictions, test, catalogue, counts, K)
        write_json(Path(output_dir) / f"{name}.json", predictions, indent=None)
        write_json(output, results[name])
    cli.say(table(results))
    stage.done(**{name: f"HR@10 {result['item'].get('HR@10')}" for name, result in results.items()})


if __name__ == "__main__":
    cli.run(baselines)
