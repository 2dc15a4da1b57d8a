"""Kill -9 at random moments of every stage, started again each time: the result must be that of an undisturbed run.

python -m scripts.fault_runs --work_dir faults --kills 30

The stages of a small data set run once undisturbed, then again while they are killed: by turns after a random share of
what the stage prints, and when it has written a random one of its files. At the end every final file is
compared, no temporary file and no lock may be left, and no stage may have been skipped, or done more than once. The
last line sums it up; the exit status is 1 unless all is well.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from minionerec.common.cli import Flags, flag, parse_flags, run_command

STAGES = ("data", "text2emb", "rqvae", "indices", "convert", "sasrec", "sft", "evaluate_sft", "rl", "evaluate_rl")


@dataclass
class FaultFlags(Flags):
    """Faults."""

    work_dir: str = flag(help="folder of the data and of both runs; it must not exist")
    kills: int = flag(30, "kills in all, shared out over the stages")
    seed: int = flag(0, "of the moments")
    stages: list[str] = flag(list(STAGES), "the stages to kill, those before them run undisturbed", choices=STAGES)


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(FaultFlags)

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from minionerec.common.files import InputError, read_json
from minionerec.common.processes import say

ROOT = Path(__file__).parents[1]
SECONDS = 900  # that a stage may take
MOST_MISSED = 6  # starts of a stage that end before they are killed
LEFT = re.compile(r".*(\.tmp-.*|\.lock)$")
# What says when and where something ran, and what trainers go on from: of equal values, but packed otherwise.
NOT_COMPARED = re.compile(
    r".*(\.stage\.json|\.settings\.yaml|/log\.txt|/steps\.csv|/checkpoint_\d+\.pth)$"
    r"|.*/(checkpoint-\d+|data_cache|runs)/.*"
)


@dataclass
class Outcome:
    """What happened: kills and restarts that went on, by stage; what is wrong at the end."""

    kills: int = 0
    resumes: int = 0
    wrong: list[str] = field(default_factory=list)


def write_raw_data(folder: Path, users: int = 40, items: int = 24) -> None:
    """A small RecBole data set, the same every time."""
    folder.mkdir(parents=True)
    draws = random.Random(0)
    titles = [
        f"{kind} {part} {n}"
        for n, (kind, part) in enumerate(
            (kind, part)
            for kind in ("red", "blue", "green", "black", "white", "steel")
            for part in ("saw", "drill", "nail", "glue")
        )
    ]
    lines = [
        "item_id:token\ttitle:token_seq\tcategories:token_seq",
        *(f"i{n}\t{titles[n]}\ttools" for n in range(items)),
    ]
    (folder / "toy.item").write_text("\n".join(lines) + "\n")
    rows = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(users):
        start = draws.randrange(items)
        rows += [
            f"u{user}\ti{(start + step * draws.choice((1, 1, 2))) % items}\t{1_500_000_000 + user + 86_400 * step}"
            for step in range(10)
        ]
    (folder / "toy.inter").write_text("\n".join(rows) + "\n")


def list_commands(raw: Path, out: Path) -> dict[str, list[str]]:
    """The command of every stage, in their order."""
    data, csv = out / "data", out / "csv"
    paths = {"raw": raw, "out": out, "data": data, "csv": csv, "info": csv / "info" / "toy.txt"}
    paths |= {split: csv / split / "toy.csv" for split in ("train", "valid", "test")}
    paths |= {"embeddings": data / "toy.emb-tfidf-td.npy", "index": data / "toy.index.json"}
    paths["config"] = ROOT / "config" / "tiny_qwen3.json"
    # What follows a name are its flags; {...} are paths.
    texts = {
        "data": "-m data_process.recbole_data_process --dataset toy --input_dir {raw} --output_path {data} --user_k 2 "
        "--item_k 2",
        "text2emb": "-m rq.text2emb.amazon_text2emb --dataset toy --root {data} --plm_name tfidf",
        "rqvae": "-m rq.rqvae --data_path {embeddings} --ckpt_dir {out}/rqvae --num_emb_list 8,8 --e_dim 8 --layers 16 "
        "--epochs 60 --eval_step 5 --batch_size 8 --warmup_epochs 0",
        "indices": "-m rq.generate_indices --ckpt_path {out}/rqvae/final_model.pth --data_path {embeddings} "
        "--output_file {index} --collisions nearest_free",
        "convert": "convert_dataset.py --dataset_name toy --data_dir {data} --output_dir {csv}",
        "sasrec": "sasrec.py --train_file {train} --valid_file {valid} --test_data_path {test} --info_file {info} "
        "--output_dir {out}/sasrec --num_epochs 8 --hidden_size 16",
        "sft": "sft.py --base_model {config} --train_from_scratch True --train_file {train} --eval_file {valid} "
        "--sid_index_path {index} --item_meta_path {data}/toy.item.json --output_dir {out}/sft --num_epochs 5 "
        "--batch_size 64 --micro_batch_size 32 --save_total_limit 2",
        "evaluate_sft": "evaluate.py --base_model {out}/sft/final_checkpoint --result_json_data {out}/sft/test.json "
        "--train_file {train} --info_file {info} --test_data_path {test} --num_beams 10 --K 5 --batch_size 4",
        "rl": "rl.py --model_path {out}/sft/final_checkpoint --train_file {train} --eval_file {valid} "
        "--info_file {info} --output_dir {out}/rl --max_steps 8 --num_generations 4 --train_batch_size 16 "
        "--eval_step 2 --test_beam 10 --gradient_accumulation_steps 1",
    }
    texts["evaluate_rl"] = texts["evaluate_sft"].replace("{out}/sft", "{out}/rl")
    return {name: [word.format(**paths) for word in texts[name].split()] for name in STAGES}


def start(command: list[str], log: Path) -> subprocess.Popen:
    """A stage in a process group of its own, its output appended to `log`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("a") as file:
        file.write(f"\n# {' '.join(command)}\n")
        file.flush()
        return subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )


