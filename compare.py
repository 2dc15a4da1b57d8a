"""Is one model better than another on the same test rows? Item-level metrics of two prediction files, row by row.

    python compare.py --a output/sft/test.json --b output/rl/test.json --info_file ... --train_file ...

A difference of two metrics on the same rows is far more certain than their separate intervals suggest: both models find
the same rows hard. So every figure here comes from the differences of single rows.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import binomtest

import cli
from fileio import InputError, read_json, write_json
from metrics import (
    CUTOFFS,
    GAINS,
    bootstrap_interval,
    item_rank,
    items_by_sid,
    popularity,
    rank_array,
    rank_of,
    row_gains,
)
from records import Catalogue, read_info, read_rows

PERMUTATIONS = 10_000
PRINTED = ("HR@1", "HR@3", "HR@5", "HR@10", "HR@20", "HR@50", "NDCG@5", "NDCG@10", "NDCG@50", "MRR@10")


def read_predictions(path: str, flag: str) -> list[dict]:
    """A predictions file of evaluate.py or baselines.py: a JSON list of rows, in the order of the test file.

    Raises:
        InputError: not such a list, or a row without one of the keys that are used here.
    """
    rows = read_json(path, flag)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"--{flag}: {path}: expected a JSON list of predictions, as evaluate.py writes it")
    for number, row in enumerate(rows, 1):
        missing = [
            key for key in ("user_id", "item_id", "output", "predict") if not isinstance(row, dict) or key not in row
        ]
        if missing:
            raise InputError(f"{path}, row {number}: expected a prediction with {', '.join(missing)}")
    return rows


def check_same_rows(a: list[dict], b: list[dict], path_a: str, path_b: str) -> None:
    """Both files must hold the same test rows in the same order.

    Raises:
        InputError: at the first row with another user or target, or at the end of the shorter file.
    """
    for number, (first, second) in enumerate(zip(a, b), 1):
        of_a, of_b = ((row["user_id"], row["item_id"]) for row in (first, second))
        if of_a != of_b:
            raise InputError(
                f"row {number} differs: user {of_a[0]}, item {of_a[1]} in {path_a}, but user {of_b[0]}, item {of_b[1]} "
                f"in {path_b}; only predictions for the same test rows can be compared"
            )
    if len(a) != len(b):
        raise InputError(
            f"{path_a} has {len(a)} rows, but {path_b} has {len(b)}; only predictions for the same test rows can be "
            "compared"
        )


def item_ranks(rows: list[dict], catalogue: Catalogue, counts: dict[int, int], path: str, info_file: str) -> np.ndarray:
    """Item-level ranks [rows], 0 for a target not found: of `predict_items` where a row has it, else of its SIDs.

    Raises:
        InputError: a target that the catalogue does not have under this SID.
    """
    items = items_by_sid(catalogue.sids, catalogue.item_ids, counts)
    known = dict(zip(catalogue.item_ids, catalogue.sids))
    for number, row in enumerate(rows, 1):
        if known.get(row["item_id"]) != row["output"]:
            raise InputError(
                f"{path}, row {number}: item {row['item_id']} with SID {row['output']} is not in {info_file}; "
                "is it the catalogue of this model?"
            )
    return rank_array(
        rank_of(row["item_id"], row["predict_items"])
        if "predict_items" in row
        else item_rank(row["item_id"], row["predict"], items)
        for row in rows
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value that a hit of one model alone is as likely as one of the other alone (McNemar, 1947).

    Args:
        only_a, only_b: rows that only one of the two hits. Rows that both or none hit say nothing.
    """
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def sign_flip(differences: np.ndarray, seed: int = 0, permutations: int = PERMUTATIONS) -> float:
    """Two-sided p-value of a mean difference [rows] under swapping the two models in every row by a fair coin.

    Fisher's randomisation test, as recommended for retrieval metrics (Smucker, Allan and Carterette, CIKM 2007). The
    observed order counts as one of the permutations, so p is never 0 (Phipson and Smyth, 2010). Rows with differences
    of the same size share one binomial draw: the number of them that keep a plus.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    plus = np.random.default_rng(seed).binomial(counts, 0.5, size=(permutations, len(counts)))
    totals = np.abs(2 * (plus @ sizes) - counts @ sizes)
    # Sums in another order differ in the last bits; without the margin, ties with the observed total would be lost.
    as_far = (totals >= np.abs(differences.sum()) - 1e-9).sum()
    return float((as_far + 1) / (permutations + 1))


def paired(ranks_a: np.ndarray, ranks_b: np.ndarray, longest: int, seed: int = 0) -> dict[str, dict]:
    """{"HR@1": {"a", "b", "difference", "interval_95", "p", "wins", "losses"}, ...} at the CUTOFFS up to `longest`.

    difference is b - a, its interval a paired bootstrap over rows; wins are the rows in which b gains more than a,
    losses those in which it gains less. p is of `mcnemar` for HR and of `sign_flip` for NDCG and MRR, which at 1 equal
    HR@1 and are left out.

    Args:
        ranks_a, ranks_b: [rows], as `rank_array` gives them. longest: length of the shorter lists.
    """
    keys = [(name, k) for name in GAINS for k in CUTOFFS if k <= longest and (name == "HR" or k > 1)]
    a, b = (np.stack([row_gains(name, ranks, k) for name, k in keys], axis=1) for ranks in (ranks_a, ranks_b))
    differences = b - a
    intervals = bootstrap_interval(differences, seed).T.tolist()
    result = {}
    for column, ((name, k), interval) in enumerate(zip(keys, intervals)):
        difference = differences[:, column]
        wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
        result[f"{name}@{k}"] = {
            "a": float(a[:, column].mean()),
            "b": float(b[:, column].mean()),
            "difference": float(difference.mean()),
            "interval_95": interval,
            "p": mcnemar(losses, wins) if name == "HR" else sign_flip(difference, seed),
            "wins": wins,
            "losses": losses,
        }
    return result


def comparison_table(result: dict[str, dict]) -> str:
    """The metrics of `paired` as text, one line each."""
    lines = [
        f"{'item level':<10}{'a':>9}{'b':>9}{'b - a':>10}{'95 % interval':>21}{'p':>9}{'b better':>10}{'a better':>10}"
    ]
    for key in PRINTED:
        if key in result:
            row = result[key]
            interval = "[{:+.4f}, {:+.4f}]".format(*row["interval_95"])
            p = f"{row['p']:.4f}" if row["p"] >= 1e-4 else "<0.0001"
            lines.append(
                f"{key:<10}{row['a']:>9.4f}{row['b']:>9.4f}{row['difference']:>+10.4f}{interval:>21}{p:>9}"
                f"{row['wins']:>10}{row['losses']:>10}"
            )
    return "\n".join(lines)


def compare(
    a: str,
    b: str,
    info_file: str,
    train_file: str,
    info_file_b: str | None = None,
    shared_sids: bool = False,
    output: str | None = None,
    seed: int = 42,
) -> None:
    """Compare two prediction files on the same test rows, at item level.

    Args:
        a, b: prediction files of evaluate.py or baselines.py.
        info_file: the catalogue; info_file_b: that of b, where its SIDs are others (the item ids must be the same).
        train_file: CSV of the train split; its target counts order the items that share a SID.
        shared_sids: accept items that share a SID.
        output: write everything, at all cutoffs, to this JSON file too.
        seed: of the resampling.
    """
    rows_a, rows_b = read_predictions(a, "a"), read_predictions(b, "b")
    check_same_rows(rows_a, rows_b, a, b)
    counts = popularity(row.item_id for row in read_rows(train_file, "train_file"))
    catalogue_a = read_info(info_file, shared_sids)
    catalogue_b = read_info(info_file_b, shared_sids, "info_file_b") if info_file_b else catalogue_a
    ranks_a = item_ranks(rows_a, catalogue_a, counts, a, info_file)
    ranks_b = item_ranks(rows_b, catalogue_b, counts, b, info_file_b or info_file)
    longest = min(max(len(row["predict"]) for row in rows) for rows in (rows_a, rows_b))
    if not longest:
        raise InputError(f"{a}, {b}: all lists of one of them are empty")
    result = paired(ranks_a, ranks_b, longest, seed)

    cli.say(f"a: {a}\nb: {b}\n{len(rows_a):,} rows, lists of {longest}\n\n{comparison_table(result)}\n")
    for key in [key for key in ("HR@1", "HR@10", "HR@50") if key in result]:
        wins, losses = result[key]["wins"], result[key]["losses"]
        cli.say(f"{key}: {wins + losses:,} discordant rows (hit by one of the two): {wins:,} by b, {losses:,} by a")
    cli.say("p: exact McNemar test for HR, sign-flip permutation test for NDCG and MRR; interval: paired bootstrap")
    if output:
        settings = {"a": a, "b": b, "seed": seed, "rows": len(rows_a), "longest": longest}
        write_json(output, {**settings, "item": result})
        cli.say(f"-> {output}")


if __name__ == "__main__":
    cli.run(compare)
