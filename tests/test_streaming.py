"""Rows and tokens that lie on disk: the rows, trees and errors of the plain way, whatever the kind of file."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from test_data import SIDS, encoder
from test_tasks import random_inputs
from tiny import make_dataset

from benchmarks.plain_reader import PlainSidDataset, PlainTreeBatches
from data import TASKS, SidSFTDataset, TaskInputs, build_mixture
from minionerec.common import row_table
from minionerec.common.files import InputError
from minionerec.common.records import Catalogue, check_rows, iterate_rows, read_info, read_rows
from minionerec.common.row_files import CSV_COLUMNS
from minionerec.common.row_table import RowCache, RowTable, check_table, draw_rows, iterate_record_batches
from minionerec.training.settings import SFTFlags
from minionerec.training.sft_trainer import TreeBatches
from sft import resolve_sft_flags

FIELDS = dict(
    zip(
        CSV_COLUMNS,
        ("user_id", "history_titles", "title", "history_ids", "item_id", "history_sids", "sid"),
        strict=True,
    )
)


def list_records(rows):
    """The rows as records of a JSON or Parquet file."""
    values = [{column: getattr(row, field) for column, field in FIELDS.items()} for row in rows]
    return [{key: list(value) if isinstance(value, tuple) else value for key, value in row.items()} for row in values]


def write_split(path, records):
    """A split in the kind that the name says."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(records), path, row_group_size=7)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def keep(rows, folder, streaming="True", name="rows.jsonl"):
    """The rows as `open_rows` gives them, after a way through a file."""
    folder.mkdir(parents=True, exist_ok=True)
    return RowCache(folder / "cache", streaming, 1).open_rows(write_split(folder / name, list_records(rows)), "rows")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("toy"), items=30, users=24)


@pytest.mark.parametrize("streaming", ["True", "False", "auto"])
def test_every_kind_of_file_gives_the_same_rows(toy, tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(row_table, "BATCH_ROWS", 16)
    rows = read_rows(toy["train_file"])
    cache = RowCache(tmp_path / "cache", streaming, 1)
    others = [write_split(tmp_path / f"t.{kind}", list_records(rows)) for kind in ("jsonl", "parquet")]
    for path in (toy["train_file"], *others):
        table = cache.open_rows(path, "train_file")
        assert list(iterate_rows(path)) == list(table) == rows and len(table) == len(rows)
        assert [table[number] for number in range(-3, 20)] == [rows[number] for number in range(-3, 20)]
        assert list(table[5:40:3]) == rows[5:40:3]
        some = draw_rows(table, 30, random.Random(1))
        assert list(some) == draw_rows(rows, 30, random.Random(1)) and some[4] == list(some)[4]
        assert list(some.select([0, 7])) == [some[0], some[7]]
        assert [list(some.get_history_sids(n)) for n in range(30)] == [list(row.history_sids) for row in some]
        for part in (table, some):
            names, codes = part.number_users()
            assert [names[code].as_py() for code in codes] == [row.user_id for row in part]
            assert row_table.count_history_items(part).tolist() == [len(row.history_ids) for row in part]
            assert row_table.list_target_sids(part) == {row.sid for row in part}
    assert (tmp_path / "cache").exists() == (streaming == "True")


def test_a_build_that_was_killed_is_not_taken_for_a_finished_one(toy, tmp_path):
    """A second build finds what a first one left, whose process is gone; a changed file is another one."""
    cache = RowCache(tmp_path / "cache", "True", 1)
    rows = keep(read_rows(toy["train_file"]), tmp_path)
    (folder,) = (tmp_path / "cache").iterdir()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    left = folder.with_name(f"{folder.name}.tmp-{os.uname().nodename}-{child.pid}")
    folder.rename(left)
    (left / "rows.arrow").write_bytes((left / "rows.arrow").read_bytes()[:999])
    assert list(cache.open_rows(tmp_path / "rows.jsonl", "rows")) == list(rows)
    assert folder.exists() and not left.exists()

    written = folder.stat().st_mtime_ns
    cache.open_rows(tmp_path / "rows.jsonl", "rows")
    assert folder.stat().st_mtime_ns == written
    other = keep(list(rows)[1:], tmp_path)
    assert len(other) == len(rows) - 1 and len(list((tmp_path / "cache").iterdir())) == 2
    with pytest.raises(ZeroDivisionError):
        row_table.build_once(tmp_path / "cache" / "fails", lambda temporary: 1 / 0)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "changes, said",
    [
        ({"item_id": None}, "no item_id"),
        ({"item_id": "x"}, "item ids must be whole numbers"),
        ({"history_item_id": "[1, 2"}, "expected a list literal"),
        ({"history_item_sid": []}, "histories of different length"),
    ],
)
def test_wrong_records_are_named(toy, tmp_path, kind, changes, said):
    records = list_records(read_rows(toy["train_file"])[:3])
    for record in records:  # one type a column, as Parquet wants it
        record.update({key: str(record[key]) for key, value in changes.items() if isinstance(value, str)})
    records[1].update(changes)
    path = write_split(tmp_path / f"t.{kind}", records)
    with pytest.raises(InputError) as error:
        RowCache(tmp_path / "cache", "True", 1).open_rows(path, "train_file")
    assert str(error.value).startswith(f"{path}, {'line' if kind == 'jsonl' else 'row'} 2")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("*"))


