"""Is one model better than another on the same test rows? Item-level metrics of two prediction files, row by row.

    python -m scripts.compare --a output/sft/test.json --b output/rl/test.json --info_file ... --train_file ...

A difference of two metrics on the same rows is far more certain than their separate intervals suggest: both models find
the same rows hard. So every figure here comes from the differences of single rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import flag, parse_flags, run_command
from minionerec.common.settings import CatalogueFlags, DryRunFlags, SeedFlags


@dataclass
class CompareFlags(CatalogueFlags, SeedFlags, DryRunFlags):
    """Predictions to compare."""

    a: str = flag(help="predictions of evaluate.py, baselines.py or sasrec.py")
    b: str = flag(help="predictions of another model for the same rows")
    info_file_b: str | None = flag(
        None, "the catalogue of b, where its SIDs are others; the item ids must be the same", default_text="--info_file"
    )
    train_file: str = flag(help="CSV of the train split; its target counts order the items that share a SID")
    output: str | None = flag(None, "write everything, at all cutoffs, to this JSON file too")


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(CompareFlags)

from minionerec.common.files import InputError, write_json
from minionerec.common.processes import say, say_outputs
from minionerec.common.records import read_info, read_rows
from minionerec.evaluation.predictions import read_predictions
from minionerec.evaluation.significance import check_same_rows, compare_paired, compute_item_ranks, format_comparison


def compare(flags: CompareFlags) -> None:
    """Compare two prediction files on the same test rows, at item level."""
    a, b = flags.a, flags.b
    rows = check_same_rows(read_predictions(a, "a"), read_predictions(b, "b"), a, b)
    train_rows = read_rows(flags.train_file, "train_file")
    catalogue_a = catalogue_b = read_info(flags.info_file, flags.shared_sids).with_counts(train_rows)
    if flags.info_file_b:
        catalogue_b = read_info(flags.info_file_b, flags.shared_sids, "info_file_b").with_counts(train_rows)
    info_file_b = flags.info_file_b or flags.info_file
    ranks_a, longest_a = compute_item_ranks(read_predictions(a, "a"), catalogue_a, a, flags.info_file)
    ranks_b, longest_b = compute_item_ranks(read_predictions(b, "b"), catalogue_b, b, info_file_b)
    longest = min(longest_a, longest_b)
    if not longest:
        raise InputError(f"{a}, {b}: all lists of one of them are empty")
    result = compare_paired(ranks_a, ranks_b, longest, flags.seed)

    say(f"a: {a}\nb: {b}\n{rows:,} rows, lists of {longest}\n\n{format_comparison(result)}\n")
    for key in [key for key in ("HR@1", "HR@10", "HR@50") if key in result]:
        wins, losses = result[key]["wins"], result[key]["losses"]
        say(f"{key}: {wins + losses:,} discordant rows (hit by one of the two): {wins:,} by b, {losses:,} by a")
    say("p: exact McNemar test for HR, sign-flip permutation test for NDCG and MRR; interval: paired bootstrap")
    if flags.output and flags.dry_run:
        say_outputs([flags.output], dry_run=True)
    elif flags.output:
        settings = {"a": a, "b": b, "seed": flags.seed, "rows": rows, "longest": longest}
        write_json(flags.output, {**settings, "item": result})
        say(f"-> {flags.output}")


if __name__ == "__main__":
    run_command(compare, FLAGS)
