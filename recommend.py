"""What a model recommends to one user: the best items of the catalogue with their scores, once or in a dialogue.

python recommend.py --base_model output/sft/final_checkpoint --info_file ... --history_file ... --user_id U12
python recommend.py --base_model output/sft/final_checkpoint --info_file ... --titles "first title; second title"
python recommend.py --base_model output/sft/final_checkpoint --info_file ... --interactive True
python recommend.py ... --fused_metrics output/sft/test.fused.metrics.json --train_file ... --titles "..."

The score of an item is the log-probability that the model writes its SID and the end token, over the whole vocabulary,
as in the predictions of evaluate.py. Fused with baselines, the list is over items, and every item has its reason.
"""

from __future__ import annotations

from minionerec.common.cli import parse_flags, run_command
from minionerec.evaluation.settings import RecommendFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(RecommendFlags)


from minionerec.common.files import InputError
from minionerec.common.plugins import load_plugins
from minionerec.common.processes import say
from minionerec.common.records import read_info, read_rows
from minionerec.engines.settings import check_vllm_flags
from minionerec.evaluation.recommender import (
    Recommender,
    build_fused,
    check_recommended_fusion,
    find_history,
    find_latest_history,
    load_recommender,
    read_fused_metrics,
    read_prefix_words,
)


def check_recommend_flags(flags: RecommendFlags) -> None:
    """The flags must name one history.

    Raises:
        InputError: none, several, or numbers out of range.
    """
    if (flags.user_id is not None) + (flags.titles is not None) + flags.interactive != 1:
        raise InputError("expected one of --user_id with --history_file, --titles, --interactive True")
    if (flags.user_id is None) != (flags.history_file is None):
        raise InputError("--user_id and --history_file go together")
    if not 1 <= flags.top <= flags.num_beams:
        raise InputError(f"--top {flags.top}: must be at least 1 and cannot exceed --num_beams {flags.num_beams}")
    check_vllm_flags(flags, flags.engine, flags.dtype)
    if flags.max_history < 0:
        raise InputError(f"--max_history {flags.max_history}: must be 0 (all) or more")


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
            history = find_history(text, recommender.catalogue)
            say(recommender.answer(history, flags.top, flags.exclude_seen))
        except InputError as error:
            say(f"error: {error}")


def recommend(flags: RecommendFlags) -> None:
    """Print the items that a model recommends next."""
    load_plugins(flags.plugin)
    flags = read_fused_metrics(flags)
    check_recommended_fusion(flags)
    check_recommend_flags(flags)
    catalogue = read_info(flags.info_file, flags.shared_sids)
    train_rows = read_rows(flags.train_file, "train_file") if flags.train_file else []
    if train_rows:
        catalogue = catalogue.with_counts(train_rows)
    words_of = read_prefix_words(flags.explained_sids) if flags.explained_sids else {}
    # What can be wrong is found before a model is loaded.
    history = None
    if flags.user_id is not None:
        rows = read_rows(flags.history_file, "history_file")
        history = find_latest_history(rows, flags.user_id, flags.history_file)
        unknown = [item for item in history.item_ids if item not in catalogue.sid_of]
        if flags.fuse and unknown:
            raise InputError(f"--user_id {flags.user_id}: item {unknown[0]} is not in {flags.info_file}")
    elif flags.titles is not None:
        history = find_history(flags.titles, catalogue)
    fused = build_fused(flags, catalogue, train_rows)
    recommender = load_recommender(flags, catalogue, fused, words_of)
    if history is None:
        converse(recommender, flags)
    else:
        say(recommender.answer(history, flags.top, flags.exclude_seen))


if __name__ == "__main__":
    run_command(recommend, FLAGS)
