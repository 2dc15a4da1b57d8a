"""A run folder read back: its stages, the models that were measured there, and the data they were measured on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minionerec.common.files import InputError, read_json
from minionerec.common.items import read_items
from minionerec.common.records import Catalogue, Row, read_info, read_rows
from minionerec.common.stage import RECORD_SUFFIX

METRICS_SUFFIX, FUSED_SUFFIX = ".metrics.json", ".fused"
# Names and order of the folders that the scripts make; others follow, under their own names.
NETWORKS = {"sasrec": "SASRec", "gru4rec": "GRU4Rec"}
TRAINED = {"likeness": "likeness", "sft": "SFT", "rl": "RL"}
BASELINE_NAMES = {
    "popularity": "popularity",
    "transitions": "transition counts",
    "repeat_last": "repeat last",
    "cooccurrence": "co-occurrence",
    "cooccurrence_wide": "co-occurrence, wide",
    "content": "likeness of texts",
    "transitions+content": "transitions + likeness",
    "cooccurrence+content": "co-occurrence + likeness",
    **NETWORKS,
}
NEEDED = ("item", "item_unseen", "rows", "illegal")  # of a metrics file


@dataclass
class Model:
    """What was measured: one row of the table.

    Attributes:
        name: as it is shown.
        kind: baseline, network, sft, rl, fused or other.
        metrics: the content of its NAME.metrics.json.
        predictions: its NAME.json, None where that is gone.
        stages: the records of what made it.
    """

    name: str
    kind: str
    metrics: dict[str, Any]
    predictions: Path | None
    stages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def minutes(self) -> float | None:
        """Of all its stages."""
        return sum(stage["seconds"] for stage in self.stages) / 60 if self.stages else None

    @property
    def memory_mb(self) -> int | None:
        """The largest of its stages."""
        return max((stage["peak_memory_mb"] for stage in self.stages), default=None)


@dataclass
class RunData:
    """What the models were measured on.

    Attributes:
        catalogue: the items, with their popularity.
        train_rows: of the train split.
        test_rows: of the test split.
        items: {item id: {"title", "categories", ...}}, empty without an item.json.
        files: {flag: file} that all of it was read from.
    """

    catalogue: Catalogue
    train_rows: list[Row]
    test_rows: list[Row]
    items: dict[int, dict]
    files: dict[str, Path]


@dataclass
class Run:
    """A run folder.

    Attributes:
        folder: of the run.
        records: {path of a stage record below the folder: its content}, oldest first.
        models: in the order of the table.
    """

    folder: Path
    records: dict[str, dict[str, Any]]
    models: list[Model]

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.resolve().name

    def find_setting(self, name: str) -> Any:
        """A flag's value in the newest stage that has one, None if none has."""
        for record in reversed(self.records.values()):
            if record.get("settings", {}).get(name) is not None:
                return record["settings"][name]
        return None

    @property
    def data_set(self) -> str:
        """Its name, as the test split is called."""
        path = Path(self.find_setting("test_data_path") or "")
        return path.stem if path.stem not in ("", "test") else path.parent.name or self.name

    @property
    def seed(self) -> int | None:
        """That of training, where there was any."""
        for path, record in reversed(self.records.items()):
            if Path(path).parts[0] in (*TRAINED, *NETWORKS):
                return record["settings"].get("seed")
        return self.find_setting("seed")

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and machine of the newest stage that recorded them."""
        return next(
            (record["environment"] for record in reversed(self.records.values()) if "environment" in record), {}
        )

    def find_stage(self, folder: str, name: str) -> dict[str, Any] | None:
        """The record of a stage in one of the run's folders."""
        return self.records.get(f"{folder}/{name}{RECORD_SUFFIX}")

    def locate(self, path: str | Path) -> Path | None:
        """A file that a record names, which may have moved with the run's folder."""
        path = Path(path)
        if path.exists():
            return path
        tails = (self.folder.joinpath(*path.parts[start:]) for start in range(1, len(path.parts)))
        return next((tail for tail in tails if tail.exists()), None)


