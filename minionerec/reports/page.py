"""report.html of a run: what is shown is gathered here, how it looks stands in templates/."""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from minionerec.common.files import InputError, write_text
from minionerec.common.records import read_index
from minionerec.reports.curves import read_trainings
from minionerec.reports.examples import choose_examples
from minionerec.reports.figures import (
    CUTOFFS,
    METRICS,
    Difference,
    Estimate,
    Ranked,
    choose_reference,
    choose_shown,
    compare_with,
    measure_groups,
    measure_model,
    rank_models,
)
from minionerec.reports.pictures import draw_code_use, draw_curves, draw_cutoffs, draw_group_points, draw_methods
from minionerec.reports.results import average_runs, format_results, tabulate_runs
from minionerec.reports.runs import (
    Run,
    RunData,
    count_codes,
    describe_rl,
    iterate_quality_reports,
    read_run_data,
)

TEMPLATES = Path(__file__).parent / "templates"
PAGE = "report.html"
COMMAND_FILE = "command.txt"  # that scripts/pipeline.sh writes


def format_metric(value: float | None, digits: int = 4) -> str:
    """.1234 for a share; a dash for what is not known."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def format_change(value: float) -> str:
    """A difference with its sign."""
    return ("+" if value >= 0 else "−") + format_metric(abs(value))


def format_p(value: float) -> str:
    """A p-value."""
    return "< .0001" if value < 1e-4 else format_metric(value)


def format_interval(estimate: Estimate | Difference, signed: bool = False) -> str:
    """The ends of an interval."""
    shown = format_change if signed else format_metric
    return (
        f"{shown(estimate.low)} to {shown(estimate.high)}"
        if signed
        else f"{shown(estimate.low)}–{shown(estimate.high)}"
    )


def fingerprint(path: Path) -> str:
    """The first 12 digits of the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def load_templates() -> Environment:
    """The templates, with the formats of the numbers as filters; everything that comes from files is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "metric": format_metric,
        "change": format_change,
        "p": format_p,
        "interval": format_interval,
        "minutes": format_minutes,
    }
    return environment


def build_model_rows(run: Run, ranked: Sequence[Ranked]) -> list[dict[str, Any]]:
    """A row for each model: its estimates, those without intervals where its predictions are gone, flaws and cost."""
    measured = {entry.model.name: measure_model(entry) for entry in ranked}
    outcome = describe_rl(run)
    rows = []
    for model in run.models:
        estimates = measured.get(model.name, {})
        values = {
            f"{name}@{k}": estimates.get(f"{name}@{k}") or model.metrics["item"].get(f"{name}@{k}")
            for name, k in METRICS
        }
        note = ""
        if outcome and outcome["kept"] == "SFT" and model.name.startswith("after RL"):
            note = "the SFT weights: RL found none that were better"
        if model.kind == "fused" and model.metrics.get("fuse"):
            weights = model.metrics.get("weights") or {}
            parts = ", ".join(
                f"{name} × {weight:g}" for name, weight in weights.items() if isinstance(weight, int | float)
            )
            note = "; ".join(part for part in (note, f"with {parts or model.metrics['fuse']}") if part)
        rows.append({"model": model, "values": values, "note": note})
    for name, k in METRICS:
        key = f"{name}@{k}"
        known = [_value_of(row["values"][key]) for row in rows if row["values"][key] is not None]
        for row in rows:
            value = _value_of(row["values"][key])
            row.setdefault("best", set()).update({key} if known and value == max(known) else ())
    return rows


def _value_of(entry: Estimate | float | None) -> float | None:
    return entry.value if isinstance(entry, Estimate) else entry


def build_comparisons(ranked: Sequence[Ranked], reference: Ranked | None) -> list[tuple[str, dict[str, Difference]]]:
    """(model, its differences from the reference) of all others, those of the reference left out."""
    if reference is None:
        return []
    return [(entry.model.name, compare_with(entry, reference)) for entry in ranked if entry is not reference]


def compare_rl(ranked: Sequence[Ranked]) -> dict[str, Difference]:
    """What the model after RL has more than the one after SFT; empty without both."""
    of_kind = {entry.model.kind: entry for entry in ranked if entry.model.kind in ("sft", "rl")}
    return compare_with(of_kind["rl"], of_kind["sft"]) if len(of_kind) == 2 else {}


def build_curves(run: Run, place: str) -> list[dict[str, Any]]:
    """The pictures of every training."""
    return [
        {
            "name": training.name,
            "source": training.source,
            "pictures": [draw_curves(panel, training.name, training.step_name, place) for panel in training.panels],
        }
        for training in read_trainings(run)
    ]


def build_sids(run: Run, place: str) -> dict[str, Any]:
    """Figures and pictures of the semantic IDs of a run."""
    reports, pictures = {}, []
    for folder, report, index_file in iterate_quality_reports(run):
        name = folder if folder != "data" else "of this run"
        record = next(
            (record for path, record in run.records.items() if path.startswith(f"{folder}/") and "index" in path), {}
        )
        before = record.get("results", {}).get("collision_rate_before")
        reports[name] = report | {"before": before, "method": record.get("stage", "")}
        if index_file is not None:
            levels = report["levels"]
            sizes = [level["codes"] for level in report["per_level"]]
            counts = count_codes(read_index(index_file), levels)
            title = "Use of the codes" if name == "of this run" else f"Use of the codes: {name}"
            pictures.append(draw_code_use(counts, sizes, title, place))
    if len(reports) > 1:
        pictures.append(draw_methods(reports, place))
    return {"reports": reports, "pictures": pictures}


def build_settings(run: Run, data: RunData | None) -> dict[str, Any]:
    """Stages with their cost and flags, versions, machine, data files, and how to run all of it again."""
    command = run.folder / COMMAND_FILE
    stages = [
        {
            "path": path,
            "name": record.get("stage", path),
            "status": record.get("status", ""),
            "minutes": record.get("seconds", 0.0) / 60,
            "memory_mb": record.get("peak_memory_mb"),
            "command": record.get("command", ""),
            "results": record.get("results", {}),
            "flags": yaml.safe_dump(record["settings"], sort_keys=False, allow_unicode=True, width=100).strip(),
        }
        for path, record in run.records.items()
    ]
    files = data.files if data else {}
    return {
        "stages": stages,
        "environment": run.environment,
        "files": [
            {"flag": flag, "path": _shorten(path, run.folder), "bytes": path.stat().st_size, "hash": fingerprint(path)}
            for flag, path in files.items()
        ],
        "command": command.read_text(encoding="utf-8").strip() if command.is_file() else "",
    }


def _shorten(path: Path, folder: Path) -> str:
    """A path below the run's folder, others as they are."""
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return str(path)


