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
from minionerec.common.files import InputError, read_json
from minionerec.common.records import Catalogue, Row, read_info, read_rows
from minionerec.evaluation.fusion import WEIGHTS, choose_weight, fuse_scores, read_likelihoods, score_sids
from minionerec.evaluation.settings import EvaluateFlags
from minionerec.recommenders.networks import build_network, save_network
from minionerec.recommenders.transitions import count_transitions, score_transitions


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(command, "draw_metrics", lambda columns, path: path.write_text(", ".join(columns)))


def run(trained, output, **changes):
    paths = trained.paths
    flags = {key: paths[key] for key in ("train_file", "info_file", "test_data_path")}
    flags |= {"base_model": trained.checkpoint, "result_json_data": str(output / "test.json"), "num_beams": 12, "K": 10}
    evaluate(EvaluateFlags(**{**flags, **changes}))
    return [read_json(output / f"test{end}.json") for end in ("", ".metrics", ".fused", ".fused.metrics")]


def test_fuse_by_hand():
    model = {"x": math.log(0.5), "y": math.log(0.2), "z": math.log(0.2)}
    catalogue = Catalogue(["x", "y", "y", "z"], [""] * 4, [1, 2, 3, 4])
    counted = replace(catalogue, counts={2: 5})
    baseline = {3: 0.4, 4: 0.1}
    assert [item for item, _ in fuse_scores(model, baseline, 0.0, counted)] == [1, 3, 4, 2]
    assert [item for item, _ in fuse_scores(model, {}, 0.0, counted)] == [1, 2, 3, 4]
    ranked = fuse_scores(model, baseline, 1.0, catalogue)
    assert [item for item, _ in ranked] == [3, 1, 4, 2]
    assert [score for _, score in ranked] == pytest.approx([0.6, 0.5, 0.3, 0.2])


def test_the_weight_with_the_best_ndcg_is_chosen():
    catalogue = Catalogue(["x", "y"], ["", ""], [0, 1])
    results = [{"model": [["x", math.log(0.3)], ["y", math.log(0.1)]], "baseline": [[1, 0.5]]}] * 3
    rows = [Row("u", (), (0,), (), "", target, "") for target in (1, 1, 0)]
    weight, grid = choose_weight(rows, results, catalogue)
    second = 1 / math.log2(3)
    assert grid == {w: pytest.approx((2 + second) / 3 if w > 0.4 else (1 + 2 * second) / 3, abs=1e-6) for w in WEIGHTS}
    assert weight == 1.0


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
    pure, metrics, fused, beside = run(trained, tmp_path / "a", fuse="transitions", fuse_weight=0.0, num_beams=beams)
    assert [row["predict"] for row in fused] == [row["predict"] for row in pure]
    assert beside["item"] == metrics["item"] and beside["fuse_weight"] == 0
    *_, fused, beside = run(trained, tmp_path / "b", fuse="transitions", fuse_weight=1e9)
    for row, own in zip(rows, fused, strict=True):
        scores = score_transitions(row.history_ids, transitions)
        followed = own["predict_items"][: min(10, len(scores))]
        assert {scores[item] for item in followed} >= set(sorted(scores.values(), reverse=True)[:1])
        assert [scores[item] for item in followed] == sorted(scores.values(), reverse=True)[: len(followed)]
        assert own["predict"] == [catalogue.sid_of[item] for item in own["predict_items"]]
        assert len(own["predict"]) == 10 and own["score"] == sorted(own["score"], reverse=True)
    assert (tmp_path / "b" / "test.png").read_text() == f"{trained.checkpoint}, with transitions, weight 1e+09"


@pytest.mark.parametrize("kind", ["transitions", "content", "transitions+content", "sasrec"])
def test_the_weight_is_chosen_on_validation_rows(trained, tmp_path, kind):
    valid, extra = trained.paths["eval_file"], {}
    if kind == "sasrec":
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
    assert beside["fuse_weight"] in WEIGHTS and beside["chosen_on"] == valid
    assert max(beside["grid"].values()) == beside["grid"][f"{beside['fuse_weight']}"]
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
    pure, *_ = run(trained, tmp_path / "a", fuse="content", fuse_weight=0.1)
    file = tmp_path / "a" / "test.json"
    again, _, fused, _ = run(trained, tmp_path / "b", fuse=str(file), fuse_weight=1.0)
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
            read_likelihoods(str(file), rows, catalogue)
    file.write_text(json.dumps(pure[:-1]))
    with pytest.raises(InputError, match=f"expected a predictions file of these {len(rows)} rows"):
        read_likelihoods(str(file), rows, catalogue)