def read_run(folder: str | Path) -> Run:
    """Everything that lies in a run folder.

    Raises:
        InputError: no such folder, no metrics below it, or a file that is none of ours.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{folder}: no such folder")
    paths = sorted(root.rglob(f"*{RECORD_SUFFIX}"), key=lambda path: (path.stat().st_mtime_ns, str(path)))
    records = {}
    for path in paths:
        record = read_json(path)
        if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
            raise InputError(f"{path}: expected the record of a stage")
        records[path.relative_to(root).as_posix()] = record
    models = [_read_model(path, root, records) for path in root.rglob(f"*{METRICS_SUFFIX}")]
    if not models:
        raise InputError(f"{folder}: no *{METRICS_SUFFIX} below it; is it the output of a run?")
    places, known = ["baseline", "network", "other", "sft", "rl"], list(BASELINE_NAMES.values())

    def sort_key(entry: tuple[str, str, Model]) -> tuple:
        place, path, model = entry
        number = known.index(model.name) if model.name in known else len(known)
        return places.index(place), number, model.kind == "fused", path

    models.sort(key=sort_key)
    return Run(root, records, [model for _, _, model in models])


def _read_model(path: Path, root: Path, records: dict[str, dict]) -> tuple[str, str, Model]:
    """(place in the table, path, the model) of a metrics file."""
    metrics = read_json(path)
    missing = [key for key in NEEDED if not isinstance(metrics, dict) or key not in metrics]
    if missing:
        raise InputError(f"{path}: expected a metrics file of evaluate.py with {', '.join(missing)}; evaluate again")
    relative = path.relative_to(root)
    stem = path.name.removesuffix(METRICS_SUFFIX)
    folder = relative.parent.as_posix()
    top = relative.parts[0]
    fused = stem.endswith(FUSED_SUFFIX)
    own = stem.removesuffix(FUSED_SUFFIX)
    suffix = "" if own == "test" else f", {own}"
    names = {}
    if folder == "baselines" or f"{folder}/baselines{RECORD_SUFFIX}" in records:
        place, kind, name = "baseline", "baseline", BASELINE_NAMES.get(stem, stem)
        names = {f"{folder}/baselines{RECORD_SUFFIX}"}
    elif top in NETWORKS or f"{folder}/sasrec{RECORD_SUFFIX}" in records:
        place, kind, name = "network", "network", NETWORKS.get(top, folder) + suffix
        names = {f"{folder}/sasrec{RECORD_SUFFIX}"}
    else:
        place = top if top in ("sft", "rl") else "other"
        kind = "fused" if fused else place
        name = (f"after {TRAINED[top]}" if top in TRAINED else folder if folder != "." else own) + suffix
        name += ", fused" * fused
        names = {f"{folder}/{own}{RECORD_SUFFIX}", f"{folder}/{top}{RECORD_SUFFIX}"}
    predictions = path.with_name(f"{stem}.json")
    stages = [records[record] for record in records if record in names]
    model = Model(name, kind, metrics, predictions if predictions.is_file() else None, stages)
    return place, relative.as_posix(), model


def read_run_data(run: Run) -> RunData:
    """The data that the models of a run were measured on.

    Raises:
        InputError: a file that is no longer where the records say, or below the run's folder.
    """
    files = {}
    for flag in ("info_file", "train_file", "test_data_path"):
        named = run.find_setting(flag)
        path = run.locate(named) if named else None
        if path is None:
            raise InputError(f"--{flag} {named}: no such file")
        files[flag] = path
    catalogue = read_info(files["info_file"], shared_sids=True)
    train_rows = read_rows(files["train_file"])
    catalogue = catalogue.with_counts(train_rows)
    items, named = {}, run.find_setting("item_meta_path") or run.find_setting("data_dir")
    path = run.locate(named) if named else None
    if path is not None and path.is_file():
        files["item_meta_path"] = path
        items = read_items(path, catalogue.item_ids, str(files["info_file"]))
    for flag in ("eval_file", "sid_index_path"):
        path = run.locate(run.find_setting(flag)) if run.find_setting(flag) else None
        if path is not None:
            files[flag] = path
    return RunData(catalogue, train_rows, read_rows(files["test_data_path"]), items, files)


def describe_rl(run: Run) -> dict[str, Any] | None:
    """What RL did to the validation figure it was chosen by, and whose weights were kept.

    Returns:
        {"figure", "start", "best", "kept": "RL" or "SFT", "steps"}; None without a finished RL that validated.
    """
    record = run.find_stage("rl", "rl") or {}
    results = record.get("results", {})
    for name in results:
        if name.startswith("validation ") and name.endswith(" at start"):
            figure = name.removeprefix("validation ").removesuffix(" at start")
            start, best = results[name], results.get(f"validation {figure} best")
            if best is None:
                continue
            # Older runs did not say it, but kept the better one.
            kept = "SFT" if results.get("kept_sft_weights", best <= start) else "RL"
            return {"figure": figure, "start": start, "best": best, "kept": kept, "steps": results.get("steps")}
    return None


def iterate_quality_reports(run: Run) -> Iterator[tuple[str, dict[str, Any], Path | None]]:
    """(name, SID report, its index file or None) of every semantic-ID table below the run's folder."""
    ends = [".index.quality.json", ".quality.json"]
    for path in sorted(run.folder.rglob(f"*{ends[1]}")):
        stem = path.name.removesuffix(ends[1])
        index = path.with_name(f"{stem}.json")
        folder = path.parent.relative_to(run.folder).as_posix()
        yield folder, read_json(path), index if index.is_file() else None


def count_codes(index: dict[int, tuple[str, ...]], levels: int) -> list[list[int]]:
    """Items of every used code, most used first, level by level."""
    return [
        sorted(Counter(sid[level] for sid in index.values() if len(sid) > level).values(), reverse=True)
        for level in range(levels)
    ]
