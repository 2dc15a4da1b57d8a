"""The end that all methods share: collisions resolved, the index written, the report beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from minionerec.common.embeddings import side_file_path
from minionerec.common.files import InputError, read_json, write_json
from minionerec.common.processes import say
from minionerec.common.records import read_index
from minionerec.common.stage import Stage
from rq.index.append import append_items, parse_sids
from rq.index.codebook import (
    Model,
    compute_reconstruction_error,
    find_last_level,
    load_items,
    load_model,
    pick_device,
    quantise,
)
from rq.index.collisions import Repair, make_sid_tokens, resolve_collisions
from rq.index.quality_plot import format_quality
from rq.quality import report_files, write_report


def strip_index_suffix(output_file: str | Path) -> Path:
    """DIR/NAME.index of DIR/NAME.index.json: what the names of the files beside the index begin with."""
    path = Path(output_file)
    if path.suffix != ".json":
        raise InputError(f"--output_file {path}: expected a name such as NAME.index.json")
    return path.with_suffix("")


def output_files(output_file: str | Path) -> list[Path]:
    """The index and its report."""
    return [Path(output_file), *report_files(strip_index_suffix(output_file))]


def finish_index(stage: Stage, results: dict[str, Any], output_file: str | Path) -> None:
    """Record the stage and print its results and the report beside the index."""
    stage.done(**results)
    say("\n" + format_quality({Path(output_file).name: read_json(report_files(strip_index_suffix(output_file))[0])}))


def _write(
    model: Model,
    codes: np.ndarray,
    sids: list[list[str]],
    array: np.ndarray,
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
    output_file: str | Path,
    repair: Repair,
    batch_size: int,
) -> dict[str, Any]:
    """SIDs of array [n, in_dim] from its codes [n, levels], written with their report. Returns the results to print.

    array and item_ids are those of `load_items`, in the order of the ids.
    """
    codes, extra, counts = resolve_collisions(codes, find_last_level(model, array, codes), repair)
    sids = make_sid_tokens(codes, extra)
    index = dict(zip(item_ids, sids))
    return {"items": len(sids), **counts, **_write(model, codes, sids, array, index, output_file, batch_size)}


def append_to_index(
    model: Model,
    array: np.ndarray,
    item_ids: list[str],
    old_index: str | Path,
    output_file: str | Path,
    repair: Repair,
    batch_size: int,
) -> dict[str, Any]:
    """`old_index` with SIDs for those of item_ids that it lacks; its own SIDs stay as they are.

    array [n, in_dim] holds the embeddings of item_ids, new ones alone or old ones too. The report covers these n items.
    """
    if repair.steps not in (["nearest_free"], ["extra_token"]):
        raise InputError(
            "--append_to: expected --collisions nearest_free or extra_token, for no SID may be given twice"
        )
    if not all(item.isdigit() for item in item_ids):
        raise InputError("--append_to: expected item ids that are whole numbers")
    old = read_index(old_index, "append_to")
    parsed = parse_sids(old, model.config["num_emb_list"], str(old_index))
    new = np.array([row for row, item in enumerate(item_ids) if int(item) not in old], dtype=np.int64)
    if not len(new):
        raise InputError(f"--append_to {old_index}: all {len(item_ids)} items of the embeddings are in it already")
    nearest = quantise(model, array[new], batch_size)
    new_codes, extra, moved = append_items(model, array[new], nearest, parsed, repair.steps[0])
    added = dict(zip(new.tolist(), zip(new_codes, make_sid_tokens(new_codes, extra))))
    rows = [
        added[row] if row in added else (parsed[int(item)][0], list(old[int(item)]))
        for row, item in enumerate(item_ids)
    ]
    codes, sids = np.array([path for path, _ in rows]), [sid for _, sid in rows]
    index = {str(item): list(tokens) for item, tokens in old.items()}
    index |= {str(int(item_ids[row])): sids[row] for row in new}
    return {
        "items_before": len(old),
        "items_added": len(new),
        "moved_to_free_codes": moved,
        "items_with_extra_token": int((extra >= 0).sum()),
        **_write(model, codes, sids, array, index, output_file, batch_size),
    }


def generate_index(command: str, settings: dict[str, Any], only: type | None = None) -> None:
    """The commands rq.generate_indices and rq.generate_indices_plus; settings: their flags; only: the kind of model."""
    ckpt_path, data_path, output_file = (settings[name] for name in ("ckpt_path", "data_path", "output_file"))
    append_to, batch_size = settings["append_to"], settings["batch_size"]
    settings["collisions"] = settings["collisions"] or (["nearest_free"] if append_to else ["sinkhorn", "nearest_free"])
    repair = Repair(settings["collisions"], settings["sk_epsilon"], settings["sk_iters"], settings["repair_rounds"])
    repair.check()
    if batch_size < 1:
        raise InputError(f"--batch_size {batch_size}: expected 1 or more")
    device = pick_device(settings["device"])
    stage = Stage(
        command,
        settings,
        [ckpt_path, data_path, side_file_path(data_path), *([append_to] if append_to else [])],
        output_files(output_file),
        f"{strip_index_suffix(output_file)}.stage.json",
        settings["force"],
    )
    if stage.finished:
        return
    model = load_model(ckpt_path, "ckpt_path").to(device)
    if only and not isinstance(model, only):
        raise InputError(f"--ckpt_path {ckpt_path}: not a checkpoint of {only.__name__}; use rq.generate_indices")
    array, item_ids = load_items(data_path, "data_path")
    in_dim = model.config["in_dim"]
    if array.shape[1] != in_dim:
        raise InputError(f"{data_path}: {array.shape[1]} columns, but {ckpt_path} was trained on {in_dim}")
    if append_to:
        results = append_to_index(model, array, item_ids, append_to, output_file, repair, batch_size)
    else:
        codes = quantise(model, array, batch_size)
        results = write_index(model, codes, array, item_ids, output_file, repair, batch_size)
    finish_index(stage, results, output_file)