def list_files(folder: Path) -> set[str]:
    """The paths of all files below a folder; one that vanishes meanwhile may be among them or not."""
    return {os.path.join(place, name) for place, _, names in os.walk(folder) for name in names}


def list_versions(folder: Path) -> set[tuple[str, int]]:
    """(path, number on the disk) of all files below a folder: one that is written anew is another version."""
    versions = set()
    for path in list_files(folder):
        try:
            versions.add((path, os.stat(path).st_ino))
        except FileNotFoundError:  # renamed meanwhile
            continue
    return versions


def count_done(out: Path) -> int:
    """Stages whose record says that they are done."""
    return sum(read_status(path) == "done" for path in out.rglob("*.stage.json"))


def read_status(record: Path) -> str | None:
    """The status in the record of a stage, None where it is not whole."""
    try:
        return read_json(record).get("status")
    except InputError:
        return None


def kill_once(command: list[str], log: Path, out: Path, said: int, draws: random.Random, *, by_file: bool) -> bool:
    """Start a stage and kill it; False where it ended before.

    What it has said, and not the time, tells how far it is: the same on a machine that does other things beside it.

    Args:
        said: bytes of what it prints, after which it is killed.
        by_file: kill it shortly after it has written its n-th file instead, for a random n.
    """
    before, wanted = list_versions(out), draws.randint(1, 8)
    process = start(command, log)
    begin, deadline = log.stat().st_size, time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if by_file and len(list_versions(out) - before) >= wanted or not by_file and log.stat().st_size - begin >= said:
            time.sleep(draws.random() * 0.05)
            break
        time.sleep(0.002)
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def run_to_end(name: str, command: list[str], log: Path) -> float:
    """Seconds that a stage took.

    Raises:
        InputError: it failed.
    """
    begun = time.monotonic()
    process = start(command, log)
    try:
        status = process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        status = "none"
    if status != 0:
        last = [line for line in log.read_text().splitlines() if line.strip()][-1]
        raise InputError(f"stage {name} ended with status {status} ({last[:300]}); its log is {log}")
    return time.monotonic() - begun


