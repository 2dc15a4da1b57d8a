"""The planner: counts against real models, activations against what autograd saves, advice against a full search."""

import contextlib
import itertools
import json
import os
import random
from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, make_dataset, tiny_model, write_config

import rl
import sft
from benchmarks import bench_plan
from minionerec.common.files import InputError
from minionerec.common.records import Row
from minionerec.common.settings import AdapterFlags
from minionerec.language.adapters import add_lora, count_trainable_parameters, train_token_rows
from minionerec.search.prefix_tree import TreeBatch, compute_label_logits
from minionerec.search.trie import SidTrie
from minionerec.training.plan_fitting import find_fitting, list_changes
from minionerec.training.plan_memory import (
    ATTENTION,
    MLP,
    BatchShape,
    Setting,
    count_activation_bytes,
    count_copy_bytes,
    count_phases,
    count_state_bytes,
    find_peak,
    read_shape,
)
from minionerec.training.plan_report import describe_changes, report_plan
from minionerec.training.plan_work import draw_whole_users, find_forced_tokens
from minionerec.training.planning import list_uncounted_savers, make_plan
from minionerec.training.settings import RLFlags, SFTFlags
from scripts.plan import PlannerFlags, plan, read_machine, read_problem


def count_saved_bytes(model, rows, length, *, autocast, masked):
    """The slow twin: every tensor that autograd keeps of a forward pass, each storage once, the weights left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes, alive = {}, []

    def note(tensor):
        alive.append(tensor)  # or its address would be given to another one
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    end = torch.arange(1, length + 1).repeat(rows, 1)
    end[:, : length // 2] = length
    labels = torch.tensor([3, 7, 11])
    batch = TreeBatch(
        torch.randint(2, 90, (rows, length)),
        torch.arange(length).repeat(rows, 1),
        end if masked else None,
        labels,
        torch.arange(3),
        labels,
        torch.ones(3),
    )
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = compute_label_logits(model, batch)
    assert logits.requires_grad
    return sum(sizes.values())


def wrap(model, trains):
    """(model that trains what is named, its shape)."""
    shape = read_shape(model)
    if trains == "rows":
        return train_token_rows(model, [1, 2]), replace(shape, trains="rows")
    if trains == "all":
        return model, shape
    names = ["q_proj", "v_proj"] if trains == "some" else None
    model = add_lora(model, [1, 2], AdapterFlags(lora=True, lora_rank=4, lora_targets=names))
    shape = replace(shape, trains="lora", rank=4, targets=names or (*ATTENTION, *MLP))
    return model, replace(shape, trainable=count_trainable_parameters(model))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("trains", ["all", "lora", "some", "rows"])
def test_activations_are_what_autograd_keeps(kind, trains):
    for precision, masked, tied in itertools.product(("fp32", "autocast", "bf16"), (True, False), (True, False)):
        model = tiny_model(kind, 100, tie_word_embeddings=tied).train()
        model, shape = wrap(model, trains)
        if precision == "bf16":
            model = model.bfloat16()
        setting = Setting(bf16=precision != "fp32", engine="ZeRO-2" if precision == "bf16" else "one process")
        batch = BatchShape(3, 40, 3, masked)
        planned = count_activation_bytes(shape, batch, setting) + count_copy_bytes(shape, setting)
        saved = count_saved_bytes(model, 3, 40, autocast=precision == "autocast", masked=masked)
        assert planned == pytest.approx(saved, rel=2e-3), (precision, masked, tied)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_the_real_model(kind, tied):
    model = tiny_model(kind, 50, tie_word_embeddings=tied)
    with torch.device("meta"):
        shape = read_shape(tiny_model(kind, 50, tie_word_embeddings=tied))
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    linear = [part for part in model.get_decoder().layers.modules() if isinstance(part, torch.nn.Linear)]
    assert shape.decoder_weights >= sum(part.weight.numel() for part in linear)
    assert shape.tied == tied and shape.normed_heads == (kind == "qwen3") and shape.is_known


SHAPE = read_shape(tiny_model("qwen3", 1000))
LABELS = 20


@pytest.mark.parametrize("bf16", [True, False])
def test_parts_of_all_processes_sum_up(bf16):
    whole = count_state_bytes(SHAPE, Setting())
    assert (whole["weights"], whole["gradients"], whole["optimizer"]) == tuple(SHAPE.parameters * n for n in (4, 4, 8))
    for processes in (2, 3, 8):
        parts = {
            engine: count_state_bytes(SHAPE, Setting(engine=engine, processes=processes, bf16=bf16))
            for engine in ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2")
        }
        assert parts["DDP"] == {**whole, "buckets": 4 * SHAPE.parameters}
        for name in ("weights", "gradients", "optimizer"):
            assert parts["FSDP2"][name] * processes == pytest.approx(whole[name], abs=processes)
        element = 2 if bf16 else 4
        assert parts["ZeRO-2"]["weights"] == element * SHAPE.parameters
        assert parts["ZeRO-3"]["weights"] * processes == pytest.approx(element * SHAPE.parameters, abs=processes)
        for engine in ("ZeRO-2", "ZeRO-3"):
            assert parts[engine]["optimizer"] * processes == pytest.approx(12 * SHAPE.parameters, abs=processes)
            assert parts[engine]["gradients"] * processes == pytest.approx(element * SHAPE.parameters, abs=processes)


def test_peak_grows_with_what_is_computed():
    def peak(batch, **changes):
        return find_peak(count_phases(SHAPE, batch, Setting(**changes), {}))[1]

    base = BatchShape(4, 200, LABELS)
    for larger in (BatchShape(5, 200, LABELS), BatchShape(4, 201, LABELS), BatchShape(4, 200, 400)):
        assert peak(larger) > peak(base)
    assert peak(base, checkpointing=True) < peak(base)
    assert peak(base, reference=True) > peak(base)
    assert peak(base, accumulates=False) < peak(base)
    assert peak(base, dropout=True) > peak(base)
    assert count_activation_bytes(replace(SHAPE, trains="rows"), base, Setting()) < count_activation_bytes(
        SHAPE, base, Setting()
    )


def test_forced_tokens_are_found():
    unique = SidTrie([[2, 3, 4, 1], [2, 5, 6, 1], [7, 3, 4, 1]])  # two levels decide, and two tokens are left
    assert find_forced_tokens(unique) == 2
    assert find_forced_tokens(SidTrie([[2, 3, 4, 1], [2, 3, 5, 1]])) == 1


def test_a_sample_holds_whole_users():
    rng = random.Random(0)
    rows = [Row(f"U{rng.randrange(40)}", ("t",), (1,), ("<a_1>",), "t", 1, "<a_1>") for _ in range(400)]
    drawn = draw_whole_users(rows, 100, seed=1)
    assert 100 <= len(drawn) < 400
    users = {row.user_id for row in drawn}
    assert drawn == [row for row in rows if row.user_id in users]
    assert draw_whole_users(rows, 400, seed=1) is rows


# ------------------------------------------------------------------------------------------------------------- commands
@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("plan"), users=60)


def build_sft_flags(paths, folder, **changes):
    names = ("train_file", "eval_file", "sid_index_path", "item_meta_path")
    settings = {"base_model": write_config(folder), "train_from_scratch": True, "batch_size": 32, "num_epochs": 2}
    settings |= {"output_dir": str(folder / "out"), **{name: paths[name] for name in names}}
    return SFTFlags(**{**settings, **changes})


def test_dry_run_of_sft_writes_nothing_and_tells_what_the_run_does(paths, tmp_path, capsys):
    flags = build_sft_flags(paths, tmp_path)
    before = sorted(os.listdir(tmp_path))
    sft.sft(replace(flags, dry_run=True))
    assert sorted(os.listdir(tmp_path)) == before
    printed = capsys.readouterr().out
    planned = sft.plan_sft(*sft.resolve_sft_flags(flags))
    sft.sft(flags)
    record = json.loads((tmp_path / "out" / "sft.stage.json").read_text())
    assert planned.work.steps == record["results"]["steps"]
    assert planned.shape.parameters == record["results"]["parameters"]
    assert f"{planned.shape.parameters:,}" in printed and "It fits." in printed
    assert "dry_run" not in record["settings"]


def test_dry_run_of_rl_writes_nothing(trained, tmp_path, capsys):
    names = ("train_file", "eval_file", "info_file")
    flags = RLFlags(
        model_path=trained.checkpoint, output_dir=str(tmp_path / "out"), **{name: trained.paths[name] for name in names}
    )
    rl.rl(replace(flags, dry_run=True))
    assert not list(tmp_path.iterdir())
    assert "rollouts" in capsys.readouterr().out
    planned = rl.plan_rl(rl.resolve_rl_flags(flags))
    assert planned.setting.reference and planned.work.searches.keys() == {"rollouts", "validation"}
    without = rl.plan_rl(rl.resolve_rl_flags(replace(flags, beta=0.0, test_during_training=False)))
    assert not without.setting.reference and without.peak[1] < planned.peak[1]


@pytest.fixture
def config_only(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    tiny_model("qwen3", 400).config.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return str(folder)


def build_planner_flags(paths, base, **changes):
    settings = {"base_model": base, "train_file": paths["train_file"], "info_file": paths["info_file"], "gpus": 4}
    return PlannerFlags(**{**settings, "gpu_memory": 1.0, "reserve": 0.0, "batch_size": 64, **changes})


def test_a_config_is_enough(paths, config_only, capsys):
    planned = plan(build_planner_flags(paths, config_only, lora=True, lora_rank=3))
    tokens = {token for tokens in json.loads(open(paths["sid_index_path"]).read()).values() for token in tokens}
    model = tiny_model("qwen3", 400 + len(tokens))
    assert planned.shape.vocabulary == 400 + len(tokens)
    assert planned.shape.parameters == sum(weight.numel() for weight in model.parameters())
    wrapped = add_lora(model, range(400, 400 + len(tokens)), AdapterFlags(lora=True, lora_rank=3))
    assert planned.shape.trainable == count_trainable_parameters(wrapped)
    assert "Note on tokens" in capsys.readouterr().out
    assert planned.seconds is None
    timed = plan(build_planner_flags(paths, config_only, lora=True, lora_rank=3, peak_tflops=1.0, utilization=0.5))
    assert timed.seconds == pytest.approx(sum(timed.operations.values()) / 4 / 0.5e12)


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_the_first_setting_that_fits_is_proposed(paths, config_only, stage, capsys):
    flags = build_planner_flags(paths, config_only, stage=stage, **({"batch_size": 1024} if stage == "rl" else {}))
    machine = read_machine(flags)
    problem = read_problem(flags, machine)
    whole, proposed = make_plan(problem, machine), set()
    assert whole.fits
    for share in (0.95, 0.75, 0.55):
        small = replace(machine, memory=round(whole.peak[1] * share))
        assert not make_plan(problem, small).fits
        tried = []
        for changed, other in list_changes(problem.flags, small):
            with contextlib.suppress(InputError):
                tried.append(make_plan(problem, other, changed))
        fitting = [candidate for candidate in tried if candidate.fits]
        found = find_fitting(problem, small)
        assert (found is None) == (not fitting)
        if found is not None:
            assert found == fitting[0] and found.peak[1] + found.machine.reserve <= small.memory
            proposed.add(describe_changes(found, problem, small))
    assert proposed and "" not in proposed
    capsys.readouterr()
    report_plan(problem, replace(machine, memory=round(whole.peak[1] * 0.85)))
    assert "The nearest setting that fits" in capsys.readouterr().out
    report_plan(problem, replace(machine, memory=1))
    assert "Nothing that was tried fits" in capsys.readouterr().out


def test_savers_that_are_not_counted_are_named():
    files = {"train_file": "", "eval_file": "", "output_dir": ""}
    sft_flags = SFTFlags(base_model="", sid_index_path="", item_meta_path="", **files)
    rl_flags = RLFlags(model_path="", info_file="", **files)
    assert list_uncounted_savers(sft_flags) == list_uncounted_savers(rl_flags) == []
    notes = list_uncounted_savers(replace(sft_flags, optim="adamw_8bit", lora=True, load_in_4bit=True))
    assert [note.partition(":")[0] for note in notes] == ["--optim adamw_8bit", "--load_in_4bit True"]
    notes = list_uncounted_savers(replace(rl_flags, rollout_dtype="auto"))
    assert [note.partition(":")[0] for note in notes] == ["--rollout_dtype auto"]


def test_wrong_input_is_one_line(paths, config_only, tmp_path):
    tied = tmp_path / "tied"
    tiny_model("qwen3", 400, tie_word_embeddings=True).config.save_pretrained(tied)
    for changes, expected in (
        ({"base_model": "nobody/nothing"}, "hub's cache"),
        ({"num_generations": 4}, "no effect with --stage sft"),
        ({"stage": "rl", "batch_size": 1024, "micro_batch_size": 4}, "no effect with --stage rl"),
        ({"gpus": 0, "launch": "zero2"}, "needs --gpus 1 or more"),
        ({"micro_batch_size": 24}, "must be a multiple"),
        ({"launch": "fsdp2", "lora": True, "base_model": str(tied)}, "FSDP2"),
        ({"launch": "zero3", "stage": "rl", "batch_size": 1024, "sync_ref_model": True}, "sync_ref_model"),
    ):
        with pytest.raises(InputError, match=expected):
            plan(replace(build_planner_flags(paths, config_only), **changes))


def test_the_benchmark_measures_a_run(monkeypatch, capsys):
    monkeypatch.setitem(bench_plan.RUNS, "sft-tiny-full", ("sft", "tiny", "full"))
    bench_plan.print_run("sft-tiny-full", "32", "0")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["trainable"] == result["parameters"] > 0
    assert result["planned_mb"] >= 0 and result["base_mb"] > 50
