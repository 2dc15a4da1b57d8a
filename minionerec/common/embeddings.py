"""Item embedding files: float32 [N, dim] with a side file that names the item of every row."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minionerec.common.files import InputError, atomic_write, first_line, read_json, require_file, write_json
from minionerec.common.records import Catalogue

BEHAVIOUR_FIELD = "behaviour"  # among the fields of embeddings that know who bought what


def side_file_path(path: str | Path) -> Path:
    """The JSON that stands beside an embedding file."""
    return Path(path).with_suffix(".json")


def save_embeddings(
    path: str | Path, array: np.ndarray, item_ids: list[str], encoder: str, fields: list[str], fit: str | None = None
) -> None:
    """Write an embedding file and its side file.

    Args:
        path: the .npy file; the side file has the same name with .json.
        array: [N, dim], written as float32.
        item_ids: the item of every row.
        encoder, fields: what the embeddings were made with and from.
        fit: name of the fit that made them, of an encoder that is fitted to the items.
    """
    described = {"encoder": encoder, "text_fields": fields, "shape": list(array.shape), "item_ids": item_ids}
    write_json(side_file_path(path), described | ({"fit": fit} if fit else {}), indent=None)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.save(file, array.astype(np.float32))


def open_array(path: Path, *, mapped: bool = False) -> np.ndarray:
    """The numbers [items, dim] of a .npy file, read or mapped from disk.

    Raises:
        InputError: a file that is no 2-D array of numbers.
    """
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python, and raises of every kind where that fails
        raise InputError(f"{path}: not a .npy array, or one that is cut off ({first_line(error)})") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiu" or not array.size:
        raise InputError(f"{path}: expected a 2-D array of numbers [items, dim]")
    return array


def load_embeddings(path: str | Path, flag: str | None = None) -> tuple[np.ndarray, list[str]]:
    """Read an embedding file and the item of every row, which its side file says and nothing assumes.

    Args:
        path: the .npy file.
        flag: the command-line flag that named it.

    Returns:
        float32 [N, dim], and the item id of each row.

    Raises:
        InputError: a file that is no 2-D array of numbers, a value that is not finite, a missing side file, or ids that
            do not match the rows one to one.
    """
    path = require_file(path, flag)
    array = open_array(path)
    array = array.astype(np.float32)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise InputError(f"{path}, row {int(np.argmin(finite))}: a value is not finite")
    side = side_file_path(path)
    if not side.is_file():
        raise InputError(f'{side}: no such file; it names the item of each row: {{"item_ids": ["0", "1", ...]}}')
    described = read_json(side)
    ids = described.get("item_ids") if isinstance(described, dict) else None
    if not isinstance(ids, list) or not ids:
        raise InputError(f'{side}: expected an object with a list "item_ids"')
    ids = [str(item) for item in ids]
    if len(ids) != len(array):
        raise InputError(f"{side}: {len(ids)} item ids for the {len(array)} rows of {path}")
    if len(set(ids)) != len(ids):
        twice = next(item for item in ids if ids.count(item) > 1)
        raise InputError(f"{side}: item {twice} is named by more than one row")
    return array, ids


def read_item_vectors(path: str, catalogue: Catalogue, flag: str) -> np.ndarray:
    """The embeddings [N, dim] of a catalogue's items, in its order.

    Args:
        path: the .npy file.
        catalogue: the items.
        flag: the command-line flag that named the file.

    Raises:
        InputError: a broken file, or an item without embedding.
    """
    array, item_ids = load_embeddings(path, flag)
    row_of = {item: row for row, item in enumerate(item_ids)}
    missing = [item for item in catalogue.item_ids if str(item) not in row_of]
    if missing:
        raise InputError(f"--{flag} {path}: item {missing[0]} has no embedding there")
    return array[[row_of[str(item)] for item in catalogue.item_ids]]


def is_made_from_behaviour(path: str | Path) -> bool:
    """Whether the side file of embeddings says that they were made from interactions too."""
    described = read_json(side_file_path(path))
    fields = described.get("text_fields") if isinstance(described, dict) else None
    return isinstance(fields, list) and BEHAVIOUR_FIELD in fields


def fit_to_width(vectors: np.ndarray, width: int, seed: int) -> np.ndarray:
    """Item embeddings [N, dim] in `width` dimensions [N, width]: their principal components, randomly rotated.

    Products of two rows, less the mean, stay as they are as far as the components reach.
    """
    centred = vectors.astype(np.float64) - vectors.mean(axis=0)
    _, _, components = np.linalg.svd(centred, full_matrices=False)
    reduced = centred @ components[:width].T
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))
    return reduced @ rotation[: reduced.shape[1]]
