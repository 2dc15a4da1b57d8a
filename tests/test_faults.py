"""Runs that are killed, doubled, moved, or write on a full disk; trainings whose numbers are no longer finite."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_dataset, write_config

from minionerec.common.cli import run_command
from minionerec.common.disk_errors import explain_disk_error
from minionerec.common.files import InputError, read_json
from minionerec.common.run_lock import release_lock, remove_stale_files, take_lock
from minionerec.common.settings import StageFlags
from minionerec.common.stage import Stage
from minionerec.recommenders.network_training import NetworkTrainer, TrainSequence
from minionerec.recommenders.networks import build_network
from minionerec.training.settings import RLFlags, SFTFlags
from rl import rl
from sft import sft

ROOT = Path(__file__).parent.parent


def stage(folder, force=False):
    flags = StageFlags(force=force)
    return Stage("toy", flags, [folder / "in.txt"], [folder / "out.txt"], folder / "toy.stage.json")


def finish(folder, **options):
    running = stage(folder, **options)
    (folder / "out.txt").write_text("done")
    running.done()


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "in.txt").write_text("input")
    return tmp_path / "work"


# --------------------------------------------------------------------------------------------------------------- stages
@pytest.mark.parametrize("content", ["", "{", '{"status": "do', "[]", "\x00\x00", '{"settings": 3}'])
@pytest.mark.parametrize("force", [False, True])
def test_a_record_that_is_cut_off_counts_as_not_finished(work, capsys, content, force):
    finish(work)
    (work / "toy.stage.json").write_text(content)
    again = stage(work, force=force)
    assert not again.finished and not again.resuming and "counts as not finished" in capsys.readouterr().out
    finish(work)
    assert stage(work).finished


@pytest.mark.parametrize("how", ["copied", "moved"])
def test_a_finished_folder_that_was_copied_is_finished(work, tmp_path, how):
    finish(work)
    other = tmp_path / "elsewhere" / "work"
    other.parent.mkdir()
    shutil.copytree(work, other) if how == "copied" else shutil.move(work, other)
    for path in other.iterdir():
        os.utime(path, (1, 1))
    assert stage(other).finished
    (other / "in.txt").write_text("INPUT")  # as many bytes
    assert not stage(other).finished


def test_records_with_times_of_earlier_versions_count_by_size(work):
    finish(work)
    record = read_json(work / "toy.stage.json")
    for path in record["inputs"]:
        record["inputs"][path] = [5, 123456789]
    (work / "toy.stage.json").write_text(json.dumps(record))
    assert stage(work).finished


# ------------------------------------------------------------------------------------------------ locks and stale files
HOLD = """
import sys, time
from minionerec.common.run_lock import take_lock
from pathlib import Path
take_lock(Path(sys.argv[1]), "out")
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_dead(work):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(work / "toy.lock")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"another run is writing there \(process {holder.pid} on .*, since "):
            stage(work)
        holder.send_signal(signal.SIGKILL)
    assert (work / "toy.lock").is_file()  # stale: nobody holds it
    finish(work)
    assert not (work / "toy.lock").exists()


def test_two_trainings_in_one_folder_are_refused_whichever_they_are(work):
    """SFT and RL keep different records and locks, but write the same checkpoints."""

    def train(name):
        return Stage(name, StageFlags(), [work / "in.txt"], [work / "out"], work / f"{name}.stage.json", trains_in=work)

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(work / "training.lock")]  # as a stage sft would
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"another run is writing there \(process {holder.pid} on "):
            train("rl")
        assert not (work / "rl.lock").exists() and not (work / "rl.stage.json").exists()
        holder.send_signal(signal.SIGKILL)
    running = train("rl")
    assert (work / "rl.lock").exists() and (work / "training.lock").exists()
    (work / "out").write_text("done")
    running.done()
    assert not list(work.glob("*.lock"))
    (work / "training.lock").write_text("{}")  # of a run that was killed after its last word
    assert train("rl").finished and not list(work.glob("*.lock"))


