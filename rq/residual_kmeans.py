"""Residual k-means, level by level, whatever clusters a level; and the command that both k-means methods are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from tqdm import tqdm

import cli
from embeddings import side_file
from fileio import InputError
from rq.codebook import load_items, pick_device, save_codebooks
from rq.collisions import LETTERS, Repair
from rq.indices import finish, output_files, stem, write_index
from rq.models.rqkmeans import RQKMeans

# points [n, dim], codes, level -> centres [codes, dim], cluster of each point [n]
Cluster = Callable[[torch.Tensor, int, int], tuple[torch.Tensor, torch.Tensor]]


def level_sizes(codebook_size: list[int] | None, num_levels: int | None) -> list[int]:
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
    progress = tqdm(sizes, desc="residual k-means", unit="level", disable=not cli.is_main_process())
    for level, size in enumerate(progress):
        centres, labels = cluster(residual, size, level)
        residual -= centres[labels]
        codebooks.append(centres)
        codes.append(labels.cpu().numpy())
    return codebooks, np.stack(codes, axis=1)


def run(command: str, settings: dict[str, Any], cluster: Cluster) -> None:
    """Codebooks and index of settings["data_path"]; settings: the flags of the command."""
    sizes = level_sizes(settings["codebook_size"], settings["num_levels"])
    repair = Repair(settings["collisions"], settings["sk_epsilon"], settings["sk_iters"], settings["repair_rounds"])
    repair.check()
    device = pick_device(settings["device"])
    data_path, output_file = settings["data_path"], settings["output_file"]
    array, item_ids = load_items(data_path, "data_path")
    if max(sizes) > len(array):
        raise InputError(f"--codebook_size {max(sizes)}: more codes than the {len(array)} items of {data_path}")
    codebooks_file = Path(f"{stem(output_file)}.codebooks.npz")
    stage = cli.Stage(
        command,
        settings,
        [data_path, side_file(data_path)],
        [*output_files(output_file), codebooks_file],
        f"{stem(output_file)}.stage.json",
        settings["force"],
    )
    if stage.finished:
        return
    codebooks, codes = residual_kmeans(torch.from_numpy(array).to(device), sizes, cluster)
    save_codebooks(codebooks_file, codebooks)
    model = RQKMeans(codebooks).to(device).eval()
    finish(stage, write_index(model, codes, array, item_ids, output_file, repair, batch_size=65_536), output_file)
