"""Two processes against one: same global batch, same final weights."""

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from tiny import make_dataset, write_config

ROOT = Path(__file__).parent.parent


def run(script, processes, flags):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
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
    two = run("sft.py", 2, sft | {"output_dir": tmp_path / "sft2"})
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
    two = run("rl.py", 2, rl | {"output_dir": tmp_path / "rl2", "train_batch_size": 16})
    assert largest_difference(one, two) < 1e-5
    assert largest_difference(before, one) > 1e-4  # it did learn