def format_minutes(minutes: float | None) -> str:
    """Minutes, of short work that it was short."""
    if minutes is None:
        return "–"
    return f"{minutes:.1f}" if minutes >= 0.05 else "< .1"


def render_run(run: Run) -> str:
    """The page of one run.

    Raises:
        InputError: a file of the run that is malformed. What is missing is said on the page.
    """
    place = f"{run.data_set} · {run.name}" + (f" · seed {run.seed}" if run.seed is not None else "")
    try:
        data, missing = read_run_data(run), ""
    except InputError as error:
        data, missing = None, str(error)
    ranked, left_out = rank_models(run.models, data) if data else ([], [])
    reference = choose_reference(ranked)
    shown = choose_shown(ranked, reference)
    table = build_model_rows(run, ranked)
    estimates = {entry.model.name: measure_model(entry) for entry in shown}
    groups = measure_groups(shown, data) if data and shown else {}
    example_model = next((entry for entry in reversed(shown) if entry.model.kind != "fused"), None)
    context = {
        "run": run,
        "place": place,
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "missing": missing,
        "left_out": left_out,
        "metrics": [f"{name}@{k}" for name, k in METRICS],
        "table": table,
        "reference": reference.model.name if reference else "",
        "comparisons": build_comparisons(ranked, reference),
        "rl": describe_rl(run),
        "rl_change": compare_rl(ranked),
        "cutoffs": [draw_cutoffs(name, estimates, CUTOFFS, place) for name in ("HR", "NDCG")] if estimates else [],
        "trainings": build_curves(run, place),
        "sids": build_sids(run, place),
        "groups": groups,
        "group_pictures": [draw_group_points(title, parts, place) for title, parts in groups.items() if len(parts) > 1],
        "example_model": example_model.model.name if example_model else "",
        "examples": choose_examples(example_model, data) if example_model and data else [],
        "settings": build_settings(run, data),
    }
    return load_templates().get_template("report.html.jinja").render(context)


def write_page(run: Run) -> Path:
    """Write report.html into a run's folder; returns its path."""
    path = run.folder / PAGE
    write_text(path, render_run(run))
    return path


def write_overview(runs: Sequence[Run], folder: Path) -> Path:
    """Write report.html about several runs: their results side by side, and links to their own pages."""
    table = tabulate_runs(runs)
    summary = average_runs(table)
    context = {
        "runs": [(run, _relative(run.folder / PAGE, folder)) for run in runs],
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "summary": summary.to_dict("records"),
        "lines": table.to_dict("records"),
        "command": shlex.join(["python", "-m", "scripts.report", *(str(run.folder) for run in runs)]),
        "markdown": format_results(table),
    }
    path = folder / PAGE
    write_text(path, load_templates().get_template("overview.html.jinja").render(context))
    return path


def _relative(path: Path, folder: Path) -> str:
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return path.resolve().as_uri()
