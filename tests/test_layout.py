"""Where files lie, who imports whom, and the limits of functions and lines: read from the syntax trees of the code."""

import ast
import os
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_OURS = {"output", "wandb", "__pycache__"}  # folders that runs leave behind; those with a dot are left out as well
TOP_LEVEL = {
    "sft.py",
    "rl.py",
    "evaluate.py",
    "data.py",
    "minionerec_trainer.py",
    "LogitProcessor.py",
    "convert_dataset.py",
    "recommend.py",
    "baselines.py",
    "sasrec.py",
}
# Which other rooms of minionerec/ a room may import.
ROOMS = {
    "common": set(),
    "search": {"common"},
    "recommenders": {"common"},
    "language": {"search", "common"},
    "engines": {"language", "search", "common"},
    "evaluation": {"engines", "language", "search", "recommenders", "common"},
    "reports": {"evaluation", "recommenders", "common"},
    # What validates is handed in by the commands.
    "training": {"engines", "language", "search", "recommenders", "common"},
}
# The published constructors, whose parameters are part of what carries over.
MANY_PARAMETERS = {
    "rq/models/rqvae.py": {"RQVAE.__init__"},
    "rq/models/rq.py": {"ResidualVectorQuantizer.__init__"},
    "rq/models/vq.py": {"VectorQuantizer.__init__"},
}
# A benchmark's entry is read as bench_decode.bench, so every benchmark may define it.
COMMAND_STEPS = {"bench"}


def list_files(*suffixes: str) -> list[Path]:
    """The project's files with these suffixes, below ROOT."""
    paths = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if name not in NOT_OURS and not name.startswith("."))
        paths += [Path(folder, name) for name in sorted(files) if name.endswith(suffixes)]
    return paths


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), name_of(path))


def list_program_files() -> list[Path]:
    return [path for path in list_files(".py") if not name_of(path).startswith("tests/")]


def module_of(path: Path) -> str:
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def list_imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, those inside functions and of TYPE_CHECKING included."""
    package = module_of(path).split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            # What is imported may be a module of the package as well.
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def is_command(path: Path) -> bool:
    """Whether a file runs something when it is the main module."""
    return any(
        isinstance(node, ast.If)
        and "__name__" in {name.id for name in ast.walk(node.test) if isinstance(name, ast.Name)}
        for node in parse(path).body
    )


def list_functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(name with the classes and functions around it, node) of every function and method."""

    def visit(node: ast.AST, outer: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            inner = outer
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{outer}{child.name}."
                if not isinstance(child, ast.ClassDef):
                    yield inner[:-1], child
            yield from visit(child, inner)

    yield from visit(parse(path), "")


def fail_with(problems: list[str]) -> None:
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def test_the_top_level_holds_these_files():
    assert {name for name in os.listdir(ROOT) if name.endswith(".py")} == TOP_LEVEL
    rooms = {path.name for path in (ROOT / "minionerec").iterdir() if path.is_dir()} - NOT_OURS
    assert rooms == set(ROOMS)
    assert [name_of(path) for path in (ROOT / "minionerec").glob("*.py")] in ([], ["minionerec/__init__.py"])


def test_rooms_import_what_the_table_allows():
    problems = []
    ours = {path.stem if path.suffix else path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    for path in list_program_files():
        parts = name_of(path).split("/")
        if parts[0] == "minionerec" and len(parts) > 2:
            allowed = [f"minionerec.{room}" for room in sorted({parts[1]} | ROOMS[parts[1]])]
        elif parts[0] in ("rq", "data_process"):
            allowed = ["minionerec.common", parts[0]]
        else:
            continue
        for line, module in list_imports(path):
            if module.split(".")[0] in ours and not any(is_inside(module, package) for package in allowed):
                problems.append(f"{name_of(path)}:{line} imports {module}; it may import {', '.join(allowed)}")
    fail_with(problems)


def test_only_tests_and_benchmarks_import_commands():
    commands = {module_of(path): name_of(path) for path in list_program_files() if is_command(path)}
    assert {"sft", "evaluate", "rq.rqvae", "data_process.validate", "scripts.compare"} <= commands.keys()
    problems = []
    for path in list_program_files():
        if name_of(path).startswith("benchmarks/"):
            continue
        for line, module in list_imports(path):
            target = next((name for name in commands if is_inside(module, name)), None)
            if target is not None and target != module_of(path):
                problems.append(f"{name_of(path)}:{line} imports the command {commands[target]}")
    fail_with(problems)


def test_functions_are_short_or_say_why_not():
    problems = []
    for path in list_program_files():
        lines = path.read_text(encoding="utf-8").splitlines()
        for name, node in list_functions(path):
            length = node.end_lineno - node.lineno + 1
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if length > 80 and not lines[first - 2].lstrip().startswith("#"):
                problems.append(f"{name_of(path)}:{node.lineno} {name} has {length} lines and no reason above it")
    fail_with(problems)


def test_functions_have_at_most_eight_positional_parameters():
    problems = []
    for path in list_program_files():
        for name, node in list_functions(path):
            parameters = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            count = len(parameters) - (parameters[:1] in (["self"], ["cls"]))
            if count > 8 and name not in MANY_PARAMETERS.get(name_of(path), ()):
                problems.append(f"{name_of(path)}:{node.lineno} {name} has {count} positional parameters")
    fail_with(problems)


def test_public_names_are_defined_once():
    definitions = defaultdict(list)
    for path in list_program_files():
        for node in parse(path).body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if not node.name.startswith("_") and not (node.name in COMMAND_STEPS and is_command(path)):
                definitions[node.name].append(f"{name_of(path)}:{node.lineno}")
    fail_with([f"{name} is defined in {', '.join(where)}" for name, where in definitions.items() if len(where) > 1])


def test_lines_are_at_most_120_wide():
    fail_with(
        [
            f"{name_of(path)}:{number} has {len(line)} columns"
            for path in list_files(".py", ".sh", ".md")
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > 120
        ]
    )


def test_nothing_is_configured_by_locals():
    fail_with(
        [
            f"{name_of(path)}:{node.lineno} calls locals()"
            for path in list_program_files()
            for node in ast.walk(parse(path))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "locals"
        ]
    )
