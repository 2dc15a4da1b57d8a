"""Baselines that count: popularity, item-to-item transitions, and the user's own last items again.

python baselines.py --train_file ... --test_data_path ... --info_file ... --output_dir output/baselines
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import cli
from fileio import InputError, write_json
from item_lists import check_items, item_predictions, score_item_lists, transition_counts, transition_scores
from metrics import popularity, table
from records import read_info, read_rows

NAMES = ("popularity", "transitions", "repeat_last")


def popularity_order(item_ids: Sequence[int], counts: dict[int, int]) -> list[int]:
    """Items by their count as a target in the train rows, ties by id."""
    return sorted(item_ids, key=lambda item: (-counts.get(item, 0), item))


def filled(ranked: Iterable[int], by_popularity: Sequence[int], k: int) -> list[int]:
    """The first k distinct items of `ranked`, filled up with the most popular ones that it lacks."""
    chosen = dict.fromkeys(ranked)
    for item in by_popularity:
        if len(chosen) >= k:
            break
        chosen[item] = None
    return list(chosen)[:k]


def rank_by_transitions(
    history: Sequence[int], follows: dict[int, Counter], by_popularity: Sequence[int], k: int
) -> list[int]:
    """The k best items by `transition_scores`.

    Popularity breaks ties, and so also orders the items that never followed.
    """
    scores = transition_scores(history, follows)
    followed = [item for item in by_popularity if item in scores]
    return filled(sorted(followed, key=lambda item: -scores[item]), by_popularity, k)


def rank_by_repeating(history: Sequence[int], by_popularity: Sequence[int], k: int) -> list[int]:
    """The distinct items of the history, newest first, then the most popular ones."""
    return filled(reversed(history), by_popularity, k)


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
    stage = cli.Stage("baselines", settings, inputs, outputs, Path(output_dir) / "baselines.stage.json", force)
    if stage.finished:
        return
    catalogue = read_info(info_file, shared_sids)
    train, test = read_rows(train_file, "train_file"), read_rows(test_data_path, "test_data_path")
    check_items(test, test_data_path, catalogue, info_file)
    counts = popularity(row.item_id for row in train)
    by_popularity = popularity_order(catalogue.item_ids, counts)
    follows = transition_counts(train)

    by_transitions = [rank_by_transitions(row.history_ids, follows, by_popularity, K) for row in test]
    scores = [transition_scores(row.history_ids, follows) for row in test]
    values = [[of_item.get(item, 0.0) for item in ranked] for of_item, ranked in zip(scores, by_transitions)]
    predictions = {
        "popularity": item_predictions(test, [by_popularity[:K]] * len(test), catalogue),
        "transitions": item_predictions(test, by_transitions, catalogue, values),
        "repeat_last": item_predictions(
            test, [rank_by_repeating(row.history_ids, by_popularity, K) for row in test], catalogue
        ),
    }
    results = {}
    for name, output in zip(NAMES, outputs):
        results[name] = score_item_lists(predictions[name], test, catalogue, counts, K)
        write_json(Path(output_dir) / f"{name}.json", predictions[name], indent=None)
        write_json(output, results[name])
    cli.say(table(results))
    stage.done(**{name: f"HR@10 {result['item'].get('HR@10')}" for name, result in results.items()})


if __name__ == "__main__":
    cli.run(baselines)
