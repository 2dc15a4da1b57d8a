"""The commands as users run them: wrong input ends with one clear last line on stderr, no traceback and status 2.

A process of its own takes seconds to load torch and transformers: two cases get one, the others run the script in here.
"""

import json
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def arguments(flags):
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def assert_one_clear_line(status, errors, said):
    assert status == 2 and "Traceback" not in errors
    last = [line for line in errors.splitlines() if line.strip()][-1]
    assert last.startswith("error: ") and all(part in last for part in said)


@pytest.fixture
def flags(trained, tmp_path):
    """Complete and right flags of the scripts, and files that are wrong in one place."""
    paths = trained.paths

    def pick(*names):
        return {name: paths[name] for name in names}

    lines = Path(paths["info_file"]).read_text().splitlines()
    index = json.loads(Path(paths["sid_index_path"]).read_text())
    (tmp_path / "less.index.json").write_text(json.dumps({item: index[item] for item in index if item != "7"}))
    (tmp_path / "twice.txt").write_text("\n".join(lines + [lines[3].rsplit("\t", 1)[0] + "\t99"]) + "\n")
    (tmp_path / "unknown.txt").write_text("\n".join(lines + ["<e_1><f_1>\tNew\t99"]) + "\n")
    broken = Path(paths["train_file"]).read_text().splitlines()
    broken[2] = broken[2].replace("[", "(", 1)
    (tmp_path / "broken.csv").write_text("\n".join(broken) + "\n")
    return {
        "sft.py": {
            **pick("train_file", "eval_file", "sid_index_path", "item_meta_path"),
            "base_model": trained.folder / "tiny.json",
            "train_from_scratch": True,
            "output_dir": tmp_path / "sft",
        },
        "rl.py": {
            **pick("train_file", "eval_file", "info_file"),
            "model_path": trained.checkpoint,
            "output_dir": tmp_path / "rl",
        },
        "evaluate.py": {
            **pick("train_file", "info_file", "test_data_path"),
            "base_model": trained.checkpoint,
            "num_beams": 10,
            "K": 10,
            "result_json_data": tmp_path / "test.json",
        },
        "baselines.py": {**pick("train_file", "info_file", "test_data_path"), "output_dir": tmp_path / "baselines"},
    }


def test_in_a_process_of_its_own(flags, tmp_path):
    cases = [
        ("sft.py", {**flags["sft.py"], "bogus": 1}),
        ("evaluate.py", {**flags["evaluate.py"], "info_file": tmp_path / "unknown.txt"}),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(case):
        return subprocess.run(
            [sys.executable, case[0], *arguments(case[1])], cwd=ROOT, capture_output=True, text=True, env=environment
        )

    with ThreadPoolExecutor(2) as pool:
        unknown_flag, unknown_token = pool.map(start, cases)
    assert_one_clear_line(unknown_flag.returncode, unknown_flag.stderr, ["unknown flag --bogus"])
    assert len(unknown_flag.stderr.splitlines()) == 1 and unknown_flag.stdout == ""
    assert_one_clear_line(unknown_token.returncode, unknown_token.stderr, ["does not know the SID token <e_1>"])
    assert not (tmp_path / "sft").exists() and not (tmp_path / "test.json").exists()


@pytest.mark.parametrize(
    "script, flag, value, said",
    [
        ("sft.py", "train_file", "nowhere.csv", ["nowhere.csv: no such file"]),
        ("sft.py", "num_epochs", "many", ["--num_epochs: expected int, got 'many'"]),
        ("sft.py", "sid_index_path", "less.index.json", ["less.index.json", "item 7 is not in", "train.csv, row "]),
        (
            "sft.py",
            "train_file",
            "broken.csv",
            ["broken.csv, line 3, column history_item_title: expected a list literal"],
        ),
        ("rl.py", "info_file", "twice.txt", ["twice.txt, line 31: SID", "line 4 already", "--shared_sids True"]),
        ("evaluate.py", "info_file", "twice.txt", ["twice.txt, line 31: SID", "line 4 already", "--shared_sids True"]),
        ("evaluate.py", "K", "11", ["--K 11: cannot exceed --num_beams 10"]),
        ("baselines.py", "info_file", "twice.txt", ["twice.txt, line 31"]),
        ("baselines.py", "sid_index_path", "less.index.json", ["unknown flag --sid_index_path"]),
    ],
)
def test_wrong_input(flags, tmp_path, monkeypatch, capfd, script, flag, value, said):
    value = tmp_path / value if (tmp_path / value).exists() else value
    monkeypatch.setattr(sys, "argv", [script, *arguments({**flags[script], flag: value})])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert_one_clear_line(stop.value.code, capfd.readouterr().err, said)
    assert not any(path.suffix == ".safetensors" for path in tmp_path.rglob("*"))


def test_a_right_command(flags, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments(flags["evaluate.py"])])
    runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    output = capfd.readouterr().out
    assert "num_beams=10" in output and "illegal" in output and str(tmp_path / "test.metrics.json") in output
    assert json.loads((tmp_path / "test.metrics.json").read_text())["illegal"] == 0
