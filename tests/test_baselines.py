"""The counting baselines against naive twins that score every item of the catalogue in loops."""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
from tiny import make_dataset

from baselines import baselines
from minionerec.common.files import InputError
from minionerec.common.records import Catalogue, Row, read_info, read_rows
from minionerec.recommenders.networks import load_network
from minionerec.recommenders.registry import (
    BASELINES,
    BaselineInputs,
    build_baseline,
    build_content,
    register_baseline,
)
from minionerec.recommenders.settings import BaselinesFlags, SASRecFlags
from minionerec.recommenders.sum_weights import choose_descriptions
from minionerec.recommenders.transitions import (
    count_transitions,
    rank_by_repeating,
    rank_by_transitions,
    score_transitions,
    sort_by_popularity,
)


def row(history, target):
    return Row("u", ("t",) * len(history), tuple(history), ("<a>",) * len(history), "t", target, "<a>")


def catalogue_of(items, train):
    return Catalogue([f"<{item}>" for item in items], [""] * len(items), items).with_counts(train)


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
    order = sort_by_popularity(catalogue_of(items, train))
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
    order = sort_by_popularity(catalogue_of([5, 4, 3, 2, 1], train))
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


NO_FILES = {"train_file": "train.csv", "test_data_path": "test.csv", "info_file": "info.txt"}


def pick_flags(paths):
    return {key: paths[key] for key in NO_FILES}


@pytest.mark.parametrize("shared", [False, True])
def test_the_command_on_a_dataset(tmp_path, shared):
    paths = make_dataset(tmp_path, shared=shared)
    flags = pick_flags(paths)
    if shared:
        with pytest.raises(InputError, match=r"info.txt, line 3: SID .* of line 2 already"):
            baselines(BaselinesFlags(**flags, output_dir=str(tmp_path / "none")))
    output = tmp_path / "out"
    baselines(BaselinesFlags(**flags, output_dir=str(output), K=20, shared_sids=shared))
    train, test = read_rows(paths["train_file"]), read_rows(paths["test_data_path"])
    catalogue = read_info(paths["info_file"], shared)
    for name in ("popularity", "transitions", "repeat_last"):
        predictions = json.loads((output / f"{name}.json").read_text())
        rankers = {
            "popularity": lambda r: naive_popularity(train, catalogue.item_ids, 20),
            "transitions": lambda r: naive_transitions(train, r.history_ids, catalogue.item_ids, 20),
            "repeat_last": lambda r: naive_repeating(train, r.history_ids, catalogue.item_ids, 20),
        }
        expected = [rankers[name](r) for r in test]
        assert [p["predict_items"] for p in predictions] == expected
        assert [p["predict"] for p in predictions] == [
            [catalogue.sid_of[item] for item in ranked] for ranked in expected
        ]
        rows = [(r.user_id, r.item_id, r.sid) for r in test]
        assert [(p["user_id"], p["item_id"], p["output"]) for p in predictions] == rows
        # A ranking over items names one item in every place: a shared SID hides nothing and gives no hit away.
        ranks = [
            ranked.index(r.item_id) + 1 if r.item_id in ranked else None
            for ranked, r in zip(expected, test, strict=True)
        ]
        metrics = json.loads((output / f"{name}.metrics.json").read_text())
        for k in (1, 3, 5, 10, 20):
            found = [rank for rank in ranks if rank and rank <= k]
            assert metrics["item"][f"HR@{k}"] == pytest.approx(len(found) / len(test), abs=1e-6)
            gain = sum(1 / math.log2(rank + 1) for rank in found)
            assert metrics["item"][f"NDCG@{k}"] == pytest.approx(gain / len(test), abs=1e-6)
        assert metrics["illegal"] == metrics["duplicates"] == metrics["short_lists"] == 0
        assert metrics["rows"] == len(test)
    for prediction, r in zip(json.loads((output / "transitions.json").read_text()), test, strict=True):
        scores = naive_scores(train, r.history_ids, catalogue.item_ids)
        assert prediction["score"] == pytest.approx([scores[item] for item in prediction["predict_items"]], abs=1e-6)
    assert {path.name.split(".")[0] for path in output.iterdir()} == {
        *rankers,
        "content",
        "transitions+content",
        "baselines",
    }
    written = (output / "transitions.json").stat().st_mtime_ns
    baselines(BaselinesFlags(**flags, output_dir=str(output), K=20, shared_sids=shared))
    assert (output / "transitions.json").stat().st_mtime_ns == written


