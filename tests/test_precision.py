"""--dtype and --rollout_dtype: which precision is chosen, and that searches and rollouts really run in it."""

import json
import random
import shutil

import pytest
import torch
from tiny import random_catalogue, random_prompts, tiny_model

from benchmarks import bench_dtype
from evaluate import evaluate
from minionerec.common.files import InputError, read_json
from minionerec.common.model_folder import read_model_catalogue
from minionerec.evaluation.recommender import load_recommender
from minionerec.evaluation.settings import EvaluateFlags, RecommendFlags
from minionerec.language import models
from minionerec.language.models import choose_dtype, has_fast_bf16, place_for_search
from minionerec.search.beam_search import beam_search
from minionerec.search.output_head import OutputHead
from minionerec.search.trie import SidTrie
from minionerec.training import rollouts, setup
from minionerec.training.rollouts import choose_rollout_dtype, compute_in
from minionerec.training.settings import RLFlags
from minionerec_trainer import GroupTrainer
from rl import rl

CPU = torch.device("cpu")


def test_auto_asks_for_instructions_and_size(monkeypatch, capsys):
    model = tiny_model("qwen3", 40)
    size = sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(setup, "computes_on_cpu", lambda: True)
    for instructions in ({}, {"avx512_bf16": True}, {"amx_bf16": True}, {"avx512_f": True, "avx512_bf16": False}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda instructions=instructions: instructions)
        fast = any(value for name, value in instructions.items() if name.endswith("_bf16"))
        assert has_fast_bf16(CPU) == fast
        assert setup.trains_in_bf16(True) and not setup.trains_in_bf16(None)
        assert ("no bfloat16 instructions" in capsys.readouterr().out) != fast
        for limit in (size, size + 1):
            monkeypatch.setattr(models, "BF16_PARAMETERS", limit)
            expected = torch.bfloat16 if fast and limit == size else torch.float32
            assert choose_dtype("auto", model, CPU) == expected
        assert choose_dtype(None, model, CPU) == choose_dtype("float32", model, CPU) == torch.float32
        assert choose_dtype("bfloat16", model, CPU) == torch.bfloat16
    assert choose_dtype(None, model, torch.device("cuda")) == torch.bfloat16  # no device is asked for


def test_what_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    assert place_for_search(tiny_model("qwen3", 40).train(), CPU, None).dtype == torch.float32
    assert capsys.readouterr().out == ""
    model = place_for_search(tiny_model("qwen3", 40).train(), CPU, "bfloat16")
    assert model.dtype == torch.bfloat16 and not model.training
    assert capsys.readouterr().out.startswith("[search] weights in bfloat16, for which this device has no instructions")
    place_for_search(model, CPU, "auto")
    assert capsys.readouterr().out == "[search] weights in float32\n"


@pytest.fixture
def precisions(monkeypatch):
    """The precisions of the keys that searches keep, as they are computed."""
    seen = set()
    score = OutputHead.score

    def noting(self, *arguments):
        gains = score(self, *arguments)
        assert gains.dtype == torch.float32  # scores are summed in float32 whatever the weights are
        seen.add(self.model.get_input_embeddings().weight.dtype)
        return gains

    monkeypatch.setattr(OutputHead, "score", noting)
    return seen


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "auto"])
def test_evaluate_and_recommend(trained, tmp_path, precisions, dtype):
    paths = {key: trained.paths[key] for key in ("train_file", "info_file", "test_data_path")}
    result = str(tmp_path / "test.json")
    evaluate(EvaluateFlags(base_model=trained.checkpoint, **paths, result_json_data=result, num_beams=10, dtype=dtype))
    expected = {torch.bfloat16 if dtype == "bfloat16" else torch.float32}  # the model is too small for auto
    assert precisions == expected
    metrics = read_json(tmp_path / "test.metrics.json")
    assert metrics["illegal"] == metrics["duplicates"] == 0
    flags = RecommendFlags(base_model=trained.checkpoint, info_file=paths["info_file"], titles="x", dtype=dtype)
    recommender = load_recommender(flags, read_model_catalogue(trained.checkpoint))
    assert {recommender.model.dtype} == expected and not recommender.model.training


@pytest.mark.parametrize("mode", ["weights", "autocast"])
def test_lists_of_bfloat16_are_ranked_by_its_own_scores(mode):
    """No prompt is lost and nothing stands twice; scores fall, and are those of the float32 search to bf16's rounding.

    Ties, which are frequent, do not disturb the order: the smaller sequence number stands first.
    """
    rng = random.Random(3)
    for kind in ("llama", "qwen2", "qwen3"):
        model = tiny_model(kind, 60)
        sequences = random_catalogue(rng, 200, 4, 20, 60, mixed=True)
        trie = SidTrie(sequences)
        prompts = random_prompts(rng, 5, 60)
        exact = beam_search(model, trie, prompts, len(sequences))
        if mode == "weights":
            rounded = beam_search(model.to(torch.bfloat16), trie, prompts, len(sequences))
        else:
            with compute_in(torch.bfloat16, model):
                rounded = beam_search(model, trie, prompts, len(sequences))
        assert (rounded.score != exact.score).any()
        for row in range(5):
            numbers, scores = rounded.sequence[row].tolist(), rounded.score[row].tolist()
            pairs = list(zip(numbers, scores, strict=True))
            assert sorted(numbers) == list(range(trie.num_sequences))
            assert pairs == sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
            truth = dict(zip(exact.sequence[row].tolist(), exact.score[row].tolist(), strict=True))
            assert max(abs(truth[number] - score) for number, score in pairs) < 0.1 * max(map(abs, truth.values()))


