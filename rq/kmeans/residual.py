"""Residual k-means, level by level, whatever clusters a level; and the command that both k-means methods are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from minionerec.common.embeddings import side_file_path
from minionerec.common.files import InputError
from minionerec.common.processes import is_main_process
from minionerec.common.stage import Stage
from rq.index.codebook import load_items, pick_device, save_codebooks
from rq.index.collisions import LETTERS, Repair
from rq.index.write import finish_index, output_files, strip_index_suffix, write_index
from rq.models.rqkmeans import RQKMeans

# points [n, dim], codes, level -> centres [codes, dim], cluster of each point [n]
Cluster = Callable[[torch.Tensor, int, int], tuple[torch.Tensor, torch.Tensor]]


def expand_level_sizes(codebook_size: list[int] | None, num_levels: int | None) -> list[int]:
    """Codes per level: a list stands for itself, one number for num_levels levels (default 3) of that size."""
    sizes = codebook_size or [256]
    if len(sizes) == 1:
        sizes = sizes * (3 if num_levels is None else num_levels)
    elif num_levels is not None and num_levels != len(sizes):
        raise InputError(f"--num_levels {num_levels}, but --codebook_size names {len(sizes)} levels")
    if not 1 <= len(sizes) < len(LETTERS) or min(sizes) < 1:
        raise InputError(f"expected --codebook_size of 1 or more and --num_levels from 1 to {len(LETTERS) - 1}")
    return sizes


def residual_kmeans(x: torch.Tensor, sizes: list[int], cluster: Cluster) -> tuple[list[torch.Tensor], np.ndarray]:
    """Cluster x [n, dim], then what its centres leave over, and so on. Returns (codebooks [K, dim], codes [n, levels])."""
    codebooks, codes, residual = [], [], x.clone()
    progress = tqdm(sizes, desc="residual k-means", unit="level", disable=not is_main_process())
    for level, size in enumerate(progress):
        centres, labels = cluster(residual, size, level)
        residual -= centres[labels]
        codebooks.append(centres)
        codes.append(labels.cpu().numpy())
    return codebooks, np.stack(codes, axis=1)


def run_method(command: str, settings: dict[str, Any], cluster: Cluster) -> None:
    """Codebooks and index of settings["data_path"]; settings: the flags of the command."""
    sizes = expand_level_sizes(settings["codebook_size"], settings["num_levels"])
    repair = Repair(settings["collisions"], settings["sk_epsilon"], settings["sk_iters"], settings["repair_rounds"])
    repair.check()
    device = pick_device(settings["device"])
    data_path, output_file = settings["data_path"], settings["output_file"]
    array, item_ids = load_items(data_path, "data_path")
    if max(sizes) > len(array):
        raise InputError(f"--codebook_size {max(sizes)}: more codes than the {len(array)} items of {data_path}")
    codebooks_file = Path(f"{strip_index_suffix(output_file)}.codebooks.npz")
    stage = Stage(
        command,
        settings,
        [data_path, side_file_path(data_path)],
        [*output_files(output_file), codebooks_file],
        f"{strip_index_suffix(output_file)}.stage.json",
        settings["force"],
    )
    if stage.finished:
        return
    codebooks, codes = residual_kmeans(torch.from_numpy(array).to(device), sizes, cluster)
    save_codebooks(codebooks_file, codebooks)
    model = RQKMeans(codebooks).to(device).eval()
    finish_index(stage, write_index(model, codes, array, item_ids, output_file, repair, batch_size=65_536), output_file)
