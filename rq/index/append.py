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

Path = tuple[int, ...]  # the codes of an item, level by level


def parse_sids(index: Mapping[int, Sequence[str]], sizes: list[int], where: str) -> dict[int, tuple[Path, int]]:
    """SIDs written by `make_sid_tokens`, as numbers.

    Args:
        index: item -> SID tokens.
        sizes: codes per level of the codebook.
        where: the file, for the error.

    Returns:
        Item -> its codes, and the number of its extra token or -1.

    Raises:
        InputError: a SID that the codebook cannot have given.
    """
    parsed = {}
    pattern = re.compile(r"<([a-z])_(\d+)>")
    for item, tokens in index.items():
        matches = [pattern.fullmatch(token) for token in tokens]
        letters = "".join(match[1] if match else "?" for match in matches)
        numbers = [int(match[2]) for match in matches if match]
        fits = letters in (LETTERS[: len(sizes)], LETTERS[: len(sizes) + 1])
        # An extra token, behind the levels, may have any number.
        if not fits or any(number >= size for number, size in zip(numbers, sizes, strict=False)):
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
        self.counts: Counter[Path] = Counter()  # prefix -> paths below it that are in use
        for path in paths:
            self.add(path)

    def add(self, path: Path) -> None:
        """Note that a path is in use."""
        if path not in self.paths:
            self.paths.add(path)
            self.counts.update(path[:level] for level in range(len(path)))

    def has_free_path(self, prefix: Path) -> bool:
        """Whether a path below `prefix` is still free."""
        return self.counts[prefix] < math.prod(self.sizes[len(prefix) :])


def find_nearest_free(
    codebooks: list[torch.Tensor], residual: torch.Tensor, occupied: OccupiedSids, prefix: Path = ()
) -> Path:
    """The first free path below `prefix`, codes tried nearest first at every level.

    So an item stays in its prefix while that has a free path, then goes to the nearest sibling prefix.

    Args:
        codebooks: one [K, dim] per level.
        residual: [dim], what `prefix` leaves to quantise.
        occupied: the paths in use; one below `prefix` must be free.
        prefix: the codes of the first levels.
    """
    codebook = codebooks[len(prefix)]
    for code in squared_distances(residual[None], codebook)[0].argsort(stable=True).tolist():
        path = (*prefix, code)
        if len(path) == len(codebooks):
            if path not in occupied.paths:
                return path
        elif occupied.has_free_path(path):
            return find_nearest_free(codebooks, residual - codebook[code], occupied, path)
    raise AssertionError(f"no free code below {prefix}")


@torch.no_grad()
def append_items(
    model: Model, array: np.ndarray, codes: np.ndarray, parsed: dict[int, tuple[Path, int]], step: str
) -> tuple[np.ndarray, np.ndarray, int]:
    """SIDs of new items next to existing ones.

    step "nearest_free": an item whose path is taken moves to the nearest free one. step "extra_token": items that meet
    on a fresh path, or on one whose items have extra tokens, get extra tokens; where an existing SID has none, the
    newcomer moves all the same, for no SID may be the beginning of another. The nearest to its code is served first,
    then the lower row; items that move come last. step "own_token": every item gets the next number as its own token.

    Args:
        model: the codebook.
        array: the embeddings of the new items [n, in_dim].
        codes: their nearest codes [n, levels].
        parsed: the existing SIDs, of `parse_sids`.
        step: what happens to items that share a SID.

    Returns:
        The codes [n, levels], the extra tokens or -1 [n], and how many items moved.

    Raises:
        InputError: every path of the codebook is in use.
    """
    if step == "own_token":
        first = max(extra_token for _, extra_token in parsed.values()) + 1
        return codes, np.arange(first, first + len(codes)), 0
    codebooks = [layer.embedding.weight for layer in model.rq.vq_layers]
    occupied = OccupiedSids([len(codebook) for codebook in codebooks], (path for path, _ in parsed.values()))
    extra_tokens: Counter[Path] = Counter()  # path -> extra tokens given out, for the paths that give any
    if step == "extra_token":
        for path, extra_token in parsed.values():
            if extra_token >= 0:
                extra_tokens[path] = max(extra_tokens[path], extra_token + 1)
        for path, members in Counter(map(tuple, codes.tolist())).items():
            if members > 1 and path not in occupied.paths:
                extra_tokens[path] = 0
                occupied.add(path)
    encoded = model.encoder(torch.from_numpy(array).to(codebooks[0].device))
    columns = [torch.from_numpy(column).to(encoded.device) for column in codes.T.copy()]
    decoded = sum(codebook[column] for codebook, column in zip(codebooks, columns, strict=True))
    order = np.argsort((encoded - decoded).pow(2).sum(1).cpu().numpy(), kind="stable")
    codes, extra, moving = codes.copy(), np.full(len(codes), -1, dtype=np.int64), []
    for row in order.tolist():
        path = tuple(codes[row].tolist())
        if path in extra_tokens:
            extra[row] = extra_tokens[path]
            extra_tokens[path] += 1
        elif path in occupied.paths:
            moving.append(row)
        else:
            occupied.add(path)
    for row in moving:
        if not occupied.has_free_path(()):
            raise InputError(f"all {len(occupied.paths)} code paths are taken: no more new items can be added")
        path = find_nearest_free(codebooks, encoded[row], occupied)
        codes[row] = path
        occupied.add(path)
    return codes, extra, len(moving)
