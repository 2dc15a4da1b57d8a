"""The log of a training: a table of all its steps in steps.csv, and tensorboard and wandb where they are wanted."""

from __future__ import annotations

import csv
import io
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minionerec.common.files import InputError, open_text, write_text
from minionerec.common.processes import is_main_process, process_state
from minionerec.common.settings import LoggingFlags

STEPS_FILE = "steps.csv"
BOARD_FOLDER = "runs"  # of tensorboard
WANDB_ID_FILE = "wandb_run_id.txt"
DEFAULT_PROJECT = "MiniOneRec"


def choose_loggers(flags: LoggingFlags) -> list[str]:
    """The names of the loggers that a run reports to, besides steps.csv."""
    if flags.report_to is not None:
        return [name for name in dict.fromkeys(flags.report_to) if name != "none"]
    return ["wandb"] if flags.wandb_project else []


def prepare_loggers(flags: LoggingFlags, folder: str | Path, resuming: bool) -> list[str]:
    """The loggers of a run, told by their environment variables where to write; a resumed run goes on in its own.

    Args:
        flags: of the command.
        folder: of its output.
        resuming: the run goes on. Otherwise curves of an earlier run in the same folder are removed.
    """
    loggers, folder = choose_loggers(flags), Path(folder)
    if not is_main_process():
        return loggers
    if not resuming:
        shutil.rmtree(folder / BOARD_FOLDER, ignore_errors=True)
        (folder / WANDB_ID_FILE).unlink(missing_ok=True)
    if "tensorboard" in loggers:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / BOARD_FOLDER)
    if "wandb" in loggers:
        path = folder / WANDB_ID_FILE
        if not path.is_file():
            write_text(path, f"{secrets.token_hex(4)}\n")
        os.environ["WANDB_PROJECT"] = flags.wandb_project or DEFAULT_PROJECT
        os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"] = path.read_text().strip(), "allow"
        os.environ.setdefault("WANDB_DIR", str(folder))
    return loggers


def read_steps(path: str | Path) -> list[dict[str, float]]:
    """The rows of a steps.csv, each with `step` and what was measured there.

    Raises:
        InputError: a file without steps, or a cell that is no number.
    """
    rows = []
    with open_text(path) as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ()):
            raise InputError(f"{path}, line 1: expected a column step")
        for row in reader:
            try:
                rows.append({name: float(cell) for name, cell in row.items() if name and cell})
            except (TypeError, ValueError):
                raise InputError(f"{path}, line {reader.line_num}: expected numbers") from None
    return rows


class StepLog:
    """steps.csv of a training, written row by row; a column that comes later is added to all rows.

    Args:
        path: of the file.
        done: the steps that a resumed run goes on from: rows up to it stay, later ones were undone by the break.
    """

    def __init__(self, path: str | Path, done: int = 0):
        self.path = Path(path)
        rows = read_steps(self.path) if done and self.path.is_file() else []
        self._rows: list[dict[str, Any]] = [
            {name: int(value) if value.is_integer() and name == "step" else value for name, value in row.items()}
            for row in rows
            if row["step"] <= done
        ]
        self.columns = list(dict.fromkeys(["step", *(name for row in self._rows for name in row)]))
        self._rewrite()

    def _rewrite(self) -> None:
        write_text(self.path, self._format([dict(zip(self.columns, self.columns, strict=True)), *self._rows]))

    def _format(self, rows: Sequence[Mapping[str, Any]]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([[row.get(name, "") for name in self.columns] for row in rows])
        return text.getvalue()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add the numbers among `values` as the row of a step."""
        row = {"step": step} | {
            name: value
            for name, value in values.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._rows.append(row)
        new = [name for name in row if name not in self.columns]
        if new:
            self.columns += new
            self._rewrite()
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._format([row]))


class TrainingLog:
    """steps.csv, tensorboard and wandb of a training that has no trainer of transformers.

    Args:
        folder: of the output.
        flags: where to report to.
        settings: of the run, for wandb.
        done: the epochs that a resumed run goes on from, 0 for a new one.
    """

    def __init__(self, folder: str | Path, flags: LoggingFlags, settings: Mapping[str, Any], done: int = 0):
        loggers = prepare_loggers(flags, folder, resuming=done > 0)
        self._steps = StepLog(Path(folder) / STEPS_FILE, done) if is_main_process() else None
        self._trackers = []
        if loggers:
            process_state()  # which they want to be there
        if "tensorboard" in loggers:
            from accelerate.tracking import TensorBoardTracker

            self._trackers.append(TensorBoardTracker("", Path(folder) / BOARD_FOLDER))
        if "wandb" in loggers:
            from accelerate.tracking import WandBTracker

            name = {"name": flags.wandb_run_name} if flags.wandb_run_name else {}
            self._trackers.append(WandBTracker(flags.wandb_project or DEFAULT_PROJECT, config=dict(settings), **name))
        for tracker in self._trackers:
            tracker.start()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Note what was measured after an epoch; on every process, of which the main one writes."""
        if self._steps:
            self._steps.add(step, values)
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def close(self) -> None:
        """Wait until all is written."""
        for tracker in self._trackers:
            tracker.finish()
