"""Every command and every shell script explains itself, at once and without side effects; every recipe can be read."""

import ast
import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minionerec.common.cli import format_help, read_config

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "pandas", "numpy", "sklearn", "scipy", "accelerate", "fire", "yaml"}
RECIPES = sorted((ROOT / "config" / "recipes").glob("*.yaml"))
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.sh") if path.read_text().startswith("#!"))


def find_commands() -> dict[str, tuple[str, str]]:
    """{module of a command: (module of its flags class, name of the class)}, read from its call of `parse_flags`."""
    commands = {}
    for folder in ("", "rq", "rq/text2emb", "data_process", "scripts", "benchmarks"):
        for path in sorted((ROOT / folder).glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
            names = [
                call.args[0].id for call in calls if isinstance(call.func, ast.Name) and call.func.id == "parse_flags"
            ]
            module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            for name in names[:1]:
                imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
                origins = [node.module for node in imports if name in {alias.name for alias in node.names}]
                commands[module] = (origins[0] if origins else module, name)
    return commands


COMMANDS = find_commands()


def load_flags_class(command: str) -> type:
    module, name = COMMANDS[command]
    return getattr(importlib.import_module(module), name)


def run(*command: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "MINIONEREC_PYTHON": sys.executable, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **options)


def test_the_commands_are_these():
    assert set(COMMANDS) == {
        *("sft", "rl", "evaluate", "recommend", "baselines", "sasrec", "convert_dataset"),
        *(
            f"rq.{name}"
            for name in (
                "rqvae",
                "rqkmeans_faiss",
                "rqkmeans_constrained",
                "rqkmeans_plus",
                "quality",
                "explain",
                "behaviour",
            )
        ),
        *("rq.generate_indices", "rq.generate_indices_plus", "rq.text2emb.amazon_text2emb"),
        *(f"data_process.{name}" for name in ("amazon18_data_process", "join_data_process", "published_data_process")),
        *("data_process.csv_data_process", "data_process.recbole_data_process", "data_process.validate"),
        *(
            f"scripts.{name}"
            for name in (
                "benchmark_table",
                "compare",
                "demo",
                "model_card",
                "plan",
                "plots",
                "recipe",
            )
        ),
        *(f"scripts.{name}" for name in ("fault_runs", "fuzz_readers", "report", "serve_vllm", "sid_table", "summary")),
        *(f"scripts.{name}" for name in ("stand_in_model", "stand_in_network", "stand_in_sids")),
        *(f"benchmarks.bench_{name}" for name in ("balanced_kmeans", "data", "decode", "dtype", "grpo", "plan")),
        *(f"benchmarks.bench_{name}" for name in ("batch", "demo", "evaluation", "sft", "stream", "trie", "vllm")),
        "benchmarks.gpu_check",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_explained(command):
    flags_class = load_flags_class(command)
    text = format_help(flags_class, "About.")
    described = {match.group(1) for match in re.finditer(r"^  --(\w+)", text, re.MULTILINE)}
    for field in dataclasses.fields(flags_class):
        assert field.metadata.get("help", "").strip(), f"--{field.name} has no help"
        assert field.name in described
        assert all(f"--{alias}" in text for alias in field.metadata["aliases"])


HELP_OF_ALL = """
import contextlib, io, runpy, sys
for command in sys.argv[1:]:
    sys.argv[:] = [command, "--help"]
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            runpy.run_module(command, run_name="__main__", alter_sys=True)
        print(command, "went on after --help")
    except SystemExit as stopped:
        if stopped.code or "  --config " not in text.getvalue():
            print(command, "has no help")
    loaded = sorted(HEAVY & set(sys.modules))
    if loaded:
        print(command, "loads", *loaded)
        break
"""


def test_help_and_wrong_flags_wait_for_no_import():
    """Before its flags are parsed a command has loaded nothing that takes seconds; all of them in one process."""
    done = run(sys.executable, "-c", f"HEAVY = {HEAVY!r}{HELP_OF_ALL}", *COMMANDS, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == ""


@pytest.mark.parametrize("command", [["sft.py"], ["-m", "rq.rqvae"]])
def test_help_goes_to_standard_output(command):
    done = run(sys.executable, *command, "--help", cwd=ROOT)
    assert done.returncode == 0 and done.stderr == ""
    name = command[-1].removesuffix(".py")
    assert name in done.stdout.split("\n  --")[0] and "--config" in done.stdout
    assert all(f"  --{field.name} " in done.stdout for field in dataclasses.fields(load_flags_class(name)))


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A copy of the scripts whose env.sh would be noticed, beside what their --help reads."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("rq", "minionerec", "benchmarks", "data.py", "sft.py", "rl.py", "evaluate.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "scripts" / "env.sh").write_text("echo the environment is made >&2; exit 3\n")
    return folder / "scripts"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_help(name, scripts, tmp_path):
    before = sorted(path for path in scripts.parent.rglob("*"))
    done = run("bash", str(scripts / name), "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert f"bash scripts/{name}" in done.stdout and not done.stdout.startswith(("#", "!"))
    assert sorted(path for path in scripts.parent.rglob("*")) == before and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, flags, message",
    [
        (
            "run_category.sh",
            ["--data_root", "x", "--epochs", "3"],
            "unknown flag --epochs; known: --data_root --category",
        ),
        ("run_category.sh", ["--data_root", "x", "--sft"], "--sft: a value is missing"),
        ("run_category.sh", ["--category", "x"], "--data_root is missing"),
        ("baselines.sh", ["--data_root=x"], "--category is missing"),
        ("baselines.sh", ["--sft", "x"], "unknown flag --sft; known: --data_root --category --output_dir --seed"),
        ("baselines.sh", ["toy"], "unknown flag toy"),
        ("quickstart.sh", ["--seed", "7"], "unexpected argument --seed"),
        ("lint.sh", ["sft.py"], "unexpected argument sft.py"),
    ],
)
def test_a_wrong_flag_ends_a_script_before_anything_is_installed(name, flags, message, scripts):
    done = run("bash", str(scripts / name), *flags)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_its_command_and_holds_its_flags(path):
    comment = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert path.read_text(encoding="utf-8").startswith("# ") and comment
    match = re.search(r"python (\w+)\.py|python -m ([\w.]+)|\b(rq\.\w+)", "\n".join(comment))
    assert match, "its comment names no command"
    texts = read_config(str(path), load_flags_class(next(filter(None, match.groups()))))
    assert texts and not any(name.endswith(("_file", "_dir", "_path")) for name in texts)
