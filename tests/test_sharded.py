"""Engines that share or shard weights over two processes (gloo): the same weights as one process, never a hang.

The short form runs FSDP2 and, where deepspeed is installed, ZeRO-2 and ZeRO-3. `bash scripts/test_launch.sh` makes an
environment with deepspeed and runs the long form too (LAUNCH_TESTS=all).
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import LONG, ROOT, SECONDS, find_last_line, launch, long_form, note_cell
from safetensors.torch import load_file
from tiny import TINY_CONFIG, make_dataset
from transformers import AutoModelForCausalLM

from evaluate import evaluate
from minionerec.common.files import InputError, read_json
from minionerec.evaluation.settings import EvaluateFlags
from minionerec.training.checkpoints import check_checkpoint_folder
from minionerec.training.settings import RLFlags, SFTFlags
from minionerec.training.sharded import check_engine, check_resumable
from rl import rl
from sft import sft

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: bash scripts/test_launch.sh"
)
ENGINES = [
    pytest.param("torchrun", marks=long_form),
    pytest.param("ddp", marks=long_form),
    "fsdp2",
    pytest.param("zero2", marks=needs_deepspeed),
    pytest.param("zero3", marks=needs_deepspeed),
]
# What the parameters of a layer are at the first step: their class, and the share of them that a rank holds.
HELD = {"fsdp2": ("DTensor", 0.5), "zero3": ("ZeRO-3", 0.5)} | dict.fromkeys(
    ("torchrun", "ddp", "zero2"), ("Parameter", 1)
)
ENGINE_NAMES = {"torchrun": "DDP", "ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


def read_weights(folder):
    """The exported weights, from a folder that loads as a plain model."""
    final = Path(folder) / "final_checkpoint"
    model = AutoModelForCausalLM.from_pretrained(final)
    assert all(bool(torch.isfinite(weight).all()) for weight in model.parameters())
    return load_file(final / "model.safetensors")


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def assert_engine(seen, engine):
    """What every rank saw of its parameters at the first step is what the engine makes of them."""
    kind, share = HELD[engine]
    for rank in range(2):
        parameters = read_json(seen / f"{rank}.json")["parameters"]
        held = {name: value for name, value in parameters.items() if "layers.0.self_attn.q_proj" in name}
        assert held
        for found, local, whole in held.values():
            assert found == kind and local == share * whole


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Flags of both commands on a dataset with an odd number of validation rows, and two bases trained by one process.

    Their outputs are folder/tied and folder/untied.
    """
    folder = tmp_path_factory.mktemp("sharded")
    paths = make_dataset(folder / "data")
    rows = Path(paths["eval_file"]).read_text().splitlines(keepends=True)
    Path(paths["eval_file"]).write_text("".join(rows[: len(rows) - len(rows) % 2]))  # the first is the heading
    data = {name: paths[name] for name in ("train_file", "eval_file", "sid_index_path", "item_meta_path")}
    shared = {
        "num_epochs": 2,
        "batch_size": 32,
        "micro_batch_size": 4,
        "best_by": "HR@10",
        "early_stopping_patience": 9,
    }
    # With this seed RL finds a checkpoint that beats the tied base, with and without adapters, so that it exports it.
    scratch = data | shared | {"train_from_scratch": True, "learning_rate": 3e-3, "seed": 3}
    bases = {}
    for name, tied in (("tied", True), ("untied", False)):
        config = folder / f"{name}.json"
        config.write_text(json.dumps({**TINY_CONFIG, "tie_word_embeddings": tied}))
        bases[name] = str(config)
        flags = scratch | {"seed": 3 if tied else 42}
        sft(SFTFlags(base_model=str(config), output_dir=str(folder / name), **flags))
    rl_flags = {name: paths[name] for name in ("train_file", "eval_file", "info_file")} | {
        "model_path": str(folder / "tied" / "final_checkpoint"),
        "max_steps": 4,
        "learning_rate": 3e-4,
        "num_generations": 8,
        "reward_type": ["rule"],
        "eval_step": 2,
        "test_beam": 10,
        "eval_batch_size": 20,
    }
    return SimpleNamespace(folder=folder, data=data, shared=shared, scratch=scratch, rl=rl_flags, bases=bases)


def as_texts(flags):
    return {name: ",".join(value) if isinstance(value, list) else value for name, value in flags.items()}


def resume_with_another_number(engine, script, flags, killed, expected):
    """A copy of a killed run goes on with one process to the expected weights.

    Or it is said why not: ZeRO refuses; RL, whose accumulation follows the number of processes, begins anew.
    """
    run = Path(flags["output_dir"])
    shutil.copytree(run, killed)
    done = launch(engine, flags, script=script, processes=1)
    if script == "rl.py":
        assert "[rl] doing it again, changed: gradient_accumulation_steps: " in done.stdout, done.stdout
    elif engine.startswith("zero"):
        assert done.returncode != 0 and "written by 2 processes of ZeRO" in done.stderr, done.stderr[-3000:]
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert largest_difference(read_weights(expected), read_weights(run)) < 1e-5
    shutil.rmtree(run)
    shutil.copytree(killed, run)


