"""One page of plots for one model or several: where the hits are, and for which rows.

python -m scripts.plots --metrics output/sft/test.metrics.json output/rl/test.metrics.json --output output/plots.png
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import flag, parse_flags, run_command
from minionerec.common.settings import DryRunFlags


@dataclass
class PlotsFlags(DryRunFlags):
    """Models and page."""

    metrics: list[str] = flag(
        help="NAME.metrics.json files of evaluate.py, baselines.py or sasrec.py, all of the same test split"
    )
    output: str = flag(help="the PNG file")
    title: str = flag("", "head of the page, such as the data set", default_text="none")
    names: list[str] | None = flag(
        None, "names of the models, one a file, without spaces and commas", default_text="folder/NAME"
    )


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(PlotsFlags)

from pathlib import Path

from minionerec.common.files import InputError
from minionerec.common.processes import say, say_outputs
from minionerec.evaluation.metrics import format_metrics
from minionerec.evaluation.plot import draw_metrics, read_metrics


def plot_models(flags: PlotsFlags) -> None:
    """Draw metrics files side by side and print their table."""
    paths = flags.metrics
    names = flags.names or [
        f"{Path(path).parent.name}/{Path(path).name.removesuffix('.metrics.json')}" for path in paths
    ]
    if len(names) != len(paths):
        raise InputError(f"--names: expected {len(paths)} names, one for every file of --metrics, got {len(names)}")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"--names: {twice[0]} stands for two files of --metrics; give each its own name")
    columns = {name: read_metrics(path) for name, path in zip(names, paths, strict=True)}
    if not flags.dry_run:
        draw_metrics(columns, flags.output, flags.title)
    say(format_metrics(columns))
    say_outputs([flags.output], flags.dry_run)


if __name__ == "__main__":
    run_command(plot_models, FLAGS)
