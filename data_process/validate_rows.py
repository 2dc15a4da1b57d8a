"""The checks of `data_process.validate` on the splits: their rows one by one, and what they give away of each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from data_process.validate_items import Items, Report, check_texts, iterate_fields, iterate_lines
from minionerec.common.files import InputError, parse_item_id
from minionerec.common.interactions import INTER_COLUMNS
from minionerec.common.records import parse_list_cell
from minionerec.common.row_files import CSV_COLUMNS, iterate_csv


@dataclass
class Rows:
    """A split as read from `path`, as parallel lists; a window is a history, oldest first, and then its target.

    `lines` are line numbers. A row that could not be read has the window ().
    """

    path: Path
    users: list[str] = field(default_factory=list)
    windows: list[tuple[int, ...]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)

    def add(self, user: str, window: tuple[int, ...], line: int) -> None:
        """Append a row."""
        self.users.append(user)
        self.windows.append(window)
        self.lines.append(line)


def check_row(
    report: Report, path: Path, line: str, items: Items, users: set[str] | None, user: str, window: list[int]
) -> bool:
    """Whether user, history and target (the last of `window`) can be used; what is wrong is reported."""
    if not user:
        report.error("no user", path, line, "the user id is empty")
    elif users is not None and user not in users:
        report.error("unknown user", path, line, f"user {user} is not in the user2id file")
    if len(window) < 2:
        report.error("empty history", path, line, "the history is empty")
        return False
    unknown = [item for item in window if item not in items.ids] if items.ids_file else []
    if unknown:
        report.error("unknown item", path, line, f"item {unknown[0]} is not in {items.ids_file}")
    return not unknown


def finish_rows(report: Report, rows: Rows) -> Rows:
    """The rows, entered into the table of files; a split without any is reported."""
    if not rows.lines:
        report.error("no rows", rows.path, "", "no rows below the header line")
    longest = max(map(len, rows.windows), default=1) - 1
    note = f"rows, {len(set(rows.users))} users, longest history {max(longest, 0)}"
    report.checked.append((rows.path, len(rows.lines), note))
    return rows


def read_inter_rows(report: Report, path: Path, items: Items, users: set[str] | None) -> Rows:
    """The rows of an .inter file; what is wrong with them is reported. users: the mapped ids, where a file has them."""
    rows = Rows(path)
    for number, fields in iterate_fields(report, path):
        line, window = f"line {number}", []
        if number == 1:
            if len(fields) != 3 or any(text.strip().isdigit() for text in fields[1:]):
                report.error("no header", path, line, f"expected a header line such as {' '.join(INTER_COLUMNS)}")
            continue
        if len(fields) != 3:
            text = f"expected user, history and target separated by tabs, got {len(fields)} fields"
            report.error("malformed line", path, line, text)
        else:
            try:
                window = [parse_item_id(text) for text in (*fields[1].split(), fields[2])]
            except ValueError:
                text = f"item ids must be whole numbers, got {' '.join(fields)[:60]!r}"
                report.error("malformed line", path, line, text)
            else:
                window = window if check_row(report, path, line, items, users, fields[0], window) else []
        rows.add(fields[0], tuple(window), number)
    return finish_rows(report, rows)


def read_table_rows(report: Report, path: Path, items: Items, users: set[str] | None) -> Rows:
    """The rows of a CSV split, its titles and SIDs held against those of other files; what is wrong is reported."""
    rows, begin = Rows(path), 1
    header: list[str] = []
    try:
        for last, cells in iterate_csv(iterate_lines(report, path), path):
            # A quoted title may hold line ends: a row is named by its first line.
            number, begin = begin, last + 1
            line = f"line {number}"
            if not header:
                header = cells
                missing = [name for name in CSV_COLUMNS if name not in header]
                if missing:
                    text = f"missing column {', '.join(missing)}; found {', '.join(header)}"
                    report.error("columns", path, line, text)
                    return rows
                continue
            window: list[int] = []
            row = dict(zip(header, cells, strict=False))  # a line with another number of fields is reported below
            if len(cells) != len(header):
                report.error("fields", path, line, f"expected {len(header)} fields, got {len(cells)}")
            else:
                window = _table_window(report, path, line, row, items, users)
            rows.add(row.get("user_id", ""), tuple(window), number)
    except InputError as error:
        text = str(error).partition(": ")[2]
        report.error("not CSV", path, f"line {begin}", f"{text}; the file was not read to its end")
    return finish_rows(report, rows)


def _table_window(
    report: Report, path: Path, line: str, row: dict[str, str], items: Items, users: set[str] | None
) -> list[int]:
    """History and target of a CSV row, [] where they cannot be used."""
    lists = []
    for name in ("history_item_id", "history_item_title", "history_item_sid"):
        try:
            lists.append(parse_list_cell(row[name], name))
        except InputError as error:
            report.error("list literal", path, line, f"column {error}")
    if len(lists) < 3:
        return []
    ids, titles, sids = lists
    try:
        window = [parse_item_id(item) for item in (*ids, row["item_id"])]
    except ValueError:
        report.error("item ids", path, line, f"item ids must be whole numbers, got {[*ids, row['item_id']]}")
        return []
    if not len(ids) == len(titles) == len(sids):
        text = f"histories of different length: {len(ids)} ids, {len(titles)} titles, {len(sids)} SIDs"
        report.error("lengths", path, line, text)
        return []
    if not check_row(report, path, line, items, users, row["user_id"], window):
        return []
    titles, sids = [*map(str, titles), row["item_title"]], [*map(str, sids), row["item_sid"]]
    check_texts(report, path, line, items, window, titles, sids)
    return window


def compare_rows(report: Report, table: Rows, inter: Rows) -> bool:
    """Whether a CSV split has the rows of the .inter file of the same split; the first that differs is reported."""
    if len(table.lines) != len(inter.lines):
        text = f"{len(table.lines)} rows, but {inter.path} has {len(inter.lines)}"
        report.error("other rows than .inter", table.path, "", text)
    same = len(table.lines) == len(inter.lines)
    for row, (line, user, window) in enumerate(zip(table.lines, table.users, table.windows, strict=True)):
        if row >= len(inter.lines):
            break
        if window and inter.windows[row] and (user, window) != (inter.users[row], inter.windows[row]):
            text = f"user, history or target differ from {inter.path}, line {inter.lines[row]}"
            report.error("other rows than .inter", table.path, f"line {line}", text)
            return False
    return same


def count_overlap(before: tuple[int, ...], after: tuple[int, ...]) -> int:
    """How many items the end of window `before` shares with the beginning of the history of window `after`."""
    for size in range(min(len(before), len(after) - 1), 0, -1):
        if before[-size:] == after[:size]:
            return size
    return 0


def can_follow(before: tuple[int, ...], after: tuple[int, ...], longest: int) -> bool:
    """Whether window `after` can stand behind `before` in one timeline, as far as the two overlap."""
    history = after[:-1]
    if history == before[-longest:]:
        return True
    if len(history) < longest:
        return history[: len(before)] == before
    return count_overlap(before, after) > count_overlap(after, before)


def find_leaks(splits: list[Rows]) -> Iterator[tuple[str, Path, int, str]]:
    """Rows whose target an earlier split gives away.

    The rows of a user are points of one timeline: what the user had up to a point, cut to the last `longest` items (the
    longest history of all splits), and what came next. A history shorter than that starts where the timeline starts, so
    the length of the history says where the row stands; a history of full length may be anywhere behind.

    A user is in order when the rows, split after split and within a split the short ones by length and then the full
    ones as they stand in the file, can each follow the one before: all rows fit one timeline, and nothing is reported,
    however often its items repeat. Of the other users a row is reported when an earlier split has

    - the same history and target (level error; also reported for the same split, as a warning), or
    - a row that starts with the end of this row, its target included, and so is not before it (level error). Besides
      the target at least one item of history must agree, and more than half of the row if its history is of full
      length: in a shorter agreement items may have come back. The two rows must agree in fewer items the allowed way
      round.

    So samples made by `write_dataset` are never reported. Where rows are missing, or the full ones of a split are not
    in the order of time, this is a judgement: it may err when the same run of items comes back, so with short histories
    (1 to 3) of few items. A user not in order costs the square of the longest history a row, any other its length.

    Args:
        splits: from early to late.

    Yields:
        Level (error or warning), path, line and what is wrong.
    """
    longest = max((len(window) for rows in splits for window in rows.windows), default=1) - 1
    by_user: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, rows in enumerate(splits):
        for row, (user, window) in enumerate(zip(rows.users, rows.windows, strict=True)):
            if window:
                by_user[user].append((number, row))
    for user, positions in by_user.items():
        # The sort is stable: only short histories move, to the front of their split.
        positions.sort(key=lambda position: (position[0], len(splits[position[0]].windows[position[1]])))
        windows = [splits[number].windows[row] for number, row in positions]
        if all(can_follow(before, after, longest) for before, after in pairwise(windows)):
            continue
        yield from _find_user_leaks(user, positions, windows, splits, longest)


def _find_user_leaks(
    user: str, positions: list[tuple[int, int]], windows: list[tuple[int, ...]], splits: list[Rows], longest: int
) -> Iterator[tuple[str, Path, int, str]]:
    """`find_leaks` of one user that is not in order.

    `positions` are (split, row) of the `windows`, split after split.
    """
    same: dict[tuple[int, ...], int] = {}  # window -> the first of its kind
    starts: dict[tuple[int, ...], int] = {}  # two or more first items of a window of an earlier split -> that window
    indexed = 0
    for number, (position, window) in enumerate(zip(positions, windows, strict=True)):
        while positions[indexed][0] < position[0]:
            for size in range(len(windows[indexed]), 1, -1):
                if starts.setdefault(windows[indexed][:size], indexed) != indexed:
                    break  # and so are all shorter ones
            indexed += 1
        rows = splits[position[0]]
        where = rows.path, rows.lines[position[1]]
        if window in same:
            split, row = positions[same[window]]
            level = "warning" if split == position[0] else "error"
            other = f"{splits[split].path}, line {splits[split].lines[row]}"
            yield level, *where, f"user {user}: the same history and target as {other}"
            continue
        same[window] = number
        least = 2 if len(window) <= longest else len(window) // 2 + 1
        for size in range(len(window), least - 1, -1):
            earlier = starts.get(window[-size:])
            if earlier is not None and count_overlap(windows[earlier], window) < size:
                split, row = positions[earlier]
                other = f"{splits[split].path}, line {splits[split].lines[row]}"
                text = f"the target, item {window[-1]}, stands in {other}, which is not before it in time"
                yield "error", *where, f"user {user}: {text}"
                break
