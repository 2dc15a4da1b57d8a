"""The table of a benchmark: mean and standard deviation of every model over the seeds, beside published figures.

python -m scripts.benchmark_table --run_dir output/benchmark/industrial --recipe config/benchmarks/industrial.yaml
python -m scripts.benchmark_table --run_dir output/cross_domain --kind cross_domain
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import flag, parse_flags, run_command
from minionerec.common.settings import DryRunFlags


@dataclass
class BenchmarkTableFlags(DryRunFlags):
    """Benchmark."""

    run_dir: str = flag(help="folder with seed_N/ folders of runs; table.txt, .csv and .png are written there")
    kind: str = flag("benchmark", "runs of benchmark.sh or of cross_domain.sh", choices=("benchmark", "cross_domain"))
    recipe: str | None = flag(None, "recipe of the benchmark, for the published figures")


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(BenchmarkTableFlags)

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minionerec.common.files import InputError, atomic_write, read_json, write_text
from minionerec.common.processes import say, say_outputs
from minionerec.evaluation.plot import COLOURS
from scripts.benchmark_recipe import read_recipe

COLUMNS = ("HR@10", "NDCG@10", "HR@50", "HR@10 unseen")
# By the kind of run, each row of the table: its metrics file below a seed's folder, and the folders of the stages that
# its CPU time counts.
Models = dict[str, tuple[str, tuple[str, ...]]]
MODELS: dict[str, Models] = {
    "benchmark": {
        "popularity": ("baselines/popularity.metrics.json", ()),
        "transition counts": ("baselines/transitions.metrics.json", ()),
        "likeness of texts": ("baselines/content.metrics.json", ()),
        "transitions + likeness": ("baselines/transitions+content.metrics.json", ("baselines",)),
        "SASRec": ("sasrec/test.metrics.json", ("sasrec",)),
        "GRU4Rec": ("gru4rec/test.metrics.json", ("gru4rec",)),
        "after SFT": ("sft/test.metrics.json", ("likeness", "sft")),
        "after SFT, fused": ("sft/test.fused.metrics.json", ("likeness", "sft")),
        "after RL": ("rl/test.metrics.json", ("likeness", "sft", "rl")),
        "after RL, fused": ("rl/test.fused.metrics.json", ("likeness", "sft", "rl")),
    },
    "cross_domain": {
        "A's model on A": ("first/test.metrics.json", ("first",)),
        "B: popularity": ("baselines/popularity.metrics.json", ()),
        "B: transition counts": ("baselines/transitions.metrics.json", ()),
        "B: likeness of texts": ("baselines/content.metrics.json", ()),
        "B: transitions + likeness": ("baselines/transitions+content.metrics.json", ("baselines",)),
        "A's model on B, no training": ("zero/test.metrics.json", ("zero",)),
        "A's model, RL on B": ("rl/test.metrics.json", ("rl",)),
        "SFT on 10 % of B, from scratch": ("scratch_10/test.metrics.json", ("scratch_10",)),
        "SFT on 10 % of B, from A": ("transfer_10/test.metrics.json", ("transfer_10",)),
        "SFT on B, from scratch": ("scratch_100/test.metrics.json", ("scratch_100",)),
        "SFT on B, from A": ("transfer_100/test.metrics.json", ("transfer_100",)),
    },
}
NOTES = {
    "benchmark": "CPU min: training and evaluation of a model, RL with the SFT before it; all: a whole run, data and "
    "semantic IDs too.",
    "cross_domain": "CPU min: training and evaluation of a model on B, without that of A before it; all: a whole run.",
}


def read_seed(folder: Path, models: Models) -> dict[str, dict[str, float]]:
    """{model: {column: figure, "minutes": CPU minutes}} of the run of one seed.

    The minutes of a model are those of its training and evaluation, data and SIDs left out; those stand under `all`,
    which is the whole run.
    """
    records = {path.relative_to(folder).parts[0]: [] for path in folder.rglob("*.stage.json")}
    for path in folder.rglob("*.stage.json"):
        records[path.relative_to(folder).parts[0]].append(read_json(path).get("cpu_seconds", 0.0) / 60)
    found = {}
    for model, (file, stages) in models.items():
        if (folder / file).is_file():
            metrics = read_json(folder / file)
            figures = {column: metrics["item"].get(column) for column in COLUMNS[:3]}
            figures[COLUMNS[3]] = metrics["item_unseen"].get("HR@10")
            minutes = sum(sum(records.get(stage, ())) for stage in stages)
            found[model] = {key: value for key, value in figures.items() if value is not None} | {"minutes": minutes}
    found["all"] = {"minutes": sum(map(sum, records.values()))}
    return found


def summarise_seeds(seeds: Sequence[dict[str, dict[str, float]]], models: Models) -> list[dict[str, Any]]:
    """One row for every model: `model`, `seeds`, and of every figure its mean and, of several seeds, `+-`."""
    rows = []
    for model in [*models, "all"]:
        runs = [seed[model] for seed in seeds if model in seed]
        row: dict[str, Any] = {"model": model, "seeds": len(runs)}
        for key in (*COLUMNS, "minutes"):
            values = [run[key] for run in runs if key in run]
            if values:
                row[key] = round(statistics.fmean(values), 4)
                row[f"{key} +-"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
        if runs:
            rows.append(row)
    return rows


def add_published(rows: list[dict[str, Any]], published: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """The rows behind those of published figures, which have no seeds and no minutes."""
    return [*({"model": f"{name} (published)", **figures} for name, figures in published.items()), *rows]


def format_benchmark(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a text table; standard deviations stand behind their means."""

    def show(row: dict[str, Any], key: str) -> str:
        digits = 1 if key == "minutes" else 4
        if row.get(key) is None:
            return "-"
        spread = row.get(f"{key} +-")
        return f"{row[key]:.{digits}f}" + (f" +-{spread:.{digits}f}" if spread is not None else "")

    header = ["", *COLUMNS, "CPU min", "seeds"]
    lines = [header]
    for row in rows:
        cells = [show(row, key) for key in (*COLUMNS, "minutes")]
        lines.append([row["model"], *cells, str(row.get("seeds", "-"))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def format_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a CSV file with a header line."""
    keys = ["model", "seeds", *(name for key in (*COLUMNS, "minutes") for name in (key, f"{key} +-"))]
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def draw_benchmark(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of HR@10 and NDCG@10, with standard deviations; published figures in another colour."""
    import matplotlib  # only here: it takes a second to load

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if COLUMNS[0] in row][::-1]
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 1.5 + 0.32 * len(shown)), sharey=True, layout="constrained")
    for panel, key in zip(panels, COLUMNS[:2], strict=True):
        values = [row.get(key) or 0.0 for row in shown]
        spread = [row.get(f"{key} +-") or 0.0 for row in shown]
        colours = [COLOURS[0] if "seeds" in row else COLOURS[6] for row in shown]
        panel.barh([row["model"] for row in shown], values, xerr=spread, color=colours, error_kw={"capsize": 3})
        panel.set_title(key)
        panel.grid(axis="x", alpha=0.3)
        for place, value in enumerate(values):
            panel.annotate(
                f"{value:.4f}", (0, place), xytext=(4, 0), textcoords="offset points", va="center", color="w"
            )
    figure.suptitle(title)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)


