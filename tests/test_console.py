"""log.txt and bars: what a command prints is kept without bars, and where there is no terminal bars are lines."""

import io
import sys

import pytest

from minionerec.common import console, progress
from minionerec.common.cli import run_command
from minionerec.common.console import log_only, open_log, record_console
from minionerec.common.files import InputError
from minionerec.common.processes import say
from minionerec.common.progress import ProgressBar, foretell_epochs, format_seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_log_holds_what_was_printed_without_bars(tmp_path, monkeypatch):
    screens = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", screens[0])
    monkeypatch.setattr(sys, "stderr", screens[1])
    with record_console():
        say("before the folder is known")
        open_log(tmp_path / "out")
        for _ in ProgressBar(range(3), desc="work"):
            print("a warning", file=sys.stderr)
        sys.stderr.write("\r 10%|# of another library\r100%|#\n")
        say("after")
        print("no line end", end="")
    assert (sys.stdout, sys.stderr) == screens
    header, *lines = (tmp_path / "out" / "log.txt").read_text().splitlines()
    assert header.startswith("# 2") and lines == ["before the folder is known", *["a warning"] * 3, "after"]
    assert "100%" in screens[1].getvalue() and screens[0].getvalue().endswith("no line end")
    with record_console():
        open_log(tmp_path / "out")
        say("again")
    assert (tmp_path / "out" / "log.txt").read_text().splitlines()[-1] == "again"


def test_bars_are_lines_where_there_is_no_terminal(monkeypatch):
    screen, now = io.StringIO(), [1000.0]
    monkeypatch.setattr(sys, "stderr", screen)
    bar = ProgressBar(total=100, unit="rows", desc="ranking")
    monkeypatch.setattr(bar, "_time", lambda: now[0])
    bar.start_t = bar.last_print_t = now[0]
    for _ in range(100):
        now[0] += 1
        bar.update()
        bar.set_postfix(loss=1)
    bar.close()
    lines = screen.getvalue().splitlines()
    assert len(lines) == 3 and lines[0].startswith("ranking: 30 of 100 rows") and "\r" not in screen.getvalue()
    assert "loss=1" in lines[1]
    screen.truncate(0)
    for _ in ProgressBar(range(5)):  # short work says nothing
        pass
    assert not screen.getvalue()


@pytest.mark.parametrize("total, told", [(100_000, True), (300, False)])
def test_long_work_says_so_once_some_of_it_was_measured(monkeypatch, capsys, total, told):
    now = [1000.0]
    bar = ProgressBar(total=total, unit="steps", shorter="--num_epochs")
    monkeypatch.setattr(bar, "_time", lambda: now[0])
    bar.start_t = bar.last_print_t = now[0]
    for _ in range(50):
        now[0] += 1
        bar.update()
    bar.close()
    said = capsys.readouterr().out
    line = "  about 27.8 hours to go (20 steps took 20 s); shorter with --num_epochs\n"
    assert said == (line if told else "")


def test_epochs_are_foretold_by_a_few(monkeypatch, capsys):
    now, done = [0.0], []
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])

    def run_epoch():
        now[0] += 100.0 if not done else 2.0  # the first one warms up
        done.append(1)

    foretell_epochs(run_epoch, 600, "--epochs")
    said = capsys.readouterr().out
    assert said.startswith("  600 epochs take about 20 minutes") and "2 s each; shorter with --epochs" in said
    assert [format_seconds(seconds) for seconds in (0.25, 100, 7200)] == ["0.25 s", "2 minutes", "2.0 hours"]


def test_other_processes_keep_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "is_main_process", lambda: False)
    with record_console():
        open_log(tmp_path)
        log_only("x")
        assert sys.stdout.__class__ is not console.RecordedStream
    assert not list(tmp_path.iterdir())


def test_the_reason_of_an_end_stands_in_the_log(tmp_path, capsys):
    def stop(error):
        open_log(tmp_path)
        raise error

    with pytest.raises(SystemExit):
        run_command(stop, InputError("no such file"))
    with pytest.raises(ZeroDivisionError):
        run_command(stop, ZeroDivisionError("by zero"))
    log = (tmp_path / "log.txt").read_text()
    assert "error: no such file" in log and "ZeroDivisionError: by zero" in log and "Traceback" in log
