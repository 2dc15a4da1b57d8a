"""Prints what a run folder holds: one table of metrics, the time and memory of every stage, the paths of all outputs.

python -m scripts.summary --run_dir output/quickstart
"""

from __future__ import annotations

from pathlib import Path

from minionerec.common.cli import run
from minionerec.common.files import InputError, read_json, write_json
from minionerec.common.processes import say
from minionerec.evaluation.metrics import format_metrics

# Where each row of the table comes from, in the order of the table.
RESULTS = {
    "popularity": "baselines/popularity.metrics.json",
    "transition counts": "baselines/transitions.metrics.json",
    "repeat last": "baselines/repeat_last.metrics.json",
    "SASRec": "sasrec/test.metrics.json",
    "GRU4Rec": "gru4rec/test.metrics.json",
    "after SFT": "sft/test.metrics.json",
    "after RL": "rl/test.metrics.json",
}


def summary(run_dir: str) -> None:
    """Summarise a run folder of quickstart.sh or run_category.sh."""
    root = Path(run_dir)
    found = {name: read_json(root / path) for name, path in RESULTS.items() if (root / path).is_file()}
    if not found:
        raise InputError(f"--run_dir {run_dir}: no metrics below it")
    records = sorted(root.rglob("*stage.json"), key=lambda path: path.stat().st_mtime)
    stages = [(path.relative_to(root), read_json(path)) for path in records]
    say(f"\nTest split, {next(iter(found.values()))['rows']:,} rows\n\n{format_metrics(found)}\n")
    say(f"{'stage':<44}{'seconds':>9}{'peak MB':>9}")
    for path, record in stages:
        say(
            f"{record['stage'] + ' (' + str(path.parent) + ')':<44}{record['seconds']:>9.1f}{record['peak_memory_mb']:>9}"
        )
    say(f"{'total':<44}{sum(record['seconds'] for _, record in stages):>9.1f}\n")
    for output in sorted({output for _, record in stages for output in record["outputs"]}):
        say(f"  {output}")
    write_json(
        root / "summary.json",
        {
            "metrics": found,
            "stages": {str(path): {k: r[k] for k in ("seconds", "peak_memory_mb")} for path, r in stages},
        },
    )
    say(f"  {root / 'summary.json'}")


if __name__ == "__main__":
    run(summary)
