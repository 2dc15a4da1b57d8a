"""Baselines that count: popularity, item-to-item transitions, and the user's own last items again.

python baselines.py --train_file ... --test_data_path ... --info_file ... --output_dir output/baselines
"""

from __future__ import annotations

from pathlib import Path

from minionerec.common.cli import run
from minionerec.common.files import InputError, write_json
from minionerec.common.processes import say
from minionerec.common.records import check_rows_against_catalogue, count_popularity, read_info, read_rows
from minionerec.common.stage import Stage
from minionerec.evaluation.metrics import format_metrics
from minionerec.evaluation.predictions import build_item_predictions, score_item_predictions
from minionerec.recommenders.transitions import (
    count_transitions,
    rank_by_repeating,
    rank_by_transitions,
    score_transitions,
    sort_by_popularity,
)

NAMES = ("popularity", "transitions", "repeat_last")


def baselines(
    train_file: str,
    test_data_path: str,
    info_file: str,
    output_dir: str,
    K: int = 50,
    shared_sids: bool = False,
    force: bool = False,
) -> None:
    """Rank the test split by popularity, transition counts and repetition; writes predictions and metrics of each.

    Args:
        K: length of the recommendation lists.
        shared_sids: accept an info file in which items share a SID.
    """
    if K < 1:
        raise InputError(f"--K {K}: expected 1 or more")
    settings = {key: value for key, value in locals().items() if key in baselines.__annotations__ and key != "force"}
    outputs = [Path(output_dir) / f"{name}.metrics.json" for name in NAMES]
    inputs = [train_file, test_data_path, info_file]
    stage = Stage("baselines", settings, inputs, outputs, Path(output_dir) / "baselines.stage.json", force)
    if stage.finished:
        return
    catalogue = read_info(info_file, shared_sids)
    train, test = read_rows(train_file, "train_file"), read_rows(test_data_path, "test_data_path")
    check_rows_against_catalogue(test, test_data_path, catalogue, info_file)
    counts = count_popularity(row.item_id for row in train)
    by_popularity = sort_by_popularity(catalogue.item_ids, counts)
    follows = count_transitions(train)

    by_transitions = [rank_by_transitions(row.history_ids, follows, by_popularity, K) for row in test]
    scores = [score_transitions(row.history_ids, follows) for row in test]
    values = [[of_item.get(item, 0.0) for item in ranked] for of_item, ranked in zip(scores, by_transitions)]
    predictions = {
        "popularity": build_item_predictions(test, [by_popularity[:K]] * len(test), catalogue),
        "transitions": build_item_predictions(test, by_transitions, catalogue, values),
        "repeat_last": build_item_predictions(
            test, [rank_by_repeating(row.history_ids, by_popularity, K) for row in test], catalogue
        ),
    }
    results = {}
    for name, output in zip(NAMES, outputs):
        results[name] = score_item_predictions(predictions[name], test, catalogue, counts, K)
        write_json(Path(output_dir) / f"{name}.json", predictions[name], indent=None)
        write_json(output, results[name])
    say(format_metrics(results))
    stage.done(**{name: f"HR@10 {result['item'].get('HR@10')}" for name, result in results.items()})


if __name__ == "__main__":
    run(baselines)
