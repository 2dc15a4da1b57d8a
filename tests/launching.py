"""Commands under a launcher, and the table of what was launched: engine, command, difference from one process, memory.

Run as a script it prints the table of a file that `note_cell` wrote: `python tests/launching.py FILE`
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECONDS = 240  # a launch takes about ten on an idle machine; deepspeed's first one compiles a minute longer
LONG = os.environ.get("LAUNCH_TESTS") == "all"
long_form = pytest.mark.skipif(not LONG, reason="the long form: bash scripts/test_launch.sh")
FILES = {"fsdp2": "fsdp2_cpu", "ddp": "ddp_cpu"}
NAMES = {
    "one": "one process",
    "torchrun": "torchrun, DDP",
    "ddp": "accelerate, DDP",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp2": "FSDP2",
}


def launch(engine, flags, *, script="sft.py", processes=2, file=None, **environment):
    """The finished command under a launcher; it must end within SECONDS.

    Args:
        engine: "torchrun", or what accelerate's file config/accelerate/ENGINE.yaml makes of it.
        flags: {name: value}.
        script: "sft.py", or a module such as "rq.rqvae".
        processes: that share the work.
        file: another file of accelerate.
        environment: what tests/launched.py reads.

    Returns:
        The finished process; its attribute `seen` is the folder of the ranks' reports.
    """
    named = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    seen = Path(tempfile.mkdtemp(prefix="seen-"))
    variables = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "FSDP_ON_CPU": "1" if engine == "fsdp2" else "",
        "SEEN": str(seen),
    }
    if engine == "torchrun":
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    else:
        file = file or f"config/accelerate/{FILES.get(engine, engine)}.yaml"
        launcher = ["accelerate.commands.launch", "--config_file", file, "--num_processes", str(processes)]
        launcher += ["--main_process_port", "0"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", *launcher, str(ROOT / "tests/launched.py")),
            *([script] if script.endswith(".py") else ["-m", script]),
            *named,
        ],
        env={**os.environ, **variables, **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=SECONDS,
        check=False,
    )
    done.seen = seen
    return done


def find_last_line(text):
    """What a launcher says last, its rulers left out."""
    return [line for line in text.splitlines() if line.strip(" =-")][-1]


def note_cell(engine, command, outcome, done):
    """Add a cell to the table of scripts/test_launch.sh.

    Args:
        engine: as in `launch`.
        command: heading of the column.
        outcome: difference of the weights from those of one process, or words.
        done: the finished launch.
    """
    path = os.environ.get("LAUNCH_TABLE")
    if path:
        memory = [int((done.seen / f"{rank}.memory").read_text()) for rank in range(2)]
        cell = {"engine": engine, "command": command, "outcome": outcome, "memory": memory}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")


def format_table(path):
    """The cells as a Markdown table: engines down, commands across."""
    cells = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    commands = list(dict.fromkeys(cell["command"] for cell in cells))
    lines = [f"| engine | {' | '.join(commands)} |", "|---" * (len(commands) + 1) + "|"]
    for engine in [engine for engine in NAMES if any(cell["engine"] == engine for cell in cells)]:
        row = []
        for command in commands:
            found = [cell for cell in cells if (cell["engine"], cell["command"]) == (engine, command)]
            texts = []
            for cell in found[-1:]:
                outcome = cell["outcome"] if isinstance(cell["outcome"], str) else f"{cell['outcome']:.1e}"
                texts.append(f"{outcome}, {max(cell['memory'])} MB")
            row += texts or [""]
        lines.append(f"| {NAMES[engine]} | {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(format_table(sys.argv[1]))
