"""The counting baselines against naive twins that score every item of the catalogue in loops."""

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
from tiny import make_dataset

from baselines import baselines
from minionerec.common.files import InputError
from minionerec.common.records import Row, count_popularity, read_info, read_rows
from minionerec.recommenders.transitions import (
    count_transitions,
    rank_by_repeating,
    rank_by_transitions,
    score_transitions,
    sort_by_popularity,
)


def row(history, target):
    return Row("u", ("t",) * len(history), tuple(history), ("<a>",) * len(history), "t", target, "<a>")


def naive_popularity(train, items, k):
    counts = {item: sum(r.item_id == item for r in train) for item in items}
    return sorted(items, key=lambda item: (-counts[item], item))[:k]


def naive_scores(train, history, items):
    """A dense score per item: for every history item, newest first, 0.5**j * count(item followed by the candidate)."""
    scores = {}
    for candidate in items:
        scores[candidate] = 0.0
        for j in range(len(history)):
            item = history[len(history) - 1 - j]
            followed = sum(r.history_ids[-1] == item and r.item_id == candidate for r in train)
            scores[candidate] += 0.5**j * followed
    return scores


def naive_transitions(train, history, items, k):
    popular = {item: sum(r.item_id == item for r in train) for item in items}
    scores = naive_scores(train, history, items)
    return sorted(items, key=lambda item: (-scores[item], -popular[item], item))[:k]


def naive_repeating(train, history, items, k):
    """Newest first by the last place where an item stands in the history; the others after it, by popularity."""
    last = {item: place for place, item in enumerate(history)}
    by_popularity = naive_popularity(train, items, len(items))
    return sorted(items, key=lambda item: (-last.get(item, -1), by_popularity.index(item)))[:k]


@pytest.mark.parametrize("seed", range(8))
def test_rankings_equal_the_naive_twins(seed):
    """Few items and many rows, so that equal scores and equal popularity are common."""
    rng = random.Random(seed)
    items = rng.sample(range(40), rng.choice([3, 12, 25]))
    train = [row(rng.choices(items, k=rng.randint(1, 6)), rng.choice(items)) for _ in range(rng.choice([5, 60]))]
    counts = count_popularity(r.item_id for r in train)
    order = sort_by_popularity(items, counts)
    assert order == naive_popularity(train, items, len(items))
    follows = count_transitions(train)
    for k in (1, 5, 100):
        for history in [rng.choices(items, k=rng.randint(1, 10)) for _ in range(10)] + [[99]]:
            assert rank_by_transitions(history, follows, order, k) == naive_transitions(train, history, items, k)
            if history != [99]:
                assert rank_by_repeating(history, order, k) == naive_repeating(train, history, items, k)


def test_by_hand():
    train = [row([1], 2), row([1, 2], 3), row([5, 1], 3), row([1, 3], 2), row([4], 2)]
    follows = count_transitions(train)
    assert follows == {1: Counter({2: 1, 3: 1}), 2: Counter({3: 1}), 3: Counter({2: 1}), 4: Counter({2: 1})}
    order = sort_by_popularity([5, 4, 3, 2, 1], count_popularity(r.item_id for r in train))
    assert order == [2, 3, 1, 4, 5]  # 3, 2, 0, 0, 0 times a target
    # history 1, 2: 2 newest gives 3 one point; 1 one step older gives half a point to 2 and to 3.
    assert rank_by_transitions([1, 2], follows, order, 5) == [3, 2, 1, 4, 5]
    assert rank_by_transitions([1], follows, order, 2) == [2, 3]  # a tie, broken by popularity
    assert score_transitions([1, 2], follows) == {3: 1.5, 2: 0.5}
    assert rank_by_repeating([4, 1, 5, 1], order, 4) == [1, 5, 4, 2]
    assert rank_by_repeating([4, 1, 5, 1], order, 2) == [1, 5]


