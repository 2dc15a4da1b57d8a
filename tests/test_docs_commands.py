"""Every command of a code block says what runs it or what it needs, and is read by the command that it names."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("docs/zh/*.md")])
BLOCK = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
README_BLOCKS = {  # its first commands -> what runs them; the page has no bytes to spare for comments
    "bash scripts/quickstart.sh": "needs: half an hour, and a package index once",
    "python -m data_process.recbole_data_process": "tested: "
    + ", ".join(
        f"tests/test_{name}.py"
        for name in (
            *("data_process", "text2emb", "rqvae", "generate_indices", "convert_dataset", "sft", "rl", "evaluate"),
            *("baselines", "sasrec", "compare", "report", "recommend", "commands_help", "validate"),
        )
    ),
    "bash scripts/run_category.sh": "needs: the published files in DIR, and hours",
}
LAUNCHERS = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:accelerate launch|torchrun) (?:--\w+ \S+ )*(?=-m |\w+\.py)")
VARIABLES = re.compile(r"^(?:[A-Z_]+=\S+ )+")


def join_lines(block: str) -> list[str]:
    """The commands of a block: continued lines joined, comments left out, launchers replaced by python."""
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    lines = [LAUNCHERS.sub("python ", line.strip()) for line in lines]
    return [VARIABLES.sub("", line).removesuffix(" &") for line in lines if line]


def list_blocks(page: Path) -> list[tuple[str, list[str]]]:
    """(mark, commands) of the shell blocks of a page."""
    return [(mark, join_lines(text)) for mark, text in BLOCK.findall(page.read_text(encoding="utf-8"))]


def list_marked() -> list[tuple[str, str, list[str]]]:
    """(page, mark, commands) of all shell blocks, README included."""
    blocks = [(page.relative_to(ROOT).as_posix(), *block) for page in PAGES for block in list_blocks(page)]
    for _, commands in list_blocks(ROOT / "README.md"):
        mark = next((mark for begin, mark in README_BLOCKS.items() if commands[0].startswith(begin)), "")
        blocks.append(("README.md", mark, commands))
    return blocks


def name_of(command: str) -> str:
    """The last part of the name of what a command runs: `rqvae` of `python -m rq.rqvae`, `pipeline` of pipeline.sh."""
    words = command.split()
    name = words[2] if words[1] == "-m" else words[1]
    return name.removesuffix(".py").removesuffix(".sh").replace("/", ".").rpartition(".")[2]


def test_every_block_says_what_runs_it_or_what_it_needs():
    wrong = []
    for page, mark, commands in list_marked():
        kind, _, what = mark.partition(": ")
        if not (mark == "run" or (kind in ("needs", "tested") and what)):
            wrong.append(f"{page}: {commands[0]}: marked {mark!r}")
    assert not wrong


def test_the_tests_that_are_named_run_these_commands():
    wrong = []
    for page, mark, commands in list_marked():
        named = re.findall(r"(?:tests|scripts|benchmarks)/\w+\.\w+", mark)
        missing = [name for name in named if not (ROOT / name).is_file()]
        texts = "".join((ROOT / name).read_text(encoding="utf-8") for name in named if name not in missing)
        if mark.startswith("tested"):
            names = [name_of(line) for line in commands if line.startswith(("python ", "bash "))]
            missing += [name for name in names if not re.search(rf"\b{name}\b", texts)]
        wrong += [f"{page}: {mark}: nothing about {name}" for name in missing]
    assert not wrong


def test_only_recipes_are_run_from_their_page():
    pages = {page for page, mark, _ in list_marked() if mark == "run"}
    assert pages and pages <= {"docs/recipes.md", "docs/zh/recipes.md"}


PARSE = """
import contextlib, io, json, runpy, sys
for argv in json.load(sys.stdin):
    words, module = argv[1:], argv[0]
    sys.argv[:] = [module, *words]
    text, status = io.StringIO(), "went on"
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as stopped:
            status = stopped.code
    if status:
        print(" ".join([module, *words]), status, text.getvalue())
"""


def test_every_command_reads_its_flags():
    """Names and values, of all commands that are written out (no `...`), in one process that runs none of them."""
    seen, commands = set(), []
    for _, _, block in list_marked():
        for line in block:
            if not line.startswith("python ") or " ..." in line or "vllm.entrypoints" in line or line in seen:
                continue
            seen.add(line)
            words = shlex.split(line)[1:]
            module = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
            commands.append([module, *words[2 if words[0] == "-m" else 1 :]])
    assert len(commands) > 30
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MINIONEREC_CHECK_FLAGS": "1"},
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.sh")))
def test_flags_of_scripts_exist(script):
    """A flag of a script stands in its own text, or in that of the command that it hands its flags to."""
    lines = [line for _, _, block in list_marked() for line in block if line.startswith(f"bash scripts/{script} ")]
    names = {name for line in lines for name in re.findall(r"--(\w+)", re.sub(r"\"[^\"]*\"", "", line))} - {"help"}
    if not names:
        return
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / script), "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert names <= set(re.findall(r"--(\w+)", done.stdout))
