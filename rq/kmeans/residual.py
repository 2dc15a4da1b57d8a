"""Residual k-means, level by level, whatever clusters a level; and what the commands of both k-means methods share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from minionerec.common.embeddings import side_file_path
from minionerec.common.files import InputError
from minionerec.common.progress import ProgressBar
from minionerec.common.stage import open_stage
from rq.index.codebook import load_items, pick_device, save_codebooks
from rq.index.collisions import LETTERS, check_repair_flags
from rq.index.write import finish_index, list_index_files, place_index, strip_index_suffix, write_index
from rq.models.rqkmeans import RQKMeans
from rq.settings import DatasetFlags, KMeansFlags

# points [n, dim], codes, level -> centres [codes, dim], cluster of each point [n]
Cluster = Callable[[torch.Tensor, int, int], tuple[torch.Tensor, torch.Tensor]]
FlagsT = TypeVar("FlagsT", bound=DatasetFlags)


def resolve_files(flags: FlagsT, embeddings: Path, index: Path) -> FlagsT:
    """The flags with the files of flags.dataset, unless others are named.

    Args:
        flags: the command's flags.
        embeddings, index: the files of flags.dataset in the layout of the published scripts.

    Raises:
        InputError: neither --data_path nor --dataset is given.
    """
    if flags.dataset is None:
        if flags.data_path is None:
            raise InputError("missing flag: --data_path, or --dataset for the layout of the published scripts")
        return flags
    return replace(flags, data_path=flags.data_path or str(embeddings), output_file=flags.output_file or str(index))


def expand_level_sizes(codebook_size: list[int] | None, num_levels: int | None) -> list[int]:
    """Codes per level: a list stands for itself, one number for num_levels levels (default 3) of that size.

    Raises:
        InputError: a list of another length than num_levels, or a size or number of levels out of range.
    """
    sizes = codebook_size or [256]
    if len(sizes) == 1:
        sizes = sizes * (3 if num_levels is None else num_levels)
    elif num_levels is not None and num_levels != len(sizes):
        raise InputError(f"--num_levels {num_levels}, but --codebook_size names {len(sizes)} levels")
    if not 1 <= len(sizes) < len(LETTERS) or min(sizes) < 1:
        raise InputError(f"expected --codebook_size of 1 or more and --num_levels from 1 to {len(LETTERS) - 1}")
    return sizes


def residual_kmeans(x: torch.Tensor, sizes: list[int], cluster: Cluster) -> tuple[list[torch.Tensor], np.ndarray]:
    """Cluster x [n, dim], then what its centres leave over, and so on.

    Args:
        x: the points.
        sizes: codes per level.
        cluster: the clustering of one level.

    Returns:
        The codebooks, one [K, dim] per level, and the codes [n, levels].
    """
    codebooks, codes, residual = [], [], x.clone()
    progress = ProgressBar(sizes, desc="residual k-means", unit="level")
    for level, size in enumerate(progress):
        centres, labels = cluster(residual, size, level)
        residual -= centres[labels]
        codebooks.append(centres)
        codes.append(labels.cpu().numpy())
    return codebooks, np.stack(codes, axis=1)


def make_kmeans_index(name: str, flags: KMeansFlags, cluster: Cluster) -> None:
    """Write the codebooks and the index of the embeddings of flags.data_path.

    Args:
        name: of the stage.
        flags: the command's flags.
        cluster: the clustering of one level.

    Raises:
        InputError: a flag outside its range, or more codes than items.
    """
    if flags.iterations < 1:
        raise InputError(f"--iterations {flags.iterations}: expected 1 or more")
    sizes = expand_level_sizes(flags.codebook_size, flags.num_levels)
    check_repair_flags(flags)
    device = pick_device(flags.device)
    flags = replace(flags, output_file=flags.output_file or str(place_index(flags.data_path)))
    stem = strip_index_suffix(flags.output_file)
    array, item_ids = load_items(flags.data_path, "data_path")
    if max(sizes) > len(array):
        raise InputError(f"--codebook_size {max(sizes)}: more codes than the {len(array)} items of {flags.data_path}")
    codebooks_file = Path(f"{stem}.codebooks.npz")
    stage = open_stage(
        name,
        flags,
        inputs=[flags.data_path, side_file_path(flags.data_path)],
        outputs=[*list_index_files(flags.output_file), codebooks_file],
        record=f"{stem}.stage.json",
    )
    if stage.finished:
        return
    codebooks, codes = residual_kmeans(torch.from_numpy(array).to(device), sizes, cluster)
    save_codebooks(codebooks_file, codebooks)
    model = RQKMeans(codebooks).to(device).eval()
    results = write_index(model, codes, array, item_ids, flags, batch_size=65_536)
    finish_index(stage, results, flags.output_file)
