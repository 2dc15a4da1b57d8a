"""The pictures of a report: SVG images as data URIs, so that a page needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minionerec.reports.curves import Panel
from minionerec.reports.figures import Estimate, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart, and shapes for a print without colour.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FROM_ZERO = ("seconds", "metric", "share of items")  # units whose axes begin at 0
WIDTH, HEIGHT = 4.4, 3.1  # inches: at 400 pixels the texts are as large as those of the page


@dataclass(frozen=True)
class Picture:
    """An image for a page: its data URI and what it shows, in words."""

    uri: str
    alt: str


def _open_figure(title: str, place: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; `place` names data set and run."""
    # Slow to import, and only pictures need it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=15)
    axes.annotate(place, (0, 1), (0, 4), "axes fraction", "offset points", fontsize=7.5, color="#555555")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _close_figure(figure: Figure, alt: str) -> Picture:
    import matplotlib

    stream = io.BytesIO()
    # Fixed ids and no date: the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return Picture(f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}", alt)


def _add_legend(axes: Axes, always: bool = False) -> None:
    """A legend below the axes, `always` or where there is more than one thing to tell apart."""
    handles, labels = axes.get_legend_handles_labels()
    if always or len(labels) > 1:
        columns = 3 if sum(map(len, labels)) < 40 else 2
        axes.figure.legend(handles, labels, loc="outside lower center", fontsize=7.5, frameon=False, ncols=columns)


def draw_curves(panel: Panel, training: str, step_name: str, place: str) -> Picture:
    """Curves over the steps of a training."""
    title = panel.title.replace("a step", "an epoch") if step_name == "epoch" else panel.title
    figure, axes = _open_figure(f"{training}: {title}", place)
    for number, (name, (steps, values)) in enumerate(panel.curves.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        few = len(steps) <= 30
        axes.plot(
            steps, values, label=name, color=colour, linewidth=1.4, marker=marker if few else None, markersize=3.5
        )
    axes.set_xlabel(step_name, fontsize=8)
    (single, *others) = panel.curves
    axes.set_ylabel(panel.unit if others else f"{panel.unit}: {single}", fontsize=8)
    if panel.unit in FROM_ZERO:
        axes.set_ylim(bottom=0)
    _add_legend(axes)
    return _close_figure(figure, f"{training}, {title} over {step_name}s: {', '.join(panel.curves)}")


def draw_cutoffs(metric: str, rows: dict[str, dict[str, Estimate]], cutoffs: Sequence[int], place: str) -> Picture:
    """A metric over its cutoffs, one curve a model, each with its intervals."""
    figure, axes = _open_figure(f"{metric}@K on the test rows", place)
    for number, (name, estimates) in enumerate(rows.items()):
        known = [(k, estimates[f"{metric}@{k}"]) for k in cutoffs if f"{metric}@{k}" in estimates]
        # Models stand a little apart, points with their intervals: on this axis equal factors are equal distances.
        x = [k * 1.03 ** (number - (len(rows) - 1) / 2) for k, _ in known]
        y = [estimate.value for _, estimate in known]
        bars = [[e.value - e.low for _, e in known], [e.high - e.value for _, e in known]]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.errorbar(x, y, bars, label=name, color=colour, marker=marker, markersize=4, linewidth=1, capsize=2)
    axes.set_xscale("log")
    known = [k for k in cutoffs if any(f"{metric}@{k}" in estimates for estimates in rows.values())]
    axes.set_xticks(known, map(str, known))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("K", fontsize=8)
    axes.set_ylabel(f"{metric}@K", fontsize=8)
    _add_legend(axes, always=True)
    return _close_figure(figure, f"{metric} at {', '.join(map(str, cutoffs))} with 95 % intervals: {', '.join(rows)}")


def draw_group_points(title: str, groups: Sequence[Group], place: str) -> Picture:
    """HR@10 of every group as points with intervals, one colour a model."""
    models = list(groups[0].estimates)
    figure, axes = _open_figure(
        f"HR@10: {title.lower()}", place, height=1.2 + len(groups) * max(0.3, 0.09 * (len(models) + 1))
    )
    step = 1 / (len(models) + 1)
    for number, model in enumerate(models):
        y = [place_of + (number - (len(models) - 1) / 2) * step for place_of in range(len(groups))]
        estimates = [group.estimates[model] for group in groups]
        bars = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
        x = [estimate.value for estimate in estimates]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.errorbar(x, y, xerr=bars, fmt=marker, color=colour, label=model, markersize=4, capsize=2, linewidth=1)
    names = [f"{group.name}\n{group.rows:,} rows{' (few)' * group.is_small}" for group in groups]
    axes.set_yticks(range(len(groups)), names)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("HR@10", fontsize=8)
    axes.grid(axis="y", visible=False)
    _add_legend(axes, always=True)
    return _close_figure(figure, f"HR@10 with 95 % intervals by {title.lower()}")


def draw_code_use(counts: Sequence[Sequence[int]], sizes: Sequence[int], title: str, place: str) -> Picture:
    """Items of every code, most used first, one curve a level."""
    from matplotlib.ticker import LogFormatter

    figure, axes = _open_figure(title, place)
    for number, (level, size) in enumerate(zip(counts, sizes, strict=True)):
        share = [position / size * 100 for position in range(1, len(level) + 1)]
        axes.step(share, level, where="pre", color=COLOURS[number], label=f"level {number + 1}: {len(level)} of {size}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter())  # plain numbers where the axis is shorter than a power of ten
    axes.set_xlim(0, 100)
    axes.set_xlabel("codes of the level, most used first (%)", fontsize=8)
    axes.set_ylabel("items with the code", fontsize=8)
    _add_legend(axes)
    used = ", ".join(f"{len(level)} of {size}" for level, size in zip(counts, sizes, strict=True))
    return _close_figure(figure, f"items per code, level by level; codes used: {used}")


def draw_methods(reports: dict[str, dict[str, Any]], place: str) -> Picture:
    """Collision rate and reconstruction error of several SID tables."""
    figure, axes = _open_figure("SID methods", place, height=1.5 + 0.42 * len(reports))
    keys = (("collision rate before extra tokens", "collision_rate_without_extra"), ("error", "reconstruction_error"))
    for number, (label, key) in enumerate(keys):
        y = [row + (number - 0.5) * 0.36 for row in range(len(reports))]
        values = [report.get(key) or 0.0 for report in reports.values()]
        bars = axes.barh(y, values, 0.34, color=COLOURS[number], label=label)
        axes.bar_label(bars, [f"{value:.3f}" for value in values], fontsize=7, padding=2)
    axes.set_yticks(range(len(reports)), list(reports))
    axes.set_ylim(len(reports) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlabel("share", fontsize=8)
    axes.grid(axis="y", visible=False)
    _add_legend(axes)
    return _close_figure(figure, f"collision rate and reconstruction error of {', '.join(reports)}")
