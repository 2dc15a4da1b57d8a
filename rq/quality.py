"""The SID report: is an index worth training a language model on?

python -m rq.quality --index DIR/NAME.index.json --emb DIR/NAME.emb-PLM-td.npy

Several indexes, separated by commas, are shown side by side. The figures of each one are written beside it, to
NAME.index.quality.json, and a page of plots to NAME.index.quality.png. Everything is computed from tokens and
embeddings alone, so it means the same for every method.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from minionerec.common.cli import parse_flags, run_command
from rq.settings import QualityFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(QualityFlags)

import numpy as np

from minionerec.common.embeddings import load_embeddings, side_file_path
from minionerec.common.files import InputError, read_json
from minionerec.common.interactions import read_inter
from minionerec.common.processes import say
from minionerec.common.records import read_index
from minionerec.common.stage import open_stage
from rq.index.quality_figures import measure_quality
from rq.index.quality_plot import format_quality
from rq.index.quality_report import list_report_files, save_report

Embeddings = tuple[np.ndarray, list[str]]  # [N, dim], and the item of each row


def read_earlier_report(stem: str | Path, index_path: Path) -> dict[str, Any]:
    """The report that stands beside an index and is no older than it, else {}.

    The method that wrote the index knows its codebooks; the index alone does not tell their sizes and errors.
    """
    figures = list_report_files(stem)[0]
    if not figures.is_file() or figures.stat().st_mtime_ns < index_path.stat().st_mtime_ns:
        return {}
    return read_json(figures)


def match_rows(index_path: Path, emb: str, embeddings: Embeddings) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """(SIDs, embeddings) of the same items, by ascending item id.

    Raises:
        InputError: an item that has only one of the two.
    """
    array, item_ids = embeddings
    index = {str(item): sid for item, sid in sorted(read_index(index_path, "index").items())}
    row_of = {item: row for row, item in enumerate(item_ids)}
    for item in index:
        if item not in row_of:
            raise InputError(f"{index_path}: item {item} has no embedding in {emb}")
    for item, row in row_of.items():
        if item not in index:
            raise InputError(f"{emb}, row {row}: item {item} has no SID in {index_path}")
    return list(index.values()), array[[row_of[item] for item in index]]


def list_consecutive_rows(index_path: Path, train_file: str) -> np.ndarray:
    """The rows, as `match_rows` orders them, of an item and of the different one that came next in train [M, 2].

    Raises:
        InputError: an item without SID, or no pair.
    """
    item_ids = sorted(read_index(index_path, "index"))
    row_of = {item: row for row, item in enumerate(item_ids)}
    _, histories, targets = read_inter(train_file, max(item_ids) + 1, "train_file")
    pairs = [(history[-1], target) for history, target in zip(histories, targets, strict=True) if history[-1] != target]
    strangers = {item for pair in pairs for item in pair} - row_of.keys()
    if strangers or not pairs:
        reason = f"item {min(strangers)} has no SID in {index_path}" if strangers else "no item follows another one"
        raise InputError(f"{train_file}: {reason}")
    return np.array([[row_of[item] for item in pair] for pair in pairs])


def measure_index(path: Path, stem: Path, flags: QualityFlags, embeddings: Embeddings) -> dict[str, Any]:
    """Measure one index and write its report, with what an earlier report says about its codebooks."""
    sids, array = match_rows(path, flags.emb, embeddings)
    sizes, earlier = flags.codebook_sizes, read_earlier_report(stem, path)
    if sizes is None and earlier.get("codebook_sizes_known"):
        sizes = earlier["codebook_sizes"]
        say(f"[quality] codebook_sizes {sizes}: from the report of the method, {list_report_files(stem)[0]}")
    pairs = list_consecutive_rows(path, flags.train_file) if flags.train_file else None
    how = {"neighbours": flags.neighbours, "sample": flags.sample, "seed": flags.seed}
    report = measure_quality(sids, array, codebook_sizes=sizes, pairs=pairs, **how)
    # An equal error means the same SIDs and embeddings, so that the error of the method's codebook holds too.
    if earlier.get("reconstruction_error") == report["reconstruction_error"]:
        report["codebook_reconstruction_error"] = earlier.get("codebook_reconstruction_error")
    save_report(stem, report, sids, array)
    return report


def report_quality(flags: QualityFlags) -> None:
    """Print the report of one or more indexes and write it beside each, as .quality.json and .quality.png."""
    embeddings, reports = None, {}
    for path in map(Path, flags.index):
        stem = path.with_name(path.name.removesuffix(".json"))
        stage = open_stage(
            "quality",
            replace(flags, index=str(path)),  # the record is about this index alone
            inputs=[path, flags.emb, side_file_path(flags.emb), flags.train_file],
            outputs=list_report_files(stem),
            record=Path(f"{stem}.quality.stage.json"),
        )
        if not stage.finished:
            embeddings = embeddings or load_embeddings(flags.emb, "emb")
            report = measure_index(path, stem, flags, embeddings)
            stage.done(items=report["items"], collision_rate=report["collision_rate"])
        if not flags.dry_run:
            reports[str(path)] = read_json(list_report_files(stem)[0])
    if reports:
        say(format_quality(reports))


if __name__ == "__main__":
    run_command(report_quality, FLAGS)
