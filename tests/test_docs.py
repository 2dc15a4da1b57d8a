"""The pages for readers: short enough, the two languages alike, and nothing named that does not exist."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?|\.\d+")
PATH = re.compile(r"[\w.-]+(?:/[\w.*-]+)+/?")
PLACEHOLDER = re.compile(r"[A-Z0-9]+/.*|.*NAME.*|output/.*|[A-Z]\w+/[A-Z].*")  # OUT/final_model.pth, Qwen/Qwen2.5-0.5B
# Files of the published repository that have no counterpart of that name here.
PUBLISHED = {"data/amazon18_data_process.py", "data/process.py", "config/zero2_opt.yaml", "rq/utils.py"}


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks."""
    return FENCE.findall(read(page))


def prose(page: Path) -> str:
    return FENCE.sub("", read(page))


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def command_lines(page: Path) -> list[str]:
    """Commands of the shell blocks, continued lines joined, comments left out; and those in the text."""
    text = "\n".join(block for language, block in code_blocks(page) if language == "bash").replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]
    return [line for line in [*lines, *inline_code(page)] if line.startswith(("python ", "bash "))]


def name_command(line: str) -> list[str]:
    """The arguments of python that start the command of a line: [-m, MODULE] or [SCRIPT]."""
    words = shlex.split(line)[1:]
    return words[:2] if words[0] == "-m" else words[:1]


@functools.cache
def help_of(command: tuple[str, ...]) -> set[str]:
    """Names of all flags in the help of a command, the other names they are accepted under included."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return set(re.findall(r"--(\w+)", result.stdout))


# ----------------------------------------------------------------------------------------------------------------- form
def test_readme_is_short():
    assert README.stat().st_size <= 12 * 1024


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_fit_120_columns(page):
    too_long = [number for number, line in enumerate(read(page).splitlines(), 1) if len(line) > 120]
    assert not too_long


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_rows_of_a_table_have_equal_cells(page):
    tables = re.findall(r"(?:^\|.*\n)+", prose(page), re.MULTILINE)
    for table in tables:
        rows = [row.replace("\\|", "") for row in table.splitlines()]
        for row, other in pairwise(rows):
            # A bar inside inline code does not separate cells in the text it stands for.
            cells = [re.sub(r"`[^`]*`", "", line).count("|") for line in (row, other)]
            assert cells[0] == cells[1], other


# ------------------------------------------------------------------------------------------------------- both languages
def test_languages_have_the_same_headings():
    levels = [re.findall(r"^(#+) ", prose(page), re.MULTILINE) for page in (README, CHINESE)]
    assert levels[0] == levels[1]


def test_languages_have_the_same_code():
    def shape(language: str, text: str) -> tuple:
        if language == "mermaid":
            return language, re.sub(r'"[^"]*"', '""', text)
        if language == "bash":
            return language, [re.sub(r"\s+#.*|^#.*", "", line) for line in text.splitlines()]
        return language, [line.split()[0] for line in text.splitlines()]

    blocks = [[shape(*block) for block in code_blocks(page)] for page in (README, CHINESE)]
    assert blocks[0] == blocks[1]
    assert sorted(inline_code(README)) == sorted(inline_code(CHINESE))


def test_languages_have_the_same_numbers():
    for kind in (r"^\|.*$", r"^#.*$"):
        numbers = [
            [NUMBER.findall(line) for line in re.findall(kind, prose(page), re.MULTILINE)] for page in (README, CHINESE)
        ]
        assert numbers[0] == numbers[1]
    comments = [[NUMBER.findall(text) for _, text in code_blocks(page)] for page in (README, CHINESE)]
    assert [sorted(block) for block in comments[0]] == [sorted(block) for block in comments[1]]


def test_languages_have_the_same_links():
    links = [
        set(re.findall(r"\]\(([^)]+)\)", prose(page))) - {"README.md", "README.zh-CN.md"} for page in (README, CHINESE)
    ]
    assert links[0] == links[1]


# -------------------------------------------------------------------------------------------------- what the pages name
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_exist(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if not re.match(r"https?:", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    words = [*inline_code(page), *(word for line in command_lines(page) for word in line.split())]
    words += [line.split()[0] for language, text in code_blocks(page) if not language for line in text.splitlines()]
    named = {word for word in words if PATH.fullmatch(word) and not PLACEHOLDER.fullmatch(word)} - PUBLISHED
    missing = [word for word in sorted(named) if not any(ROOT.glob(word.rstrip("/")))]
    assert not missing


def test_every_recipe_is_named_and_exists():
    named = {word for page in PAGES for word in re.findall(r"config/recipes/\w+\.yaml", read(page))}
    assert {path for path in named if not (ROOT / path).is_file()} == set()
    existing = {f"config/recipes/{path.name}" for path in (ROOT / "config" / "recipes").glob("*.yaml")}
    assert existing <= set(re.findall(r"config/recipes/\w+\.yaml", read(ROOT / "docs" / "results.md")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_commands_exist(page):
    for line in re.findall(r"(?:python|bash) [^`\n]+", read(page)):
        module, script = re.match(r"python -m ([\w.]+)", line), re.match(r"(?:python|bash) ([\w/]+\.(?:py|sh))", line)
        if module and module[1] != "rq.X" and not module[1].startswith("vllm."):
            assert (ROOT / f"{module[1].replace('.', '/')}.py").is_file(), line
        if script:
            assert (ROOT / script[1]).is_file(), line


def test_flags_of_documented_commands_exist():
    used: dict[tuple[str, ...], set[str]] = {}
    for page in PAGES:
        for line in command_lines(page):
            if line.startswith("python ") and "rq.X" not in line and line != "python X.py --help":
                names = re.findall(r"(?<!\S)--(\w+)", line)
                used.setdefault(tuple(name_command(line)), set()).update(names)
    unknown = {command: names - help_of(command) for command, names in used.items()}
    assert not {command: names for command, names in unknown.items() if names}


def test_published_flags_are_accepted():
    page = read(ROOT / "docs" / "differences.md")
    section = page[page.index("## Published flags") : page.index("## Published files")]
    assert "### " in section
    for part in section.split("### ")[1:]:
        name = re.match(r"`([\w.]+)`", part)[1]
        command = (name,) if name.endswith(".py") else ("-m", name)
        rows = [row.split(" | ")[0] for row in re.findall(r"^\|.*$", part, re.MULTILINE)]
        flags = {flag for row in rows for flag in re.findall(r"`(\w+)`", row)}
        assert flags <= help_of(command), f"{name}: {flags - help_of(command)}"