# ------------------------------------------------------------------------------------------------------ rollouts
def test_rollout_precision(capsys):
    model = tiny_model("qwen3", 40)
    assert choose_rollout_dtype(None, model, CPU, trains_in_bf16=False) is None
    assert choose_rollout_dtype("float32", model, CPU, trains_in_bf16=False) is None
    assert choose_rollout_dtype("bfloat16", model, CPU, trains_in_bf16=False) == torch.bfloat16
    for requested in (None, "auto", "bfloat16"):  # rollouts are under the training's own autocast
        assert choose_rollout_dtype(requested, model, CPU, trains_in_bf16=True) is None
    with pytest.raises(InputError, match="--rollout_dtype float32: training computes in bfloat16 here"):
        choose_rollout_dtype("float32", model, CPU, trains_in_bf16=True)
    assert capsys.readouterr().out == "[rl] rollouts in float32\n[rl] rollouts in bfloat16\n"


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("beams", [True, False])
def test_rollouts_in_bfloat16_follow_the_newest_weights(trained, tmp_path, monkeypatch, beams, lora):
    """Only rollouts are cast: those of every step are the ones a bf16 search over that step's weights gives, while the
    loss is computed in float32, with ratios of 1.
    """
    checked, losses = [], []
    roll_out, compute_loss = rollouts.roll_out, GroupTrainer.compute_loss

    def watching(policy, *arguments, **named):
        assert torch.is_autocast_enabled("cpu") and policy.dtype == torch.float32
        groups = roll_out(policy, *arguments, **named)
        weight = next(parameter for name, parameter in policy.named_parameters() if parameter.requires_grad)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # nothing of another step can be in use
            assert roll_out(policy, *arguments, **named) == groups
        checked.append(weight.detach().clone())
        return groups

    def in_float32(self, policy, inputs, *arguments, **named):
        assert not torch.is_autocast_enabled("cpu")
        loss = compute_loss(self, policy, inputs, *arguments, **named)
        assert loss.dtype == torch.float32 and inputs["groups"].old.dtype == torch.float32
        losses.append(loss.item())
        return loss

    monkeypatch.setattr("minionerec_trainer.roll_out", watching)
    monkeypatch.setattr(GroupTrainer, "compute_loss", in_float32)
    files = {key: trained.paths[key] for key in ("train_file", "eval_file", "info_file")}
    rl(
        RLFlags(
            model_path=trained.checkpoint,
            **files,
            output_dir=str(tmp_path / "rl"),
            num_generations=4,
            train_batch_size=16,
            gradient_accumulation_steps=1,
            reward_type=["ranking"],
            max_steps=3,
            learning_rate=1e-2,
            test_during_training=False,
            add_gt=True,
            beam_search=beams,
            lora=lora,
            rollout_dtype="bfloat16",
        )
    )
    assert len(checked) == len(losses) == 3
    assert not torch.equal(checked[0], checked[1]) and not torch.equal(checked[1], checked[2])


# ------------------------------------------------------------------------------------------------------------ benchmark
def test_benchmark(trained, tmp_path, capsys):
    sizes = {"sizes": ["1M"], "batch_sizes": [1, 2], "num_beams": 12, "prompt_length": 8, "items": 300, "repeats": 1}
    bench_dtype.bench(bench_dtype.DtypeBenchFlags(**sizes))
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert report["ratio"] > 0 and [figures["batch_size"] for figures in report["models"]] == [1, 2]
    assert all(0 <= figures["equal_top_10"] <= figures["kept_top_10"] <= 1 for figures in report["models"])
    for name, target in (
        ("train_file", "train/toy.csv"),
        ("test_data_path", "test/toy.csv"),
        ("sid_index_path", "index/toy.index.json"),
        ("item_meta_path", "index/toy.item.json"),
    ):
        (tmp_path / target).parent.mkdir(exist_ok=True)
        shutil.copy(trained.paths[name], tmp_path / target)
    data = {"model": trained.checkpoint, "data_root": str(tmp_path), "category": "toy", "rows": 6, "batch_sizes": [4]}
    bench_dtype.bench(bench_dtype.DtypeBenchFlags(**data, num_beams=10, repeats=1))
    (figures,) = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["models"]
    assert figures["rows"] == 6 and {"float32_HR@10", "bfloat16_HR@10", "kept_top_10"} <= figures.keys()
    with pytest.raises(InputError, match="--model and --data_root go together"):
        bench_dtype.bench(bench_dtype.DtypeBenchFlags(model="somewhere"))