def test_files_that_are_none(tmp_path):
    for name, content, said in (
        ("a.parquet", "what?", "not a Parquet file"),
        ("a.jsonl", "[1]\n", "line 1: expected a JSON object with user_id"),
        ("a.jsonl", "{}\n", "line 1: no user_id, history_item_title"),
        ("a.jsonl", "\n", "no rows"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=said):
            read_rows(tmp_path / name)
    write_split(tmp_path / "b.parquet", [{"user_id": "A"}])
    with pytest.raises(InputError, match="b.parquet: missing column history_item_title, .*; found user_id"):
        read_rows(tmp_path / "b.parquet")
    rows = [row_table.Row("A", ("\ud800",), (1,), ("<a>",), "t", 2, "<b>")]
    with pytest.raises(InputError, match="x.csv, rows 1 to 1: a value that is no valid text"):
        list(iterate_record_batches(iter(rows), "x.csv"))


@pytest.mark.parametrize("history", [True, False])
def test_tables_are_checked_like_rows(toy, tmp_path, monkeypatch, history):
    monkeypatch.setattr(row_table, "BATCH_ROWS", 16)
    rows, catalogue = read_rows(toy["train_file"]), read_info(toy["info_file"])
    table = keep(rows, tmp_path)
    check_table(table, catalogue, "t", "i", history=history)
    rng = random.Random(0)
    for item in rng.sample(catalogue.item_ids, 6):
        number = catalogue.item_ids.index(item)
        for sid in (None, "<x>"):  # an item that is not there, and one with another SID
            sids = [*catalogue.sids[:number], *([sid] * bool(sid)), *catalogue.sids[number + 1 :]]
            items = [other for other in catalogue.item_ids if sid or other != item]
            broken = Catalogue(sids, ["t"] * len(items), items)
            said = []
            for check, given in ((check_rows, rows), (check_table, table)):
                with pytest.raises(InputError) as error:
                    check(given, broken, "t", "i", history=history)
                said.append(str(error.value))
            assert said[0] == said[1]


# ------------------------------------------------------------------------------------------------------------- examples
def test_a_task_that_needs_memory_keeps_the_rows_there():
    paths = dict.fromkeys(("train_file", "eval_file", "sid_index_path", "item_meta_path"), "f")
    flags = SFTFlags(base_model="m", output_dir="o", tasks=["next_sid", "teacher_sid"], **paths)
    assert resolve_sft_flags(flags)[0].streaming == "False"
    with pytest.raises(InputError, match="--streaming True: --tasks teacher_sid keeps its targets in memory"):
        resolve_sft_flags(replace(flags, streaming="True"))


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if not task.in_memory])
def test_every_task_has_the_same_examples_on_disk(tmp_path, task):
    inputs = random_inputs(3, users=4)
    stored = TaskInputs(keep(inputs.rows, tmp_path), inputs.catalogue, inputs.descriptions, inputs.preferences)
    coder = encoder("worded")
    plain, mapped = (TASKS[task].build(given, coder) for given in (inputs, stored))
    # As texts, since soft labels are arrays.
    assert repr(mapped.examples) == repr(plain.examples) and mapped.left_out == plain.left_out
    assert mapped.list_sids() == {example.sid for example in mapped.examples}
    assert mapped.count_prompt_tokens().tolist() == [len(example.prompt_ids) for example in plain.examples]
    again = TASKS[task].build(stored, coder)
    for dataset in (mapped, again):
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(2)
    assert repr(mapped.examples) == repr(again.examples)


@pytest.mark.parametrize("streaming", ["True", "False"])
@pytest.mark.parametrize("cut", [True, False])
def test_batches_are_those_of_the_plain_way(toy, tmp_path, streaming, cut):
    rows, coder = read_rows(toy["train_file"]), encoder("compact", cutoff_len=60)
    coder_rows = [
        replace(row, history_sids=tuple(SIDS[item] for item in row.history_ids), sid=SIDS[row.item_id]) for row in rows
    ]
    table = keep(coder_rows, tmp_path, streaming)
    for packing, seed in (("tree", 1), ("none", 2), ("tree", None)):
        how = {"packing": packing, "tree_tokens": 90}
        plain = PlainTreeBatches([PlainSidDataset(coder_rows, coder, cut, 5)], 32, 3, coder.pad_token_id, seed, **how)
        ours = TreeBatches([SidSFTDataset(table, coder, cut, 5)], 32, 3, coder.pad_token_id, seed, **how)
        for epoch in (0, 1, 4):
            plain.set_epoch(epoch), ours.set_epoch(epoch)
            assert len(ours) == len(plain)
            for number in reversed(range(len(plain))):  # any order of asking
                for name, value in plain[number].items():
                    assert ours[number][name] is value is None or torch.equal(ours[number][name], value)


def test_a_sample_and_a_mixture_on_disk(tmp_path):
    inputs = random_inputs(8, users=8)
    table = keep(inputs.rows, tmp_path)
    weights = {"next_sid": 0.5, "next_title": 2.0, "title2sid": 0.25}
    plans = []
    for rows in (inputs.rows, table):
        drawn = draw_rows(rows, 20, random.Random(2))
        given = TaskInputs(drawn, inputs.catalogue, inputs.descriptions, cut_histories=True)
        mixture = build_mixture(weights, given, encoder("worded"))
        batches = TreeBatches([mixture], 16, 2, 0, seed=3)
        batches.set_epoch(1)
        plans.append([batches.plan_micro_batch(number) for number in range(len(batches))])
        plans.append([mixture[number] for number in range(len(mixture))])
    assert plans[:2] == plans[2:] and isinstance(table, RowTable)
