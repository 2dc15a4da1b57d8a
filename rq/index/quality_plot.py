"""The SID report for the eye: a table for the terminal and one page of plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LONGEST_NAME = 24  # of a report, in characters; reports with longer names are numbered
NOTES = """\
Good: few collisions, high perplexity, low Gini and error, and near items that agree far more often than random ones.
extra: items with a token beyond the levels; no extra: collision rate without those; sharing: items whose SID is shared.
error: share of the variance of the embeddings left unexplained; codebook: the same by the method's own codebook.
near agree: how often one of an item's nearest items has the same codes so far; random: the same for any two items.
in turn: how often two items that were bought one after the other have the same codes so far (--train_file)."""
BUCKETS = [(1, 1), (2, 2), (3, 3), (4, 5), (6, 10), (11, 100), (101, None)]  # items with one SID: least, most
# Okabe and Ito's colours, which colour-blind readers tell apart.
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#8a8f98"
NAMED = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
NAMED_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PROJECTED = 5000  # items in the scatter plot, at most


def _format_cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _format_summary(summary: dict[str, float] | None) -> str:
    return "-" if summary is None else f"{summary['mean']:.4g}/{summary['median']:.4g}/{summary['max']}"


def _format_grid(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they need to be, left-aligned up to the names of the reports."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    left = header.index("SIDs")
    lines = []
    for row in [header, *rows]:
        cells = enumerate(zip(row, widths, strict=True))
        padded = [text.ljust(width) if column <= left else text.rjust(width) for column, (text, width) in cells]
        lines.append("  ".join(padded))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def format_quality(reports: dict[str, dict[str, Any]]) -> str:
    """Reports by name as text: one line per report, then one line per level and report. Long names get a number."""
    names, legend = list(reports), []
    if max(map(len, names)) > LONGEST_NAME:
        legend = [f"[{number}] {name}" for number, name in enumerate(names, 1)] + ["", ""]
        names = [f"[{number}]" for number in range(1, len(names) + 1)]
    whole, codes, near = [], [], []
    for name, report in zip(names, reports.values(), strict=True):
        keys = ["items", "levels", "items_with_extra_token", "collision_rate", "collision_rate_without_extra"]
        keys += ["items_with_unique_sid", "items_sharing_a_sid", "largest_bucket"]
        keys += ["reconstruction_error", "codebook_reconstruction_error"]
        whole.append([name, *(_format_cell(report[key]) for key in keys)])
    for level in range(max(report["levels"] for report in reports.values())):
        for name, report in zip(names, reports.values(), strict=True):
            if level >= report["levels"]:
                continue
            figures = report["per_level"][level]
            size = f"{figures['codes']}{'' if report['codebook_sizes_known'] else '?'}"
            row = [f"{level + 1}", name, _format_cell(figures["codes_used"]), size]
            row += [
                _format_cell(figures[key]) for key in ("dead_codes", "entropy_bits", "perplexity", "gini", "prefixes")
            ]
            codes.append(
                [*row, _format_summary(figures["children_per_prefix"]), _format_summary(figures["items_per_prefix"])]
            )
            keys = ["reconstruction_error", "neighbour_agreement", "random_agreement", "lift", "cosine_within_prefix"]
            cells = [_format_cell(figures[key]) for key in keys]
            cells += map(_format_cell, (report["cosine_of_random_pairs"], figures.get("consecutive_agreement")))
            near.append([f"{level + 1}", name, *cells])
    parts = [
        _format_grid(
            [
                "SIDs",
                "items",
                "levels",
                "extra",
                "collisions",
                "no extra",
                "unique",
                "sharing",
                "largest",
                "error",
                "codebook",
            ],
            whole,
        ),
        _format_grid(
            ["level", "SIDs", "used", "of", "dead", "bits", "perplexity", "Gini", "prefixes", "next codes*", "items*"],
            codes,
        ),
        _format_grid(
            ["level", "SIDs", "error", "near agree", "random", "lift", "cosine in prefix", "cosine of all", "in turn"],
            near,
        ),
    ]
    notes = [NOTES, "* per prefix: mean/median/largest; next codes: different codes that follow it"]
    if not all(report["codebook_sizes_known"] for report in reports.values()):
        notes.append("? size of the codebook unknown: 1 + the largest code number seen")
    return "\n".join(legend) + "\n\n".join([*parts, "\n".join(notes)])


def _draw_usage(axes: Axes, level: int, counts: np.ndarray, figures: dict[str, Any]) -> None:
    """Items of each code, most used first, with the line of an even use of all codes."""
    axes.fill_between(np.arange(len(counts) + 1), np.append(counts, counts[-1]), step="post", color=BLUE)
    axes.set_xlim(0, figures["codes"])
    axes.set_ylim(0, counts[0] * 1.08)
    axes.axhline(counts.sum() / figures["codes"], color=ORANGE, linewidth=1.5, label="even use")
    axes.set_title(
        f"Level {level}: {figures['codes_used']:,} of {figures['codes']:,} codes used\n"
        f"perplexity {figures['perplexity']:.1f}, Gini {figures['gini']:.2f}"
    )
    axes.set_xlabel("codes, most used first")
    axes.set_ylabel("items")
    axes.legend(loc="upper right", frameon=False)


def _draw_bucket_sizes(axes: Axes, sids: Sequence[Sequence[str]], report: dict[str, Any]) -> None:
    """Items by the number of items that have the same SID; without the extra tokens too where there are any."""
    series = [("SIDs as they are", BLUE, Counter(map(tuple, sids)))]
    if report["items_with_extra_token"]:
        bare = Counter(tuple(sid[: report["levels"]]) for sid in sids)
        series.append(("without extra tokens", GREY, bare))
    sizes = [np.fromiter(buckets.values(), np.int64, len(buckets)) for _, _, buckets in series]
    shown = [low for low, _ in BUCKETS if low <= max(size.max() for size in sizes)]
    width = 0.8 / len(series)
    for number, ((label, colour, _), size) in enumerate(zip(series, sizes, strict=True)):
        bounds = [*shown, np.inf]
        items = [int(size[(size >= low) & (size < high)].sum()) for low, high in pairwise(bounds)]
        positions = np.arange(len(shown)) + (number - (len(series) - 1) / 2) * width
        bars = axes.bar(positions, items, width, color=colour, label=label)
        axes.bar_label(bars, [f"{count:,}" if count else "" for count in items], fontsize=8, padding=2)
    axes.set_yscale("log")
    axes.set_ylim(0.7, report["items"] * 4)
    names = [f"{low}" if low == high else f"{low}-{high}" if high else f"{low}+" for low, high in BUCKETS]
    axes.set_xticks(range(len(shown)), names[: len(shown)])
    axes.set_xlim(-0.7, max(len(shown), 4) - 0.3)
    axes.set_title(f"{report['items_sharing_a_sid']:,} items share a SID\nlargest bucket {report['largest_bucket']:,}")
    axes.set_xlabel("items with the same SID")
    axes.set_ylabel("items in such buckets (log)")
    if len(series) > 1:
        axes.legend(loc="upper right", frameon=False)


def _format_share(value: float) -> str:
    return f"{value:.2g}" if value >= 0.01 else "<.01" if value else "0"


def _draw_agreement(axes: Axes, report: dict[str, Any]) -> None:
    """How often near items and random items share the first codes, level by level, and the error left."""
    figures = report["per_level"]
    positions = np.arange(len(figures))
    series = [
        ("one of the nearest items has the same codes", "neighbour_agreement", BLUE),
        ("a random item has the same codes", "random_agreement", GREY),
        ("variance not explained by the codes", "reconstruction_error", ORANGE),
    ]
    for shift, (label, key, colour) in enumerate(series):
        values = [level[key] or 0.0 for level in figures]
        bars = axes.bar(positions + (shift - 1) * 0.27, values, 0.27, color=colour, label=label)
        texts = ["-" if level[key] is None else _format_share(level[key]) for level in figures]
        if len(figures) <= 4:  # more would write over each other
            axes.bar_label(bars, texts, fontsize=8, padding=2)
    axes.set_ylim(0, 1.5)
    axes.set_yticks(np.arange(0, 1.01, 0.2))
    axes.set_xticks(positions, [f"1-{level['level']}" if level["level"] > 1 else "1" for level in figures])
    axes.set_title(f"First codes against the {report['neighbours']} nearest items\nerror after each level")
    axes.set_xlabel("codes compared, from the first")
    axes.set_ylabel("share")
    axes.legend(loc="upper left", frameon=False)


def _draw_projection(axes: Axes, sids: Sequence[Sequence[str]], array: np.ndarray) -> None:
    """Items on the first two principal components; the most used first codes have a colour and a shape."""
    from sklearn.utils.extmath import randomized_svd

    rows = np.sort(np.random.default_rng(0).choice(len(sids), min(PROJECTED, len(sids)), replace=False))
    points = array[rows].astype(np.float64)
    points -= points.mean(axis=0)
    left, scale, _ = randomized_svd(points, min(2, *points.shape), random_state=0)
    # One item or one dimension leaves the second axis empty.
    flat = np.zeros((len(rows), 2))
    flat[:, : len(scale)] = left * scale
    explained = np.append(scale, 0.0)[:2] ** 2 / max(float((points**2).sum()), np.finfo(float).tiny)
    first = np.array([sids[row][0] for row in rows])
    ranked = [token for token, _ in sorted(Counter(first.tolist()).items(), key=lambda pair: (-pair[1], pair[0]))]
    # More colours than these could not be told apart; shapes help where colours do not.
    named = ranked[: len(NAMED)]
    others = ~np.isin(first, named)
    axes.scatter(*flat[others].T, s=7, c="#c4c8ce", alpha=0.6, linewidths=0)
    for token, colour, marker in zip(named, NAMED, NAMED_MARKERS, strict=False):  # there may be fewer codes
        inside = first == token
        axes.scatter(*flat[inside].T, s=16, c=colour, marker=marker, alpha=0.85, linewidths=0, label=token)
    if others.any():
        axes.scatter([], [], s=16, c="#c4c8ce", label="others")
    axes.set_title(f"{len(rows):,} items by first code: the {len(named)} most used of {len(ranked):,}")
    axes.set_xlabel(f"first principal component ({explained[0]:.0%} of variance)")
    axes.set_ylabel(f"second principal component ({explained[1]:.0%})")
    axes.margins(0.03)
    axes.legend(title="most used", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def draw_quality(
    report: dict[str, Any], sids: Sequence[Sequence[str]], array: np.ndarray, path: str | Path, title: str
) -> None:
    """Write one PNG page, 1600 pixels wide: code usage per level, bucket sizes, prefix agreement and a projection.

    Args:
        report: of `measure_quality` for the same sids and array [N, dim].
        sids: the tokens of every item.
        array: the embeddings.
        path: the file, whatever its suffix.
        title: what the page is about.
    """
    levels = report["levels"]
    columns = min(levels, 4)
    rows = -(-levels // columns)
    figure = Figure(figsize=(16, 6 + 4 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    top, bottom = figure.subfigures(2, 1, height_ratios=[0.8 * rows, 1.1])
    panels = top.subplots(rows, columns, squeeze=False).ravel()
    for level, (axes, figures) in enumerate(zip(panels[:levels], report["per_level"], strict=True)):
        counts = np.sort(list(Counter(sid[level] for sid in sids).values()))[::-1]
        _draw_usage(axes, level + 1, counts, figures)
    for axes in panels[levels:]:
        axes.set_axis_off()
    buckets, agreement, projection = bottom.subplots(1, 3, width_ratios=[1, 1, 1.25])
    _draw_bucket_sizes(buckets, sids, report)
    _draw_agreement(agreement, report)
    _draw_projection(projection, sids, array)
    figure.suptitle(
        f"{title}: {report['items']:,} items, collision rate {report['collision_rate']:.2%}, "
        f"reconstruction error {report['reconstruction_error']:.3f}",
        fontsize=16,
    )
    figure.savefig(path, format="png")
