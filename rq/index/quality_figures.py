"""The figures of a SID report: how evenly codes are used, how many items collide, what prefixes say about likeness.

Everything is computed from tokens and embeddings alone, so it means the same for every method. Below, N is the number
of items and L the number of levels; an item's first l codes are its prefix.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from minionerec.common.files import InputError
from minionerec.common.progress import ProgressBar

# of the prefixes of one length: the number of each item's prefix [N], the items of each, the parent prefix of each
Prefixes = tuple[np.ndarray, np.ndarray, np.ndarray]

CODE_NUMBER = re.compile(r"(\d+)>$")
BLOCK_ENTRIES = 4_000_000  # numbers held by one block of work: 32 MB of float64


def number_codes(sids: Sequence[Sequence[str]], sizes: list[int] | None) -> tuple[np.ndarray, list[int]]:
    """Number the tokens of every level, and what follows the last level.

    A code is a token, whatever is written in it: numbers run over a level's sorted tokens, and 0 in the last column
    means that nothing follows. L is len(sizes), or the depth that every item has. Unknown sizes are 1 + the largest
    number written in a level's tokens, or the count of tokens where that is more.

    Returns:
        Codes, int32 [N, L + 1]: column l numbers the tokens of level l, the last one what follows level L; and the
        sizes, codes per level.

    Raises:
        InputError: an item with fewer than L tokens, or a token that does not fit into its level's size.
    """
    depth = np.fromiter(map(len, sids), np.int64, len(sids))
    levels = int(depth.min()) if sizes is None else len(sizes)
    if not levels:
        raise InputError("--codebook_sizes: expected at least one level, and SIDs of at least one token")
    if depth.min() < levels:
        short = "".join(sids[int(depth.argmin())])
        raise InputError(f"--codebook_sizes: {levels} levels, but the SID {short} has {depth.min()} tokens")
    columns, seen = [], []
    for level in range(levels):
        tokens = sorted({sid[level] for sid in sids})
        number = {token: code for code, token in enumerate(tokens)}
        columns.append(np.fromiter((number[sid[level]] for sid in sids), np.int32, len(sids)))
        written = [int(match[1]) for match in map(CODE_NUMBER.search, tokens) if match]
        seen.append(max(len(tokens), 1 + max(written, default=0)))
        if sizes is not None and seen[level] > sizes[level]:
            raise InputError(
                f"--codebook_sizes: {sizes[level]} codes at level {level + 1}, but its tokens need {seen[level]}"
            )
    deeper = np.flatnonzero(depth > levels).tolist()
    number = {tail: code for code, tail in enumerate(sorted({tuple(sids[row][levels:]) for row in deeper}), 1)}
    tails = np.zeros(len(sids), np.int32)
    tails[deeper] = [number[tuple(sids[row][levels:])] for row in deeper]
    return np.stack([*columns, tails], axis=1), list(sizes or seen)


def number_prefixes(codes: np.ndarray) -> list[Prefixes]:
    """Number the distinct prefixes of every length, in sorted order.

    Returns:
        Per column of codes [N, columns]: the prefix number of each item [N], the items of each prefix, and the number
        of its parent prefix, which is one code shorter.
    """
    prefixes, ids = [], np.zeros(len(codes), np.int64)
    for column in codes.T:
        width = int(column.max()) + 1
        values, ids, counts = np.unique(ids * width + column, return_inverse=True, return_counts=True)
        prefixes.append((ids, counts, values // width))
    return prefixes


def measure_usage(counts: np.ndarray, size: int) -> dict[str, Any]:
    """How evenly the items use the codes of one level.

    Args:
        counts: items of each code that is used.
        size: codes of the level, all of which count in the Gini coefficient.
    """
    share = counts / counts.sum()
    bits = float(np.abs((share * np.log2(share)).sum()))
    # Ranks of the used codes among all, fewest items first: the dead ones come before them and add nothing.
    rank = np.arange(size - len(counts) + 1, size + 1)
    gini = ((2 * rank - size - 1) * np.sort(share)).sum() / size
    return {
        "codes": size,
        "codes_used": len(counts),
        "dead_codes": size - len(counts),
        "entropy_bits": bits,
        "perplexity": 2**bits,
        "gini": gini,
    }


def measure_prefixes(prefixes: list[Prefixes], level: int, levels: int) -> dict[str, Any]:
    """The prefixes that end with a level: their number, the items of each, and the next codes of each.

    Args:
        prefixes: those of `number_prefixes`.
        level: counted from 0.
        levels: how many there are; the last one has no next codes.
    """
    _, counts, _ = prefixes[level]
    children = np.bincount(prefixes[level + 1][2]) if level + 1 < levels else None
    return {
        "prefixes": len(counts),
        "items_per_prefix": _summarise(counts),
        "children_per_prefix": None if children is None else _summarise(children),
    }


def measure_agreement(prefix: Prefixes, rows: np.ndarray, near: np.ndarray | None) -> dict[str, float | None]:
    """How often near items, and any two items, have the same prefix.

    Args:
        prefix: the prefixes of one length.
        rows: the numbers of the sampled items [S].
        near: the row numbers of their nearest items [S, count]; None where there is no other item.
    """
    ids, counts, _ = prefix
    n = len(ids)
    agreement = None if near is None else float((ids[near] == ids[rows, None]).mean())
    chance = float((counts * (counts - 1)).sum() / (n * (n - 1))) if n > 1 else None
    return {
        "neighbour_agreement": agreement,
        "random_agreement": chance,
        "lift": agreement / chance if chance else None,
    }


def measure_consecutive(prefix: Prefixes, pairs: np.ndarray | None) -> dict[str, float]:
    """How often two items that were bought one after the other have the same prefix; nothing without pairs.

    Args:
        prefix: the prefixes of one length.
        pairs: row numbers of the last item of each train history and of what came next [M, 2].
    """
    if pairs is None:
        return {}
    ids = prefix[0]
    return {"consecutive_agreement": float((ids[pairs[:, 0]] == ids[pairs[:, 1]]).mean())}


def count_collisions(counts: np.ndarray) -> dict[str, Any]:
    """Figures of the buckets of items that share a SID; counts: items of each distinct SID."""
    n, unique = int(counts.sum()), int((counts == 1).sum())
    return {
        "distinct_sids": len(counts),
        "collision_rate": 1 - len(counts) / n,
        "items_with_unique_sid": unique,
        "items_sharing_a_sid": n - unique,
        "largest_bucket": counts.max(),
    }


def _summarise(counts: np.ndarray) -> dict[str, float]:
    return {"mean": counts.mean(), "median": np.median(counts), "max": counts.max()}


def _split_blocks(n: int, width: int) -> list[slice]:
    step = max(1, BLOCK_ENTRIES // width)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def compute_level_errors(array: np.ndarray, codes: np.ndarray) -> list[float]:
    """Share of the embeddings' variance that the first l codes leave unexplained, for l = 1..L; codes [N, L].

    Level by level, a code's vector is the mean residual of its items: what any codebook could reach at most at that
    level, given the codes. 0 when all rows are equal. Needs no copy of `array`: works block by block.
    """
    blocks = _split_blocks(*array.shape)
    # The figures do not change with the origin; the least value of each column makes equal rows exactly 0.
    origin = np.min([array[block].min(axis=0) for block in blocks], axis=0).astype(np.float64)
    vectors: list[np.ndarray] = [sum((array[block] - origin).sum(axis=0) for block in blocks)[None] / len(array)]
    # Column 0 is the one code that all items share, so that its vector is their mean.
    codes = np.concatenate([np.zeros_like(codes[:, :1]), codes], axis=1)
    squares = []
    for level in range(1, codes.shape[1] + 1):
        square, sums = 0.0, 0.0
        for block in blocks:
            residual = array[block] - origin
            for vector, column in zip(vectors, codes[block].T[:level], strict=True):
                residual -= vector[column]
            square += np.einsum("ij,ij->", residual, residual)
            if level < codes.shape[1]:
                column = codes[block, level]
                shape = (int(codes[:, level].max()) + 1, len(column))
                sums += csr_matrix((np.ones(len(column)), (column, np.arange(len(column)))), shape) @ residual
        squares.append(square)
        if level < codes.shape[1]:
            vectors.append(sums / np.bincount(codes[:, level])[:, None])
    return [square / squares[0] if squares[0] else 0.0 for square in squares[1:]]


def _normalise(rows: np.ndarray) -> np.ndarray:
    """float64 rows of length 1; a row of zeros stays one, so that its cosine with anything is 0."""
    rows = rows.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=rows, where=lengths > 0)


def compute_pair_cosines(array: np.ndarray, groupings: list[np.ndarray]) -> list[float | None]:
    """Per grouping, the mean cosine over all pairs of items of one group; None where no group has two items.

    Exact, in one pass: the cosines of all ordered pairs of a group, each item with itself included, add up to the
    squared length of its sum.

    Args:
        array: the embeddings [N, dim].
        groupings: group numbers [N], each a refinement of the one before it and in the same order.
    """
    order = np.argsort(groupings[-1], kind="stable")
    self_cosines, totals = 0.0, [0.0] * len(groupings)
    unfinished: list[tuple[int, Any]] = [(-1, 0.0)] * len(groupings)
    for block in _split_blocks(*array.shape):
        units = _normalise(array[order[block]])
        self_cosines += np.einsum("ij,ij->", units, units)
        for number, groups in enumerate(groupings):
            ids = groups[order[block]]
            starts = np.flatnonzero(np.diff(ids, prepend=-1))
            sums = np.add.reduceat(units, starts, axis=0)
            last, carried = unfinished[number]
            if last == ids[0]:
                sums[0] += carried
            else:
                totals[number] += np.sum(carried * carried)
            totals[number] += np.einsum("ij,ij->", sums[:-1], sums[:-1])
            unfinished[number] = (ids[-1], sums[-1])
    pairs = [int((counts * (counts - 1)).sum()) for counts in map(np.bincount, groupings)]
    totals = [total + np.sum(carried * carried) for total, (_, carried) in zip(totals, unfinished, strict=True)]
    return [
        float((total - self_cosines) / count) if count else None for total, count in zip(totals, pairs, strict=True)
    ]


def find_neighbours(array: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """The other items with the largest cosine to each of some items; on a tie the lower row goes first.

    Looks at all items, block by block, keeping those that beat an item's worst neighbour so far.

    Args:
        array: the embeddings [N, dim].
        rows: the numbers of the items asked for.
        count: neighbours of each, fewer than N.

    Returns:
        Row numbers [len(rows), count].
    """
    queries = _normalise(array[rows]).astype(np.float32)
    best = np.full((len(rows), count), -np.inf, np.float32)
    neighbours = np.zeros((len(rows), count), np.int64)
    most = max(1, min(BLOCK_ENTRIES * 4 // len(rows), BLOCK_ENTRIES // array.shape[1]))
    # Blocks that double from a small first one: each then replaces only a share of the neighbours.
    start, width = 0, min(most, 4 * count)
    bar = ProgressBar(total=len(array), desc="neighbours", unit="item", leave=False)
    while start < len(array):
        end = min(start + width, len(array))
        cosines = queries @ _normalise(array[start:end]).astype(np.float32).T
        inside = np.flatnonzero((rows >= start) & (rows < end))
        cosines[inside, rows[inside] - start] = -np.inf
        query, item = np.nonzero(cosines > best[:, -1:])
        owner = np.concatenate([np.repeat(np.arange(len(rows)), count), query])
        value = np.concatenate([best.ravel(), cosines[query, item]])
        candidate = np.concatenate([neighbours.ravel(), start + item])
        order = np.lexsort((candidate, -value, owner))
        first = np.searchsorted(owner[order], np.arange(len(rows)))
        keep = order[first[:, None] + np.arange(count)]
        best, neighbours = value[keep], candidate[keep]
        bar.update(end - start)
        start, width = end, min(2 * width, most)
    bar.close()
    return neighbours


def _to_json(value: Any) -> Any:
    """JSON values; floats with six digits, which hides the rounding noise of a different order of rows."""
    if isinstance(value, dict):
        return {key: _to_json(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_to_json(part) for part in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}")
    return int(value) if isinstance(value, np.integer) else value


def measure_quality(
    sids: Sequence[Sequence[str]],
    array: np.ndarray,
    *,
    codebook_sizes: list[int] | None = None,
    neighbours: int = 10,
    sample: int = 2000,
    seed: int = 0,
    codebook_error: float | None = None,
    pairs: np.ndarray | None = None,
) -> dict[str, Any]:
    """The report of N items as plain JSON values.

    Levels are those of codebook_sizes, or those that every item has. Tokens beyond them tell colliding items apart:
    they count in the collision figures, except in `without_extra`. Without codebook_sizes a level's size is 1 + the
    largest code number seen there, and `codebook_sizes_known` is false.

    Per level l: usage of its codes; prefixes of length l, with the items and the next codes of each (null at the last
    level); the reconstruction error after it; the share of an item's nearest others that have its prefix, the same for
    two random items (exact, over all pairs) and the ratio of the two; the mean cosine of two items of one prefix, to be
    held against `cosine_of_random_pairs` (both exact). What needs a pair that does not exist is null.

    Args:
        sids: the tokens of the item in row i of `array`, such as ["<a_12>", "<b_7>"].
        array: the embeddings, finite numbers [N, dim].
        codebook_sizes: codes per level, where they are known.
        neighbours, sample, seed: nearest items by cosine looked at for each of `sample` random items.
        codebook_error: the method's own reconstruction error, reported as it is.
        pairs: row numbers of different items that were bought one after the other [M, 2], whose agreement is reported.

    Raises:
        InputError: no items, SIDs and rows that do not match, options out of range, sizes that do not fit the tokens.
    """
    n = len(sids)
    if not n or len(array) != n:
        raise InputError(f"expected as many SIDs as embeddings, at least one; got {n} and {len(array)}")
    if neighbours < 1 or sample < 1:
        flag = f"--neighbours {neighbours}" if neighbours < 1 else f"--sample {sample}"
        raise InputError(f"{flag}: expected 1 or more")
    codes, sizes = number_codes(sids, codebook_sizes)
    levels = len(sizes)
    prefixes = number_prefixes(codes)
    groupings = [np.zeros(n, np.int64), *(ids for ids, _, _ in prefixes[:levels])]
    errors = compute_level_errors(array, codes[:, :levels])
    cosines = compute_pair_cosines(array, groupings)
    count = min(neighbours, n - 1)
    rows = np.sort(np.random.default_rng(seed).choice(n, min(sample, n), replace=False))
    near = find_neighbours(array, rows, count) if count else None
    per_level = [
        {
            "level": level + 1,
            **measure_usage(np.bincount(codes[:, level]), sizes[level]),
            **measure_prefixes(prefixes, level, levels),
            "reconstruction_error": errors[level],
            **measure_agreement(prefixes[level], rows, near),
            "cosine_within_prefix": cosines[level + 1],
            **measure_consecutive(prefixes[level], pairs),
        }
        for level in range(levels)
    ]
    without_extra = count_collisions(prefixes[levels - 1][1])
    return _to_json(
        {
            "items": n,
            "levels": levels,
            "codebook_sizes": sizes,
            "codebook_sizes_known": codebook_sizes is not None,
            **count_collisions(prefixes[levels][1]),
            "items_with_extra_token": int((codes[:, levels] > 0).sum()),
            **{f"{name}_without_extra": value for name, value in without_extra.items()},
            "reconstruction_error": errors[-1],
            "codebook_reconstruction_error": codebook_error,
            "neighbours": count,
            "sampled_items": len(rows),
            "seed": seed,
            "cosine_of_random_pairs": cosines[0],
            "per_level": per_level,
        }
    )
