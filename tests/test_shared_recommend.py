"""recommend.py --input under torchrun: two processes write the file of one, also after one of them was killed."""

import json
import os
import subprocess
import sys

from launching import ROOT

from minionerec.evaluation import batches
from minionerec.evaluation.settings import RecommendFlags
from recommend import recommend

CHUNK = 3  # users, so that a small file is several chunks
SECONDS = 240  # a launch takes about ten on an idle machine

# recommend.py with small chunks; a process whose rank is DYING is killed when it begins its second chunk.
SHARED = f"""
import os, signal, sys
from minionerec.common.cli import parse_flags, run_command
from minionerec.evaluation import batches
from minionerec.evaluation.settings import RecommendFlags
from recommend import recommend

batches.CHUNK = {CHUNK}
plain, begun = batches.recommend_to_users, []


def dying(*arguments):
    begun.append(1)
    if len(begun) == 2 and os.environ["RANK"] == os.environ.get("DYING"):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*arguments)


batches.recommend_to_users = dying
run_command(recommend, parse_flags(RecommendFlags), shared=True)
"""


def launch(script, flags, **environment):
    """The finished script under torchrun's two processes, which talk over gloo."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    named = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}
    return subprocess.run(
        [sys.executable, *launcher, str(script), *named],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=SECONDS,
        check=False,
    )


def write_users(path):
    """20 users of whom three cannot be read: no item of that name, no history, a row that is too short."""
    cells = [f"[{number % 10}, {number % 7}]" for number in range(20)]
    cells[4], cells[11] = "[99999]", ""
    lines = [f'U{number},"{cell}"' for number, cell in enumerate(cells)]
    lines[17] = "U17"
    path.write_text("\n".join(["user_id,history", *lines]) + "\n")
    return path


def test_two_processes_write_the_file_of_one_after_a_kill(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "CHUNK", CHUNK)
    flags = {"base_model": trained.checkpoint, "input": str(write_users(tmp_path / "users.csv"))}
    flags |= {"num_beams": 10, "top": 4, "exclude_seen": True}
    one = tmp_path / "one.csv"
    recommend(RecommendFlags(**flags, output=str(one)))
    skipped = [json.loads(line) for line in (tmp_path / "one.csv.skipped.jsonl").read_text().splitlines()]
    assert [user["row"] for user in skipped] == [5, 12, 18]
    assert "99999" in skipped[0]["problem"] and "empty" in skipped[1]["problem"] and "2 fields" in skipped[2]["problem"]
    assert len(one.read_text().splitlines()) == 1 + 17 * 4

    script = tmp_path / "shared.py"
    script.write_text(SHARED)

    # Two launches and no third without a kill: the second shares its chunks as such a run would.
    cut = flags | {"output": tmp_path / "cut.csv"}
    killed = launch(script, cut, DYING="1")
    assert killed.returncode != 0 and not (tmp_path / "cut.csv").exists()
    finished = sorted((tmp_path / "cut.csv.partial").glob("part-*.json"))
    assert {path.name for path in finished} >= {"part-000001.json"} and len(finished) < 7
    # A mark that a chunk done again would not have.
    marked = json.loads(finished[0].read_text())
    marked[0]["recommendations"][0]["title"] += " (kept)"
    finished[0].write_text(json.dumps(marked))
    resumed = launch(script, cut)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "going on" in resumed.stdout and resumed.stdout.count("[recommend] done") == 1  # one process prints
    text = (tmp_path / "cut.csv").read_text()
    assert text.count(" (kept)") == 1
    assert text.replace(" (kept)", "") == one.read_text()
    assert (tmp_path / "cut.csv.skipped.jsonl").read_bytes() == (tmp_path / "one.csv.skipped.jsonl").read_bytes()
    assert not (tmp_path / "cut.csv.partial").exists()
