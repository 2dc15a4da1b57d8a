"""Strict flags, stages that are not redone, atomic files, and list cells that are data and never code."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from minionerec.common.cli import Flags, flag, format_help, parse_flags, recorded_settings, run_command
from minionerec.common.files import InputError, atomic_write, parse_list, read_json, write_json
from minionerec.common.settings import SeedFlags, StageFlags
from minionerec.common.stage import Stage

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------------------------------------------------------- flags
@dataclass
class ToyFlags(SeedFlags):
    """A command with many kinds of flags."""

    path: str = flag(help="any text")
    K: int = flag(3, "a number", aliases=("topk",))
    rate: float = flag(0.5, "a share")
    on: bool = flag(False, "a switch")
    sizes: list[int] | None = flag(None, "numbers", default_text="256,256")
    names: list[str] | None = flag(None, "words")
    decay: float | None = flag(0.1, "a number or nothing")
    rows: int | bool = flag(-1, "a number or a switch")
    engine: str = flag("tree", "which engine", choices=("tree", "hf"))
    workers: int = flag(0, no_effect="nothing is read in the background")


@dataclass
class FolderFlags(Flags):
    """A command with a flag that needs no name."""

    data_dir: str = flag(help="a folder")
    K: int = flag(3, "a number")


def call(*argv):
    """{flag: value} of a call, without the seed."""
    values = vars(parse_flags(ToyFlags, list(argv), about="Does it."))
    return {name: value for name, value in values.items() if name != "seed"}


def refusal(capsys, *argv):
    """The one line on stderr of a call that must end with status 2 and without running."""
    with pytest.raises(SystemExit) as stop:
        call(*argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_defaults_and_every_way_to_write_a_value():
    expected = dict(path="x", K=3, rate=0.5, on=False, sizes=None, names=None, decay=0.1, rows=-1, engine="tree")
    assert call("--path", "x") == expected | {"workers": 0}
    given = call("--path=a=b, c", "--K", "-1", "--rate=1e-3", "--on", "--decay", "None")
    assert given["path"] == "a=b, c" and given["K"] == -1 and given["rate"] == 1e-3 and given["on"] is True
    assert given["decay"] is None


def test_numbers_or_switches_and_other_names():
    assert [call("--path", "x", "--rows", text)["rows"] for text in ("7", "False", "True")] == [7, False, True]
    assert call("--path", "x", "--topk", "9")["K"] == 9
    assert call("--path", "x", "--K", "1", "--topk", "9", "--K", "2")["K"] == 2  # later flags win


def test_a_flag_without_an_effect_is_answered_by_its_reason(capsys):
    assert call("--path", "x", "--workers", "4")["workers"] == 4
    assert capsys.readouterr().out == "--workers: has no effect here: nothing is read in the background\n"
    assert "workers" not in recorded_settings(parse_flags(ToyFlags, ["--path", "x"], about=""))


@pytest.mark.parametrize("text, value", [("True", True), ("False", False), ("true", True), ("false", False)])
def test_booleans(text, value):
    assert call("--path", "x", "--on", text)["on"] is value
    assert call("--path", "x", f"--on={text}")["on"] is value


@pytest.mark.parametrize("argv", [["256,128,64"], ["256", "128", "64"], ["[256, 128, 64]"], ["256, 128, 64"]])
def test_lists_of_numbers(argv):
    assert call("--path", "x", "--sizes", *argv)["sizes"] == [256, 128, 64]


def test_lists_of_words_and_none():
    assert call("--path", "x", "--names", "next_sid,title2sid")["names"] == ["next_sid", "title2sid"]
    assert call("--path", "x", "--names", "one")["names"] == ["one"]
    assert call("--path", "x", "--sizes", "None")["sizes"] is None


def test_text_that_looks_like_python_stays_text():
    """fire would read these as a number, a list and a dictionary."""
    for text in ("123", "[1]", "{'a': 1}", "1e5", "True"):
        assert call("--path", text)["path"] == text


def test_dashes_in_names_are_underscores():
    assert parse_flags(FolderFlags, ["--data-dir", "x"], about="").data_dir == "x"


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--path", "x", "--bogus", "1"], "--bogus"),
        (["--path", "x", "--nmaes", "1"], "unknown flag --nmaes; did you mean --names?"),
        (["--path", "x", "--zzzzz", "1"], "unknown flag --zzzzz; --help lists all flags"),
        (["--path", "x", "--engine", "vllm"], "--engine vllm: expected one of tree, hf"),
        (["--path", "x", "--rows", "few"], "--rows: expected int or True or False, got 'few'"),
        (["--path", "x", "--rat", "1"], "--rate"),
        ([], "--path"),
        (["--K", "4"], "--path"),
        (["--path"], "--path"),
        (["--path", "x", "--K", "four"], "--K"),
        (["--path", "x", "--K", "1.5"], "--K"),
        (["--path", "x", "--rate", "fast"], "--rate"),
        (["--path", "x", "--on", "yes"], "--on"),
        (["--path", "x", "--on", "1"], "--on"),
        (["--path", "x", "--sizes", "1,two"], "--sizes"),
        (["--path", "x", "--K", "1", "2"], "--K"),
        (["x"], "'x'"),
        (["--path", "x", "-K", "3"], "--path"),
    ],
)
def test_wrong_flags_are_one_line_and_status_2(capsys, argv, said):
    assert said in refusal(capsys, *argv)


@pytest.mark.parametrize(
    "argv", [["a=b"], ["--data_dir", "a=b"], ["a=b", "--K", "3"], ["--K", "3", "--data-dir=a=b"]], ids=" ".join
)
def test_a_first_argument_without_a_name(argv):
    assert parse_flags(FolderFlags, argv, "data_dir", "") == FolderFlags(data_dir="a=b", K=3)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["a", "b"], "unexpected argument 'b'"),
        (["a", "--data_dir", "b"], "--data_dir is given twice"),
        (["a", "--data-dir=a"], "--data_dir is given twice"),
        (["--K", "3", "a"], "--K: expected one value, got 2"),
        (["--K=3", "a"], "unexpected argument 'a'"),
        (["-a"], "unexpected argument '-a'"),
        ([], "missing flag: --data_dir"),
    ],
)
def test_other_arguments_without_a_name_are_refused(capsys, argv, said):
    with pytest.raises(SystemExit) as stop:
        parse_flags(FolderFlags, argv, "data_dir", "")
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


def test_an_input_error_inside_the_command_is_one_line_too(capsys):
    def command(flags):
        raise InputError("file.csv, line 3: broken")

    with pytest.raises(SystemExit) as stop:
        run_command(command, FolderFlags(data_dir="x"))
    assert stop.value.code == 2 and capsys.readouterr().err == "error: file.csv, line 3: broken\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda flags: 1 / 0, FolderFlags(data_dir="x"))


def test_choices_hold_for_flags_that_are_made_in_python():
    with pytest.raises(InputError, match="--engine vllm: expected one of tree, hf"):
        ToyFlags(path="x", engine="vllm")
    with pytest.raises(InputError, match="--engine x: expected"):
        replace(ToyFlags(path="x"), engine="x")


# ------------------------------------------------------------------------------------------------------- files of flags
def write_config(path, text):
    path.write_text(text)
    return str(path)


def test_a_config_file_gives_values_that_flags_override(tmp_path):
    first = write_config(
        tmp_path / "a.yaml", "path: x\nK: 7\nrate: 1e-3\n'on': true\nsizes: [1, 2]\nnames: one\ndecay: null\n"
    )
    second = write_config(tmp_path / "b.yaml", "topk: 8\nrows: false\n")
    given = call("--config", first)
    assert given | {"engine": 0} == dict(
        path="x", K=7, rate=1e-3, on=True, sizes=[1, 2], names=["one"], decay=None, rows=-1, engine=0, workers=0
    )
    assert call("--config", first, "--K", "9", "--path", "y") == given | {"K": 9, "path": "y"}
    assert call("--config", f"{first},{second}") == given | {"K": 8, "rows": False}
    assert call("--config", first, second)["K"] == 8


@pytest.mark.parametrize(
    "text, said",
    [
        ("path: x\nrat: 3\n", "a.yaml: unknown flag --rat; did you mean --rate?"),
        ("path: x\nK: four\n", "--K: expected int, got 'four'"),
        ("path: {a: 1}\n", "a.yaml: path: expected a single value or a list of them"),
        ("config: b.yaml\n", "a.yaml: config: expected"),
        ("- path\n", "a.yaml: expected flags and their values"),
        ("path: [1\n", "a.yaml, line 2: not valid YAML"),
        ("K: 3\n", "missing flag: --path"),
    ],
)
def test_wrong_config_files(tmp_path, capsys, text, said):
    assert said in refusal(capsys, "--config", write_config(tmp_path / "a.yaml", text))


def test_a_missing_config_file(capsys):
    assert "--config: nowhere.yaml: no such file" in refusal(capsys, "--path", "x", "--config", "nowhere.yaml")


# ----------------------------------------------------------------------------------------------------------------- help
def test_help_names_every_flag_with_type_default_and_help():
    text = format_help(ToyFlags, "Does it.")
    assert text.startswith("Does it.\n\nA command with many kinds of flags:\n  --path TEXT")
    assert text.index("A command with many kinds") < text.index("Repeatability:") < text.index("Every command:")
    for said in (
        "any text (required)",
        "--K INT",
        "a number (default: 3; also --topk)",
        "--sizes INT,...",
        "numbers (default: 256,256)",
        "words (optional)",
        "--rows INT|True|False",
        "--engine tree|hf",
        "no effect here: nothing is read in the background",
        "seed of everything random (default: 42)",
        "--config TEXT,...",
    ):
        assert said in text, said
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--path", "x", "--help"], ["--bogus", "-h"]])
def test_help_goes_to_standard_output(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        call(*argv)
    printed = capsys.readouterr()
    assert stop.value.code == 0 and "--engine tree|hf" in printed.out and printed.err == ""


def test_a_command_answers_before_it_imports(tmp_path):
    """What stands behind `parse_flags` is not reached for --help and for a wrong flag."""
    script = tmp_path / "toy.py"
    script.write_text(
        '"""Does it."""\n'
        "from dataclasses import dataclass\n"
        "from minionerec.common.cli import Flags, flag, parse_flags, run_command\n"
        "@dataclass\nclass Toy(Flags):\n    K: int = flag(50, 'length of the lists')\n"
        "if __name__ == '__main__':\n    FLAGS = parse_flags(Toy)\n"
        "print('slow imports')\n"
        "if __name__ == '__main__':\n    run_command(print, FLAGS)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for argv, status, output in ((["--help"], 0, "length of the lists"), (["--k", "1"], 2, "did you mean --K?")):
        done = subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, env=environment)
        assert done.returncode == status and output in done.stdout + done.stderr and "slow" not in done.stdout
    done = subprocess.run([sys.executable, script, "--K", "4"], capture_output=True, text=True, env=environment)
    assert done.stdout == "slow imports\nToy(K=4)\n" and done.returncode == 0


# --------------------------------------------------------------------------------------------------------------- stages
@dataclass
class ToyStageFlags(StageFlags):
    """Flags of a stage."""

    rate: float = flag(0.1, "a number")
    layers: list[int] = flag([1, 2], "numbers")
    note: str | None = flag(None, "a text")


@dataclass
class NewerFlags(ToyStageFlags):
    """The same command with a flag more."""

    extra: int = flag(0, "newer than the record")


@pytest.fixture
def work(tmp_path):
    (tmp_path / "in.txt").write_text("input")

    def stage(kind=ToyStageFlags, **flags):
        return Stage("toy", kind(**flags), [tmp_path / "in.txt"], [tmp_path / "out"], tmp_path / "toy.stage.json")

    def finish(stage):
        (tmp_path / "out").write_text("output")
        stage.done(score=0.5)

    return tmp_path, stage, finish


def test_a_finished_stage_has_nothing_to_do(work, capsys):
    folder, stage, finish = work
    first = stage()
    assert not first.finished and not first.resuming
    finish(first)
    record = read_json(folder / "toy.stage.json")
    assert record["status"] == "done" and record["results"] == {"score": 0.5}
    assert record["settings"] == {"rate": 0.1, "layers": [1, 2], "note": None}
    assert "rate=0.1" in capsys.readouterr().out  # the resolved settings, once
    written = (folder / "toy.stage.json").stat().st_mtime_ns
    again = stage()
    assert again.finished and (folder / "toy.stage.json").stat().st_mtime_ns == written


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(work, capsys):
    folder, stage, finish = work
    assert stage(dry_run=True).finished
    said = capsys.readouterr().out
    assert "dry run, nothing is written; it was not run before" in said and "rate=0.1" in said
    assert f"reads  {folder / 'in.txt'} (5 bytes)" in said and f"writes {folder / 'out'}" in said
    assert [path.name for path in folder.iterdir()] == ["in.txt"]
    finish(stage())
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for flags, message in [
        ({}, "it is done already, and --force True would do it again"),
        ({"rate": 0.2}, "it would be done again, changed: rate: 0.1 -> 0.2"),
    ]:
        capsys.readouterr()
        assert stage(dry_run=True, **flags).finished
        said = capsys.readouterr().out
        assert message in said and "an earlier run with" in said
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_force_does_it_again_and_from_the_start(work):
    _, stage, finish = work
    finish(stage())
    again = stage(force=True)
    assert not again.finished and not again.resuming
    assert not stage(force=True).resuming  # cut off, but force means from the start


@pytest.mark.parametrize("change", ["setting", "new setting", "input", "output"])
def test_what_changed_is_done_again_from_the_start(work, capsys, change):
    folder, stage, finish = work
    finish(stage())
    if change == "input":
        (folder / "in.txt").write_text("other input")
    if change == "output":
        (folder / "out").unlink()
    capsys.readouterr()
    again = stage(**{"setting": {"rate": 0.2}, "new setting": {"kind": NewerFlags, "extra": 1}}.get(change, {}))
    assert not again.finished and not again.resuming
    told = {"setting": "rate: 0.1 -> 0.2", "new setting": "extra: 0 -> 1", "input": "its input files", "output": ""}
    assert told[change] in capsys.readouterr().out
    finish(again)


def test_a_record_that_is_older_than_a_flag_counts_as_its_default(work):
    _, stage, finish = work
    finish(stage())
    assert stage(kind=NewerFlags).finished
    assert not stage(kind=NewerFlags, extra=2).finished


def test_the_settings_are_written_as_a_file_that_config_reads(work):
    folder, stage, _ = work
    stage(kind=NewerFlags, rate=1e-5, layers=[3], extra=4)
    again = parse_flags(NewerFlags, ["--config", str(folder / "toy.settings.yaml")], about="")
    assert again == NewerFlags(rate=1e-5, layers=[3], extra=4)


def test_an_input_of_another_time_is_the_same_input_and_one_of_equal_size_may_not_be(work):
    folder, stage, finish = work
    finish(stage())
    os.utime(folder / "in.txt", (1, 1))
    assert stage().finished
    content = (folder / "in.txt").read_text()
    (folder / "in.txt").write_text("x" * len(content))
    assert not stage().finished


def test_a_file_in_an_input_folder_counts(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1")

    def make():
        return Stage("toy", StageFlags(), [tmp_path / "model"], [], tmp_path / "toy.stage.json")

    make().done()
    assert make().finished
    (tmp_path / "model" / "weights").write_text("12")
    assert not make().finished


def test_a_stage_that_was_cut_off_is_resumed_and_its_time_counted(work):
    folder, stage, finish = work
    cut = stage()
    cut._started -= 100
    cut.tick()
    going_on = stage()
    assert going_on.resuming and not going_on.finished
    finish(going_on)
    assert read_json(folder / "toy.stage.json")["seconds"] >= 100
    assert stage().finished
    stage(rate=7)
    assert not stage().resuming  # cut off with other settings


def test_a_missing_input_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="nowhere.csv: no such file or folder"):
        Stage("toy", StageFlags(), [tmp_path / "nowhere.csv"], [], tmp_path / "toy.json")
    assert list(tmp_path.iterdir()) == []


def test_only_the_main_process_writes_and_prints(work, monkeypatch, capsys):
    folder, stage, _ = work
    monkeypatch.setenv("RANK", "1")
    stage().done()
    assert not (folder / "toy.stage.json").exists() and capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------------------- files
def test_atomic_file(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(path) as temporary:
            temporary.write_text("two")
            raise KeyboardInterrupt
    assert path.read_text() == "one" and [p.name for p in path.parent.iterdir()] == ["file.txt"]
    with atomic_write(path) as temporary:
        temporary.write_text("three")
    assert path.read_text() == "three" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_atomic_folder(tmp_path):
    path = tmp_path / "folder"
    with atomic_write(path) as temporary:
        temporary.mkdir()
        (temporary / "old").write_text("1")
    with pytest.raises(RuntimeError):
        with atomic_write(path) as temporary:
            temporary.mkdir()
            (temporary / "new").write_text("2")
            raise RuntimeError
    assert [p.name for p in path.iterdir()] == ["old"] and [p.name for p in tmp_path.iterdir()] == ["folder"]
    with atomic_write(path) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("2")
    assert [p.name for p in path.iterdir()] == ["new"] and [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_json_keeps_letters_and_names_the_broken_line(tmp_path):
    write_json(tmp_path / "a.json", {"title": "Kühe, 牛"})
    assert "Kühe, 牛" in (tmp_path / "a.json").read_text(encoding="utf-8")
    (tmp_path / "b.json").write_text('{\n "a": 1,\n "b" 2\n}')
    with pytest.raises(InputError, match=r"b.json, line 3: not valid JSON"):
        read_json(tmp_path / "b.json")
    with pytest.raises(InputError, match=r"--index: .*c.json: no such file"):
        read_json(tmp_path / "c.json", "index")


@pytest.mark.parametrize(
    "text, value",
    [
        ("['a', 'b']", ["a", "b"]),
        ('["a", "b"]', ["a", "b"]),
        ("[]", []),
        ("[1, 2]", [1, 2]),
        ("[null, true]", [None, True]),
        ("[None, True]", [None, True]),
        ("[\"it's\", '6\"']", ["it's", '6"']),
        (json.dumps(["\U0001f980 é \u2028"]), ["\U0001f980 é \u2028"]),
        (r"['\x41\n\\']", ["A\n\\"]),
        (r'["a\/b"]', ["a/b"]),
        ("['a' 'b',]", ["ab"]),
        (" ['a'] ", ["a"]),
    ],
)
def test_list_literals(text, value):
    assert parse_list(text, "x.csv, line 1") == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "[__import__('os').getcwd()]",
        "['a', open('x')]",
        "[i for i in range(3)]",
        "['a'",
        "'a'",
        "{'a': 1}",
        "('a', 'b')",
        "",
        "3",
        "nan",
        "['a\0']",
        "[" * 100_000 + "]" * 100_000,
        "[" + "9" * 5000 + "]",
    ],
)
def test_what_is_no_list_literal_is_refused_with_its_place(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^x.csv, line 7, column ids: expected a list literal") as error:
        parse_list(text, "x.csv, line 7, column ids")
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []
