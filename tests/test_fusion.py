"""Fusion: by hand, against plain forward passes, and end to end beside the pure model."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from tiny import END, random_catalogue, random_prompts, tiny_model

import evaluate as command
from evaluate import evaluate
from minionerec.common.files import InputError, read_json, write_json
from minionerec.common.records import Catalogue, Row, read_info, read_rows
from minionerec.evaluation.fusion import Explainer, score_sids
from minionerec.evaluation.fusion_weights import WEIGHTS, choose_weights, fuse_scores, list_terms
from minionerec.evaluation.likelihood_file import LikelihoodFile
from minionerec.evaluation.metrics import score_predictions
from minionerec.evaluation.settings import EvaluateFlags
from minionerec.recommenders.networks import build_network, save_network
from minionerec.recommenders.reasons import ReasonFinder
from minionerec.recommenders.registry import BaselineInputs, BuiltBaselines, build_baseline
from minionerec.recommenders.transitions import count_transitions, score_transitions


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(command, "draw_metrics", lambda columns, path, title: path.write_text(", ".join(columns)))


def run(trained, output, **changes):
    paths = trained.paths
    flags = {key: paths[key] for key in ("train_file", "info_file", "test_data_path")}
    flags |= {"base_model": trained.checkpoint, "result_json_data": str(output / "test.json"), "num_beams": 12, "K": 10}
    evaluate(EvaluateFlags(**{**flags, **changes}))
    return [read_json(output / f"test{end}.json") for end in ("", ".metrics", ".fused", ".fused.metrics")]


def test_fuse_by_hand():
    result = {
        "model": [["x", math.log(0.5)], ["y", math.log(0.2)], ["z", math.log(0.2)]],
        "baselines": [[[3, 0.4], [4, 0.1]]],
    }
    catalogue = Catalogue(["x", "y", "y", "z"], [""] * 4, [1, 2, 3, 4])
    counted = replace(catalogue, counts={2: 5})
    terms = list_terms(result, catalogue)
    assert terms[0] == pytest.approx({1: 0.5, 2: 0.2, 3: 0.2, 4: 0.2}) and terms[1] == {3: 0.4, 4: 0.1}
    assert [item for item, _ in fuse_scores(terms, [1, 0], counted)] == [1, 3, 4, 2]
    assert [item for item, _ in fuse_scores(terms[:1], [1], counted)] == [1, 2, 3, 4]
    ranked = fuse_scores(terms, [1, 1], catalogue)
    assert [item for item, _ in ranked] == [3, 1, 4, 2]
    assert [score for _, score in ranked] == pytest.approx([0.6, 0.5, 0.3, 0.2])
    more = [*terms, {1: 0.1, 4: 0.3}]
    ranked = fuse_scores(more, [0.5, 1, 2], catalogue)
    assert [item for item, _ in ranked] == [4, 3, 1, 2]
    assert [score for _, score in ranked] == pytest.approx([0.8, 0.5, 0.45, 0.1])


def draw_results(seed):
    """(validation rows, what was found of them, catalogue): shared SIDs, equal probabilities, missed targets."""
    rng = random.Random(seed)
    count = rng.choice([1, 4, 12, 30])
    sids = [f"<{item // 2 if rng.random() < 0.4 else item}>" for item in range(count)]
    catalogue = Catalogue(sids, [""] * count, list(range(count)), {item: rng.randrange(3) for item in range(count)})
    rows, results = [], []
    for _ in range(rng.choice([1, 25])):
        found = rng.sample(sorted(set(sids)), rng.randint(1, len(set(sids))))
        items = [item for sid in found for item in catalogue.items_of_sid[sid]]
        baselines = [
            [[item, rng.choice([0.0, 0.1, 0.2, 0.5])] for item in items if rng.random() < 0.7]
            for _ in range(1 + seed % 3)
        ]
        model = [[sid, math.log(rng.choice([0.05, 0.1, 0.1, 0.3]))] for sid in found]
        results.append({"model": model, "baselines": baselines})
        rows.append(Row("u", (), (0,), (), "", rng.randrange(count), ""))
    return rows, results, catalogue


def measure_slowly(rows, results, weights, catalogue):
    gains = 0.0
    for row, result in zip(rows, results, strict=True):
        ranked = [item for item, _ in fuse_scores(list_terms(result, catalogue), weights, catalogue)]
        if row.item_id in ranked[:10]:
            gains += 1 + 1 / math.log2(ranked.index(row.item_id) + 2)
    return gains / len(rows)


@pytest.mark.parametrize("seed", range(12))
def test_the_weights_are_those_of_a_slow_search(seed):
    """Every choice is measured as by sorting every row; no single weight can be changed for a better figure."""
    rows, results, catalogue = draw_results(seed)
    weights, tried = choose_weights(rows, results, catalogue)
    for text, figure in tried.items():
        choice = [float(weight) for weight in text.split(":")]
        assert figure == pytest.approx(measure_slowly(rows, results, choice, catalogue), abs=2e-6)
    best = max(tried.values())
    assert len(weights) == 2 + seed % 3 and tried[":".join(f"{weight:g}" for weight in weights)] == best
    assert measure_slowly(rows, results, weights, catalogue) == pytest.approx(best, abs=2e-6)
    for number in range(len(weights)):
        for weight in WEIGHTS:
            choice = [*weights[:number], weight, *weights[number + 1 :]]
            if any(choice):
                assert measure_slowly(rows, results, choice, catalogue) <= best + 2e-6
    alone = ":".join(["1", *["0"] * (len(weights) - 1)])
    assert best >= tried[alone] and best >= tried[":".join(["1"] * len(weights))]


def test_a_useless_baseline_gets_no_weight():
    catalogue = Catalogue(["x", "y"], ["", ""], [0, 1])
    right = {"model": [["x", math.log(0.3)], ["y", math.log(0.1)]], "baselines": [[[1, 0.5]], [[0, 0.2]]]}
    rows = [Row("u", (), (0,), (), "", target, "") for target in (0, 0, 0)]
    weights, tried = choose_weights(rows, [right] * 3, catalogue)
    assert weights == [1, 0, 0] and tried["1:0:0"] == 2
    rows = [Row("u", (), (0,), (), "", 1, "")] * 3
    weights, tried = choose_weights(rows, [right] * 3, catalogue)
    assert tried["1:0:0"] == pytest.approx(1 + 1 / math.log2(3), abs=1e-6)
    assert max(tried.values()) == 2 and 0.3 * weights[0] + 0.2 * weights[2] < 0.1 * weights[0] + 0.5 * weights[1]


@pytest.mark.parametrize("seed", range(4))
def test_sid_log_probs_are_those_of_plain_forward_passes(seed):
    rng = random.Random(seed)
    model = tiny_model(["llama", "qwen2", "qwen3"][seed % 3], 40, seed)
    prompts = random_prompts(rng, 4, 40)
    sequences = [random_catalogue(rng, size, 3, 5, 40, True) for size in (5, 0, 1, 9)]
    for prompt, own, scores in zip(prompts, sequences, score_sids(model, prompts, sequences, 0), strict=True):
        for sequence, score in zip(own, scores, strict=True):
            log_probs = model(torch.tensor([prompt + sequence])).logits[0].log_softmax(-1)
            plain = sum(log_probs[len(prompt) - 1 + n, token].item() for n, token in enumerate(sequence))
            assert sequence[-1] == END and score == pytest.approx(plain, abs=1e-4)
    assert score_sids(model, prompts, [[]] * 4, 0) == [[]] * 4


def test_without_weight_it_is_the_model_and_with_a_huge_one_the_baseline(trained, tmp_path):
    catalogue, rows = read_info(trained.paths["info_file"]), read_rows(trained.paths["test_data_path"])
    transitions = count_transitions(read_rows(trained.paths["train_file"]))
    beams = len(catalogue.sids)  # no item can be missed by the search and found by the baseline
    pure, metrics, fused, beside = run(trained, tmp_path / "a", fuse="transitions", fuse_weight=[0.0], num_beams=beams)
    assert [row["predict"] for row in fused] == [row["predict"] for row in pure]
    assert beside["item"] == metrics["item"] and beside["weights"] == {"model": 1, "transitions": 0}
    *_, fused, beside = run(trained, tmp_path / "b", fuse="transitions", fuse_weight=[1e9])
    for row, own in zip(rows, fused, strict=True):
        scores = score_transitions(row.history_ids, transitions)
        followed = own["predict_items"][: min(10, len(scores))]
        assert {scores[item] for item in followed} >= set(sorted(scores.values(), reverse=True)[:1])
        assert [scores[item] for item in followed] == sorted(scores.values(), reverse=True)[: len(followed)]
        assert own["predict"] == [catalogue.sid_of[item] for item in own["predict_items"]]
        assert len(own["predict"]) == 10 and own["score"] == sorted(own["score"], reverse=True)
    assert (tmp_path / "b" / "test.png").read_text() == f"{trained.checkpoint}, with transitions, weights 1:1e+09"


@pytest.mark.parametrize("kind", ["transitions", "content", "transitions+content", "transitions,content,sasrec"])
def test_the_weight_is_chosen_on_validation_rows(trained, tmp_path, kind):
    valid, extra = trained.paths["eval_file"], {}
    if "sasrec" in kind:
        catalogue = read_info(trained.paths["info_file"])
        torch.manual_seed(0)
        shape = {
            "model": "sasrec",
            "hidden_size": 8,
            "num_layers": 1,
            "num_heads": 1,
            "dropout": 0.0,
            "max_history": 10,
        }
        save_network(build_network(catalogue.item_ids, shape), tmp_path / "cf")
        extra = {"cf_path": str(tmp_path / "cf")}
    pure, metrics, _, beside = run(trained, tmp_path, fuse=kind, fuse_valid_file=valid, fuse_valid_sample=9, **extra)
    assert list(beside["weights"]) == ["model", *kind.split(",")] and beside["chosen_on"] == valid
    assert max(beside["tried"].values()) > 0 and len(beside["tried"]) >= 13
    plain = tmp_path / "plain"
    evaluate(
        EvaluateFlags(
            **{key: trained.paths[key] for key in ("train_file", "info_file", "test_data_path")},
            base_model=trained.checkpoint,
            result_json_data=str(plain / "test.json"),
            num_beams=12,
            K=10,
        )
    )
    assert read_json(plain / "test.metrics.json") == metrics and read_json(plain / "test.json") == pure
    assert not list(tmp_path.glob("*.partial"))


def test_a_predictions_file_as_baseline(trained, tmp_path):
    """The model fused with its own file has twice the probabilities, and so the same order."""
    pure, *_ = run(trained, tmp_path / "a", fuse="content", fuse_weight=[0.1])
    file = tmp_path / "a" / "test.json"
    again, _, fused, _ = run(trained, tmp_path / "b", fuse=str(file), fuse_weight=[1.0])
    for row, own in zip(again, fused, strict=True):
        assert own["predict"] == row["predict"]
        assert own["score"] == pytest.approx([2 * math.exp(score) for score in row["score"]], abs=1e-5)
    rows, catalogue = read_rows(trained.paths["test_data_path"]), read_info(trained.paths["info_file"])
    for change, message in (
        ({"user_id": "someone"}, "row 2: expected user"),
        ({"score": pure[1]["score"][:-1]}, "row 2: expected a score for every recommendation"),
        ({"score": [0.5] * 10}, "row 2: the scores must be log-probabilities"),
        ({"score": [math.nan] * 10}, "row 2: the scores must be log-probabilities"),
        ({"predict_items": [999] * 10}, "row 2: 999 is not in the info file"),
        ({"predict": ["<z_1>"] * 10}, "row 2: <z_1> is not in the info file"),
    ):
        file.write_text(json.dumps([pure[0], {**pure[1], **change}, *pure[2:]]))
        with pytest.raises(InputError, match=message):
            LikelihoodFile(str(file), rows, catalogue)
    file.write_text(json.dumps(pure[:-1]))
    with pytest.raises(InputError, match=f"expected a predictions file of these {len(rows)} rows"):
        LikelihoodFile(str(file), rows, catalogue)


def test_the_baseline_counts_for_every_item_of_the_search(trained, tmp_path):
    """Also for those beyond its own K best; and the lists are those of a plain sort over the whole catalogue."""
    catalogue, rows = read_info(trained.paths["info_file"]), read_rows(trained.paths["test_data_path"])
    torch.manual_seed(0)
    shape = {"model": "sasrec", "hidden_size": 8, "num_layers": 1, "num_heads": 1, "dropout": 0.0, "max_history": 10}
    network = build_network(catalogue.item_ids, shape)
    save_network(network, tmp_path / "cf")
    flags = {"num_beams": len(catalogue.sids), "sample": 6}
    whole, *_ = run(trained, tmp_path / "a", K=30, fuse="content", fuse_weight=[1.0], **flags)
    *_, fused, _ = run(
        trained, tmp_path / "b", K=3, fuse="sasrec", fuse_weight=[0.3], cf_path=str(tmp_path / "cf"), **flags
    )
    history_of = {(row.user_id, row.item_id): row.history_ids for row in rows}
    item_of = dict(zip(catalogue.sids, catalogue.item_ids, strict=True))
    for row, own in zip(whole, fused, strict=True):
        (scores,) = network.score_histories([history_of[row["user_id"], row["item_id"]]])
        p = dict(zip(catalogue.item_ids, scores.exp().tolist(), strict=True))
        pairs = zip(row["predict"], row["score"], strict=True)
        values = {item_of[sid]: math.exp(score) + 0.3 * p[item_of[sid]] for sid, score in pairs}
        assert own["score"] == pytest.approx(sorted(values.values(), reverse=True)[:3], abs=3e-6)


def test_several_baselines_by_a_plain_sum_over_the_whole_catalogue(trained, tmp_path):
    """The search finds few items, so that most candidates come from the baselines; every probability is exact."""
    catalogue, rows = read_info(trained.paths["info_file"]), read_rows(trained.paths["test_data_path"])
    train = read_rows(trained.paths["train_file"])
    inputs = BaselineInputs(train, catalogue.with_counts(train))
    whole, *_ = run(trained, tmp_path / "a", K=30, num_beams=30, fuse="content", fuse_weight=[0.0])
    names, weights = ["transitions", "content"], [0.7, 0.4, 1.1]
    narrow, _, fused, beside = run(
        trained, tmp_path / "b", K=3, num_beams=3, fuse=",".join(names), fuse_weight=weights, batch_size=5
    )
    item_of = dict(zip(catalogue.sids, catalogue.item_ids, strict=True))
    # A narrow search need not find the three best of a wide one.
    for row, model, few, own in zip(rows, whole, narrow, fused, strict=True):
        terms = [{item_of[sid]: math.exp(p) for sid, p in zip(model["predict"], model["score"], strict=True)}]
        terms += [build_baseline(name, inputs)([row.history_ids])[0] for name in names]
        beam = {item_of[sid] for sid in few["predict"]}
        for term in terms[1:]:
            beam |= set(sorted(term, key=lambda item: (-term[item], -inputs.catalogue.counts.get(item, 0), item))[:3])
        values = {item: sum(w * t.get(item, 0) for w, t in zip(weights, terms, strict=True)) for item in beam}
        assert own["score"] == pytest.approx(sorted(values.values(), reverse=True)[:3], abs=3e-6)
        for item, score in zip(own["predict_items"], own["score"], strict=True):
            assert values[item] == pytest.approx(score, abs=3e-6)
    assert beside["weights"] == {"model": 0.7, "transitions": 0.4, "content": 1.1}


def test_seen_items_are_in_no_fused_list(trained, tmp_path):
    """Neither by the search nor by a baseline; the newest one may come back where it is asked for."""
    rows = read_rows(trained.paths["test_data_path"])
    settings = dict(fuse="transitions,content", fuse_weight=[0.1, 3.0, 1.0], exclude_seen=True)
    *_, fused, _ = run(trained, tmp_path / "a", **settings)
    seen = [set(row.history_ids) & set(own["predict_items"]) for row, own in zip(rows, fused, strict=True)]
    assert not any(seen) and all(len(own["predict_items"]) == 10 for own in fused)
    *_, fused, _ = run(trained, tmp_path / "b", **settings, repeat_newest=1)
    seen = [set(row.history_ids) & set(own["predict_items"]) for row, own in zip(rows, fused, strict=True)]
    assert any(seen) and all(items <= {row.history_ids[-1]} for row, items in zip(rows, seen, strict=True))


def test_reasons_name_what_carried_an_item():
    """By hand: the item of the history with the largest part, and the shares of the terms in the score."""
    titles = ["red drill, 5% off", "blue saw", "red drill case", "blue saw blade", "tape"]
    catalogue = Catalogue([f"<{item}>" for item in range(5)], titles, list(range(5)))
    train = [Row("u", (), (0,), (), "", 4, "")] * 3 + [Row("u", (), (1,), (), "", 4, "")] * 2
    built = BuiltBaselines(BaselineInputs(train, catalogue))
    explainer = Explainer(built, ["model", "transitions", "content"], [1.0, 1.0, 0.5])
    terms = [{2: 0.1, 4: 0.3, 3: 0.9}, {4: 0.6}, {2: 0.8, 4: 0.0}]
    assert explainer.explain([0, 1], terms, [2, 4, 3]) == [
        "like red drill, 5% off (80 %), model (20 %)",
        "bought after blue saw (67 %), model (33 %)",  # 2 newest against 3 times a half
        "model (100 %)",
    ]
    assert explainer.explain([1, 0], terms, [4]) == ["bought after red drill, 5% off (67 %), model (33 %)"]
    finder = ReasonFinder(built)
    assert finder.explain("transitions+content", [0], [2, 4]) == [
        "like red drill, 5% off",
        "bought after red drill, 5% off",
    ]
    assert finder.explain("content", [0], [3]) == ["content"] and finder.explain("some.json", [0], [3]) == ["some.json"]


def test_a_file_is_fused_without_a_train_file(trained, tmp_path):
    """It needs nothing of the train rows, as a baseline that is built from them does."""
    run(trained, tmp_path / "a", fuse="content", fuse_weight=[0.1])
    file = str(tmp_path / "a" / "test.json")
    expected, found = (
        run(trained, tmp_path / name, fuse=file, fuse_weight=[1.0], train_file=path)
        for name, path in (("b", trained.paths["train_file"]), ("c", None))
    )
    assert found[2] == expected[2] and found[3]["item"] == expected[3]["item"]


@pytest.mark.parametrize("split", ["test_data_path", "train_file"])
def test_the_weight_is_not_chosen_on_the_other_splits(trained, tmp_path, split):
    with pytest.raises(InputError, match=f"is --{split}; choose the weight on the validation split"):
        run(trained, tmp_path, fuse="content", fuse_valid_file=trained.paths[split])


def test_fused_lists_of_an_earlier_run_do_not_stay(trained, tmp_path):
    run(trained, tmp_path, fuse="content", fuse_weight=[0.1])
    with pytest.raises(InputError, match=r"test.fused.json: no such file"):
        run(trained, tmp_path, num_beams=13)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fuse_weight": [1.0]}, "--fuse_weight: has an effect with --fuse only"),
        ({"cf_path": "x"}, "--cf_path: has an effect with --fuse only"),
        (
            {"fuse": "luck", "fuse_weight": [1.0]},
            "--fuse luck: expected one of transitions, cooccurrence, cooccurrence_wide, content, sasrec, gru4rec, or a",
        ),
        ({"fuse": "content", "fuse_weight": [1.0], "renormalize": True}, "--fuse: adds probabilities"),
        ({"fuse": "sasrec", "fuse_weight": [1.0]}, "--fuse sasrec: needs --cf_path"),
        (
            {"fuse": "content", "fuse_weight": [1.0], "cf_path": "x"},
            "--cf_path: has an effect with --fuse sasrec or gru4rec only",
        ),
        ({"fuse": "content", "fuse_weight": [1.0], "train_file": None}, "--fuse content: needs --train_file"),
        ({"fuse": "content"}, "expected either --fuse_weight or --fuse_valid_file"),
        ({"fuse": "content", "fuse_weight": [-1.0]}, "--fuse_weight -1: must be 0 or more"),
        ({"fuse": "content", "fuse_weight": [0.0, 0.0]}, "--fuse_weight 0,0: must be 0 or more, and finite, and not"),
        ({"fuse": "content", "fuse_weight": [1.0] * 3}, "--fuse_weight 1,1,1: expected 1, one for every baseline"),
        ({"fuse": "content,content", "fuse_weight": [1.0, 1.0]}, "--fuse content,content: content is given twice"),
        ({"fuse": "transitions", "fuse_weight": [1.0], "item_meta_path": "x"}, "--item_meta_path: has an effect with"),
        ({"item_meta_path": "x"}, "--item_meta_path: has an effect with --fuse only"),
        ({"fuse": "content", "fuse_weight": [math.inf]}, "--fuse_weight inf: must be 0 or more, and finite"),
        ({"fuse": __file__, "fuse_valid_file": "x"}, "a file has no validation rows"),
        ({"fuse": "content", "fuse_weight": [1.0], "fuse_valid_sample": 5}, "--fuse_valid_sample 5: expected"),
    ],
)
def test_flags_that_do_not_go_together(trained, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        run(trained, tmp_path, **flags)


def test_a_split_on_disk_gives_the_same_files(trained, tmp_path):
    """And they are what lists of all predictions give."""
    chosen = {"fuse": "content", "fuse_valid_file": trained.paths["eval_file"], "workers": 1}
    for streaming in ("True", "False"):
        predictions, metrics, fused, _ = run(trained, tmp_path / streaming, streaming=streaming, **chosen)
    for end in ("", ".metrics", ".fused", ".fused.metrics"):
        written, other = ((tmp_path / name / f"test{end}.json").read_bytes() for name in ("True", "False"))
        assert written == other and len(written) > 2
    for name, rows in (("test", predictions), ("test.fused", fused)):
        write_json(tmp_path / "list.json", rows, indent=None)
        assert (tmp_path / "list.json").read_bytes() == (tmp_path / "True" / f"{name}.json").read_bytes()
    catalogue = read_info(trained.paths["info_file"]).with_counts(read_rows(trained.paths["train_file"]))
    test_rows = read_rows(trained.paths["test_data_path"])
    assert metrics == score_predictions(predictions, catalogue, 10, [row.history_sids for row in test_rows])
