"""Frozen codebooks: reading them from a file, and giving items the nearest codes.

Two kinds of file: a checkpoint (`.pth`: RQ-VAE or RQ-KMeans+, of this trainer or the published one) and an `.npz` with
`codebook_0`, `codebook_1`, ... [K, dim] (residual k-means). A model, whatever its kind, has `encoder`, `decoder`,
`rq.vq_layers[i].embedding` and `config["in_dim"]`, `config["num_emb_list"]`.
"""

from __future__ import annotations

import argparse
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minionerec.common.embeddings import load_embeddings
from minionerec.common.files import InputError, atomic_write, first_line, require_file
from minionerec.common.processes import computes_on_cpu, count_processes, process_state
from rq.models.rqkmeans import RQKMeans, RQKMeansPlus
from rq.models.rqvae import RQVAE
from rq.models.vq import squared_distances

Model = RQVAE | RQKMeans


def pick_device(device: str | None) -> torch.device:
    """The named device, or cuda where there is one, else cpu; of several processes each has its own.

    Raises:
        InputError: the device cannot be used here.
    """
    if count_processes() > 1:
        own = process_state().device
        if device is not None and torch.device(device).type != own.type:
            raise InputError(f"--device {device}: several processes share the work here, each on {own.type}")
        return own
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() and not computes_on_cpu() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: cannot be used here ({first_line(error)})") from None
    return torch.device(device)


def sort_ids(item_ids: list[str]) -> list[int]:
    """Row numbers in the order of their ids: numbers by value, other ids behind them."""
    return sorted(range(len(item_ids)), key=lambda row: (not item_ids[row].isdigit(), item_ids[row].zfill(20)))


def load_items(path: str | Path, flag: str | None = None) -> tuple[np.ndarray, list[str]]:
    """`load_embeddings`, rows sorted by id, so that the order of rows in the file changes no result."""
    array, item_ids = load_embeddings(path, flag)
    order = sort_ids(item_ids)
    if order != list(range(len(order))):
        array, item_ids = array[order], [item_ids[row] for row in order]
    return array, item_ids


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint on the CPU, read without running any code from it.

    Raises:
        InputError: the file is no checkpoint of this trainer.
    """
    require_file(path)
    try:
        # Published checkpoints hold their command line as a Namespace: plain data, and not used here.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and its unpickler raise of every kind over bytes that are no checkpoint
        raise InputError(f"{path}: not a checkpoint of this trainer ({first_line(error)})") from None
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
        raise InputError(f"{path}: not a checkpoint of this trainer (no weights in it)")
    return state


def _config_of_weights(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The configuration of a published RQ-VAE checkpoint, which has none: it shows in the shapes of the weights."""
    linear = [w for name, w in weights.items() if name.startswith("encoder.mlp_layers.") and w.ndim == 2]
    codes = [w for name, w in weights.items() if name.startswith("rq.vq_layers.") and name.endswith("embedding.weight")]
    return {
        "in_dim": linear[0].shape[1],
        "num_emb_list": [len(w) for w in codes],
        "e_dim": codes[0].shape[1],
        "layers": [len(w) for w in linear[:-1]],
        "bn": any("encoder" in name and name.endswith("running_mean") for name in weights),
    }


