"""What a run folder holds: one table of metrics, the time and memory of every stage, the paths of all outputs.

python -m scripts.summary --run_dir output/quickstart
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import flag, parse_flags, run_command
from minionerec.common.settings import DryRunFlags


@dataclass
class SummaryFlags(DryRunFlags):
    """The run."""

    run_dir: str = flag(help="folder of pipeline.sh, quickstart.sh or run_category.sh; summary.json is written there")


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(SummaryFlags)

from pathlib import Path

from minionerec.common.files import write_json
from minionerec.common.processes import say, say_outputs
from minionerec.evaluation.metrics import format_metrics
from minionerec.reports.runs import describe_rl, read_run


def summary(flags: SummaryFlags) -> None:
    """Print the table, the stages and the outputs of a run folder, and write table and stages to summary.json."""
    root = Path(flags.run_dir)
    run = read_run(root)
    metrics, stages = {model.name: model.metrics for model in run.models}, run.records
    say(f"\nTest split, {next(iter(metrics.values()))['rows']:,} rows\n\n{format_metrics(metrics)}\n")
    outcome = describe_rl(run)
    if outcome:
        changed = f"{outcome['figure']} on the validation rows {outcome['start']:.4f} -> {outcome['best']:.4f}"
        kept = "RL's weights were kept" if outcome["kept"] == "RL" else "the SFT weights were kept, so that it is SFT's"
        say(f"after RL: {kept} ({changed})\n")
    say(f"{'stage':<44}{'seconds':>9}{'peak MB':>9}")
    for path, record in stages.items():
        name = f"{record['stage']} ({Path(path).parent})"
        say(f"{name:<44}{record['seconds']:>9.1f}{record['peak_memory_mb']:>9}")
    say(f"{'total':<44}{sum(record['seconds'] for record in stages.values()):>9.1f}\n")
    for output in sorted({output for record in stages.values() for output in record["outputs"]}):
        say(f"  {output}")
    shown = {path: {key: record[key] for key in ("seconds", "peak_memory_mb")} for path, record in stages.items()}
    if not flags.dry_run:
        write_json(root / "summary.json", {"metrics": metrics, "stages": shown})
    say_outputs([root / "summary.json"], flags.dry_run)


if __name__ == "__main__":
    run_command(summary, FLAGS)
