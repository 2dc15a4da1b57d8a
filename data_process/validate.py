"""A dataset's files checked against each other, and its splits against leakage.

python -m data_process.validate DIR

Prints what is wrong, with file and line; the exit status is 1 when there are errors.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from data_process.settings import ValidateFlags
from minionerec.common.cli import parse_flags, run_command

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(ValidateFlags, positional="data_dir")

from data_process.interactions import SPLITS
from data_process.validate_items import (
    Items,
    Report,
    check_embeddings,
    check_index,
    check_info,
    check_item_file,
    check_names,
)
from data_process.validate_rows import Rows, compare_rows, find_leaks, read_inter_rows, read_table_rows
from minionerec.common.files import InputError

NAMED_FILE = re.compile(r"(.+?)\.(item\.json|index\.json|(?:train|valid|test)\.inter|user2id|item2id|emb-.+\.npy)")


@dataclass
class Files:
    """The files of one dataset.

    Attributes:
        named: (end of the name, path) of the files DATASET.*.
        tables: {CSV name: {split: path}}.
        infos: {name: path} of the info files.
    """

    named: list[tuple[str, Path]] = field(default_factory=list)
    tables: dict[str, dict[str, Path]] = field(default_factory=dict)
    infos: dict[str, Path] = field(default_factory=dict)

    def find(self, end: str) -> list[Path]:
        """The files DATASET.END."""
        return [path for name_end, path in self.named if name_end == end]


def find_files(folder: Path) -> dict[str, Files]:
    """The datasets of a folder: DATASET.* in it and in index/, and train|valid|test/DATASET*.csv, info/DATASET*.txt.

    A CSV or info file belongs to the dataset with the longest name that begins its name, or else is one of its own.
    """
    datasets: dict[str, Files] = {}
    for path in sorted(folder.iterdir()) + sorted((folder / "index").glob("*")):
        match = NAMED_FILE.fullmatch(path.name)
        if match and path.is_file():
            datasets.setdefault(match[1], Files()).named.append((match[2], path))
    names = sorted(datasets, key=len, reverse=True)
    for part in (*SPLITS, "info"):
        for path in sorted((folder / part).glob("*.txt" if part == "info" else "*.csv")):
            owner = next((name for name in names if re.match(re.escape(name) + r"(?![^\W_])", path.stem)), path.stem)
            files = datasets.setdefault(owner, Files())
            if part == "info":
                files.infos[path.stem] = path
            else:
                files.tables.setdefault(path.stem, {})[part] = path
    return datasets


def check_leaks(report: Report, splits: list[Rows]) -> None:
    """Report rows whose target an earlier split gives away; `splits` from early to late."""
    for level, path, line, text in find_leaks(splits):
        report.add(level, "leakage" if level == "error" else "row twice", path, f"line {line}", text)


def check_dataset(report: Report, files: Files) -> None:
    """All checks of one dataset; items first, as the other files are held against them."""
    items = Items()
    for path in files.find("item.json"):
        check_item_file(report, path, items)
    for path in files.find("index.json"):
        check_index(report, path, items)
    for path in files.infos.values():
        check_info(report, path, items)
    for end, path in files.named:
        if end.startswith("emb-"):
            check_embeddings(report, path, items)
    for path in files.find("item2id"):
        check_names(report, path, "item", items)
    users = None
    for path in files.find("user2id"):
        users = check_names(report, path, "user", None)
    inters = {
        split: read_inter_rows(report, path, items, users) for split in SPLITS for path in files.find(f"{split}.inter")
    }
    check_leaks(report, list(inters.values()))
    for tables in files.tables.values():
        splits = {split: read_table_rows(report, path, items, users) for split, path in tables.items()}
        same = [compare_rows(report, rows, inters[split]) for split, rows in splits.items() if split in inters]
        # The same rows as in the .inter files leak in the same places.
        if len(same) < len(inters) or len(splits) > len(same) or not all(same):
            check_leaks(report, list(splits.values()))


def validate_folder(flags: ValidateFlags) -> None:
    """Check the files of a folder and print what is wrong; exit status 1 when there are errors.

    Raises:
        InputError: no such folder or dataset, or nothing to check.
    """
    folder = Path(flags.data_dir)
    if not folder.is_dir():
        raise InputError(f"--data_dir: {folder}: no such folder")
    if flags.max_problems < 1:
        raise InputError(f"--max_problems {flags.max_problems}: expected 1 or more")
    datasets = find_files(folder)
    if not datasets:
        raise InputError(f"{folder}: nothing to check; expected NAME.item.json, NAME.train.inter, train/NAME.csv, ...")
    if flags.dataset is not None and flags.dataset not in datasets:
        raise InputError(f"--dataset {flags.dataset}: not in {folder}, which has {', '.join(sorted(datasets))}")
    report = Report(flags.max_problems)
    for name, files in datasets.items():
        if flags.dataset in (None, name):
            check_dataset(report, files)
    report.show(folder)
    if report.count("error"):
        sys.exit(1)


if __name__ == "__main__":
    run_command(validate_folder, FLAGS)
