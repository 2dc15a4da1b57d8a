"""Results of any number of runs as one table: a line for each run and method, and means and spreads over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from minionerec.common.files import atomic_write, write_text
from minionerec.reports.figures import METRICS
from minionerec.reports.runs import Run, describe_rl

METRIC_NAMES = [f"{name}@{k}" for name, k in METRICS]
SUMMARY = ["HR@5", "HR@10", "HR@50", "NDCG@5", "NDCG@10", "HR@10 unseen", "minutes"]
TABLES = ("results.csv", "results.md")
KEYS = ["data set", "method"]


def tabulate_runs(runs: Sequence[Run]) -> pd.DataFrame:
    """One line for each run and method: data set, run, method, seed, metrics at item level, cost and commit."""
    lines: list[dict[str, Any]] = []
    for run in runs:
        outcome = describe_rl(run)
        for model in run.models:
            metrics = model.metrics
            kept = outcome["kept"] if outcome and model.name.startswith("after RL") else ""
            lines.append(
                {
                    "data set": run.data_set,
                    "run": run.name,
                    "method": model.name,
                    "seed": run.seed,
                    "rows": metrics["rows"],
                    **{name: metrics["item"].get(name) for name in METRIC_NAMES},
                    "HR@10 unseen": metrics["item_unseen"].get("HR@10"),
                    "NDCG@10 unseen": metrics["item_unseen"].get("NDCG@10"),
                    "coverage@10": metrics.get("coverage@10"),
                    "illegal": metrics["illegal"],
                    "weights of": kept,
                    "minutes": None if model.minutes is None else round(model.minutes, 2),
                    "peak memory MB": model.memory_mb,
                    "commit": run.environment.get("commit") or "",
                }
            )
    return pd.DataFrame(lines)


def average_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Means over runs of one data set and method, in the order of the table, and "X sd": spreads where there are two.

    `runs` counts them; the spread is the standard deviation of a sample.
    """
    groups = table.groupby(KEYS, sort=False)
    numbers = table.assign(**{name: pd.to_numeric(table[name]) for name in SUMMARY}).groupby(KEYS, sort=False)
    means = numbers[SUMMARY].mean()
    spreads = numbers[SUMMARY].std(ddof=1).add_suffix(" sd")
    return pd.concat([groups.size().rename("runs"), means, spreads], axis=1).reset_index()


def _format(value: Any, digits: int = 4) -> str:
    if value is None or pd.isna(value):
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _format_markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [list(header), ["---"] * len(header), *map(list, lines)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def format_results(table: pd.DataFrame) -> str:
    """The results as Markdown: means and spreads over seeds, then every run by itself."""
    summary = average_runs(table)
    means = []
    for _, row in summary.iterrows():
        cells = []
        for name in SUMMARY:
            digits = 1 if name == "minutes" else 4
            spread = row[f"{name} sd"]
            cells.append(_format(row[name], digits) + ("" if pd.isna(spread) else f" ± {_format(spread, digits)}"))
        means.append([str(row[key]) for key in KEYS] + [str(row["runs"]), *cells])
    shown = ["data set", "run", "method", "seed", "HR@10", "NDCG@10", "HR@50", "illegal", "weights of", "minutes"]
    shown.append("commit")
    single = [[_format(row[name], 2 if name == "minutes" else 4) for name in shown] for _, row in table.iterrows()]
    return (
        "# Results\n\nItem level, on all rows of the test split. ±: standard deviation over runs, which differ in "
        "their seed.\n\n"
        f"## Means\n\n{_format_markdown([*KEYS, 'runs', *SUMMARY], means)}\n\n"
        f"## Runs\n\n{_format_markdown(shown, single)}\n\n"
        "`weights of`: SFT where no step of RL was better on the validation rows, so that the model after RL is the "
        "one before it.\n"
    )


def write_results(runs: Sequence[Run], folder: str | Path) -> list[Path]:
    """Write results.csv and results.md into a folder; returns their paths."""
    table = tabulate_runs(runs)
    paths = [Path(folder) / name for name in TABLES]
    with atomic_write(paths[0]) as temporary:
        table.to_csv(temporary, index=False)
    write_text(paths[1], format_results(table))
    return paths
