"""One page of plots for one model or several: where the hits are, and for which rows.

python -m scripts.report --metrics output/sft/test.metrics.json output/rl/test.metrics.json --output output/report.png
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from minionerec.common.cli import run
from minionerec.common.files import InputError
from minionerec.common.processes import say
from minionerec.evaluation.metrics import (
    format_metrics,
)

if TYPE_CHECKING:
    pass
from minionerec.evaluation.plot import draw_metrics, read_metrics


def report(metrics: list[str], output: str, names: list[str] | None = None) -> None:
    """Draw metrics files side by side and print their table.

    Args:
        metrics: NAME.metrics.json files of evaluate.py or baselines.py, all of the same test split.
        output: the PNG file. names: of the models, one a file, without spaces; else folder/NAME.
    """
    shown = names or [f"{Path(path).parent.name}/{Path(path).name.removesuffix('.metrics.json')}" for path in metrics]
    if len(shown) != len(metrics):
        raise InputError(f"--names: expected {len(metrics)} names, one for every file of --metrics, got {len(shown)}")
    twice = [name for name in shown if shown.count(name) > 1]
    if twice:
        raise InputError(f"--names: {twice[0]} stands for two files of --metrics; give each its own name")
    columns = {name: read_metrics(path) for name, path in zip(shown, metrics)}
    draw_metrics(columns, output)
    say(f"{format_metrics(columns)}\n-> {output}")


if __name__ == "__main__":
    run(report)
