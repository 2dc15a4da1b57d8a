"""The end that all methods share: collisions resolved, the index written, the report beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minionerec.common.embeddings import side_file_path
from minionerec.common.files import InputError, read_json, write_json
from minionerec.common.processes import say
from minionerec.common.records import read_index
from minionerec.common.stage import Stage, open_stage
from rq.index.append import append_items, parse_sids
from rq.index.codebook import (
    Model,
    compute_reconstruction_error,
    load_frozen_model,
    load_items,
    measure_last_level,
    pick_device,
    quantise,
)
from rq.index.collisions import check_repair_flags, make_sid_tokens, resolve_collisions
from rq.index.quality_plot import format_quality
from rq.index.quality_report import list_report_files, write_report
from rq.settings import IndexFlags, KMeansFlags


def place_index(data_path: str | Path) -> Path:
    """Where the index of DIR/NAME.emb-PLM-td.npy is written unless a flag says otherwise: DIR/NAME.index.json."""
    path = Path(data_path)
    return path.with_name(f"{path.name.removesuffix('.npy').split('.emb-')[0]}.index.json")


def strip_index_suffix(output_file: str | Path) -> Path:
    """DIR/NAME.index of DIR/NAME.index.json: what the names of the files beside the index begin with.

    Raises:
        InputError: another suffix.
    """
    path = Path(output_file)
    if path.suffix != ".json":
        raise InputError(f"--output_file {path}: expected a name such as NAME.index.json")
    return path.with_suffix("")


def list_index_files(output_file: str | Path) -> list[Path]:
    """The index and its report."""
    return [Path(output_file), *list_report_files(strip_index_suffix(output_file))]


def finish_index(stage: Stage, results: dict[str, Any], output_file: str | Path) -> None:
    """Record the stage and print its results and the report beside the index."""
    stage.done(**results)
    report = read_json(list_report_files(strip_index_suffix(output_file))[0])
    say("\n" + format_quality({Path(output_file).name: report}))


# Old items that tell whether embeddings are those that an index was made from: how many are looked at, with how few
# nothing can be said, and the share whose first code must be the same.
COMPARED_ITEMS, FEWEST_COMPARED, LEAST_KEPT = 2000, 10, 0.9


def _write_files(
    model: Model,
    codes: np.ndarray,
    sids: list[list[str]],
    array: np.ndarray,
    *,
    index: dict[str, list[str]],
    output_file: str | Path,
    batch_size: int,
) -> dict[str, Any]:
    """Write index and report; array, codes and sids are row by row. Returns the figures of the report worth a line."""
    sizes = model.config["num_emb_list"]
    error = compute_reconstruction_error(model, array, codes, batch_size)
    write_json(output_file, index, indent=None)
    report = write_report(strip_index_suffix(output_file), sids, array, codebook_sizes=sizes, codebook_error=error)
    used = [f"{level['codes_used']}/{level['codes']}" for level in report["per_level"]]
    return {"codes_used_per_level": " ".join(used), "reconstruction_error": round(error, 6)}


def write_index(
    model: Model,
    codes: np.ndarray,
    array: np.ndarray,
    item_ids: list[str],
    flags: IndexFlags | KMeansFlags,
    batch_size: int,
) -> dict[str, Any]:
    """Resolve collisions and write the index with its report.

    Args:
        model: gives the distances to the codes.
        codes: [n, levels], of the rows of `array`.
        array: the embeddings [n, in_dim] of item_ids, both as `load_items` orders them.
        item_ids: the item of each row.
        flags: the output file, and what happens to items that share a SID.
        batch_size: rows decoded at a time.

    Returns:
        The results to print.
    """
    codes, extra, counts = resolve_collisions(codes, measure_last_level(model, array, codes), flags)
    sids = make_sid_tokens(codes, extra)
    index = dict(zip(item_ids, sids, strict=True))
    figures = _write_files(model, codes, sids, array, index=index, output_file=flags.output_file, batch_size=batch_size)
    return {"items": len(sids), **counts, **figures}


def _check_same_embeddings(
    model: Model, array: np.ndarray, item_ids: list[str], parsed: dict[int, tuple], flags: IndexFlags
) -> None:
    """Refuse embeddings of another fit than the index was made from, by the old items that are among them.

    The first of several codes is the nearest one whatever happens to collisions, up to those that moved to a free path.

    Raises:
        InputError: the old items have other first codes now.
    """
    rows = np.array([row for row, item in enumerate(item_ids) if int(item) in parsed], dtype=np.int64)
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), COMPARED_ITEMS)).astype(np.int64)] if len(rows) else rows
    if len(rows) < FEWEST_COMPARED or len(model.config["num_emb_list"]) < 2:
        return
    first = quantise(model, array[rows], flags.batch_size)[:, 0]
    kept = float(np.mean([code == parsed[int(item_ids[row])][0][0] for row, code in zip(rows, first, strict=True)]))
    if kept < LEAST_KEPT:
        raise InputError(
            f"--append_to {flags.append_to}: only {kept:.1%} of its items keep their first code with "
            f"{flags.data_path}: embeddings of another fit or encoder than the index was made from; embed old and new "
            "items with the same (tfidf does where the .fit.npz of the old embeddings lies beside them)"
        )


def append_to_index(model: Model, array: np.ndarray, item_ids: list[str], flags: IndexFlags) -> dict[str, Any]:
    """Write the index flags.append_to with SIDs for those of item_ids that it lacks; its own SIDs stay as they are.

    Args:
        model: the codebook that the index was made with.
        array: the embeddings [n, in_dim] of item_ids, new items alone or old ones too. The report covers these n items.
        item_ids: the item of each row.
        flags: the flags of the command, with `collisions` resolved.

    Returns:
        The results to print.

    Raises:
        InputError: other collision steps than one that gives no SID twice, item ids that are no whole numbers, an
            index of another codebook, or nothing to add.
    """
    if flags.collisions not in (["nearest_free"], ["extra_token"], ["own_token"]):
        expected = "nearest_free, extra_token or own_token"
        raise InputError(f"--append_to: expected --collisions {expected}, for no SID may be given twice")
    if not all(item.isdigit() for item in item_ids):
        raise InputError("--append_to: expected item ids that are whole numbers")
    old = read_index(flags.append_to, "append_to")
    parsed = parse_sids(old, model.config["num_emb_list"], flags.append_to)
    own = {extra for _, extra in parsed.values() if extra >= 0}
    if flags.collisions == ["own_token"] and len(own) < len(parsed):
        raise InputError("--append_to: --collisions own_token expects an index in which every item has its own token")
    new = np.array([row for row, item in enumerate(item_ids) if int(item) not in old], dtype=np.int64)
    if not len(new):
        raise InputError(
            f"--append_to {flags.append_to}: all {len(item_ids)} items of the embeddings are in it already"
        )
    _check_same_embeddings(model, array, item_ids, parsed, flags)
    nearest = quantise(model, array[new], flags.batch_size)
    new_codes, extra, moved = append_items(model, array[new], nearest, parsed, flags.collisions[0])
    new_sids = make_sid_tokens(new_codes, extra)
    added = dict(zip(new.tolist(), zip(new_codes, new_sids, strict=True), strict=True))
    rows = [
        added[row] if row in added else (parsed[int(item)][0], list(old[int(item)]))
        for row, item in enumerate(item_ids)
    ]
    codes, sids = np.array([path for path, _ in rows]), [sid for _, sid in rows]
    index = {str(item): list(tokens) for item, tokens in old.items()}
    index |= {str(int(item_ids[row])): sids[row] for row in new}
    figures = _write_files(
        model, codes, sids, array, index=index, output_file=flags.output_file, batch_size=flags.batch_size
    )
    return {
        "items_before": len(old),
        "items_added": len(new),
        "moved_to_free_codes": moved,
        "items_with_extra_token": int((extra >= 0).sum()),
        **figures,
    }


def resolve_index_flags(flags: IndexFlags) -> IndexFlags:
    """The flags with output file and collision steps worked out.

    Raises:
        InputError: a flag outside its range, or --append_to without --output_file, which might overwrite the old index.
    """
    if flags.append_to and flags.output_file is None:
        raise InputError("--append_to: needs --output_file, the index to write")
    flags = replace(
        flags,
        output_file=flags.output_file or str(place_index(flags.data_path)),
        collisions=flags.collisions or (["nearest_free"] if flags.append_to else ["sinkhorn", "nearest_free"]),
    )
    check_repair_flags(flags)
    if flags.batch_size < 1:
        raise InputError(f"--batch_size {flags.batch_size}: expected 1 or more")
    return flags


def make_frozen_index(name: str, flags: IndexFlags, expected: type | None = None) -> None:
    """Write the index of a frozen codebook: what rq.generate_indices and rq.generate_indices_plus do.

    Args:
        name: of the stage.
        flags: the command's flags.
        expected: the kind of model that flags.ckpt_path must hold; None for any.

    Raises:
        InputError: a flag outside its range, a checkpoint of another kind, or embeddings of another width.
    """
    flags = resolve_index_flags(flags)
    device = pick_device(flags.device)
    stage = open_stage(
        name,
        flags,
        inputs=[flags.ckpt_path, flags.data_path, side_file_path(flags.data_path), flags.append_to],
        outputs=list_index_files(flags.output_file),
        record=f"{strip_index_suffix(flags.output_file)}.stage.json",
    )
    if stage.finished:
        return
    model = load_frozen_model(flags.ckpt_path, "ckpt_path").to(device)
    if expected and not isinstance(model, expected):
        raise InputError(
            f"--ckpt_path {flags.ckpt_path}: not a checkpoint of {expected.__name__}; use rq.generate_indices"
        )
    array, item_ids = load_items(flags.data_path, "data_path")
    in_dim = model.config["in_dim"]
    if array.shape[1] != in_dim:
        raise InputError(f"{flags.data_path}: {array.shape[1]} columns, but {flags.ckpt_path} was trained on {in_dim}")
    if flags.append_to:
        results = append_to_index(model, array, item_ids, flags)
    else:
        codes = quantise(model, array, flags.batch_size)
        results = write_index(model, codes, array, item_ids, flags, flags.batch_size)
    finish_index(stage, results, flags.output_file)
