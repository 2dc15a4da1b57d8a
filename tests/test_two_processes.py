"""Two processes against one: same global batch, same final weights; same predictions, also after a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import make_dataset, write_config

from evaluate import evaluate
from minionerec.common.files import read_json
from minionerec.evaluation.settings import EvaluateFlags
from minionerec.evaluation.shards import format_batch

ROOT = Path(__file__).parent.parent


def launch(script, processes, flags):
    """The finished process of a script under 1 or 2 processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        check=False,
    )


def run(script, processes, flags):
    done = launch(script, processes, flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(Path(flags["output_dir"]) / "final_checkpoint" / "model.safetensors")


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def test_sft_and_rl_give_the_same_weights_on_two_processes(tmp_path):
    paths = make_dataset(tmp_path)
    sft = {name: paths[name] for name in ("train_file", "eval_file", "sid_index_path", "item_meta_path")} | {
        "base_model": write_config(tmp_path),
        "train_from_scratch": True,
        "num_epochs": 2,
        "batch_size": 32,
        "micro_batch_size": 8,
        "learning_rate": 3e-3,
    }
    one = run("sft.py", 1, sft | {"output_dir": tmp_path / "sft1"})
    # Rows in memory against rows on disk, which one of the processes puts there.
    mapped = {"streaming": True, "workers": 1}
    two = run("sft.py", 2, sft | mapped | {"output_dir": tmp_path / "sft2"})
    assert largest_difference(one, two) < 1e-5
    rl = {name: paths[name] for name in ("train_file", "eval_file", "info_file")} | {
        "model_path": tmp_path / "sft1" / "final_checkpoint",
        "max_steps": 4,
        "learning_rate": 1e-3,
        "num_generations": 8,
        "test_during_training": False,
        "reward_type": "rule",
    }
    before = one
    one = run("rl.py", 1, rl | {"output_dir": tmp_path / "rl1", "train_batch_size": 32})
    two = run("rl.py", 2, rl | mapped | {"output_dir": tmp_path / "rl2", "train_batch_size": 16})
    assert largest_difference(one, two) < 1e-5
    assert largest_difference(before, one) > 1e-4  # it did learn
    # A mean over tokens, two updates a rollout, adapters, groups left out (a process may have none), shared validation.
    more = {"dapo": True, "num_iterations": 2, "lora": True, "lora_rank": 2, "mask_all_zero": True, "beta": 0.1}
    more |= {"test_during_training": True, "eval_step": 2, "train_batch_size": 8, "test_beam": 10}
    one = run("rl.py", 1, rl | more | {"output_dir": tmp_path / "rl3", "gradient_accumulation_steps": 4})
    two = run("rl.py", 2, rl | more | {"output_dir": tmp_path / "rl4", "gradient_accumulation_steps": 2})
    assert largest_difference(one, two) < 1e-5
    results = [read_json(tmp_path / name / "rl.stage.json")["results"] for name in ("rl3", "rl4")]
    assert results[0] == results[1] and max(value for name, value in results[0].items() if "best" in name) > 0


# evaluate.py, in which rank 1 is killed in its second batch
KILLED = """
import os, signal
from minionerec.common.cli import parse_flags, run_command
from minionerec.evaluation import predict
from minionerec.evaluation.settings import EvaluateFlags
from minionerec.evaluation.shards import format_batch
from evaluate import evaluate

rank_sids, done = predict.rank_sids, []


def dying(*args, **kwargs):
    if os.environ["RANK"] == "1" and done:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(1)
    return rank_sids(*args, **kwargs)


predict.rank_sids = dying
run_command(evaluate, parse_flags(EvaluateFlags), shared=True)
"""


def assert_same_result(folder, expected):
    found, theirs = (read_json(path / "test.json") for path in (folder, expected))
    assert [{**row, "score": 0} for row in found] == [{**row, "score": 0} for row in theirs]
    for ours, other in zip(found, theirs, strict=True):
        assert ours["score"] == pytest.approx(other["score"], abs=1e-5)
    assert read_json(folder / "test.metrics.json") == read_json(expected / "test.metrics.json")
    # A command keeps what it printed; what is called in this process prints to the test.
    assert {path.name for path in folder.iterdir()} - {"log.txt"} == {path.name for path in expected.iterdir()}


def test_evaluation_gives_the_same_on_two_processes_and_after_a_kill(trained, tmp_path):
    flags = {
        **{name: trained.paths[name] for name in ("train_file", "info_file", "test_data_path")},
        "base_model": trained.checkpoint,
        "num_beams": 20,
        "K": 10,
        "batch_size": 3,
    }

    def result(name):
        return {"result_json_data": str(tmp_path / name / "test.json")}

    evaluate(EvaluateFlags(**flags, **result("one")))
    two = launch("evaluate.py", 2, flags | result("two"))
    assert two.returncode == 0, two.stderr[-3000:]
    assert two.stdout.count("item level") == 1  # one process prints
    assert_same_result(tmp_path / "two", tmp_path / "one")

    (tmp_path / "killed.py").write_text(KILLED)
    killed = launch(tmp_path / "killed.py", 2, flags | result("cut"))
    assert killed.returncode != 0 and not (tmp_path / "cut" / "test.json").exists()  # and rank 0 does not wait for ever
    finished = set()
    for rank in range(2):
        path = tmp_path / "cut" / "test.partial" / f"rank{rank}.jsonl"
        batches = [json.loads(line) for line in path.read_text().splitlines()]
        finished |= {row for batch in batches for row in batch["rows"]}
        for batch in batches:  # a mark that a row done again would not have
            for row in batch["results"]:
                row["score"][0] += 1
        path.write_bytes(b"".join(format_batch(batch["rows"], batch["results"]) for batch in batches))
    evaluate(EvaluateFlags(**flags, **result("cut")))
    marked = read_json(tmp_path / "cut" / "test.json")
    for number, (ours, other) in enumerate(zip(marked, read_json(tmp_path / "one" / "test.json"), strict=True)):
        ours["score"][0] = round(ours["score"][0] - (number in finished), 6)
        assert ours["score"] == pytest.approx(other["score"], abs=1e-5)
    assert 3 < len(finished) < len(marked)
    (tmp_path / "cut" / "test.json").write_text(json.dumps(marked))
    assert_same_result(tmp_path / "cut", tmp_path / "one")


ENDING = """
import torch

from minionerec.common.cli import run_command
from minionerec.common.processes import process_state


def exchange(_flags):
    state = process_state()
    torch.distributed.all_reduce(torch.ones(3))
    print(f"in a group: {torch.distributed.is_initialized()}, {state.num_processes}")


run_command(exchange, None, shared=True)
print(f"after it: {torch.distributed.is_initialized()}")
"""


def test_a_command_leaves_the_group_before_the_interpreter_ends(tmp_path):
    (tmp_path / "ending.py").write_text(ENDING)
    done = launch(tmp_path / "ending.py", 2, {})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("in a group: True, 2") == done.stdout.count("after it: False") == 2
