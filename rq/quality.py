"""The SID report: is an index worth training a language model on?

    python -m rq.quality --index DIR/NAME.index.json --emb DIR/NAME.emb-PLM-td.npy

Several indexes, separated by commas, are shown side by side. Beside each one stand its figures, NAME.index.quality.json,
and a page of plots, NAME.index.quality.png. Everything is computed from tokens and embeddings alone, so it means the same
for every method. Below, N is the number of items and L the number of levels; an item's first l codes are its prefix.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from tqdm import tqdm

from minionerec.common.cli import run
from minionerec.common.embeddings import load_embeddings, side_file_path
from minionerec.common.files import InputError, atomic_write, read_json, write_json
from minionerec.common.processes import is_main_process, say
from minionerec.common.records import read_index
from minionerec.common.stage import Stage
from rq.index.quality_plot import draw_quality, format_quality

CODE_NUMBER = re.compile(r"(\d+)>$")
BLOCK_ENTRIES = 4_000_000  # numbers held by one block of work: 32 MB of float64


def parse(sids: Sequence[Sequence[str]], sizes: list[int] | None) -> tuple[np.ndarray, list[int]]:
    """(int32 [N, L + 1], codes per level): column l numbers the tokens of level l, the last one what follows level L.

    A code is a token, whatever is written in it: numbers run over a level's sorted tokens, and 0 in the last column
    means that nothing follows. L is len(sizes), or the depth that every item has. Unknown sizes are 1 + the largest
    number written in a level's tokens, or the count of tokens where that is more.

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
    columns, found = [], []
    for level in range(levels):
        tokens = sorted({sid[level] for sid in sids})
        number = {token: place for place, token in enumerate(tokens)}
        columns.append(np.fromiter((number[sid[level]] for sid in sids), np.int32, len(sids)))
        written = [int(match[1]) for match in map(CODE_NUMBER.search, tokens) if match]
        found.append(max(len(tokens), 1 + max(written, default=0)))
        if sizes is not None and found[level] > sizes[level]:
            raise InputError(
                f"--codebook_sizes: {sizes[level]} codes at level {level + 1}, but its tokens need {found[level]}"
            )
    deeper = np.flatnonzero(depth > levels).tolist()
    number = {tail: place for place, tail in enumerate(sorted({tuple(sids[row][levels:]) for row in deeper}), 1)}
    tails = np.zeros(len(sids), np.int32)
    tails[deeper] = [number[tuple(sids[row][levels:])] for row in deeper]
    return np.stack([*columns, tails], axis=1), list(sizes or found)