def test_a_test_item_without_a_line_in_the_info_file_is_named(tmp_path):
    paths = make_dataset(tmp_path)
    target = read_rows(paths["test_data_path"])[0].item_id
    info = Path(paths["info_file"])
    lines = info.read_text().splitlines()
    info.write_text("".join(f"{line}\n" for line in lines if not line.endswith(f"\t{target}")))
    with pytest.raises(InputError, match=f"test.csv, row 1: item {target} is not in .*info.txt"):
        baselines(BaselinesFlags(**pick_flags(paths), output_dir=str(tmp_path / "out")))


def test_a_list_of_no_items_is_refused(tmp_path):
    with pytest.raises(InputError, match="--K 0: expected 1 or more"):
        baselines(BaselinesFlags(**NO_FILES, output_dir=str(tmp_path), K=0))


def test_a_registered_baseline_is_ranked_and_measured(tmp_path):
    """Ties fall by popularity, then id, and short lists are filled up with the most popular items."""
    paths = make_dataset(tmp_path, items=12)
    output = tmp_path / "out"
    baselines(BaselinesFlags(**pick_flags(paths), output_dir=str(output), names=["content", "popularity"], K=12))
    train, test = read_rows(paths["train_file"]), read_rows(paths["test_data_path"])
    catalogue = read_info(paths["info_file"])
    by_popularity = naive_popularity(train, catalogue.item_ids, 12)
    predict = build_content(catalogue)
    predictions = json.loads((output / "content.json").read_text())
    for prediction, r in zip(predictions, test, strict=True):
        (likelihoods,) = predict([r.history_ids])
        expected = sorted(catalogue.item_ids, key=lambda i: (-likelihoods.get(i, 0), by_popularity.index(i)))
        assert prediction["predict_items"] == expected
        assert prediction["score"] == [round(likelihoods.get(item, 0.0), 6) for item in expected]
    metrics = json.loads((output / "content.metrics.json").read_text())
    assert metrics["rows"] == len(test) and metrics["short_lists"] == metrics["duplicates"] == 0
    assert not (output / "transitions.json").exists()


def test_descriptions_are_used_where_validation_rows_are_better_for_them():
    """Titles say nothing, descriptions everything; and the other way round. Of equals titles alone are taken."""
    rng = random.Random(0)
    kinds = [item % 6 for item in range(60)]
    pairs = [rng.sample([i for i in range(60) if kinds[i] == kind], 2) for kind in kinds for _ in range(2)]
    rows = [row([first], second) for first, second in pairs]
    words, noise = [f"kind{kind} thing" for kind in kinds], [f"only{item} thing" for item in range(60)]
    for titles, texts, chosen in ((noise, words, True), (words, noise, False), (words, words, False)):
        catalogue = Catalogue([f"<{item}>" for item in range(60)], titles, list(range(60)))
        inputs = BaselineInputs([], catalogue, descriptions=dict(enumerate(texts)))
        found, tried = choose_descriptions(inputs, rows)
        assert bool(found.descriptions) is chosen and list(tried) == ["titles", "titles and descriptions"]
        for texts_used, figure in zip(({}, inputs.descriptions), tried.values(), strict=True):
            predict = build_content(catalogue, texts_used)
            gain = 0.0
            for r in rows:
                likelihoods = predict([r.history_ids])[0]
                ranked = sorted(likelihoods, key=lambda item: (-likelihoods[item], item))[:10]
                gain += 1 + 1 / math.log2(ranked.index(r.item_id) + 2) if r.item_id in ranked else 0
            assert figure == pytest.approx(gain / len(rows), abs=1e-6)


