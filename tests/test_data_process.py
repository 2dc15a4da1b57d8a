"""Windows, k-core, samples, splits and the files of data_process, each against a slow obvious twin."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_process.interactions import (
    SPLITTERS,
    bound_window,
    build_samples,
    filter_k_core,
    filter_window,
    number_ids,
    split_chronological,
    split_leave_one_out,
    start_of_month,
)
from data_process.recbole_data_process import process_recbole
from data_process.settings import SPLIT_METHODS, RecboleFlags, SampleFlags
from minionerec.common.cli import parse_flags
from minionerec.common.files import InputError
from minionerec.common.interactions import read_inter
from minionerec.common.items import read_item_records

logs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=60)


def frame(log):
    return pd.DataFrame(log, columns=["user", "item", "timestamp"])


def slow_k_core(log, user_k, item_k):
    while True:
        users = [row[0] for row in log]
        items = [row[1] for row in log]
        kept = [row for row in log if users.count(row[0]) >= user_k and items.count(row[1]) >= item_k]
        if len(kept) == len(log):
            return kept
        log = kept


def slow_samples(log, max_history):
    """(user, history, target, targets the user still has to come), in time order, with the original ids."""
    ordered = sorted(log, key=lambda row: row[2])
    seen, samples = {}, []
    for position, (user, item, _) in enumerate(ordered):
        past = seen.setdefault(user, [])
        if past:
            after = sum(row[0] == user for row in ordered[position + 1 :])
            samples.append((user, past[-max_history:], item, after))
        past.append(item)
    return samples


@settings(deadline=None, max_examples=60)
@given(logs, st.integers(0, 4), st.integers(0, 4))
def test_k_core_equals_a_loop(log, user_k, item_k):
    fast = filter_k_core(frame(log), user_k, item_k)
    assert list(fast.itertuples(index=False, name=None)) == slow_k_core(log, user_k, item_k)


@settings(deadline=None, max_examples=60)
@given(logs, st.integers(1, 4))
def test_samples_and_splits_equal_a_loop(log, max_history):
    table, users, items = number_ids(frame(log))
    samples = build_samples(table, max_history)
    fast = [
        (
            users[samples.user[i]],
            [items[k] for k in samples.log[samples.begin[i] : samples.end[i]]],
            items[samples.target[i]],
            samples.after[i],
        )
        for i in range(len(samples))
    ]
    slow = slow_samples(log, max_history)
    assert fast == slow
    cut = split_chronological(samples)
    n = len(slow)
    sizes = [len(cut[name]) for name in ("train", "valid", "test")]
    assert sizes == [int(n * 0.8 + 1e-9), int(n * 0.9 + 1e-9) - int(n * 0.8 + 1e-9), n - int(n * 0.9 + 1e-9)]
    assert np.concatenate(list(cut.values())).tolist() == list(range(n))
    last = split_leave_one_out(samples)
    assert last["test"].tolist() == [i for i, row in enumerate(slow) if row[3] == 0]
    assert last["valid"].tolist() == [i for i, row in enumerate(slow) if row[3] == 1]
    assert last["train"].tolist() == [i for i, row in enumerate(slow) if row[3] > 1]


def test_no_history_reaches_past_its_target_and_the_cut_is_in_time():
    random = np.random.default_rng(0)
    users, items = random.integers(0, 20, 400), random.integers(0, 50, 400)
    log = frame({"user": users, "item": items, "timestamp": random.random(400)})
    table, _, _ = number_ids(log)
    parts = split_chronological(build_samples(table, 10))
    assert max(parts["train"]) < min(parts["valid"]) and max(parts["valid"]) < min(parts["test"])
    assert (np.diff(table["timestamp"]) >= 0).all()


def test_published_row_counts_follow_from_the_cut():
    """45,324 and 48,656 samples are the published Industrial and Office datasets."""
    for n, expected in ((45_324, (36_259, 4_532, 4_533)), (48_656, (38_924, 4_866, 4_866))):
        table = pd.DataFrame({"user": 0, "item": np.arange(n + 1), "timestamp": np.arange(n + 1)})
        parts = split_chronological(build_samples(table, 10))
        assert tuple(len(part) for part in parts.values()) == expected


def test_ids_are_numbered_by_first_appearance_in_time():
    _, users, items = number_ids(frame([("b", "y", 5), ("a", "x", 1), ("b", "x", 1), ("c", "z", 9)]))
    assert users == ["a", "b", "c"] and items == ["x", "y", "z"]


def window(st_year, st_month, ed_year, ed_month):
    months = {"st_year": st_year, "st_month": st_month, "ed_year": ed_year, "ed_month": ed_month}
    return SampleFlags(dataset="x", output_path="out", **months)


def test_window_is_half_open_and_utc():
    assert start_of_month(1970, 1) == 0 and start_of_month(2016, 10) == 1_475_280_000
    start, end = bound_window(window(2016, 10, 2016, 11))
    log = frame([(0, 0, start - 1), (0, 1, start), (0, 2, end - 1), (0, 3, end)])
    assert filter_window(log, start, end)["item"].tolist() == [1, 2]
    assert filter_window(log, None, end)["item"].tolist() == [0, 1, 2]
    assert filter_window(log, start, None)["item"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("bounds", [(2016, 13, 2017, 1), (2017, 1, 2016, 1), (2017, 1, 2017, 1), (None, 3, None, None)])
def test_wrong_windows_are_refused(bounds):
    with pytest.raises(InputError):
        bound_window(window(*bounds))


ITEMS = """item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
m1\tToy  Story\t1995\tAnimation Children's Comedy
m2\tM\tunknown\tFilm-Noir
m3\t"Quoted, "title"\t1968\tDrama
"""


def write_atomic_files(folder: Path, inter: str | None = None, item: str = ITEMS) -> dict:
    if inter is None:
        rows = [f"u{u}\tm{1 + (u + j) % 3}\t{1 + j % 5}\t{1_000_000 * j + u}" for u in range(4) for j in range(6)]
        inter = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "\n".join(rows) + "\n"
    folder.mkdir(exist_ok=True)
    (folder / "toy.inter").write_text(inter, encoding="utf-8")
    (folder / "toy.item").write_text(item, encoding="utf-8")
    return {"dataset": "toy", "input_dir": str(folder), "output_path": str(folder / "out"), "user_k": 2, "item_k": 2}


def test_recbole_files_end_to_end(tmp_path, capsys):
    flags = write_atomic_files(tmp_path / "raw")
    process_recbole(RecboleFlags(**flags))
    out = tmp_path / "raw" / "out"
    items = read_item_records(out / "toy.item.json")
    by_title = {item["title"]: item for item in items.values()}
    assert by_title["Toy Story"]["description"] == "Genres: Animation, Children's, Comedy. Year: 1995 (1990s)."
    assert by_title["Toy Story"]["categories"] == "Animation, Children's, Comedy"
    assert by_title["M"]["description"] == "Genres: Film-Noir. Year: unknown."
    assert '"Quoted, "title"' in by_title
    users, histories, targets = read_inter(out / "toy.train.inter", len(items))
    assert len(users) == 16 and all(1 <= len(history) <= 10 for history in histories) and max(targets) < 3
    assert (out / "toy.item2id").read_text().splitlines()[0] == "original_item\titem_id"
    assert len((out / "toy.user2id").read_text().splitlines()) == 5

    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    process_recbole(RecboleFlags(**flags))
    assert "already done" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    process_recbole(RecboleFlags(**flags, force=True))
    assert before["toy.item.json"] != (out / "toy.item.json").stat().st_mtime_ns
    process_recbole(RecboleFlags(**{**flags, "max_history": 2}))
    assert max(len(history) for history in read_inter(out / "toy.train.inter", 3)[1]) == 2


def test_filters_and_leave_one_out(tmp_path):
    flags = write_atomic_files(tmp_path / "raw")
    process_recbole(RecboleFlags(**flags, split="leave_one_out", min_rating=2, st_year=1970, ed_year=1971))
    record = json.loads((tmp_path / "raw" / "out" / "toy.data_process.stage.json").read_text())
    assert record["results"]["interactions"] == 16 and record["results"]["test_rows"] == 4
    assert record["results"]["valid_rows"] == 4 and record["results"]["train_rows"] == 4


HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


@pytest.mark.parametrize(
    "inter, message",
    [
        ("user_id:token\titem_id:token\nu1\tm1\n", "toy.inter: no column timestamp; its columns are user_id, item_id"),
        ("user_id\titem_id:token\nu1\tm1\n", "line 1: expected a typed header"),
        (HEADER + "u1\tm1\t1\t5\nu1\tm1\t1\n", "line 3: expected 4 tab-separated fields, got 3"),
        (HEADER + "u1\tm1\t1\t5\nu1\tm1\t1\t2\t3\n", "line 3: expected 4 tab-separated fields, got 5"),
        (HEADER + "u1\tm1\t1\t5\n\nu1\tm1\t1\tsoon\n", "line 4, column timestamp: expected a number, got 'soon'"),
        (HEADER + "u1\tm1\t1\tnan\n", "line 2, column timestamp"),
        ("", "the file is empty"),
        (HEADER + "u1\tm1\t1\t5\nu2\tm1\t1\t6\n", "none of its 2 interactions is left (without_id 0, "),
        (HEADER + "u1\tm1\t1\t5\nu1\tm1\t1\t6\nu1\tm1\t1\t6\n", "split is empty"),
    ],
)
def test_bad_interactions_stop_with_one_line(tmp_path, inter, message):
    with pytest.raises(InputError, match="^[^\n]*$") as error:
        process_recbole(RecboleFlags(**write_atomic_files(tmp_path / "raw", inter)))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "item, message",
    [
        (ITEMS.replace("movie_title", "film"), "toy.item: no title column"),
        (ITEMS.replace("item_id", "id"), "toy.item: no column item_id; its columns are id, movie_title, release_year,"),
        (ITEMS + "m1\tAgain\t2000\tDrama\n", "line 5: item 'm1' is here twice"),
    ],
)
def test_bad_items_stop_with_one_line(tmp_path, item, message):
    with pytest.raises(InputError) as error:
        process_recbole(RecboleFlags(**write_atomic_files(tmp_path / "raw", item=item)))
    assert message in str(error.value)


def test_interactions_without_a_titled_item_are_left_out(tmp_path):
    flags = write_atomic_files(tmp_path / "raw", item=ITEMS.replace("Toy  Story", ""))
    process_recbole(RecboleFlags(**flags))
    record = json.loads((tmp_path / "raw" / "out" / "toy.data_process.stage.json").read_text())
    assert record["results"]["items"] == 2 and record["results"]["without_title"] == 8


def test_files_do_not_depend_on_the_time_zone(tmp_path):
    """Daylight saving begins inside the window in both zones; the same bytes come out."""
    rows = [f"u{u}\tm{1 + (u + j) % 3}\t3\t{1_111_881_600 + 1800 * j}" for u in range(4) for j in range(9)]
    contents = []
    for zone in ("UTC", "America/New_York", "Pacific/Auckland"):
        folder = tmp_path / zone.replace("/", "_")
        flags = write_atomic_files(folder, HEADER + "\n".join(rows) + "\n")
        flags |= {"st_year": 2005, "st_month": 3, "ed_year": 2005, "ed_month": 4}
        subprocess.run(
            [sys.executable, "-m", "data_process.recbole_data_process", *(f"--{k}={v}" for k, v in flags.items())],
            check=True,
            env={**os.environ, "TZ": zone},
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.DEVNULL,
        )
        files = sorted(
            path
            for path in (folder / "out").iterdir()
            if not path.name.endswith((".stage.json", ".settings.yaml", "log.txt"))
        )
        contents.append([path.read_bytes() for path in files])
    assert len(contents[0]) == 6 and contents[0] == contents[1] == contents[2]


@pytest.mark.parametrize(
    "line, message",
    [
        ("0\t1", "line 2: expected user, history and target"),
        ("0\t1 x\t2", "line 2: item ids must be integers"),
        ("0\t\t2", "line 2: the history is empty"),
        ("0\t1 7\t2", "line 2: item 7 is not among the 3 items"),
        ("0\t1\t-1", "line 2: item ids must be integers"),
    ],
)
def test_bad_inter_lines(tmp_path, line, message):
    path = tmp_path / "x.train.inter"
    path.write_text(f"user_id:token\titem_id_list:token_seq\titem_id:token\n{line}\n")
    with pytest.raises(InputError) as error:
        read_inter(path, 3)
    assert str(path) in str(error.value) and message in str(error.value)


def test_inter_without_header_or_rows(tmp_path):
    path = tmp_path / "x.train.inter"
    path.write_text("0\t1\t2\n")
    with pytest.raises(InputError, match="line 1: expected a header"):
        read_inter(path, 3)
    path.write_text("user\thistory\ttarget\n")
    with pytest.raises(InputError, match="empty"):
        read_inter(path, 3)


@pytest.mark.parametrize(
    "content",
    ["[]", '{"1": {"title": "a"}}', '{"0": {"title": 3}}', '{"0": {"title": "a"', '{"0": "a"}'],
)
def test_bad_item_files(tmp_path, content):
    path = tmp_path / "x.item.json"
    path.write_text(content)
    with pytest.raises(InputError, match="x.item.json"):
        read_item_records(path)


def test_unknown_split(capsys):
    assert tuple(SPLITTERS) == SPLIT_METHODS
    flags = ["--dataset", "x", "--input_dir", "raw", "--output_path", "out", "--split", "random"]
    with pytest.raises(SystemExit, match="2"):
        parse_flags(RecboleFlags, flags)
    assert "--split random: expected one of chronological, leave_one_out" in capsys.readouterr().err