def fingerprint_files(out: Path) -> dict[str, str]:
    """{path below `out`: hash of its content} of the final files."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_file() and not NOT_COMPARED.fullmatch(f"/{name}"):
            found[name] = hashlib.blake2b(path.read_bytes()).hexdigest()
    return found


@dataclass
class Victim:
    """A stage that is killed while it runs.

    Attributes:
        log: what all its starts print. expected: bytes that it prints undisturbed. before: stages before it.
    """

    name: str
    command: list[str]
    log: Path
    expected: int
    before: int


def check_end(victim: Victim, out: Path, begin: int, was_done: bool, forced: bool) -> str | None:
    """What is wrong with a start that was not killed: it skips what was done, and does the rest.

    Args:
        begin: bytes of the log before it. was_done: whether the record said so before it.
    """
    text = victim.log.read_bytes()[begin:].decode(errors="replace")
    skipped, done = "] already done" in text, "] done in " in text
    if skipped != (was_done and not forced) or skipped == done or count_done(out) != victim.before + 1:
        return f"stage {victim.name} was {'skipped' if skipped else 'done'} wrongly: {text[-200:]!r}"
    return None


def disturb_stage(victim: Victim, out: Path, kills: int, draws: random.Random, outcome: Outcome) -> None:
    """Kill a stage as often as asked for, then run it to its end; a finished one is done again by force before that."""
    killed = missed = 0
    while killed < kills and missed < MOST_MISSED:
        # A start that goes on says less than one from the beginning.
        said = int(victim.expected * draws.uniform(0.05, 0.95 if killed == 0 else 0.6) / (1 + missed))
        was_done, begin = count_done(out) > victim.before, victim.log.stat().st_size if victim.log.exists() else 0
        command = [*victim.command, *(["--force", "True"] if was_done else [])]
        if kill_once(command, victim.log, out, said, draws, by_file=(killed + missed) % 2 == 1):
            killed += 1
            continue
        missed += 1
        outcome.wrong += filter(None, [check_end(victim, out, begin, was_done, was_done)])
    was_done, begin = count_done(out) > victim.before, victim.log.stat().st_size if victim.log.exists() else 0
    run_to_end(victim.name, victim.command, victim.log)
    outcome.wrong += filter(None, [check_end(victim, out, begin, was_done, False)])
    text = victim.log.read_text(errors="replace")
    outcome.kills += killed
    outcome.resumes += text.count("an earlier run was cut off; going on")
    if killed < kills:
        outcome.wrong.append(f"stage {victim.name} was killed {killed} times only")
    if "Traceback" in text:
        outcome.wrong.append(f"stage {victim.name} printed a traceback")
    say(f"[faults] {victim.name}: {killed} kills, {missed} starts that ended before, then to its end")


def disturb(commands: dict[str, list[str]], out: Path, flags: FaultFlags) -> Outcome:
    """Run all stages and kill those of the flags, until all have ended."""
    outcome, draws, logs = Outcome(), random.Random(flags.seed), out.parent / "logs"
    shares = {name: flags.kills // len(flags.stages) for name in flags.stages}
    for name in draws.sample(flags.stages, flags.kills % len(flags.stages)):
        shares[name] += 1
    for before, (name, command) in enumerate(commands.items()):
        expected = (logs / f"undisturbed_{name}.log").stat().st_size
        victim = Victim(name, command, logs / f"disturbed_{name}.log", expected, before)
        disturb_stage(victim, out, shares.get(name, 0), draws, outcome)
    return outcome


def fault_runs(flags: FaultFlags) -> None:
    """Run undisturbed, run with kills, compare.

    Raises:
        InputError: the folder exists, or a stage fails.
    """
    work = Path(flags.work_dir).absolute()
    if work.exists():
        raise InputError(f"--work_dir {flags.work_dir}: exists already; name a new folder")
    # Both runs go into one folder, one after the other, so that they have the same paths.
    raw, out = work / "raw", work / "out"
    write_raw_data(raw)
    (work / "logs").mkdir()
    commands = list_commands(raw, out)
    last = max(list(commands).index(name) for name in flags.stages)
    commands = {name: command for name, command in list(commands.items())[: last + 1]}
    for name, command in commands.items():
        seconds = run_to_end(name, command, work / "logs" / f"undisturbed_{name}.log")
        say(f"[faults] {name}: {seconds:.1f} s undisturbed")
    expected = fingerprint_files(out)
    shutil.move(out, work / "undisturbed")

    outcome = disturb(commands, out, flags)
    found = fingerprint_files(out)
    left = sorted(path for path in list_files(out) if LEFT.fullmatch(path))
    differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    unfinished = [str(path) for path in out.rglob("*.stage.json") if read_status(path) != "done"]
    outcome.wrong += [f"{name} differs" for name in differ] + [f"{path} is left" for path in left]
    outcome.wrong += [f"{path} says that it is not done" for path in unfinished]
    for text in outcome.wrong:
        say(f"[faults] {text}")
    say(
        f"faults: {outcome.kills} kills, {outcome.resumes} resumes, {len(differ)} of {len(expected)} final files "
        f"differ, {len(left)} files left over, {len(outcome.wrong) - len(differ) - len(left)} other faults"
    )
    if outcome.wrong:
        sys.exit(1)


if __name__ == "__main__":
    run_command(fault_runs, FLAGS)
