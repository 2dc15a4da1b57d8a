"""The `.inter` files: next-item samples by item id, before items have semantic IDs."""

from __future__ import annotations

from pathlib import Path

from minionerec.common.files import InputError, parse_item_id, read_lines

INTER_COLUMNS = ("user_id:token", "item_id_list:token_seq", "item_id:token")


def read_inter(path: str | Path, n_items: int, flag: str | None = None) -> tuple[list[str], list[list[int]], list[int]]:
    """(users, histories, targets) of an `.inter` file.

    Raises:
        InputError: a malformed line, an item id outside 0..n_items-1, an empty history, or no row.
    """
    users: list[str] = []
    histories: list[list[int]] = []
    targets: list[int] = []
    for number, line in read_lines(path, flag):
        fields = line.split("\t")
        if len(fields) != 3:
            raise InputError(
                f"{path}, line {number}: expected user, history and target separated by tabs, "
                f"got {len(fields)} field{'s' if len(fields) != 1 else ''}"
            )
        if number == 1:
            if any(field.strip().isdigit() for field in fields[1:]):
                raise InputError(f"{path}, line 1: expected a header line such as {' '.join(INTER_COLUMNS)}")
            continue
        try:
            *history, target = (parse_item_id(text) for text in (*fields[1].split(), fields[2]))
        except ValueError:
            raise InputError(f"{path}, line {number}: item ids must be integers, got {line[:60]!r}") from None
        if not history:
            raise InputError(f"{path}, line {number}: the history is empty")
        unknown = [item for item in (*history, target) if not 0 <= item < n_items]
        if unknown:
            raise InputError(f"{path}, line {number}: item {unknown[0]} is not among the {n_items} items")
        users.append(fields[0])
        histories.append(history)
        targets.append(target)
    if not users:
        raise InputError(f"{path}: the split is empty")
    return users, histories, targets