def test_the_baseline_counts_for_every_item_of_the_search(trained, tmp_path):
    """Also for those beyond its own K best; and the lists are those of a plain sort over the whole catalogue."""
    catalogue, rows = read_info(trained.paths["info_file"]), read_rows(trained.paths["test_data_path"])
    torch.manual_seed(0)
    shape = {"model": "sasrec", "hidden_size": 8, "num_layers": 1, "num_heads": 1, "dropout": 0.0, "max_history": 10}
    network = build_network(catalogue.item_ids, shape)
    save_network(network, tmp_path / "cf")
    flags = {"num_beams": len(catalogue.sids), "sample": 6}
    whole, *_ = run(trained, tmp_path / "a", K=30, fuse="content", fuse_weight=1.0, **flags)
    *_, fused, _ = run(
        trained, tmp_path / "b", K=3, fuse="sasrec", fuse_weight=0.3, cf_path=str(tmp_path / "cf"), **flags
    )
    history_of = {(row.user_id, row.item_id): row.history_ids for row in rows}
    item_of = dict(zip(catalogue.sids, catalogue.item_ids, strict=True))
    for row, own in zip(whole, fused, strict=True):
        (scores,) = network.score_histories([history_of[row["user_id"], row["item_id"]]])
        p = dict(zip(catalogue.item_ids, scores.exp().tolist(), strict=True))
        pairs = zip(row["predict"], row["score"], strict=True)
        values = {item_of[sid]: math.exp(score) + 0.3 * p[item_of[sid]] for sid, score in pairs}
        assert own["score"] == pytest.approx(sorted(values.values(), reverse=True)[:3], abs=3e-6)


def test_a_file_is_fused_without_a_train_file(trained, tmp_path):
    """It needs nothing of the train rows, as a baseline that is built from them does."""
    run(trained, tmp_path / "a", fuse="content", fuse_weight=0.1)
    file = str(tmp_path / "a" / "test.json")
    expected, found = (
        run(trained, tmp_path / name, fuse=file, fuse_weight=1.0, train_file=path)
        for name, path in (("b", trained.paths["train_file"]), ("c", None))
    )
    assert found[2] == expected[2] and found[3]["item"] == expected[3]["item"]


@pytest.mark.parametrize("split", ["test_data_path", "train_file"])
def test_the_weight_is_not_chosen_on_the_other_splits(trained, tmp_path, split):
    with pytest.raises(InputError, match=f"is --{split}; choose the weight on the validation split"):
        run(trained, tmp_path, fuse="content", fuse_valid_file=trained.paths[split])


def test_fused_lists_of_an_earlier_run_do_not_stay(trained, tmp_path):
    run(trained, tmp_path, fuse="content", fuse_weight=0.1)
    with pytest.raises(InputError, match=r"test.fused.json: no such file"):
        run(trained, tmp_path, num_beams=13)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fuse_weight": 1.0}, "--fuse_weight: has an effect with --fuse only"),
        ({"cf_path": "x"}, "--cf_path: has an effect with --fuse only"),
        ({"fuse": "luck", "fuse_weight": 1.0}, "--fuse luck: expected one of transitions, content, sasrec, or a"),
        ({"fuse": "content", "fuse_weight": 1.0, "renormalize": True}, "--fuse: adds probabilities"),
        ({"fuse": "sasrec", "fuse_weight": 1.0}, "--fuse sasrec: needs --cf_path"),
        ({"fuse": "content", "fuse_weight": 1.0, "cf_path": "x"}, "--cf_path: has an effect with --fuse sasrec only"),
        ({"fuse": "content", "fuse_weight": 1.0, "train_file": None}, "--fuse content: needs --train_file"),
        ({"fuse": "content"}, "expected either --fuse_weight or --fuse_valid_file"),
        ({"fuse": "content", "fuse_weight": -1.0}, "--fuse_weight -1.0: must be 0 or more"),
        ({"fuse": "content", "fuse_weight": math.inf}, "--fuse_weight inf: must be 0 or more, and finite"),
        ({"fuse": __file__, "fuse_valid_file": "x"}, "a file has no validation rows"),
        ({"fuse": "content", "fuse_weight": 1.0, "fuse_valid_sample": 5}, "--fuse_valid_sample 5: expected"),
    ],
)
def test_flags_that_do_not_go_together(trained, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        run(trained, tmp_path, **flags)
