"""One page of plots for one model or several: where the hits are, and for which rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scipy.stats import binomtest

from minionerec.common.files import InputError, atomic_write, read_json
from minionerec.evaluation.metrics import CUTOFFS, HISTORY_BUCKETS, MAIN_CUTOFF, POPULARITY_BUCKETS, name_buckets

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEY = f"HR@{MAIN_CUTOFF}"

# Colours that stay apart for colour-blind eyes, and shapes for a print without colour.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8f98", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

LEVELS = {
    "sid": "SID level",
    "item_expected": "item level,\nties at random",
    "item": "item level",
    "item_unseen": "item level,\nunseen items",
}


def _style(number: int) -> dict:
    return {"color": COLOURS[number % len(COLOURS)]}


def _find_interval(share: float | None, rows: int) -> tuple[float, float]:
    """How far the 95 % interval of a share of rows reaches below and above it (Wilson, 1927)."""
    if share is None or not rows:
        return 0.0, 0.0
    interval = binomtest(round(share * rows), rows).proportion_ci(method="wilson")
    return max(0.0, share - interval.low), max(0.0, interval.high - share)


def _draw_curves(axes: Axes, columns: dict[str, dict]) -> None:
    """Item-level HR@K over K, with the 95 % interval at K = 10. The models' points stand a little apart."""
    for number, (name, result) in enumerate(columns.items()):
        cutoffs = [k for k in CUTOFFS if f"HR@{k}" in result["item"]]
        values = [result["item"][f"HR@{k}"] for k in cutoffs]
        # On a logarithmic axis equal factors are equal distances.
        aside = 1.03 ** (number - (len(columns) - 1) / 2)
        x = [k * aside for k in cutoffs]
        axes.plot(x, values, marker=MARKERS[number % len(MARKERS)], markersize=5, label=name, **_style(number))
        if KEY in result["item_interval_95"]:
            low, high = result["item_interval_95"][KEY]
            value = result["item"][KEY]
            ends = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar([MAIN_CUTOFF * aside], [value], ends, fmt="none", capsize=4, **_style(number))
    axes.set_xscale("log")
    axes.set_xticks(CUTOFFS, map(str, CUTOFFS))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title(f"HR@K, item level (bars: 95 % interval at K = {MAIN_CUTOFF})")
    axes.set_xlabel("K")
    axes.set_ylabel("HR@K")
    axes.grid(alpha=0.25)


def _draw_bars(
    axes: Axes,
    labels: Sequence[str],
    values: list[list[float | None]],
    rows: list[list[int]],
    title: str,
    xlabel: str,
) -> None:
    """Groups of bars, one group a label and one bar a model, each with its 95 % interval.

    Args:
        axes: where to.
        labels: of the groups.
        values: [models][labels], None where nothing is known.
        rows: that each value is a share of, [models][labels].
        title, xlabel: of the axes.
    """
    width, highest = 0.84 / len(values), None
    for number, (row, counts) in enumerate(zip(values, rows, strict=True)):
        x = [group + (number - (len(values) - 1) / 2) * width for group in range(len(labels))]
        ends = [_find_interval(value, count) for value, count in zip(row, counts, strict=True)]
        heights = [value or 0 for value in row]
        bars = axes.bar(x, heights, width * 0.94, **_style(number))
        if labels:
            axes.errorbar(
                x, heights, list(zip(*ends, strict=True)), fmt="none", ecolor="#333333", elinewidth=1, capsize=2
            )
        if len(values) <= 3:  # more bars are too narrow for their figures
            texts = ["-" if value is None else f"{value:.3f}" for value in row]
            axes.bar_label(bars, texts, fontsize=8, padding=2, label_type="center", color="white", fontweight="bold")
        tops = [value + end[1] for value, end in zip(row, ends, strict=True) if value is not None]
        highest = max([*tops, *([highest] if highest is not None else [])], default=None)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylim(0, 1.08 * highest if highest else 1)
    missing = f"the lists are shorter than {MAIN_CUTOFF}" if labels else "it was not counted"
    axes.set_title(title if highest is not None else f"{title}: {missing}")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(KEY)
    axes.grid(axis="y", alpha=0.25)