def test_networks_are_trained_once_and_stand_in_sums_too(tmp_path, monkeypatch):
    """With the seed; each baseline is built once, whatever sums it stands in; the model folders can be fused."""
    paths = make_dataset(tmp_path, users=40)
    monkeypatch.setattr(SASRecFlags, "__init__", partialmethod(SASRecFlags.__init__, num_epochs=2, hidden_size=8))
    built = Counter()
    for name, baseline in BASELINES.items():
        build = baseline.build

        def count(inputs, name=name, build=build):
            built[name] += 1
            return build(inputs)

        monkeypatch.setitem(BASELINES, name, replace(baseline, build=count))
    names = ["sasrec", "gru4rec", "content", "transitions+content", "transitions+sasrec+gru4rec"]
    output = tmp_path / "out"
    flags = {**pick_flags(paths), "names": names, "K": 10, "valid_file": paths["eval_file"]}
    baselines(BaselinesFlags(**flags, output_dir=str(output)))
    assert built == {"sasrec": 1, "gru4rec": 1, "content": 1, "transitions": 1}
    test, catalogue = read_rows(paths["test_data_path"]), read_info(paths["info_file"])
    for name in ("sasrec", "gru4rec"):
        network = load_network(output / name / "model")
        assert network.settings["model"] == name
        best = network.score_histories([row.history_ids for row in test]).topk(10).indices.tolist()
        expected = [[network.item_ids[column] for column in columns] for columns in best]
        assert [row["predict_items"] for row in json.loads((output / f"{name}.json").read_text())] == expected
    with pytest.raises(InputError, match="holds sasrec, not gru4rec"):
        inputs = BaselineInputs([], catalogue, files={"cf_path": str(output / "sasrec" / "model")})
        build_baseline("gru4rec", inputs)
    metrics = json.loads((output / "transitions+sasrec+gru4rec.metrics.json").read_text())
    assert set(metrics["weights"]) == {"transitions", "sasrec", "gru4rec"} and metrics["rows"] == len(test)


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"names": ["luck"]},
            "--names luck: expected some of popularity, transitions, repeat_last, cooccurrence",
        ),
        ({"names": ["content", "content"]}, "--names: content is given twice"),
        ({"names": []}, "--names: expected some of popularity"),
        ({"names": ["sasrec"]}, "--names sasrec: needs --valid_file to be trained, or --cf_path"),
        ({"names": ["sasrec", "gru4rec"], "cf_path": "x"}, "--cf_path: holds one network, and --names has sasrec and"),
        ({"valid_file": "test.csv"}, "--valid_file test.csv: is --test_data_path; choose"),
        ({"cf_path": "x"}, "--cf_path: has an effect with --names sasrec or gru4rec only"),
        ({"plugin": ["nowhere.py"]}, "--plugin nowhere.py: expected a Python file that exists"),
    ],
)
def test_names_that_cannot_be(tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        baselines(BaselinesFlags(**NO_FILES, output_dir=str(tmp_path / "out"), **changes))


# -------------------------------------------------------------------------------------------------------- the registry
INPUTS = BaselineInputs([row([1], 2), row([1], 9)], Catalogue(["<a>", "<b>"], ["", ""], [1, 2]))


@pytest.fixture
def registered():
    """A function that registers a baseline for one test."""
    before = dict(BASELINES)
    yield lambda predict: register_baseline("test", lambda inputs: predict)
    BASELINES.clear()
    BASELINES.update(before)


def test_train_targets_outside_the_catalogue_are_no_candidates():
    assert build_baseline("transitions", INPUTS)([[1], [2]]) == [{2: 1.0}, {}]


@pytest.mark.parametrize(
    "predictions, said",
    [
        ([], "baseline test: 0 predictions for 1 histories"),
        ([{7: 1.0}], "baseline test: 7 is not in the info file"),
        ([{1: -0.5}], "baseline test: the likelihoods must be finite numbers of 0 or more"),
        ([{1: math.nan}], "baseline test: the likelihoods must be"),
        ([{1: math.inf}], "baseline test: the likelihoods must be"),
    ],
)
def test_likelihoods_that_are_none(registered, predictions, said):
    registered(lambda histories: predictions)
    with pytest.raises(InputError, match=said):
        build_baseline("test", INPUTS)([[1]])


def test_a_name_that_is_taken(registered):
    registered(None)
    for name in ("test", "content"):
        with pytest.raises(InputError, match=f"baseline '{name}' is registered already"):
            register_baseline(name, lambda inputs: None)
