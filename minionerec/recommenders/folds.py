"""Cross-fitting: several fits of one recommender, each without some users, so that none answers from memory.

What a recommender that was trained on a row says of that row is no prediction. Of several that were each fitted without
one part of the users, the one that has not seen a row's user predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from minionerec.common.files import InputError, read_json, write_json
from minionerec.common.records import Row

FOLDS_FOLDER, PARTS_FILE = "folds", "parts.json"  # beside the model folder of a run of sasrec.py


def part_users(rows: Sequence[Row], folds: int) -> list[list[str]]:
    """The users of the rows, dealt out in turn: `folds` lists of them."""
    users = list(dict.fromkeys(row.user_id for row in rows))
    return [users[fold::folds] for fold in range(folds)]


def leave_out_users(rows: Sequence[Row], users: Sequence[str]) -> list[Row]:
    """The rows of all other users."""
    left_out = frozenset(users)
    return [row for row in rows if row.user_id not in left_out]


def ask_unseen(
    predictors: Sequence[Callable[[Sequence[Sequence[int]]], list[Mapping[int, float]]]],
    parts: Sequence[Sequence[str]],
) -> Callable[[Sequence[Row]], list[Mapping[int, float]]]:
    """What gives the likelihoods after the history of each row, by the predictor that has not seen its user.

    Args:
        predictors: of histories of item ids; number k was fitted without the users of parts[k].
        parts: of `part_users`.

    Returns:
        The function of rows; it raises InputError at a user that all predictors may have seen.
    """
    part_of = {user: part for part, users in enumerate(parts) for user in users}

    def predict_rows(rows: Sequence[Row]) -> list[Mapping[int, float]]:
        numbers_of: list[list[int]] = [[] for _ in parts]
        for number, row in enumerate(rows):
            if row.user_id not in part_of:
                raise InputError(f"user {row.user_id!r} of the train rows was in none of the parts that were left out")
            numbers_of[part_of[row.user_id]].append(number)
        predictions: list[Mapping[int, float]] = [{} for _ in rows]
        for predict, numbers in zip(predictors, numbers_of, strict=True):
            answers = predict([rows[number].history_ids for number in numbers]) if numbers else []
            for number, answer in zip(numbers, answers, strict=True):
                predictions[number] = answer
        return predictions

    return predict_rows


def name_fold(output_dir: str | Path, fold: int) -> Path:
    """The folder of one fit; it holds what a run of sasrec.py holds, above all model/."""
    return Path(output_dir) / FOLDS_FOLDER / str(fold)


def write_parts(output_dir: str | Path, parts: Sequence[Sequence[str]]) -> None:
    """Say who was left out of each fit; written last, so that a cut-off run has none."""
    write_json(Path(output_dir) / FOLDS_FOLDER / PARTS_FILE, list(parts))


def read_parts(cf_path: str | Path, name: str) -> list[list[str]]:
    """The users that each fit beside a model folder was made without.

    Args:
        cf_path: the model folder.
        name: of the network, for the error.

    Raises:
        InputError: the run of sasrec.py made none, or the file is damaged.
    """
    file = Path(cf_path).parent / FOLDS_FOLDER / PARTS_FILE
    if not file.is_file():
        raise InputError(
            f"--teacher {name}: --cf_path {cf_path} was trained on the rows that it would teach, and there is no "
            f"{file}; sasrec.py --folds 3 trains networks for it, or --walk_teacher names it"
        )
    parts = read_json(file)
    if not isinstance(parts, list) or not all(
        isinstance(users, list) and all(isinstance(user, str) for user in users) for users in parts
    ):
        raise InputError(f"{file}: expected a list of lists of user ids")
    return parts
