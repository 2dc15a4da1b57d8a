"""The files of a SID report: NAME.index.quality.json, its figures, and NAME.index.quality.png, a page of plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minionerec.common.files import atomic_write, write_json
from rq.index.quality_figures import measure_quality
from rq.index.quality_plot import draw_quality


def list_report_files(stem: str | Path) -> list[Path]:
    """The files of a report; for DIR/NAME.index.json the stem is DIR/NAME.index."""
    return [Path(f"{stem}.quality.json"), Path(f"{stem}.quality.png")]


def save_report(stem: str | Path, report: dict[str, Any], sids: Sequence[Sequence[str]], array: np.ndarray) -> None:
    """Write a report of `measure_quality`: the JSON and the page of plots."""
    figures, page = list_report_files(stem)
    write_json(figures, report)
    with atomic_write(page) as temporary:
        draw_quality(report, sids, array, temporary, Path(stem).name)


def write_report(
    stem: str | Path,
    sids: Sequence[Sequence[str]],
    array: np.ndarray,
    codebook_sizes: list[int],
    codebook_error: float,
) -> dict[str, Any]:
    """Measure an index whose codebook is at hand, write the files of its report and return the report."""
    report = measure_quality(sids, array, codebook_sizes=codebook_sizes, codebook_error=codebook_error)
    save_report(stem, report, sids, array)
    return report