def kill_and_resume(engine, script, flags, step, expected, folder, **environment):
    """A run that is killed before a step and goes on: the finished second launch, and what of the first was seen."""
    dying = {"DIE_ON_RANK": "1", "DIE_AT_STEP": str(step), "DIE_HOW": "kill"}
    killed = launch(engine, flags, script=script, **environment, **dying)
    assert killed.returncode != 0 and not (Path(flags["output_dir"]) / "final_checkpoint").exists()
    if LONG and (script == "sft.py" or engine == "ddp"):
        resume_with_another_number(engine, script, flags, folder / "killed", expected)
    done = launch(engine, flags, script=script, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("an earlier run was cut off") == 1
    assert done.stdout.count(f"[launch] 2 processes, engine: {ENGINE_NAMES[engine]}") == 1
    return done, killed.seen


@pytest.mark.parametrize("engine", ENGINES)
def test_sft_gives_the_weights_of_one_process_also_after_a_kill(toy, tmp_path, engine):
    """Ranks make unequal numbers of forward passes; the run is killed in its second epoch and goes on."""
    flags = toy.scratch | {"base_model": toy.bases["tied"], "output_dir": tmp_path / "run"}
    epoch = read_json(toy.folder / "tied" / "sft.stage.json")["results"]["steps"] // 2
    expected = toy.folder / "tied"
    done, seen = kill_and_resume(engine, "sft.py", flags, epoch + 1, expected, tmp_path, EXTRA_FORWARDS="1")
    assert_engine(seen, engine)
    difference = largest_difference(read_weights(expected), read_weights(tmp_path / "run"))
    assert difference < 1e-5
    note_cell(engine, "sft.py", difference, done)


def assert_start_is_beaten(one, two):
    """Both runs export what they trained, not their start, and measured the same."""
    results = [read_json(folder / "rl.stage.json")["results"] for folder in (one, two)]
    assert results[0] == results[1]
    (best,) = [name for name in results[0] if name.endswith(" best")]
    assert results[0][best] > results[0][best.replace(" best", " at start")]


@pytest.fixture(scope="module")
def one_rl(toy):
    rl(RLFlags(**toy.rl, train_batch_size=16, output_dir=str(toy.folder / "rl")))
    return toy.folder / "rl"


@pytest.mark.parametrize("engine", ENGINES)
def test_rl_gives_the_weights_of_one_process(toy, one_rl, tmp_path, engine):
    """In the long form also after a kill."""
    flags = as_texts(toy.rl) | {"train_batch_size": 8, "output_dir": tmp_path / "run"}
    if LONG:
        done, seen = kill_and_resume(engine, "rl.py", flags, 3, one_rl, tmp_path, EXTRA_FORWARDS="1")
    else:
        done = launch(engine, flags, script="rl.py", EXTRA_FORWARDS="1")
        seen = done.seen
    assert done.returncode == 0, done.stderr[-3000:]
    assert_engine(seen, engine)
    start, one, two = (read_weights(folder) for folder in (toy.folder / "tied", one_rl, tmp_path / "run"))
    difference = largest_difference(one, two)
    assert difference < 1e-5
    note_cell(engine, "rl.py", difference, done)
    assert largest_difference(start, one) > 1e-4
    assert_start_is_beaten(one_rl, tmp_path / "run")


@long_form
@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_gives_the_lists_of_one_process(toy, tmp_path, engine):
    flags = {name: toy.rl[name] for name in ("train_file", "info_file")}
    flags |= {"test_data_path": toy.rl["eval_file"], "num_beams": 20, "K": 10, "batch_size": 5}
    flags |= {"base_model": str(toy.folder / "tied" / "final_checkpoint")}
    evaluate(EvaluateFlags(**flags, result_json_data=str(tmp_path / "one.json")))
    done = launch(engine, flags | {"result_json_data": tmp_path / "two.json"}, script="evaluate.py")
    assert done.returncode == 0, done.stderr[-3000:]
    lists = [[row["predict"] for row in read_json(tmp_path / f"{name}.json")] for name in ("one", "two")]
    assert lists[0] == lists[1] and len(lists[0]) > 20
    note_cell(engine, "evaluate.py", "identical lists", done)


@long_form
@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_rl_that_does_not_beat_its_start_exports_the_start(toy, tmp_path, engine):
    flags = as_texts(toy.rl) | {"train_batch_size": 8, "output_dir": tmp_path, "learning_rate": 1e-12}
    done = launch(engine, flags, script="rl.py")
    assert done.returncode == 0 and "no checkpoint beat the SFT model" in done.stdout, done.stderr[-3000:]
    assert largest_difference(read_weights(toy.folder / "tied"), read_weights(tmp_path)) == 0


LORA = {"lora": True, "lora_rank": 2}
ADAPTERS = [
    ("fsdp2", "untied", LORA),
    pytest.param("fsdp2", "untied", {"freeze_LLM": True}, marks=long_form),
    pytest.param("torchrun", "tied", LORA, marks=long_form),
    pytest.param("ddp", "tied", LORA, marks=long_form),
    pytest.param("zero2", "tied", LORA, marks=[long_form, needs_deepspeed]),
    pytest.param("zero3", "untied", LORA, marks=[long_form, needs_deepspeed]),
    pytest.param("zero3", "tied", {"freeze_LLM": True}, marks=[long_form, needs_deepspeed]),
    pytest.param("zero3", "tied", LORA, marks=needs_deepspeed),
]


@pytest.mark.parametrize("engine, base, adapter", ADAPTERS)
def test_adapters_give_the_weights_of_one_process(toy, tmp_path, engine, base, adapter):
    """In the long form also after a kill, also with one process instead of two."""
    start = toy.folder / base
    flags = toy.data | toy.shared | adapter | {"num_epochs": 2 if LONG else 1, "learning_rate": 1e-3}
    flags |= {"base_model": str(start / "final_checkpoint"), "prompts": "compact"}
    one, two = tmp_path / "one", tmp_path / "two"
    sft(SFTFlags(**flags, output_dir=str(one)))
    flags |= {"output_dir": two}
    if LONG:
        step = read_json(one / "sft.stage.json")["results"]["steps"] // 2 + 1
        done, _ = kill_and_resume(engine, "sft.py", flags, step, one, tmp_path)
    else:
        done = launch(engine, flags, EXTRA_FORWARDS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    difference = largest_difference(read_weights(one), read_weights(two))
    assert difference < 1e-5 and largest_difference(read_weights(start), read_weights(one)) > 1e-4
    if adapter is LORA:
        note_cell(engine, "sft.py --lora True", difference, done)


@long_form
@pytest.mark.parametrize(
    "engine, base",
    [(name, "tied") for name in ("torchrun", "ddp")]
    + [("fsdp2", "untied")]
    + [pytest.param(name, "tied", marks=needs_deepspeed) for name in ("zero2", "zero3")],
)
def test_rl_with_adapters_gives_the_weights_of_one_process(toy, tmp_path, engine, base):
    """Also after a kill."""
    more = LORA | {"beta": 0.1, "learning_rate": 1e-4, "model_path": str(toy.folder / base / "final_checkpoint")}
    one, two = tmp_path / "one", tmp_path / "two"
    rl(RLFlags(**toy.rl | more, train_batch_size=16, output_dir=str(one)))
    flags = as_texts(toy.rl | more) | {"train_batch_size": 8, "output_dir": two}
    done, _ = kill_and_resume(engine, "rl.py", flags, 3, one, tmp_path)
    difference = largest_difference(read_weights(one), read_weights(two))
    assert difference < 1e-5
    assert_start_is_beaten(one, two)
    note_cell(engine, "rl.py --lora True", difference, done)


def test_fsdp2_refuses_adapters_on_a_tied_base(toy, tmp_path):
    flags = toy.data | {"base_model": toy.folder / "tied" / "final_checkpoint", "lora": True, "prompts": "compact"}
    done = launch("fsdp2", flags | {"output_dir": tmp_path, "batch_size": 32})
    assert done.returncode != 0 and "error: FSDP2 with --lora or --freeze_LLM" in done.stderr
    assert not (tmp_path / "final_checkpoint").exists()


def test_a_file_for_fsdp_is_refused_where_another_engine_starts(toy, tmp_path):
    flags = toy.scratch | {"base_model": toy.bases["tied"], "output_dir": tmp_path}
    done = launch("none", flags, file="config/accelerate/fsdp2_cpu.yaml")
    assert done.returncode != 0 and "asks for FSDP, but DDP started" in done.stderr


@needs_deepspeed
def test_the_published_file_works_by_its_published_name(toy, tmp_path):
    flags = toy.scratch | {"base_model": toy.bases["tied"], "output_dir": tmp_path, "num_epochs": 1}
    done = launch("none", flags, file="./config/zero2_opt.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "engine: ZeRO-2" in done.stdout


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("ddp", marks=long_form)])
def test_an_error_on_one_rank_ends_all_with_its_line_last(toy, tmp_path, engine):
    flags = toy.scratch | {"base_model": toy.bases["tied"], "output_dir": tmp_path}
    done = launch(engine, flags, DIE_ON_RANK="1", DIE_AT_STEP="1", DIE_HOW="error")
    assert done.returncode != 0 and "error on rank 1: rank 1 stops here" in find_last_line(done.stderr)
    assert "error on rank 0" not in done.stderr and "error: " not in done.stderr.replace("rank 1: ", "")


def pretend(kind, *, fsdp2=False, stage=2, processes=1):
    """What `check_engine` reads of an accelerator."""
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    named = {"is_fsdp2": fsdp2, "num_processes": processes, "state": state}
    return SimpleNamespace(distributed_type=SimpleNamespace(value=kind), **named)


def test_engines_are_named_and_those_that_would_train_wrongly_are_refused(monkeypatch):
    plain = torch.nn.Linear(1, 1)
    assert check_engine(pretend("NO"), plain, moving_reference=True) == "one process"
    with pytest.raises(InputError, match="write fsdp_version: 2"):
        check_engine(pretend("FSDP"), plain, moving_reference=False)
    for accelerator in (pretend("FSDP", fsdp2=True), pretend("DEEPSPEED", stage=3)):
        with pytest.raises(InputError, match="--sync_ref_model True: not under"):
            check_engine(accelerator, plain, moving_reference=True)
    assert check_engine(pretend("DEEPSPEED", stage=2), plain, moving_reference=True) == "ZeRO-2"
    with pytest.raises(InputError, match="announced 1 processes, but 2"):
        check_engine(pretend("MULTI_CPU", processes=2), plain, moving_reference=False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="asks for DeepSpeed, but one process started"):
        check_engine(pretend("NO"), plain, moving_reference=False)


@pytest.mark.parametrize(
    "how, expected",
    [
        ("fsdp2", "accelerate has no FSDP on CPUs"),
        ("ddp", "say with PROCESSES how many"),
        ("gpu", "no GPU that torch can use"),
        ("unknown", "expected auto, cpu, gpu"),
    ],
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="says what it says on a machine without GPU")
def test_scripts_refuse_an_engine_that_the_machine_does_not_have(how, expected):
    environment = {**os.environ, "MINIONEREC_PYTHON": sys.executable, "LAUNCH": how}
    environment.pop("PROCESSES", None)
    script = ["bash", str(ROOT / "scripts/sft.sh"), "--base_model", "none"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    said = [line for line in done.stderr.splitlines() if not line.startswith("[env] ")]
    assert done.returncode == 2 and len(said) == 1 and expected in said[0]


def test_a_checkpoint_of_another_engine_is_refused(tmp_path):
    plain, fsdp, zero = (tmp_path / name for name in ("plain", "fsdp", "zero"))
    (zero / "global_step4").mkdir(parents=True)
    (zero / "latest").write_text("global_step4")
    for rank in range(2):
        for part in ("model", "optim"):
            (zero / "global_step4" / f"zero_pp_rank_{rank}_mp_rank_00_{part}_states.pt").touch()
    fsdp.mkdir()
    (fsdp / "optimizer.bin").touch()
    plain.mkdir()
    (plain / "optimizer.pt").touch()
    for folder, engine, world in (
        (plain, "one process", 1),
        (plain, "DDP", 3),
        (fsdp, "FSDP2", 4),
        (zero, "ZeRO-3", 2),
    ):
        check_resumable(folder, engine, world)
    refused = ((plain, "FSDP2", 2), (plain, "ZeRO-2", 2), (fsdp, "DDP", 2), (zero, "ZeRO-3", 4), (zero, "ZeRO-2", 2))
    for folder, engine, world in refused:
        with pytest.raises(InputError, match="launch it as before"):
            check_resumable(folder, engine, world)


def test_an_export_that_is_not_whole_or_not_finite_is_refused(toy, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(toy.folder / "untied" / "final_checkpoint")
    state = model.state_dict()
    model.save_pretrained(tmp_path / "good")
    check_checkpoint_folder(tmp_path / "good")
    name = "model.layers.0.mlp.up_proj.weight"
    for number, (changed, expected) in enumerate(
        [
            ({name: torch.zeros(0)}, "loaded again"),
            ({name: torch.full_like(state[name], float("nan"))}, "not finite"),
            ({name: None}, "not those of its config"),
        ]
    ):
        folder = tmp_path / str(number)
        whole = {key: value for key, value in (state | changed).items() if value is not None}
        model.save_pretrained(folder, state_dict=whole)
        with pytest.raises(InputError, match=expected):
            check_checkpoint_folder(folder)


def test_no_file_for_accelerate_names_a_number_of_gpus():
    files = [*(ROOT / "config/accelerate").glob("*.yaml"), ROOT / "config/zero2_opt.yaml"]
    assert len(files) == 9
    for file in files:
        if file.stem not in ("cpu", "gpu"):  # one process
            assert "num_processes:" not in file.read_text()
