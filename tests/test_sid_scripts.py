"""The SID shell scripts end to end on a few hundred items, and the table over their folders."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from minionerec.common.cli import parse_flags
from minionerec.common.embeddings import save_embeddings
from minionerec.common.files import InputError, read_json
from rq.settings import RQKMeansPlusFlags, RQVAEFlags
from scripts.sid_table import SidTableFlags, tabulate_sids

ROOT = Path(__file__).parent.parent


def run(script, *flags):
    environment = {**os.environ, "MINIONEREC_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "scripts" / script), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_scripts_write_index_report_and_table(tmp_path, capsys):
    random = np.random.default_rng(0)
    data = tmp_path / "toy.emb-x-td.npy"
    save_embeddings(
        data, random.standard_normal((300, 8)).astype(np.float32), [str(i) for i in range(300)], "x", ["title"]
    )
    short = ["--epochs", "4", "--eval_step", "2", "--layers", "8", "--warmup_epochs", "1"]
    calls = {
        "rqkmeans_plus": [
            *[*short, "--checkpoint", "final_model.pth", "--seed", "7"],
            *["--kmeans", "--codebook_size 64 --num_levels 2"],
        ],
        "rqvae": [*short, "--num_emb_list", "16", "8", "8", "--e_dim", "4"],
    }
    with ThreadPoolExecutor() as pool:
        done = {
            name: pool.submit(run, f"{name}.sh", "--data_path", str(data), "--output_dir", str(tmp_path / name), *flags)
            for name, flags in calls.items()
        }
    for name, future in done.items():
        assert future.result().returncode == 0, future.result().stderr
        index = read_json(tmp_path / name / "toy.index.json")
        assert len(set(map(tuple, index.values()))) == 300
        assert (tmp_path / name / "toy.index.quality.png").is_file()
    assert "final_model.pth" in read_json(tmp_path / "rqkmeans_plus" / "toy.index.stage.json")["settings"]["ckpt_path"]

    tabulate_sids(SidTableFlags(run_dir=str(tmp_path)))
    rows = read_json(tmp_path / "sids.json")
    assert list(rows) == ["rqkmeans_plus", "rqkmeans_plus/kmeans", "rqvae"]
    folder = tmp_path / "rqkmeans_plus"
    records = [
        folder / "toy.index.stage.json",
        folder / "rqkmeans_plus" / "rqkmeans_plus.stage.json",
        folder / "kmeans" / "toy.index.stage.json",
    ]
    assert rows["rqkmeans_plus"]["seconds"] == pytest.approx(sum(read_json(record)["seconds"] for record in records))
    assert all(row["collisions_after"] == 0 and row["items"] == 300 for row in rows.values())
    assert rows["rqkmeans_plus"]["codes_used"] == rows["rqkmeans_plus/kmeans"]["codes_used"] == "64/64"
    assert [read_json(record)["settings"]["seed"] for record in records[1:]] == [7, 7]
    assert "rqkmeans_plus/kmeans" in capsys.readouterr().out


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("rqvae.sh", [], "error: --data_path is missing"),
        ("rqvae.sh", ["--data_path", "x.npy"], "error: --output_dir is missing"),
        ("rqkmeans_faiss.sh", ["--checkpoint", "x"], "error: unknown flag --checkpoint"),
        ("rqvae.sh", ["--kmeans", "x"], "error: unknown flag --kmeans"),
        ("rqkmeans_constrained.sh", ["--data_path"], "error: --data_path: a value is missing"),
        ("compare_sids.sh", ["--data_path", "x.npy", "--output_dir", "y", "--epochs", "3"], "error: unknown flags"),
    ],
)
def test_wrong_flags_of_the_scripts(script, flags, message):
    result = run(script, *flags)
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith(message)


@pytest.mark.parametrize(
    "script, command",
    [
        ("rqvae", "rq.rqvae"),
        ("rqkmeans_faiss", "rq.rqkmeans_faiss"),
        ("rqkmeans_constrained", "rq.rqkmeans_constrained"),
        ("rqkmeans_plus", "rq.rqkmeans_plus"),
        ("compare_sids", None),
    ],
)
def test_help_of_the_scripts_runs_nothing_else(tmp_path, script, command):
    folder = tmp_path / "copy"
    for part in ("scripts", "rq", "minionerec/common"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name != "MINIONEREC_PYTHON"}
    call = ["bash", str(folder / "scripts" / f"{script}.sh"), "--data_path", "x.npy", "--help"]
    result = subprocess.run(call, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert result.returncode == 0 and result.stderr == ""
    assert f"  bash scripts/{script}.sh --data_path" in result.stdout
    assert ("--codebook_size" in result.stdout or "--num_emb_list" in result.stdout) == (command is not None)
    assert command is None or f"Flags of {command}:" in result.stdout
    assert not (folder / ".venv").exists()


def test_recipes_of_the_scripts_are_flags_of_their_commands(monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["--data_path", "x.npy", "--ckpt_dir", "ck"]
    flags = parse_flags(RQVAEFlags, ["--config", "config/recipes/movielens_rqvae.yaml", *arguments])
    assert (flags.num_emb_list, flags.layers, flags.e_dim, flags.lr) == ([128, 128, 128], [256], 64, 1e-3)
    flags = parse_flags(RQVAEFlags, ["--config", "config/recipes/compare_sids_rqvae.yaml", *arguments])
    assert (flags.layers, flags.epochs, flags.revive_every, flags.lr) == ([512, 256, 128], 600, 20, 1e-3)
    arguments += ["--pretrained_codebook_path", "x.npz"]
    flags = parse_flags(RQKMeansPlusFlags, ["--config", "config/recipes/compare_sids_rqkmeans_plus.yaml", *arguments])
    assert (flags.layers, flags.epochs, flags.batch_size, flags.lr) == ([512, 256], 200, 512, 1e-3)


def test_table_of_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match="no quality report below it"):
        tabulate_sids(SidTableFlags(run_dir=str(tmp_path)))
