"""The catalogue that a model folder carries, so that the folder can recommend without any other file.

MODEL/catalogue/ holds:

    info.txt           SID, title and item id of every item, as an info file (docs/file_formats.md)
    index.json         {item id: SID tokens}
    item.json          {item id: title, description, categories, original_id} of the items whose texts are known
    counts.json        {item id: how often the item is a target of the train rows}
    transitions.json   {item id: {next item id: how often}} of the train rows, which fusion with transitions reads
    settings.yaml      max_history, cutoff_len and shared_sids of the training
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from minionerec.common.files import InputError, read_json, read_yaml, write_json, write_text
from minionerec.common.records import SID_TOKEN, Catalogue, Row, read_info

CATALOGUE_FOLDER = "catalogue"
SHOWN_FIELDS = ("title", "description", "categories", "original_id")  # of an item's record


@dataclass(frozen=True)
class ModelCatalogue:
    """What a model folder knows beside its weights, tokenizer and prompts.

    Attributes:
        catalogue: the items, with their popularity in the train rows.
        records: {item id: {"title", "description", "categories", "original_id"}} of the items whose texts are known.
        transitions: {item id: {next item id: times in the train rows}}.
        max_history: items of the longest history among the train rows.
        cutoff_len: longest prompt with its target, in tokens.
        shared_sids: whether items may share a SID.
    """

    catalogue: Catalogue
    records: dict[int, dict[str, str]] = field(default_factory=dict)
    transitions: dict[int, dict[int, int]] = field(default_factory=dict)
    max_history: int = 10
    cutoff_len: int = 512
    shared_sids: bool = False

    @property
    def descriptions(self) -> dict[int, str]:
        """{item id: description} of the items that have one."""
        texts = {item: record.get("description", "") for item, record in self.records.items()}
        return {item: text for item, text in texts.items() if text}

    @property
    def categories(self) -> dict[int, str]:
        """{item id: its categories, as one text} of the items that have some."""
        texts = {item: record.get("categories", "") for item, record in self.records.items()}
        return {item: text for item, text in texts.items() if text}

    @property
    def original_ids(self) -> dict[int, str]:
        """{item id: what the raw log calls it} of the items of which that is known."""
        return {item: record["original_id"] for item, record in self.records.items() if record.get("original_id")}


def summarise_rows(
    catalogue: Catalogue,
    rows: Iterable[Row],
    records: Mapping[int, Mapping[str, object]],
    cutoff_len: int,
    shared_sids: bool = False,
) -> ModelCatalogue:
    """What a model folder keeps of its training data: counts, never a user or a whole history.

    Args:
        catalogue: the items.
        rows: of the train split, in one pass.
        records: {item id: its record of an item.json}.
        cutoff_len, shared_sids: flags of the training.
    """
    counts: dict[int, int] = defaultdict(int)
    transitions: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    longest = 1
    for row in rows:
        counts[row.item_id] += 1
        transitions[row.history_ids[-1]][row.item_id] += 1
        longest = max(longest, len(row.history_ids))
    shown = {
        item: {name: _join_text(record.get(name)) for name in SHOWN_FIELDS if record.get(name)}
        for item, record in records.items()
    }
    known = Catalogue(catalogue.sids, catalogue.titles, catalogue.item_ids, dict(counts))
    tables = {item: dict(following) for item, following in transitions.items()}
    return ModelCatalogue(known, shown, tables, longest, cutoff_len, shared_sids)


def _join_text(value: object) -> str:
    """A field of an item record as one text; dumps write some as lists."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def write_model_catalogue(model: str | Path, known: ModelCatalogue) -> None:
    """Write `known` into a model folder that is being made."""
    folder, catalogue = Path(model) / CATALOGUE_FOLDER, known.catalogue
    folder.mkdir(exist_ok=True)
    items = list(zip(catalogue.sids, catalogue.titles, catalogue.item_ids, strict=True))
    lines = [f"{sid}\t{' '.join(title.split())}\t{item}\n" for sid, title, item in items]
    write_text(folder / "info.txt", "".join(lines))
    write_json(folder / "index.json", {item: SID_TOKEN.findall(sid) for sid, _, item in items}, indent=None)
    write_json(folder / "item.json", known.records, indent=None)
    write_json(folder / "counts.json", catalogue.counts, indent=None)
    write_json(folder / "transitions.json", known.transitions, indent=None)
    settings = {name: getattr(known, name) for name in ("max_history", "cutoff_len", "shared_sids")}
    write_text(folder / "settings.yaml", yaml.safe_dump(settings, sort_keys=False))


def copy_model_catalogue(source: str | Path, model: str | Path) -> None:
    """Give a model folder the catalogue of another one, if that has one."""
    folder = Path(source) / CATALOGUE_FOLDER
    if folder.is_dir():
        shutil.copytree(folder, Path(model) / CATALOGUE_FOLDER, dirs_exist_ok=True)


def find_info_file(model: str | Path) -> str:
    """The info file of a model folder, whether it is there or not."""
    return str(Path(model) / CATALOGUE_FOLDER / "info.txt")


def has_catalogue(model: str | Path) -> bool:
    """Whether a model folder carries its catalogue."""
    return Path(find_info_file(model)).is_file()


def read_model_catalogue(model: str | Path, flag: str = "model") -> ModelCatalogue:
    """The catalogue of a model folder.

    Args:
        model: the folder.
        flag: the command-line flag that named it.

    Raises:
        InputError: the folder carries none, or a broken one.
    """
    folder = Path(model) / CATALOGUE_FOLDER
    if not has_catalogue(model):
        what = (
            f"carries no {CATALOGUE_FOLDER}/ (sft.py and rl.py write it)" if Path(model).is_dir() else "no such folder"
        )
        raise InputError(f"--{flag} {model}: {what}; for a model without one, such as one of the hub, give --info_file")
    settings = _read_settings(folder / "settings.yaml")
    catalogue = read_info(folder / "info.txt", settings["shared_sids"])
    counts = _read_numbers(folder / "counts.json")
    path = folder / "transitions.json"
    transitions = {item: _to_numbers(table, path) for item, table in _read_numbers(path, dict).items()}
    records = _read_numbers(folder / "item.json", dict)
    known = Catalogue(catalogue.sids, catalogue.titles, catalogue.item_ids, counts)
    return ModelCatalogue(known, records, transitions, **settings)


def _read_settings(path: Path) -> dict[str, int | bool]:
    content = read_yaml(path)
    expected = {"max_history": int, "cutoff_len": int, "shared_sids": bool}
    kinds = {name: type(value) for name, value in content.items()} if isinstance(content, dict) else None
    if kinds != expected:
        raise InputError(f"{path}: expected {', '.join(f'{name}: {kind.__name__}' for name, kind in expected.items())}")
    return content


def _read_numbers(path: Path, kind: type = int) -> dict:
    """{item id: value of a kind} of a JSON object."""
    return _to_numbers(read_json(path), path, kind)


def _to_numbers(content: object, path: Path, kind: type = int) -> dict:
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object by item id")
    wrong = [key for key, value in content.items() if not key.isdecimal() or type(value) is not kind]
    if wrong:
        raise InputError(f"{path}: {wrong[0][:40]!r}: expected an item id with a value of type {kind.__name__}")
    return {int(key): value for key, value in content.items()}