def test_a_finished_stage_removes_the_lock_of_a_run_that_was_killed_after_its_last_word(work):
    finish(work)
    (work / "toy.lock").write_text("{}")
    (work / "out.txt.tmp-elsewhere-1").write_text("")
    assert stage(work).finished
    assert not (work / "toy.lock").exists() and not (work / "out.txt.tmp-elsewhere-1").exists()


def test_a_lock_is_taken_and_given_back(tmp_path):
    for _ in range(2):
        take_lock(tmp_path / "x.lock", "x")
        take_lock(tmp_path / "x.lock", "x")  # by the same process once more
        assert json.loads((tmp_path / "x.lock").read_text())["process"] == os.getpid()
        release_lock(tmp_path / "x.lock")
        assert not (tmp_path / "x.lock").exists()


def test_what_dead_processes_left_is_removed_and_nothing_else(tmp_path):
    host = os.uname().nodename
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive, own = os.getppid(), os.getpid()
    gone = [f"out.json.tmp-{dead.pid}", f"out.json.tmp-other-{dead.pid}", f"out.json.tmp-{host}-{dead.pid}"]
    gone += [f"data.csv.tmp-{host}-{dead.pid}", f"out.json.tmp-{host}-{alive}"]
    kept = [f"data.csv.tmp-{host}-{alive}", f"data.csv.tmp-other-{dead.pid}", f"data.csv.tmp-{host}-{own}", "a.tmp-x"]
    for name in gone + kept:
        (tmp_path / name).write_text("")
    (tmp_path / f"model.tmp-{host}-{dead.pid}").mkdir()
    (tmp_path / f"model.tmp-old-{host}-{dead.pid}").mkdir()
    (tmp_path / f"model.tmp-old-{host}-{dead.pid}" / "weights").write_text("old")
    remove_stale_files(tmp_path, [tmp_path / "out.json", tmp_path / "model"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "model"])
    assert (tmp_path / "model" / "weights").read_text() == "old"  # it had stepped aside for one that never came


# ----------------------------------------------------------------------------------------------------- disks and Ctrl-C
def chained(error):
    try:
        try:
            raise error
        except OSError as inner:
            raise RuntimeError("writing failed") from inner
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(errno.ENOSPC, "No space left on device", "DIR/x.npy"), "DIR/x.npy: the disk is full"),
        (chained(OSError(errno.ENOSPC, "No space left on device")), "DIR/out: the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 38272"), "DIR/out: the disk is full"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"), "DIR/out: the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "MiB free at DIR"),
        (OSError(errno.EROFS, "Read-only file system", "DIR/x"), "DIR/x: cannot be written (read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "DIR/x"), "DIR/x: cannot be written"),
        (ValueError("nothing of the kind"), None),
        (FileNotFoundError(errno.ENOENT, "No such file", "DIR/x"), None),
    ],
)
def test_disk_errors_are_one_line_with_path_and_free_space(tmp_path, error, message):
    if isinstance(error, OSError) and error.filename:
        error.filename = error.filename.replace("DIR", str(tmp_path))
    flags = SFTFlags(
        base_model="b",
        train_file="t",
        eval_file="e",
        sid_index_path="i",
        item_meta_path="m",
        output_dir=str(tmp_path / "out"),
    )
    told = explain_disk_error(error, flags)
    assert (told is None) == (message is None)
    if message:
        assert message.replace("DIR", str(tmp_path)) in told and len(told.splitlines()) == 1


def test_ctrl_c_is_one_line_and_status_130(capsys):
    def command(_flags):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_command(command, StageFlags())
    assert end.value.code == 130 and capsys.readouterr().err.startswith("error: interrupted")


# -------------------------------------------------------------------------------------------------- diverging trainings
def sft_flags(folder, **changes):
    paths = make_dataset(folder / "data")
    settings = {name: paths[name] for name in ("train_file", "eval_file", "sid_index_path", "item_meta_path")}
    settings |= dict(base_model=write_config(folder), train_from_scratch=True, output_dir=str(folder / "sft"))
    settings |= dict(batch_size=16, micro_batch_size=16, num_epochs=2)
    return SFTFlags(**{**settings, **changes})