def prefixes(codes: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per column l: (the prefix of each item by its place in sorted order [N], items of each prefix, its parent prefix)."""
    found, ids = [], np.zeros(len(codes), np.int64)
    for column in codes.T:
        width = int(column.max()) + 1
        values, ids, counts = np.unique(ids * width + column, return_inverse=True, return_counts=True)
        found.append((ids, counts, values // width))
    return found


def usage(counts: np.ndarray, size: int) -> dict[str, Any]:
    """Figures of one level's usage; counts: items of each code that is used. Gini is over all `size` codes."""
    share = counts / counts.sum()
    bits = float(np.abs((share * np.log2(share)).sum()))
    # Places of the used codes among all, fewest items first: the dead ones come before them and add nothing.
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


def collisions(counts: np.ndarray) -> dict[str, Any]:
    """Figures of the buckets of items that share a SID; counts: items of each distinct SID."""
    n, alone = int(counts.sum()), int((counts == 1).sum())
    return {
        "distinct_sids": len(counts),
        "collision_rate": 1 - len(counts) / n,
        "items_with_unique_sid": alone,
        "items_sharing_a_sid": n - alone,
        "largest_bucket": counts.max(),
    }


def _spread(counts: np.ndarray) -> dict[str, float]:
    return {"mean": counts.mean(), "median": np.median(counts), "max": counts.max()}


def _blocks(n: int, width: int) -> list[slice]:
    step = max(1, BLOCK_ENTRIES // width)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def reconstruction_errors(array: np.ndarray, codes: np.ndarray) -> list[float]:
    """Share of the embeddings' variance that the first l codes leave unexplained, for l = 1..L; codes [N, L].

    Level by level, a code's vector is the mean residual of its items: what any codebook could reach at most at that
    level, given the codes. 0 when all rows are equal. Needs no copy of `array`: residuals are made again block by block.
    """
    blocks = _blocks(*array.shape)
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
            for vector, column in zip(vectors, codes[block].T):
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


def _units(rows: np.ndarray) -> np.ndarray:
    """float64 rows of length 1; a row of zeros stays one, so that its cosine with anything is 0."""
    rows = rows.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=rows, where=lengths > 0)


def pair_cosines(array: np.ndarray, groupings: list[np.ndarray]) -> list[float | None]:
    """Per grouping, the mean cosine over all pairs of items of one group; None where no group has two items.

    groupings: group numbers [N], each a refinement of the one before it and in the same order. Exact, in one pass: the
    cosines of all ordered pairs of a group, each item with itself included, add up to the squared length of its sum.
    """
    order = np.argsort(groupings[-1], kind="stable")
    own, totals = 0.0, [0.0] * len(groupings)
    unfinished: list[tuple[int, Any]] = [(-1, 0.0)] * len(groupings)
    for block in _blocks(*array.shape):
        units = _units(array[order[block]])
        own += np.einsum("ij,ij->", units, units)
        for place, groups in enumerate(groupings):
            ids = groups[order[block]]
            starts = np.flatnonzero(np.diff(ids, prepend=-1))
            sums = np.add.reduceat(units, starts, axis=0)
            last, carried = unfinished[place]
            if last == ids[0]:
                sums[0] += carried
            else:
                totals[place] += np.sum(carried * carried)
            totals[place] += np.einsum("ij,ij->", sums[:-1], sums[:-1])
            unfinished[place] = (ids[-1], sums[-1])
    pairs = [int((counts * (counts - 1)).sum()) for counts in map(np.bincount, groupings)]
    totals = [total + np.sum(carried * carried) for total, (_, carried) in zip(totals, unfinished)]
    return [float((total - own) / count) if count else None for total, count in zip(totals, pairs)]


def nearest(array: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """[len(rows), count]: the other items with the largest cosine to each of `rows`; on a tie the lower row goes first.

    Needs count < N. Looks at all items, block by block, keeping those that beat an item's worst neighbour so far.
    """
    queries = _units(array[rows]).astype(np.float32)
    best = np.full((len(rows), count), -np.inf, np.float32)
    found = np.zeros((len(rows), count), np.int64)
    most = max(1, min(BLOCK_ENTRIES * 4 // len(rows), BLOCK_ENTRIES // array.shape[1]))
    # Blocks that double from a small first one: each then replaces only a share of the neighbours.
    start, width = 0, min(most, 4 * count)
    bar = tqdm(total=len(array), desc="neighbours", unit="item", leave=False, disable=not is_main_process())
    while start < len(array):
        end = min(start + width, len(array))
        cosines = queries @ _units(array[start:end]).astype(np.float32).T
        inside = np.flatnonzero((rows >= start) & (rows < end))
        cosines[inside, rows[inside] - start] = -np.inf
        query, item = np.nonzero(cosines > best[:, -1:])
        owner = np.concatenate([np.repeat(np.arange(len(rows)), count), query])
        value = np.concatenate([best.ravel(), cosines[query, item]])
        place = np.concatenate([found.ravel(), start + item])
        order = np.lexsort((place, -value, owner))
        first = np.searchsorted(owner[order], np.arange(len(rows)))
        keep = order[first[:, None] + np.arange(count)]
        best, found = value[keep], place[keep]
        bar.update(end - start)
        start, width = end, min(2 * width, most)
    bar.close()
    return found


def _plain(value: Any) -> Any:
    """JSON values; floats with six digits, which hides the rounding noise of a different order of rows."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}")
    return int(value) if isinstance(value, np.integer) else value


def measure(
    sids: Sequence[Sequence[str]],
    array: np.ndarray,
    codebook_sizes: list[int] | None = None,
    neighbours: int = 10,
    sample: int = 2000,
    seed: int = 0,
    codebook_error: float | None = None,
) -> dict[str, Any]:
    """The report of N items as plain JSON values.

    Levels are those of codebook_sizes, or those that every item has. Tokens beyond them tell colliding items apart: they
    count in the collision figures, except in `without_extra`. Without codebook_sizes a level's size is 1 + the largest
    code number seen there, and `codebook_sizes_known` is false.

    Per level l: usage of its codes; prefixes of length l, with the items and the next codes of each (null at the last
    level); the reconstruction error after it; the share of an item's nearest others that have its prefix, the same for
    two random items (exact, over all pairs) and the ratio of the two; the mean cosine of two items of one prefix, to be
    held against `cosine_of_random_pairs` (both exact). What needs a pair that does not exist is null.

    Args:
        sids: the tokens of the item in row i of `array`, such as ["<a_12>", "<b_7>"].
        array: finite numbers [N, dim].
        neighbours, sample, seed: nearest items by cosine looked at for each of `sample` random items.
        codebook_error: the method's own reconstruction error, reported as it is.

    Raises:
        InputError: no items, SIDs and rows that do not match, options out of range, sizes that do not fit the tokens.
    """
    n = len(sids)
    if not n or len(array) != n:
        raise InputError(f"expected as many SIDs as embeddings, at least one; got {n} and {len(array)}")
    if neighbours < 1 or sample < 1:
        flag = f"--neighbours {neighbours}" if neighbours < 1 else f"--sample {sample}"
        raise InputError(f"{flag}: expected 1 or more")
    codes, sizes = parse(sids, codebook_sizes)
    levels = len(sizes)
    found = prefixes(codes)
    groupings = [np.zeros(n, np.int64), *(ids for ids, _, _ in found[:levels])]
    errors = reconstruction_errors(array, codes[:, :levels])
    cosines = pair_cosines(array, groupings)
    count = min(neighbours, n - 1)
    rows = np.sort(np.random.default_rng(seed).choice(n, min(sample, n), replace=False))
    near = nearest(array, rows, count) if count else None
    per_level = []
    for level in range(levels):
        ids, counts, _ = found[level]
        children = np.bincount(found[level + 1][2]) if level + 1 < levels else None
        agreement = float((ids[near] == ids[rows, None]).mean()) if count else None
        chance = float((counts * (counts - 1)).sum() / (n * (n - 1))) if n > 1 else None
        per_level.append(
            {
                "level": level + 1,
                **usage(np.bincount(codes[:, level]), sizes[level]),
                "prefixes": len(counts),
                "items_per_prefix": _spread(counts),
                "children_per_prefix": None if children is None else _spread(children),
                "reconstruction_error": errors[level],
                "neighbour_agreement": agreement,
                "random_agreement": chance,
                "lift": agreement / chance if chance else None,
                "cosine_within_prefix": cosines[level + 1],
            }
        )
    without = collisions(found[levels - 1][1])
    return _plain(
        {
            "items": n,
            "levels": levels,
            "codebook_sizes": sizes,
            "codebook_sizes_known": codebook_sizes is not None,
            **collisions(found[levels][1]),
            "items_with_extra_token": int((codes[:, levels] > 0).sum()),
            **{f"{name}_without_extra": value for name, value in without.items()},
            "reconstruction_error": errors[-1],
            "codebook_reconstruction_error": codebook_error,
            "neighbours": count,
            "sampled_items": len(rows),
            "seed": seed,
            "cosine_of_random_pairs": cosines[0],
            "per_level": per_level,
        }
    )


def report_files(stem: str | Path) -> list[Path]:
    """The files of a report; for DIR/NAME.index.json the stem is DIR/NAME.index."""
    return [Path(f"{stem}.quality.json"), Path(f"{stem}.quality.png")]


def write_report(
    stem: str | Path,
    sids: Sequence[Sequence[str]],
    array: np.ndarray,
    codebook_sizes: list[int] | None = None,
    neighbours: int = 10,
    sample: int = 2000,
    seed: int = 0,
    codebook_error: float | None = None,
) -> dict[str, Any]:
    """Measure, write the files of `report_files(stem)`, and return the report. Arguments are those of `measure`."""
    report = measure(sids, array, codebook_sizes, neighbours, sample, seed, codebook_error)
    save_report(stem, report, sids, array)
    return report


def save_report(stem: str | Path, report: dict[str, Any], sids: Sequence[Sequence[str]], array: np.ndarray) -> None:
    """Write a report that is measured already: the JSON and the page of plots."""
    figures, page = report_files(stem)
    write_json(figures, report)
    with atomic_write(page) as temporary:
        draw_quality(report, sids, array, temporary, Path(stem).name)


def earlier_report(stem: str | Path, index_path: Path) -> dict[str, Any]:
    """The report that stands beside an index and is no older than it, else {}.

    The method that wrote the index knows its codebooks; the index alone does not tell their sizes and errors.
    """
    figures = report_files(stem)[0]
    if not figures.is_file() or figures.stat().st_mtime_ns < index_path.stat().st_mtime_ns:
        return {}
    return read_json(figures)


def match_rows(index_path: Path, emb: str, array: np.ndarray, item_ids: list[str]) -> tuple[list[tuple], np.ndarray]:
    """(SIDs, embeddings) of the same items, by ascending item id. InputError for an item that has only one of the two."""
    index = {str(item): sid for item, sid in sorted(read_index(index_path, "index").items())}
    row_of = {item: row for row, item in enumerate(item_ids)}
    for item in index:
        if item not in row_of:
            raise InputError(f"{index_path}: item {item} has no embedding in {emb}")
    for item, row in row_of.items():
        if item not in index:
            raise InputError(f"{emb}, row {row}: item {item} has no SID in {index_path}")
    return list(index.values()), array[[row_of[item] for item in index]]


def main(
    index: list[str],
    emb: str,
    codebook_sizes: list[int] | None = None,
    neighbours: int = 10,
    sample: int = 2000,
    seed: int = 0,
    force: bool = False,
) -> None:
    """Print the report of one or more indexes and write it beside each, as .quality.json and .quality.png.

    index: index files, separated by commas; emb: the embeddings, with their side file
    codebook_sizes: codes per level of all of them, such as 256,256,256; default: what an earlier report beside the index
    knows, else up to the largest number seen, so that dead codes above it are not counted
    neighbours, sample, seed: nearest items by cosine looked at for each of so many random items
    """
    settings = dict(locals())
    embeddings, reports = None, {}
    for path in map(Path, index):
        stem = path.with_name(path.name.removesuffix(".json"))
        stage = Stage(
            "quality",
            {**settings, "index": str(path)},
            [path, emb, side_file_path(emb)],
            report_files(stem),
            Path(f"{stem}.quality.stage.json"),
            force,
        )
        if not stage.finished:
            embeddings = embeddings or load_embeddings(emb, "emb")
            sids, array = match_rows(path, emb, *embeddings)
            sizes, before = codebook_sizes, earlier_report(stem, path)
            if sizes is None and before.get("codebook_sizes_known"):
                sizes = before["codebook_sizes"]
                say(f"[quality] codebook_sizes {sizes}: from the report of the method, {report_files(stem)[0]}")
            report = measure(sids, array, sizes, neighbours, sample, seed)
            # An equal error means the same SIDs and embeddings, so that the error of the method's codebook holds too.
            if before.get("reconstruction_error") == report["reconstruction_error"]:
                report["codebook_reconstruction_error"] = before.get("codebook_reconstruction_error")
            save_report(stem, report, sids, array)
            stage.done(items=report["items"], collision_rate=report["collision_rate"])
        reports[str(path)] = read_json(report_files(stem)[0])
    say(format_quality(reports))


if __name__ == "__main__":
    run(main)
