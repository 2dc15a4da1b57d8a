r"""What a model recommends: the best items of the catalogue with their scores, for one user or for a file of users.

    python recommend.py --model output/rl/final_checkpoint --titles "first title; second title"
    python recommend.py --model output/rl/final_checkpoint --history_file ... --user_id U12
    python recommend.py --model output/rl/final_checkpoint --interactive True
    python recommend.py --model output/rl/final_checkpoint --input users.csv --output recommendations.csv --K 20

The score of an item is the log-probability that the model writes its SID and the end token, over the whole vocabulary,
as in the predictions of evaluate.py. With baselines (--fuse, --fused_metrics) the list is over items, the score is the
weighted sum of probabilities, and every item has its reason. From Python: `from minionerec import Recommender`.
"""

from __future__ import annotations

from minionerec.common.cli import parse_flags, run_command
from minionerec.evaluation.settings import RecommendFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(RecommendFlags)


import shutil
from collections.abc import Callable
from pathlib import Path

from minionerec.common.files import InputError
from minionerec.common.model_folder import has_catalogue
from minionerec.common.plugins import load_plugins
from minionerec.common.processes import is_main_process, process_state, say
from minionerec.common.records import read_rows
from minionerec.common.stage import open_stage
from minionerec.engines.settings import check_vllm_flags
from minionerec.evaluation.batches import name_skipped, recommend_in_chunks, write_recommendations
from minionerec.evaluation.histories import ItemFinder, find_latest_history, split_titles
from minionerec.evaluation.recommended_fusion import (
    build_fused,
    check_recommended_fusion,
    read_fused_metrics,
    read_prefix_words,
)
from minionerec.evaluation.recommender import Recommender, load_recommender
from minionerec.evaluation.setup import read_known_catalogue
from minionerec.evaluation.user_files import check_format


def check_recommend_flags(flags: RecommendFlags) -> None:
    """The flags must name one history, or a file of them.

    Raises:
        InputError: none, several, or numbers out of range.
    """
    if sum(value is not None for value in (flags.user_id, flags.titles, flags.input)) + flags.interactive != 1:
        raise InputError("expected one of --user_id with --history_file, --titles, --interactive True, --input")
    for first, second in (("user_id", "history_file"), ("input", "output")):
        if (getattr(flags, first) is None) != (getattr(flags, second) is None):
            raise InputError(f"--{first} and --{second} go together")
    for name in ("history_column", "user_column"):
        if flags.input is None and getattr(flags, name) is not None:
            raise InputError(f"--{name}: has an effect with --input only")
    for name in ("input", "output"):
        if getattr(flags, name) is not None:
            check_format(getattr(flags, name), name)
    if not 1 <= flags.top <= flags.num_beams:
        raise InputError(f"--top {flags.top}: must be at least 1 and cannot exceed --num_beams {flags.num_beams}")
    check_vllm_flags(flags, flags.engine, flags.dtype)
    if flags.max_history < 0:
        raise InputError(f"--max_history {flags.max_history}: must be 0 (all) or more")


def split_categories(flags: RecommendFlags) -> list[str] | None:
    """The texts of --categories."""
    return [part.strip() for part in flags.categories.split(";") if part.strip()] if flags.categories else None


def converse(recommender: Recommender, flags: RecommendFlags) -> None:
    """Answer lines of titles from the standard input until an empty one; wrong input does not end it."""
    say('titles, oldest first: "first; second"; an empty line ends')
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not text:
            return
        try:
            history = recommender.finder.find_history(split_titles(text))
            say(recommender.answer(history, flags.top, flags.exclude_seen, split_categories(flags)))
        except InputError as error:
            say(f"error: {error}")


def recommend_to_file(flags: RecommendFlags, load: Callable[[], Recommender]) -> None:
    """Recommendations for --input, shared by all processes of the run, as a file that appears whole."""
    output = Path(flags.output)
    partial = output.with_name(f"{output.name}.partial")
    record = output.with_name(f"{output.name}.stage.json")
    inputs = [flags.input, flags.info_file, flags.train_file, flags.item_meta_path, flags.cf_path]
    inputs += [flags.fused_metrics, *(flags.plugin or ())]
    inputs += [flags.base_model] if Path(flags.base_model).exists() else []
    stage = open_stage("recommend", flags, inputs, [output, name_skipped(output)], record)
    if stage.finished:
        return
    if is_main_process() and not stage.resuming:
        shutil.rmtree(partial, ignore_errors=True)
    process_state().wait_for_everyone()
    chunks = recommend_in_chunks(
        load(),
        flags.input,
        flags.history_column,
        flags.user_column,
        partial,
        flags.top,
        flags.exclude_seen,
        split_categories(flags),
    )
    if is_main_process():
        users, skipped = write_recommendations(output, partial, chunks)
        stage.done(users=users, skipped=skipped)
        shutil.rmtree(partial, ignore_errors=True)


def recommend(flags: RecommendFlags) -> None:
    """Print the items that a model recommends next, or write them for a file of users."""
    load_plugins(flags.plugin)
    flags = read_fused_metrics(flags)
    check_recommended_fusion(flags, has_catalogue(flags.base_model))
    check_recommend_flags(flags)
    if flags.dry_run and flags.input is None:
        raise InputError("--dry_run: says what becomes of --input; a single list is printed, not written")
    train_rows = read_rows(flags.train_file, "train_file") if flags.train_file else []
    known = read_known_catalogue(flags, train_rows)
    words_of = read_prefix_words(flags.explained_sids) if flags.explained_sids else {}

    def load() -> Recommender:
        return load_recommender(flags, known, build_fused(flags, known, train_rows), words_of)

    if flags.input is not None:
        recommend_to_file(flags, load)
        return
    # What can be wrong is found before a model is loaded.
    history = None
    if flags.user_id is not None:
        rows = read_rows(flags.history_file, "history_file")
        history = find_latest_history(rows, flags.user_id, flags.history_file)
        unknown = [item for item in history.item_ids if item not in known.catalogue.sid_of]
        if flags.fuse and unknown:
            raise InputError(f"--user_id {flags.user_id}: item {unknown[0]} is not in the catalogue")
    elif flags.titles is not None:
        history = ItemFinder(known.catalogue, known.original_ids).find_history(split_titles(flags.titles))
    recommender = load()
    if history is None:
        converse(recommender, flags)
    else:
        say(recommender.answer(history, flags.top, flags.exclude_seen, split_categories(flags)))


if __name__ == "__main__":
    run_command(recommend, FLAGS, shared=FLAGS.input is not None)
