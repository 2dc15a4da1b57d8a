"""scripts/pipeline.sh: flags are checked before anything runs, quotes survive, stages are logged, and a run goes on."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, long_form

from minionerec.common.files import read_json

NAMES = ["data", "text2emb", "sids", "convert", "baselines", "sasrec", "sft", "evaluate_sft", "rl", "evaluate_rl"]
LAST = ["card_sft", "card_rl", "summary", "report"]


def write_raw(folder):
    """RecBole files of 30 users who walk along 20 items."""
    folder.mkdir()
    rng = random.Random(0)
    words = ["red", "blue", "old", "new", "saw", "drill", "lamp"]
    titles = [f"{rng.choice(words)} {rng.choice(words)} {item}" for item in range(20)]
    items = [f"i{item}\t{title}\t{title.split()[0]}" for item, title in enumerate(titles)]
    (folder / "toy.item").write_text("\n".join(["item_id:token\ttitle:token_seq\tclass:token", *items]) + "\n")
    visits = []
    for user in range(30):
        item = rng.randrange(20)
        for _ in range(8):
            visits.append((user, item))
            item = (item + rng.choice([1, 1, 1, 3])) % 20
    rng.shuffle(visits)
    lines = [f"u{user}\ti{item}\t{time}" for time, (user, item) in enumerate(visits)]
    (folder / "toy.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *lines]) + "\n")


def run(folder, *flags, **environment):
    command = ["bash", str(ROOT / "scripts/pipeline.sh"), "--dataset", "toy", "--input_dir", str(folder / "raw")]
    variables = {"MINIONEREC_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "LAUNCH": "none", **environment}
    return subprocess.run(
        [*command, "--output_dir", str(folder / "out"), *flags],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--sft", "--num_epochs 3", "--sid_method", "kmeans"], "--sid_method kmeans: expected rqvae, rqkmeans_faiss"),
        (["--networks", "caser"], "--networks caser: expected sasrec, gru4rec"),
        (["--networks", "sasrec", "--gru4rec", "--folds 2"], "--gru4rec: needs gru4rec among --networks"),
        (["--category", "toy"], "--category: goes with --data_root"),
        (["--reviews_file", "x"], "--input_dir: goes without --reviews_file"),
        (["--text2emb", "--plm_name x"], "--text2emb: --plm_name and --plm_checkpoint are flags of pipeline.sh"),
        (["--data", "--split 'open"], "--data: a quote is not closed: --split 'open"),
    ],
)
def test_wrong_flags_of_the_pipeline(tmp_path, flags, message):
    done = run(tmp_path, *flags)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_wrong_flag_of_the_last_stage_ends_it_before_the_first(tmp_path):
    write_raw(tmp_path / "raw")
    done = run(tmp_path, "--base_model", "none", "--eval", "--num_beans 3", "--networks", "")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "unknown flag --num_beans; did you mean --num_beams" in done.stderr
    assert "stage evaluate_sft: its flags are wrong, nothing was run" in done.stderr.splitlines()[-1]


SMALL = {
    "--networks": "sasrec",
    "--network": "--num_epochs 2 --hidden_size 16",
    "--sids": "--num_emb_list 8,8 --e_dim 8 --layers 16 --epochs 4 --eval_step 2 --batch_size 16 --warmup_epochs 0 "
    "--indices '--collisions nearest_free'",
    "--sft": "--base_model {config} --train_from_scratch True --num_epochs 1 --batch_size 32 --micro_batch_size 8",
    "--eval": "--num_beams 10 --K 5",
    "--rl": "--max_steps 2 --num_generations 4 --train_batch_size 8 --eval_step 1 --test_beam 10",
}


@long_form
def test_raw_data_to_metrics_by_two_processes_and_on_after_a_break(tmp_path):
    """RL stops by a wrong file; the same command with a right one does RL and what follows, and nothing else."""
    write_raw(tmp_path / "raw")
    config = ROOT / "config/tiny_qwen3.json"
    flags = [text.replace("{config}", str(config)) for pair in SMALL.items() for text in pair]
    two = {"LAUNCH": "ddp", "PROCESSES": "2"}
    broken = [*flags, "--rl", f"{SMALL['--rl']} --plugin '{tmp_path}/no such.py'"]
    stopped = run(tmp_path, *broken, **two)
    assert stopped.returncode == 2, stopped.stderr
    assert "stage rl ended with status" in stopped.stderr and "no such.py" in stopped.stderr
    out = tmp_path / "out"
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    done = run(tmp_path, *flags, **two)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "engine: DDP" in done.stdout and "after RL" in done.stdout and "SASRec" in done.stdout
    logs = sorted(path.name for path in (out / "logs").iterdir())
    assert logs == [f"{number:02d}_{name}.log" for number, name in enumerate([*NAMES, *LAST], 1)]
    assert (out / "logs/07_sft.log").read_text().count("already done") == 1
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed <= {"rl.stage.json"}
    assert set(read_json(out / "summary.json")["metrics"]) >= {"popularity", "SASRec", "after SFT", "after RL"}
    assert "after RL" in (out / "report.html").read_text() and "rl.py" in (out / "log.txt").read_text()
    assert (out / "command.txt").read_text().startswith("bash scripts/pipeline.sh --dataset toy")
    for name in Path(out / "sft").glob("test.metrics.json"):
        assert read_json(name)["illegal"] == 0


@long_form
@pytest.mark.parametrize("own_token", [False, True])
def test_a_dry_run_plans_every_stage_and_writes_nothing(tmp_path, own_token):
    """What training would leave is stood in for, so that SFT, RL and evaluation are planned before there is a model."""
    write_raw(tmp_path / "raw")
    changed = {"--networks": ""}
    if own_token:
        changed["--sid_method"] = "rqkmeans_constrained"
        changed["--sids"] = "--codebook_size 4 --num_levels 1 --collisions own_token"
        changed["--behaviour"] = "--dim 4"
        changed["--networks"], changed["--gru4rec"] = "gru4rec", "--folds 2"
        changed["--sft"] = f"{SMALL['--sft']} --sid_init {tmp_path}/out/data/toy.emb-behaviour-td.npy"
        changed["--sft"] += f" --tasks next_sid,teacher_sid --teacher gru4rec --cf_path {tmp_path}/out/gru4rec/model"
    config = str(ROOT / "config/tiny_qwen3.json")
    flags = [text.replace("{config}", config) for pair in {**SMALL, **changed}.items() for text in pair]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = run(tmp_path, *flags, "--dry_run", "True", TMPDIR=str(temporary))
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "out").exists() and not list(temporary.glob("tmp.*"))
    plans, table = done.stdout.split("Plan of ")
    assert "optimizer steps" in plans and "rollouts" in plans
    assert own_token or "4 epochs take about" in plans
    assert f"writes {tmp_path}/out/rl/final_checkpoint" in plans and "cannot be planned" not in table
    names = [name for name in NAMES if name != "sasrec"] + LAST
    if own_token:
        names.insert(2, "behaviour")
        names.insert(names.index("baselines") + 1, "gru4rec")
        assert "4 epochs take about" in plans and "those of 2 more, each without a part of the users" in plans
    assert [line.split()[1] for line in table.splitlines()[2:]] == names
    assert [name for name in names if f" {name} " in table and "to be done" in table] == names
    wrong = run(tmp_path, "--dry_run", "yes")
    assert wrong.returncode == 2 and "--dry_run yes: expected True or False" in wrong.stderr


# A script of stages with OUT and PYTHON as its arguments, without an environment of its own.
STAGES_HEAD = """
set -euo pipefail
PYTHON="$2"
fail() { echo "error: $1" >&2; exit 2; }
source scripts/launch.sh
source scripts/stages.sh
OUT="$1"
"""


def plan(stages, folder, out, **variables):
    """Run what follows STAGES_HEAD; temporary files go to `folder`."""
    return subprocess.run(
        ["bash", "-c", STAGES_HEAD + stages, "plan", str(out), sys.executable],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder), "LAUNCH": "none", **variables},
        capture_output=True,
        text=True,
        check=True,
    )


PLANNING = """
say_plan() {
    [ -z "${MINIONEREC_CHECK_FLAGS:-}" ] || return 0
    case "$1" in
        failing) echo "error: it needs a model"; return 2 ;;
        trained) echo "  time, validation left out         12.5 minutes at 40 % of 1 TFLOPS" ;;
        finished) echo "[x] dry run, nothing is written; it is done already, and --force True would do it again"
            echo "  an earlier run with the same settings took 3.5 minutes and 870 MB" ;;
    esac
    echo "  writes $OUT/$1 ${*: -1}"
}
run_all() {
    STAGE=0
    for name in trained finished failing other; do run_stage $name say_plan $name; done
}
check_then_run run_all True
"""


def test_the_table_of_a_dry_run(tmp_path):
    """State and time as the commands say them; a stage that cannot be planned is not the end of the others."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "log.txt").write_text("kept")
    before = (out / "log.txt").stat().st_mtime_ns
    done = plan(PLANNING, tmp_path, out)
    plans, table = done.stdout.split("Plan of ")
    assert f"writes {out}/trained True" in plans and "error: it needs a model" in plans
    rows = [line.split(maxsplit=2) for line in table.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["1", "trained"], ["2", "finished"], ["3", "failing"], ["4", "other"]]
    said = [" ".join(row[2].split()) for row in rows]
    assert said[0] == "to be done 12.5 minutes, counted"
    assert said[1] == "done already 3.5 minutes, an earlier run 870 MB"
    assert said[2:] == ["cannot be planned, see above", "to be done not known before it runs"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and [path.name for path in out.iterdir()] == [
        "log.txt"
    ]
    assert (out / "log.txt").stat().st_mtime_ns == before


SIDS_PLANNING = """
say_sids() {
    [ -z "${MINIONEREC_CHECK_FLAGS:-}" ] || return 0
    echo "[method] seed=1 $2"
    echo "  writes $OUT/toy.index.json"
}
say_file() { [ -n "${MINIONEREC_CHECK_FLAGS:-}" ] || cat "$1"; }
NAMED="$OUT/toy.index.json"
run_all() {
    STAGE=0
    run_stage sids say_sids scripts/rqvae.sh "$FLAGS"
    run_stage other say_file "$NAMED" # a file of the run, named from outside
}
check_then_run run_all True
"""


@pytest.mark.parametrize(
    "flags, levels, different",
    [
        ("num_emb_list=[4, 4] x=1", [4, 4], None),
        ("codebook_size=8 num_levels=2 x=1", [8, 8], None),
        ("collisions=['extra_token'] num_levels=2 codebook_size=[2, 3] x=1", [2, 3, 3], None),
        ("collisions=['own_token'] num_levels=1 codebook_size=[4] x=1", [4, 14], 14),
    ],
)
def test_random_sids_stand_in_for_those_of_every_method(tmp_path, flags, levels, different):
    """As many levels and codes as the method's plan names, and all SIDs different."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "toy.item.json").write_text(json.dumps({str(item): {} for item in range(14)}))
    done = plan(SIDS_PLANNING, tmp_path, out, FLAGS=flags)
    assert "cannot be planned" not in done.stdout, done.stdout
    sids = json.loads("{" + done.stdout.split("\n  {")[1].split("}")[0] + "}")
    assert len(sids) == 14 == len({tuple(sid) for sid in sids.values()})
    for level, size in enumerate(levels):
        codes = [int(sid[level].strip("<>").split("_")[1]) for sid in sids.values()]
        assert max(codes) < size and (different is None or level == 0 or len(set(codes)) == different)
    assert {len(sid) for sid in sids.values()} == {len(levels)}