@pytest.mark.parametrize("rate", [1e30, 1e38])
def test_an_sft_that_diverges_stops_and_exports_nothing(tmp_path, rate):
    with pytest.raises(
        InputError, match=r"diverged at step \d+: .*--learning_rate 1e\+3.*nothing is exported"
    ) as error:
        sft(sft_flags(tmp_path, learning_rate=rate, warmup_ratio=0.0))
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "sft" / "final_checkpoint").exists()
    assert read_json(tmp_path / "sft" / "sft.stage.json")["status"] == "running"


def test_an_rl_that_diverges_says_step_and_rate(tmp_path):
    """The weights are broken by a step, and noticed by the rollouts of the next one, which know no step."""
    sft(sft_flags(tmp_path, num_epochs=1))
    settings = dict(model_path=str(tmp_path / "sft" / "final_checkpoint"), output_dir=str(tmp_path / "rl"), max_steps=3)
    settings |= {name: getattr(sft_flags(tmp_path / "again"), name) for name in ("train_file", "eval_file")}
    settings |= dict(info_file=str(tmp_path / "data" / "info.txt"), num_generations=2, train_batch_size=4)
    settings |= dict(gradient_accumulation_steps=1, learning_rate=1e30, test_during_training=False)
    with pytest.raises(InputError, match=r"diverged at step \d: .*--learning_rate 1e\+30.*nothing is exported"):
        rl(RLFlags(**settings))


@pytest.mark.parametrize("model", ["sasrec", "gru4rec"])
def test_a_network_that_diverges_stops(model):
    settings = dict(model=model, hidden_size=8, num_layers=1, num_heads=1, dropout=0.0, max_history=4)
    network = build_network([0, 1, 2], settings)
    with torch.no_grad():
        network.embedding.weight[1] = float("nan")
    sequences = [TrainSequence((0, 1), [(1, 2)])]
    trainer = NetworkTrainer(network, sequences, lambda: {"HR@10": 0, "NDCG@10": 0}, 2, 8, 0.1, 0.0, 5)
    with pytest.raises(InputError, match="training diverged in epoch 1: the loss is not finite .* --learning_rate 0.1"):
        trainer.fit()


def test_a_network_begins_anew_after_a_checkpoint_that_is_cut_off(tmp_path, capsys):
    settings = dict(model="gru4rec", hidden_size=8, num_layers=1, num_heads=1, dropout=0.0, max_history=4)
    sequences = [TrainSequence((0, 1), [(1, 2)])]
    arguments = (build_network([0, 1, 2], settings), sequences, lambda: {"HR@10": 0, "NDCG@10": 0}, 1, 8, 0.1, 0.0, 5)
    trainer = NetworkTrainer(*arguments, checkpoint=tmp_path / "training.pt")
    trainer.fit()
    content = (tmp_path / "training.pt").read_bytes()
    assert trainer.resume()
    for share in (0, 0.5, 0.99):
        (tmp_path / "training.pt").write_bytes(content[: int(share * len(content))])
        assert not trainer.resume() and "begins anew" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- the long forms
def run_script(module, *flags):
    command = [sys.executable, "-m", module, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_killed_stages_give_the_files_of_an_undisturbed_run(tmp_path):
    """The short form of scripts/fault_test.sh."""
    done = run_script(
        "scripts.fault_runs", "--work_dir", str(tmp_path / "faults"), "--kills", "2", "--stages", "text2emb"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "0 of " in done.stdout.splitlines()[-1] and "0 files left over, 0 other faults" in done.stdout.splitlines()[-1]
    )


def test_mutated_files_are_read_rightly_or_refused_in_one_line():
    """The short form of scripts/fuzz.sh; a seed that is always the same, so that a run of the suite can be repeated."""
    done = run_script("scripts.fuzz_readers", "--files", "1200", "--seed", "1")
    assert done.returncode == 0, done.stdout
    assert "0 tracebacks, 0 wrong" in done.stdout.splitlines()[-1]
