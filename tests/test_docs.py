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
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/zh/*.md")])
README = ROOT / "README.md"
# (English, Chinese) of every page.
PAIRS = [(README, ROOT / "README.zh-CN.md")]
PAIRS += [(page, ROOT / "docs/zh" / page.name) for page in sorted(ROOT.glob("docs/*.md"))]
pairs = pytest.mark.parametrize("english, chinese", PAIRS, ids=lambda page: page.name)
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?|\.\d+")
PATH = re.compile(r"[\w.-]+(?:/[\w.*-]+)+/?")
PLACEHOLDER = re.compile(r"[A-Z0-9]+/.*|.*NAME.*|output/.*|[A-Z]\w+/[A-Z].*")  # OUT/final_model.pth, Qwen/Qwen2.5-0.5B
LINK = re.compile(r"\]\(([^)]+)\)")


def list_published() -> set[str]:
    """Files of the published repository, as docs/differences.md has them; some have no counterpart of that name."""
    page = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|([^|]*)\|", page[page.index("## Published files") :], re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)} | {"data/process.py", "data/Amazon/"}


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks."""
    return FENCE.findall(read(page))


def prose(page: Path) -> str:
    return FENCE.sub("", read(page))


def inline_code(page: Path) -> list[str]:
    """What stands between backticks, which a line may end inside of."""
    return [" ".join(text.split()) for text in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", prose(page))]


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


@by_page
def test_lines_fit_120_columns(page):
    too_long = [number for number, line in enumerate(read(page).splitlines(), 1) if len(line) > 120]
    assert not too_long


@by_page
def test_rows_of_a_table_have_equal_cells(page):
    tables = re.findall(r"(?:^\|.*\n)+", prose(page), re.MULTILINE)
    for table in tables:
        rows = [row.replace("\\|", "") for row in table.splitlines()]
        for row, other in pairwise(rows):
            # A bar inside inline code does not separate cells in the text it stands for.
            cells = [re.sub(r"`[^`]*`", "", line).count("|") for line in (row, other)]
            assert cells[0] == cells[1], other


# ------------------------------------------------------------------------------------------------------- both languages
def list_links(page: Path) -> list[str]:
    """Where the links of a page lead, without places inside pages and the links to the other language."""
    targets = [target.partition("#")[0].replace("docs/zh/", "docs/") for target in LINK.findall(prose(page))]
    others = {"README.md", "README.zh-CN.md", f"zh/{page.name}", f"../{page.name}"}
    return sorted(set(targets) - others - {""})


def list_code(page: Path) -> list[tuple[str, str]]:
    """The blocks of a page without what is written for readers in them."""

    def strip(language: str, text: str) -> str:
        if language == "mermaid":
            return re.sub(r'"[^"]*"', '""', text)
        if language in ("bash", "python", "yaml"):
            return re.sub(r"(^|\s+)#.*", "", text, flags=re.MULTILINE)
        return text if language else "\n".join(line.split()[0] for line in text.splitlines())

    return [(language, strip(language, text)) for language, text in code_blocks(page)]


@pairs
def test_languages_have_the_same_headings(english, chinese):
    levels = [re.findall(r"^(#+) ", prose(page), re.MULTILINE) for page in (english, chinese)]
    assert levels[0] == levels[1]


@pairs
def test_languages_have_the_same_code(english, chinese):
    assert list_code(english) == list_code(chinese)
    assert sorted(inline_code(english)) == sorted(inline_code(chinese))


@pairs
def test_languages_have_the_same_marks(english, chinese):
    marks = [re.findall(r"^<!-- (.*) -->$", read(page), re.MULTILINE) for page in (english, chinese)]
    assert marks[0] == marks[1]


@pairs
def test_languages_have_the_same_numbers(english, chinese):
    for kind in (r"^\|.*$", r"^#.*$"):
        numbers = [
            [sorted(NUMBER.findall(line)) for line in re.findall(kind, prose(page), re.MULTILINE)]
            for page in (english, chinese)
        ]
        assert numbers[0] == numbers[1]
    comments = [[sorted(NUMBER.findall(text)) for _, text in code_blocks(page)] for page in (english, chinese)]
    assert comments[0] == comments[1]
    if english != README:
        whole = [sorted(NUMBER.findall(LINK.sub("", prose(page)))) for page in (english, chinese)]
        assert whole[0] == whole[1]


@pairs
def test_languages_have_the_same_links(english, chinese):
    assert list_links(english) == list_links(chinese)


@pairs
def test_languages_name_each_other(english, chinese):
    there, back = (chinese.name, english.name) if english == README else (f"zh/{english.name}", f"../{english.name}")
    assert f"]({there})" in read(english) and f"]({back})" in read(chinese)


# -------------------------------------------------------------------------------------------------- what the pages name
def list_places(page: Path) -> set[str]:
    """What a link may name inside a page, made of its headings as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_page
def test_relative_links_exist(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"https?:", target):
            continue
        name, _, place = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), target
        if place:
            assert place in list_places(other), target


@by_page
def test_named_files_exist(page):
    words = [*inline_code(page), *(word for line in command_lines(page) for word in line.split())]
    words += [line.split()[0] for language, text in code_blocks(page) if not language for line in text.splitlines()]
    named = {word for word in words if PATH.fullmatch(word) and not PLACEHOLDER.fullmatch(word)} - list_published()
    missing = [word for word in sorted(named) if not any(ROOT.glob(word.rstrip("/")))]
    assert not missing


def test_every_recipe_is_named_and_exists():
    named = {word for page in PAGES for word in re.findall(r"config/recipes/\w+\.yaml", read(page))}
    assert {path for path in named if not (ROOT / path).is_file()} == set()
    existing = {f"config/recipes/{path.name}" for path in (ROOT / "config" / "recipes").glob("*.yaml")}
    assert existing <= set(re.findall(r"config/recipes/\w+\.yaml", read(ROOT / "docs" / "results.md")))


@by_page
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
    section = page[page.index("## Published flags") : page.index("## Published commands")]
    assert "### " in section
    for part in section.split("### ")[1:]:
        name = re.match(r"`([\w.]+)`", part)[1]
        command = (name,) if name.endswith(".py") else ("-m", name)
        rows = [row.split(" | ")[0] for row in re.findall(r"^\|.*$", part, re.MULTILINE)]
        flags = {flag for row in rows for flag in re.findall(r"`(\w+)`", row)}
        assert flags <= help_of(command), f"{name}: {flags - help_of(command)}"
