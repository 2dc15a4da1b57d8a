"""steps.csv, tensorboard and wandb: all steps once, a resumed run goes on, and nothing is sent without being asked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minionerec.common.files import InputError
from minionerec.common.settings import LoggingFlags
from minionerec.common.step_log import StepLog, TrainingLog, choose_loggers, prepare_loggers, read_steps

ROOT = Path(__file__).parent.parent


def test_columns_that_come_later_and_a_resumed_run(tmp_path):
    path = tmp_path / "steps.csv"
    log = StepLog(path)
    log.add(1, {"loss": 0.5, "text": "no number", "flag": True})
    log.add(2, {"loss": 0.25, "step": 9})
    log.add(2, {"eval_loss": 0.75})
    log.add(3, {"loss": 0.125})
    assert path.read_text() == "step,loss,eval_loss\n1,0.5,\n2,0.25,\n2,,0.75\n3,0.125,\n"
    again = StepLog(path, done=2)  # step 3 was undone by the break
    again.add(3, {"loss": 0.0625, "kl": 1})
    assert read_steps(path) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25},
        {"step": 2, "eval_loss": 0.75},
        {"step": 3, "loss": 0.0625, "kl": 1},
    ]
    StepLog(path)
    assert path.read_text() == "step\n"


def test_a_broken_file(tmp_path):
    for text, message in [("a,b\n1,2\n", "line 1: expected a column step"), ("step,a\n1,x\n", "line 2: expected num")]:
        (tmp_path / "steps.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            read_steps(tmp_path / "steps.csv")


def test_which_loggers():
    assert choose_loggers(LoggingFlags()) == []
    assert choose_loggers(LoggingFlags(wandb_project="x")) == ["wandb"]
    assert choose_loggers(LoggingFlags(wandb_project="x", report_to=["tensorboard", "tensorboard"])) == ["tensorboard"]
    assert choose_loggers(LoggingFlags(wandb_project="x", report_to=["none"])) == []
    with pytest.raises(InputError, match="report_to comet: expected one of tensorboard, wandb, none"):
        LoggingFlags(report_to=["comet"])


def test_a_resumed_run_keeps_its_wandb_id_and_a_new_one_does_not(tmp_path, monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.setenv(name, "before")
    flags = LoggingFlags(report_to=["wandb", "tensorboard"])
    ids = []
    for resuming in (False, True, False):
        (tmp_path / "runs").mkdir(exist_ok=True)
        prepare_loggers(flags, tmp_path, resuming)
        ids.append(os.environ["WANDB_RUN_ID"])
        assert (tmp_path / "runs").exists() == resuming and os.environ["WANDB_PROJECT"] == "MiniOneRec"
    assert ids[0] == ids[1] != ids[2]
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "runs")


OFFLINE = """
import sys
from minionerec.common.settings import LoggingFlags
from minionerec.common.step_log import TrainingLog
for done in (0, 1):
    log = TrainingLog(sys.argv[1], LoggingFlags(report_to=["wandb"], wandb_run_name="toy"), {"lr": 0.1}, done)
    log.add(done + 1, {"loss": 1.0})
    log.close()
"""


def test_wandb_offline(tmp_path):
    """Two starts of one run leave two offline folders of one id, which `wandb sync` joins."""
    environment = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT), "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", OFFLINE, str(tmp_path)]
    subprocess.run(command, env=environment, check=True, timeout=120, cwd=tmp_path)
    run_id = (tmp_path / "wandb_run_id.txt").read_text().strip()
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    # Two starts within one second: the second folder has a number behind the id.
    assert len(runs) == 2 and all(run_id in name for name in runs)
    assert [row["step"] for row in read_steps(tmp_path / "steps.csv")] == [1, 2]


def test_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "before")
    for done in (0, 2):
        log = TrainingLog(tmp_path, LoggingFlags(report_to=["tensorboard"]), {}, done)
        for step in (done + 1, done + 2):
            log.add(step, {"loss": 1 / step})
        log.close()
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 3, 4)
    ]