def test_an_item_outside_the_catalogue_is_never_recommended():
    train = [row([1], 9), row([1], 2)]
    assert rank_by_transitions([1], count_transitions(train), [2, 1], 5) == [2, 1]


@pytest.mark.parametrize("shared", [False, True])
def test_the_command_on_a_dataset(tmp_path, shared):
    paths = make_dataset(tmp_path, shared=shared)
    flags = {key: paths[key] for key in ("train_file", "test_data_path", "info_file")}
    if shared:
        with pytest.raises(InputError, match=r"info.txt, line 3: SID .* of line 2 already"):
            baselines(**flags, output_dir=str(tmp_path / "none"))
    output = tmp_path / "out"
    baselines(**flags, output_dir=str(output), K=20, shared_sids=shared)
    train, test = read_rows(paths["train_file"]), read_rows(paths["test_data_path"])
    catalogue = read_info(paths["info_file"], shared)
    sid_of = dict(zip(catalogue.item_ids, catalogue.sids))
    for name in ("popularity", "transitions", "repeat_last"):
        predictions = json.loads((output / f"{name}.json").read_text())
        rankers = {
            "popularity": lambda r: naive_popularity(train, catalogue.item_ids, 20),
            "transitions": lambda r: naive_transitions(train, r.history_ids, catalogue.item_ids, 20),
            "repeat_last": lambda r: naive_repeating(train, r.history_ids, catalogue.item_ids, 20),
        }
        expected = [rankers[name](r) for r in test]
        assert [p["predict_items"] for p in predictions] == expected
        assert [p["predict"] for p in predictions] == [[sid_of[item] for item in ranked] for ranked in expected]
        rows = [(r.user_id, r.item_id, r.sid) for r in test]
        assert [(p["user_id"], p["item_id"], p["output"]) for p in predictions] == rows
        # A ranking over items names one item in every place: a shared SID hides nothing and gives no hit away.
        ranks = [ranked.index(r.item_id) + 1 if r.item_id in ranked else None for ranked, r in zip(expected, test)]
        metrics = json.loads((output / f"{name}.metrics.json").read_text())
        for k in (1, 3, 5, 10, 20):
            found = [rank for rank in ranks if rank and rank <= k]
            assert metrics["item"][f"HR@{k}"] == pytest.approx(len(found) / len(test), abs=1e-6)
            gain = sum(1 / math.log2(rank + 1) for rank in found)
            assert metrics["item"][f"NDCG@{k}"] == pytest.approx(gain / len(test), abs=1e-6)
        assert metrics["illegal"] == metrics["duplicates"] == metrics["short_lists"] == 0
        assert metrics["rows"] == len(test)
    for prediction, r in zip(json.loads((output / "transitions.json").read_text()), test):
        scores = naive_scores(train, r.history_ids, catalogue.item_ids)
        assert prediction["score"] == pytest.approx([scores[item] for item in prediction["predict_items"]], abs=1e-6)
    written = (output / "transitions.json").stat().st_mtime_ns
    baselines(**flags, output_dir=str(output), K=20, shared_sids=shared)
    assert (output / "transitions.json").stat().st_mtime_ns == written


def test_a_test_item_without_a_line_in_the_info_file_is_named(tmp_path):
    paths = make_dataset(tmp_path)
    target = read_rows(paths["test_data_path"])[0].item_id
    info = Path(paths["info_file"])
    lines = info.read_text().splitlines()
    info.write_text("".join(f"{line}\n" for line in lines if not line.endswith(f"\t{target}")))
    with pytest.raises(InputError, match=f"test.csv, row 1: item {target} is not in .*info.txt"):
        baselines(paths["train_file"], paths["test_data_path"], paths["info_file"], str(tmp_path / "out"))


def test_a_list_of_no_items_is_refused(tmp_path):
    with pytest.raises(InputError, match="--K 0: expected 1 or more"):
        baselines("train.csv", "test.csv", "info.txt", str(tmp_path), K=0)
