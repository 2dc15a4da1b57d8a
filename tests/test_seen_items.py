"""Lists of baselines and networks without the items of the history, against whole rankings filtered in a loop."""

import pytest
from tiny import make_dataset

from baselines import baselines
from minionerec.common.files import InputError, read_json
from minionerec.common.records import read_info, read_rows
from minionerec.recommenders.registry import BaselineInputs, BuiltBaselines
from minionerec.recommenders.settings import BaselinesFlags, SASRecFlags
from minionerec.recommenders.sum_weights import choose_sum_weights
from sasrec import sasrec

NAMES = ["popularity", "transitions", "repeat_last", "cooccurrence", "content", "transitions+content"]
K = 5


def pick_flags(folder, shared, *more):
    paths = make_dataset(folder, shared=shared)
    return {**{key: paths[key] for key in ("train_file", "test_data_path", "info_file", *more)}, "shared_sids": shared}


def filter_list(items, scores, row, catalogue, repeat_newest):
    """What may stay of a whole ranking: a SID of the history hides all its items, unless a newest item has it."""
    history = list(row.history_sids)
    newest = history[len(history) - min(repeat_newest, len(history)) :]
    pairs = zip(items, scores or [None] * len(items), strict=True)
    return [(item, score) for item, score in pairs if catalogue.sid_of[item] not in set(history) - set(newest)][:K]


def check_files(whole, short, rows, catalogue, repeat_newest):
    for row, before, after in zip(rows, read_json(whole), read_json(short), strict=True):
        scores = before.get("score")
        expected = filter_list(before["predict_items"], scores, row, catalogue, repeat_newest)
        assert after["predict_items"] == [item for item, _ in expected] and len(expected) == K
        assert scores is None or after["score"] == [score for _, score in expected]


@pytest.mark.parametrize("repeat_newest", [0, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_baselines(tmp_path, shared, repeat_newest):
    flags = pick_flags(tmp_path, shared)
    catalogue, rows = read_info(flags["info_file"], shared), read_rows(flags["test_data_path"])
    whole, short = tmp_path / "whole", tmp_path / "short"
    baselines(BaselinesFlags(**flags, names=NAMES, K=len(catalogue.item_ids), output_dir=str(whole)))
    seen = {"exclude_seen": True, "repeat_newest": repeat_newest}
    baselines(BaselinesFlags(**flags, names=NAMES, K=K, output_dir=str(short), **seen))
    for name in NAMES:
        check_files(whole / f"{name}.json", short / f"{name}.json", rows, catalogue, repeat_newest)
        metrics = read_json(short / f"{name}.metrics.json")
        assert metrics["short_lists"] == metrics["illegal"] == metrics["duplicates"] == 0
        hits = [
            row.item_id in found["predict_items"]
            for row, found in zip(rows, read_json(short / f"{name}.json"), strict=True)
        ]
        assert metrics["item"][f"HR@{K}"] == pytest.approx(sum(hits) / len(rows), abs=1e-6)


def test_networks(tmp_path):
    flags = pick_flags(tmp_path, True, "eval_file")
    flags["valid_file"] = flags.pop("eval_file")
    catalogue, rows = read_info(flags["info_file"], True), read_rows(flags["test_data_path"])
    short = {"num_epochs": 1, "hidden_size": 8, "seed": 1}
    sasrec(SASRecFlags(**flags, **short, K=len(catalogue.item_ids), output_dir=str(tmp_path / "whole")))
    sasrec(SASRecFlags(**flags, **short, K=K, exclude_seen=True, repeat_newest=1, output_dir=str(tmp_path / "short")))
    check_files(tmp_path / "whole/test.json", tmp_path / "short/test.json", rows, catalogue, 1)


def test_weights_of_sums_look_at_the_lists_that_are_shown(tmp_path):
    """Leaving items out while the weights are chosen is the same as a target that competes with the others alone."""
    flags = pick_flags(tmp_path, False)
    train, rows = read_rows(flags["train_file"]), read_rows(flags["test_data_path"])
    catalogue = read_info(flags["info_file"], False).with_counts(train)
    built = BuiltBaselines(BaselineInputs(train, catalogue))
    excluded = [set(row.history_ids) for row in rows]
    _, tried = choose_sum_weights("transitions+content", built, rows, excluded)
    output = tmp_path / "out"
    for text, figure in tried.items():
        predict = built.combine("transitions+content", [float(weight) for weight in text.split(":")])
        hits = 0
        for row, unwanted in zip(rows, excluded, strict=True):
            likelihoods = predict([row.history_ids])[0]
            left = [item for item, p in likelihoods.items() if p and item not in unwanted]
            left.sort(key=lambda item: (-likelihoods[item], -catalogue.counts.get(item, 0), item))
            hits += row.item_id in left[:10]
        assert hits / len(rows) <= figure <= 2 * hits / len(rows) + 1e-6
    with pytest.raises(InputError, match="--repeat_newest 1: expected 0 or more, with --exclude_seen True"):
        baselines(BaselinesFlags(**flags, repeat_newest=1, output_dir=str(output)))