def tabulate_benchmark(flags: BenchmarkTableFlags) -> None:
    """Print the table of a benchmark and write it as text, CSV and PNG.

    Raises:
        InputError: no run below the folder, or a broken recipe.
    """
    root, models = Path(flags.run_dir), MODELS[flags.kind]
    recipe = read_recipe(flags.recipe) if flags.recipe else {}
    seeds = [read_seed(folder, models) for folder in sorted(root.glob("seed_*"))]
    seeds = [seed for seed in seeds if len(seed) > 1]
    if not seeds:
        raise InputError(f"--run_dir {root}: no seed_N folder with metrics below it")
    rows = add_published(summarise_seeds(seeds, models), recipe.get("published", {}))
    table = format_benchmark(rows)
    notes = f"Test rows, item level; mean and standard deviation over the seeds. {NOTES[flags.kind]}"
    if not flags.dry_run:
        write_text(root / "table.txt", f"{table}\n\n{notes}\n")
        write_text(root / "table.csv", format_csv(rows))
        draw_benchmark(rows, root / "table.png", f"{recipe.get('dataset', root.name)}, seeds: {len(seeds)}")
    say(f"\n{table}\n\n{notes}")
    say_outputs((root / name for name in ("table.txt", "table.csv", "table.png")), flags.dry_run)


if __name__ == "__main__":
    run_command(tabulate_benchmark, FLAGS)