def _draw_buckets(
    axes: Axes, columns: dict[str, dict], split: str, starts: Sequence[int], title: str, xlabel: str
) -> None:
    """HR@10 of the buckets of one split, with the number of rows below each."""
    splits = [result["by"].get(split, {}) for result in columns.values()]
    names = [name for name in name_buckets(starts) if any(name in buckets for buckets in splits)]
    sizes = [sorted({buckets[name]["rows"] for buckets in splits if name in buckets}) for name in names]
    labels = [
        f"{name}\n{' to '.join(f'{rows:,}' for rows in (size[0], size[-1])[: len(size)])} rows"
        for name, size in zip(names, sizes, strict=True)
    ]
    values = [[buckets.get(name, {}).get(KEY) for name in names] for buckets in splits]
    rows = [[buckets.get(name, {}).get("rows", 0) for name in names] for buckets in splits]
    _draw_bars(axes, labels, values, rows, title, xlabel)


def choose_levels(columns: dict[str, dict]) -> dict[str, str]:
    """Those of LEVELS that differ: where no items share a SID, the first three ways of counting are one."""
    if any(result["items_sharing_a_sid"] for result in columns.values()):
        return LEVELS
    return {level: name for level, name in LEVELS.items() if level not in ("sid", "item_expected")}


def draw_metrics(columns: dict[str, dict], path: str | Path, title: str = "") -> None:
    """Write one PNG page of 1600 x 1200 pixels about one model or several (readable up to about six).

    HR@K over K with intervals; HR@10 by the way of counting, by history length and by popularity of the target.

    Args:
        columns: {name of the model: result of `score_predictions`}.
        path: the file, its name ending in .png.
        title: the data set and the run, for the head of the page.

    Raises:
        InputError: a path that does not end in .png.
    """
    if Path(path).suffix != ".png":
        raise InputError(f"{path}: the page of plots is a PNG image; its name must end in .png")
    # Slow to import, and only this function needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 12), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    (curves, levels), (lengths, targets) = figure.subplots(2, 2)
    _draw_curves(curves, columns)
    shown = choose_levels(columns)
    values = [[result[level].get(KEY) for level in shown] for result in columns.values()]
    counts = [[result["rows"]] * len(shown) for result in columns.values()]
    _draw_bars(levels, list(shown.values()), values, counts, f"{KEY} by the way of counting", "")
    _draw_buckets(
        lengths, columns, "history_length", HISTORY_BUCKETS, f"{KEY} by history length", "items in the history"
    )
    about, unit = f"{KEY} by popularity of the target", "times it is a target of the train split"
    _draw_buckets(targets, columns, "target_popularity", POPULARITY_BUCKETS, about, unit)
    rows = sorted({result["rows"] for result in columns.values()})
    head = f"{title}: r" if title else "R"
    figure.suptitle(f"{head}ecommendations for {' or '.join(f'{count:,}' for count in rows)} rows", fontsize=16)
    longest = max(map(len, columns))
    figure.legend(loc="outside lower center", ncols=max(1, min(len(columns), 180 // (longest + 8))), frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def read_metrics(path: str) -> dict:
    """A metrics file of evaluate.py or baselines.py.

    Raises:
        InputError: not such a file, or one without the parts that are drawn here.
    """
    result = read_json(path, "metrics")
    missing = [
        key
        for key in (*LEVELS, "item_interval_95", "by", "rows", "items_sharing_a_sid")
        if not isinstance(result, dict) or key not in result
    ]
    if missing:
        raise InputError(f"{path}: expected a metrics file of evaluate.py with {', '.join(missing)}; evaluate again")
    return result
