"""Strict flags, stages that are not redone, atomic files, and list cells that are data and never code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import minionerec.common.cli as cli
from minionerec.common.files import InputError, atomic_write, parse_list, read_json, write_json
from minionerec.common.stage import Stage


# ---------------------------------------------------------------------------------------------------------------- flags
def call(*argv):
    """The arguments that `cli.run` gives a function of many kinds of flags."""
    got = {}

    def function(
        path: str,
        K: int = 3,
        rate: float = 0.5,
        on: bool = False,
        sizes: list[int] | None = None,
        names: list[str] | None = None,
        decay: float | None = 0.1,
    ) -> None:
        got.update(locals())
        got.pop("got", None)

    cli.run(function, list(argv))
    return got


def refusal(capsys, *argv):
    """The one line on stderr of a call that must end with status 2 and without running."""
    with pytest.raises(SystemExit) as stop:
        call(*argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_defaults_and_every_way_to_write_a_value():
    assert call("--path", "x") == dict(path="x", K=3, rate=0.5, on=False, sizes=None, names=None, decay=0.1)
    given = call("--path=a=b, c", "--K", "-1", "--rate=1e-3", "--on", "--decay", "None")
    assert given["path"] == "a=b, c" and given["K"] == -1 and given["rate"] == 1e-3 and given["on"] is True
    assert given["decay"] is None


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
    def function(train_file: str) -> None:
        assert train_file == "x"

    cli.run(function, ["--train-file", "x"])


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--path", "x", "--bogus", "1"], "--bogus"),
        (["--path", "x", "--nmaes", "1"], "--names"),  # all known flags are shown where none begins alike
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
    got = {}

    def function(data_dir: str, K: int = 3) -> None:
        got.update(data_dir=data_dir, K=K)

    cli.run(function, argv, positional="data_dir")
    assert got == {"data_dir": "a=b", "K": 3}


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
    def function(data_dir: str, K: int = 3) -> None:
        raise AssertionError

    with pytest.raises(SystemExit) as stop:
        cli.run(function, argv, positional="data_dir")
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


def test_an_input_error_inside_the_command_is_one_line_too(capsys):
    def function() -> None:
        raise InputError("file.csv, line 3: broken")

    with pytest.raises(SystemExit) as stop:
        cli.run(function, [])
    assert stop.value.code == 2 and capsys.readouterr().err == "error: file.csv, line 3: broken\n"


def test_other_errors_keep_their_traceback():
    def function() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(function, [])


# --------------------------------------------------------------------------------------------------------------- stages
@pytest.fixture
def work(tmp_path):
    (tmp_path / "in.txt").write_text("input")

    def stage(force=False, **settings):
        made = Stage(
            "toy",
            {"rate": 0.1, "layers": [1, 2], "note": None, **settings},
            [tmp_path / "in.txt"],
            [tmp_path / "out"],
            tmp_path / "toy.stage.json",
            force,
        )
        return made

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
    again = stage(**{"setting": {"rate": 0.2}, "new setting": {"extra": 1}}.get(change, {}))
    assert not again.finished and not again.resuming
    told = {"setting": "rate: 0.1 -> 0.2", "new setting": "extra: None -> 1", "input": "its input files", "output": ""}
    assert told[change] in capsys.readouterr().out
    finish(again)


def test_an_input_of_equal_size_with_another_time_is_another_input(work):
    folder, stage, finish = work
    finish(stage())
    os.utime(folder / "in.txt", (1, 1))
    assert not stage().finished


def test_a_file_in_an_input_folder_counts(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1")
    make = lambda: Stage("toy", {}, [tmp_path / "model"], [], tmp_path / "toy.json")
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
        Stage("toy", {}, [tmp_path / "nowhere.csv"], [], tmp_path / "toy.json")
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


def test_help_is_shown(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(
        "import cli\n\ndef toy(path: str, K: int = 50) -> None:\n"
        '    """Does it.\n\n    Args:\n        K: length of the lists.\n    """\n\ncli.run(toy)\n'
    )
    root = Path(cli.__file__).parent
    shown = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert shown.returncode == 0 and "length of the lists" in shown.stdout + shown.stderr
