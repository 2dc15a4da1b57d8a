"""New items for an existing index: SIDs from the frozen codebook, no existing SID touched."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from minionerec.common.files import InputError
from rq.index.codebook import Model
from rq.index.collisions import LETTERS
from rq.models.vq import squared_distances

Path = tuple[int, ...]


def parse_sids(index: Mapping[int, Sequence[str]], sizes: list[int], where: str) -> dict[int, tuple[Path, int]]:
    """Item -> (codes, number of its extra token or -1) of SIDs written by `collisions.sid_tokens`.

    Raises InputError for a SID that the codebook, `sizes` codes per level, cannot have given.
    """
    parsed = {}
    pattern = re.compile(r"<([a-z])_(\d+)>")
    for item, tokens in index.items():
        found = [pattern.fullmatch(token) for token in tokens]
        letters = "".join(match[1] if match else "?" for match in found)
        numbers = [int(match[2]) for match in found if match]
        fits = letters in (LETTERS[: len(sizes)], LETTERS[: len(sizes) + 1])
        if not fits or any(number >= size for number, size in zip(numbers, sizes)):
            raise InputError(
                f"{where}, item {item}: the SID {''.join(tokens)} is not of the codebook's "
                f"{len(sizes)} levels ({','.join(map(str, sizes))} codes)"
            )
        parsed[item] = (tuple(numbers[: len(sizes)]), numbers[-1] if len(numbers) > len(sizes) else -1)
    return parsed


class OccupiedSids:
    """The code paths in use, with counts below every prefix so that a full one is seen at once."""

    def __init__(self, sizes: list[int], paths: Iterable[Path]):
        self.sizes = sizes
        self.paths: set[Path] = set()
        self.below: Counter[Path] = Counter()
        for path in paths:
            self.take(path)

    def take(self, path: Path) -> None:
        if path not in self.paths:
            self.paths.add(path)
            self.below.update(path[:level] for level in range(len(path)))

    def room(self, prefix: Path) -> bool:
        """Is a path below `prefix` still free?"""
        return self.below[prefix] < math.prod(self.sizes[len(prefix) :])


def find_nearest_free(
    codebooks: list[torch.Tensor], residual: torch.Tensor, occupied: OccupiedSids, prefix: Path = ()
) -> Path:
    """The first free path below `prefix`, codes tried nearest first at every level; residual [dim] is left to quantise.

    So an item stays in its own prefix while that has room, then goes to the nearest sibling prefix. There must be room.
    """
    book = codebooks[len(prefix)]
    for code in squared_distances(residual[None], book)[0].argsort(stable=True).tolist():
        path = (*prefix, code)
        if len(path) == len(codebooks):
            if path not in occupied.paths:
                return path
        elif occupied.room(path):
            return find_nearest_free(codebooks, residual - book[code], occupied, path)
    raise AssertionError(f"no free code below {prefix}")


@torch.no_grad()
def append_items(
    model: Model, array: np.ndarray, codes: np.ndarray, parsed: dict[int, tuple[Path, int]], step: str
) -> tuple[np.ndarray, np.ndarray, int]:
    """SIDs of new items, array [n, in_dim] with nearest codes [n, levels], beside the existing ones (`parse_sids`).

    step "nearest_free": an item whose path is taken moves to the nearest free one. step "extra_token": items that meet on
    a fresh path, or on one whose items have extra tokens, get extra tokens; where an existing SID has none, the newcomer
    moves all the same, for no SID may be the beginning of another. The nearest to its code is served first, then the lower
    row; items that move come last.

    Returns (codes, extra tokens or -1 [n], how many moved); InputError when the codebook is full.
    """
    codebooks = [layer.embedding.weight for layer in model.rq.vq_layers]
    occupied = OccupiedSids([len(book) for book in codebooks], (path for path, _ in parsed.values()))
    given: Counter[Path] = Counter()  # path -> extra tokens given out, for the paths that give any
    if step == "extra_token":
        for path, extra_token in parsed.values():
            if extra_token >= 0:
                given[path] = max(given[path], extra_token + 1)
        for path, members in Counter(map(tuple, codes.tolist())).items():
            if members > 1 and path not in occupied.paths:
                given[path] = 0
                occupied.take(path)
    encoded = model.encoder(torch.from_numpy(array).to(codebooks[0].device))
    decoded = sum(book[torch.from_numpy(codes[:, level]).to(book.device)] for level, book in enumerate(codebooks))
    order = np.argsort((encoded - decoded).pow(2).sum(1).cpu().numpy(), kind="stable")
    codes, extra, moving = codes.copy(), np.full(len(codes), -1, dtype=np.int64), []
    for row in order.tolist():
        path = tuple(codes[row].tolist())
        if path in given:
            extra[row] = given[path]
            given[path] += 1
        elif path in occupied.paths:
            moving.append(row)
        else:
            occupied.take(path)
    for row in moving:
        if not occupied.room(()):
            raise InputError(f"all {len(occupied.paths)} code paths are taken: no room for more new items")
        path = find_nearest_free(codebooks, encoded[row], occupied)
        codes[row] = path
        occupied.take(path)
    return codes, extra, len(moving)