def _is_codebooks(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "codebook_0.npy" in archive.namelist()


def load_codebooks(path: str | Path, flag: str | None = None) -> list[torch.Tensor]:
    """The codebooks [K, dim], one per level, of an `.npz` file or a checkpoint.

    Raises:
        InputError: no codebooks, or codebooks of different widths or with values that are not finite.
    """
    path = require_file(path, flag)
    if not _is_codebooks(path):
        return [layer.embedding.weight.detach() for layer in load_frozen_model(path).rq.vq_layers]
    codebooks = []
    with np.load(path, allow_pickle=False) as content:
        for level in range(len(content.files)):
            try:
                codes = content[f"codebook_{level}"]
            except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise InputError(f"{path}: codebook_{level} cannot be read ({first_line(error)})") from None
            fits = codes.ndim == 2 and codes.size and codes.dtype.kind == "f" and np.isfinite(codes).all()
            if not fits or codebooks and codes.shape[1] != codebooks[0].shape[1]:
                raise InputError(
                    f"{path}, codebook_{level}: expected finite numbers [codes, dim], dim as in codebook_0"
                )
            codebooks.append(torch.from_numpy(codes.astype(np.float32)))
    return codebooks


def save_codebooks(path: str | Path, codebooks: list[torch.Tensor]) -> None:
    """Write codebooks [K, dim], one per level, as `.npz`."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **{f"codebook_{level}": codes.cpu().numpy() for level, codes in enumerate(codebooks)})


def load_frozen_model(path: str | Path, flag: str | None = None) -> Model:
    """The frozen model of a codebook file, in evaluation mode on the CPU.

    Raises:
        InputError: the file is neither an `.npz` of codebooks nor a checkpoint.
    """
    path = require_file(path, flag)
    if _is_codebooks(path):
        return RQKMeans(load_codebooks(path)).eval()
    state = load_checkpoint(path)
    weights = state["state_dict"]
    try:
        config = state.get("config") or _config_of_weights(weights)
        model = (RQKMeansPlus if "encoder.mlp.mlp_layers.1.weight" in weights else RQVAE)(**config)
        model.load_state_dict(weights)
    except (IndexError, KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a checkpoint of this trainer ({first_line(error)})") from None
    return model.eval()


@torch.no_grad()
def quantise(model: Model, array: np.ndarray, batch_size: int) -> np.ndarray:
    """Nearest codes [n, levels] of array [n, in_dim]."""
    device = model.rq.vq_layers[0].embedding.weight.device
    parts = torch.from_numpy(array).split(batch_size)
    return np.concatenate([model.rq(model.encoder(part.to(device)), use_sk=False)[2].cpu().numpy() for part in parts])


@torch.no_grad()
def compute_residuals(model: Model, array: np.ndarray, codes: np.ndarray) -> torch.Tensor:
    """What the last level has to quantise: [n, e_dim] on the model's device, for array [n, in_dim] and its codes."""
    layers = model.rq.vq_layers
    device = layers[0].embedding.weight.device
    residual = model.encoder(torch.from_numpy(array).to(device))
    for level, layer in enumerate(layers[:-1]):
        residual = residual - layer.embedding(torch.from_numpy(codes[:, level]).to(device))
    return residual


def measure_last_level(model: Model, array: np.ndarray, codes: np.ndarray) -> Callable[[np.ndarray], torch.Tensor]:
    """A function from row numbers [m] to the squared distances [m, K] of those rows to the last level's codes.

    Computed when asked for: the tables of all rows of a large catalogue at once would not fit.
    """
    codebook = model.rq.vq_layers[-1].embedding.weight.detach()
    return lambda rows: squared_distances(compute_residuals(model, array[rows], codes[rows]), codebook)


@torch.no_grad()
def compute_reconstruction_error(model: Model, array: np.ndarray, codes: np.ndarray, batch_size: int) -> float:
    """Mean squared error of the decoded codes over the variance of array [n, in_dim]; 0 when all rows are equal."""
    layers = model.rq.vq_layers
    device = layers[0].embedding.weight.device
    total = 0.0
    for start in range(0, len(array), batch_size):
        part = torch.from_numpy(codes[start : start + batch_size]).to(device)
        decoded = model.decoder(sum(layer.embedding(part[:, level]) for level, layer in enumerate(layers)))
        total += float((decoded.cpu() - torch.from_numpy(array[start : start + batch_size])).double().pow(2).sum())
    variance = float(np.square(array - array.mean(0, dtype=np.float64).astype(np.float32)).sum(dtype=np.float64))
    return total / variance if variance else 0.0
