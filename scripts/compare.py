"""Is one model better than another on the same test rows? Item-level metrics of two prediction files, row by row.

    python -m scripts.compare --a output/sft/test.json --b output/rl/test.json --info_file ... --train_file ...

A difference of two metrics on the same rows is far more certain than their separate intervals suggest: both models find
the same rows hard. So every figure here comes from the differences of single rows.
"""

from __future__ import annotations

from minionerec.common.cli import run
from minionerec.common.files import InputError, write_json
from minionerec.common.processes import say
from minionerec.common.records import count_popularity, read_info, read_rows
from minionerec.evaluation.predictions import read_predictions
from minionerec.evaluation.significance import check_same_rows, compare_paired, compute_item_ranks, format_comparison


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
    counts = count_popularity(row.item_id for row in read_rows(train_file, "train_file"))
    catalogue_a = read_info(info_file, shared_sids)
    catalogue_b = read_info(info_file_b, shared_sids, "info_file_b") if info_file_b else catalogue_a
    ranks_a = compute_item_ranks(rows_a, catalogue_a, counts, a, info_file)
    ranks_b = compute_item_ranks(rows_b, catalogue_b, counts, b, info_file_b or info_file)
    longest = min(max(len(row["predict"]) for row in rows) for rows in (rows_a, rows_b))
    if not longest:
        raise InputError(f"{a}, {b}: all lists of one of them are empty")
    result = compare_paired(ranks_a, ranks_b, longest, seed)

    say(f"a: {a}\nb: {b}\n{len(rows_a):,} rows, lists of {longest}\n\n{format_comparison(result)}\n")
    for key in [key for key in ("HR@1", "HR@10", "HR@50") if key in result]:
        wins, losses = result[key]["wins"], result[key]["losses"]
        say(f"{key}: {wins + losses:,} discordant rows (hit by one of the two): {wins:,} by b, {losses:,} by a")
    say("p: exact McNemar test for HR, sign-flip permutation test for NDCG and MRR; interval: paired bootstrap")
    if output:
        settings = {"a": a, "b": b, "seed": seed, "rows": len(rows_a), "longest": longest}
        write_json(output, {**settings, "item": result})
        say(f"-> {output}")


if __name__ == "__main__":
    run(compare)
