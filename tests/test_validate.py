"""The validator: silent on what the pipeline writes, and for every kind of damage the file and the line."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_dataset

from convert_dataset import convert_dataset
from data_process.interactions import SPLITS, SPLITTERS, build_samples, number_ids, write_dataset
from data_process.settings import ConvertFlags, SampleFlags, ValidateFlags
from data_process.validate import validate_folder
from data_process.validate_rows import Rows, find_leaks
from minionerec.common.files import InputError

LOG = "a1 b1 a2 b2 a3 c2 a4 c3 b3 a5 c1 b4 c4 a6"  # a user and an item each, in the order of time


def sample_flags(folder, split, max_history):
    return SampleFlags(dataset="toy", output_path=str(folder), split=split, max_history=max_history)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole dataset as the pipeline writes it, in both layouts; histories of at most 3, items 0..5."""
    folder = tmp_path_factory.mktemp("made") / "data"
    log = [(entry[0], entry[1], time) for time, entry in enumerate(LOG.split())]
    table = pd.DataFrame(log, columns=["user", "item", "timestamp"])
    items = {
        str(i): {"title": f"It's  number {i}", "description": "", "brand": "", "categories": ""} for i in range(1, 7)
    }
    write_dataset(table, items, sample_flags(folder, "leave_one_out", 3))
    index = {str(i): [f"<a_{i % 2}>", f"<b_{i}>", "<c_0>"] for i in range(6)}
    (folder / "toy.index.json").write_text(json.dumps(index, indent=1))
    np.save(folder / "toy.emb-tfidf-td.npy", np.ones((6, 4), dtype=np.float32))
    (folder / "toy.emb-tfidf-td.json").write_text(json.dumps({"item_ids": [str(i) for i in range(6)]}))
    convert_dataset(ConvertFlags(dataset_name="toy", data_dir=str(folder), output_dir=str(folder)))
    return folder


@pytest.fixture
def data(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "data"))


def run_validate(capsys, folder, **flags):
    """(exit status, printed lines)"""
    capsys.readouterr()
    try:
        validate_folder(ValidateFlags(data_dir=str(folder), **flags))
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().out.splitlines()


# -------------------------------------------------------------------------------------------------- nothing to complain
def test_a_whole_dataset_is_without_problems(data, capsys):
    status, lines = run_validate(capsys, data)
    assert status == 0 and lines[-1] == f"{data}: 0 errors, 0 warnings"
    table = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[:-1]}
    assert table["toy.item.json"] == "6 items"
    assert table["toy.index.json"] == "6 6 distinct SIDs, 0 items share one, tokens 3"
    assert table["toy.train.inter"] == table["train/toy.csv"] == "5 rows, 3 users, longest history 3"
    assert table["toy.emb-tfidf-td.npy"] == "6 rows of 4 float32 values"
    assert len(table) == 12


def test_the_published_layout_is_without_problems(tmp_path, capsys):
    """Files of the dataset's name with the period behind it; other datasets whose names begin alike."""
    for name, folder in (("toy", tmp_path / "a"), ("toy_more", tmp_path / "b")):
        paths = make_dataset(folder, deep=True)
        for flag, target in (
            ("sid_index_path", f"index/{name}.index.json"),
            ("item_meta_path", f"index/{name}.item.json"),
            ("info_file", f"info/{name}_5_2016-10.txt"),
            ("train_file", f"train/{name}_5_2016-10.csv"),
            ("eval_file", f"valid/{name}_5_2016-10.csv"),
            ("test_data_path", f"test/{name}_5_2016-10.csv"),
        ):
            (tmp_path / "data" / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(paths[flag], tmp_path / "data" / target)
    status, lines = run_validate(capsys, tmp_path / "data")
    assert status == 0 and lines[-1].endswith(": 0 errors, 0 warnings") and len(lines) == 13
    status, lines = run_validate(capsys, tmp_path / "data", dataset="toy")
    assert status == 0 and len(lines) == 7 and not any("toy_more" in line for line in lines)
    shutil.copy(tmp_path / "data" / "train" / "toy_5_2016-10.csv", tmp_path / "data" / "train" / "toyota.csv")
    with pytest.raises(InputError, match="--dataset tea: not in .*, which has toy, toy_more, toyota$"):
        validate_folder(ValidateFlags(data_dir=str(tmp_path / "data"), dataset="tea"))


@pytest.mark.parametrize(
    "kept", ["toy.item.json", "toy.train.inter", "info", "test", "toy.emb-tfidf-td", "toy.user2id"]
)
def test_any_part_alone_is_checked(data, capsys, kept):
    for path in data.iterdir():
        if not path.name.startswith(kept):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run_validate(capsys, data)[0] == 0


logs = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 60)), min_size=4, max_size=60)


def rows_of(samples, numbers, name):
    rows = Rows(Path(name))
    for line, i in enumerate(numbers.tolist(), 2):
        window = (*samples.log[samples.begin[i] : samples.end[i]].tolist(), int(samples.target[i]))
        rows.add(str(samples.user[i]), window, line)
    return rows


@settings(deadline=None, max_examples=300)
@given(logs, st.integers(1, 5), st.sampled_from(sorted(SPLITTERS)), st.randoms(use_true_random=False))
def test_our_own_splits_give_no_alarm(log, max_history, split, rng):
    """With as few as four items, so that whole histories come back; also when the short rows are shuffled."""
    samples = build_samples(number_ids(pd.DataFrame(log, columns=["user", "item", "timestamp"]))[0], max_history)
    parts = SPLITTERS[split](samples)
    splits = [rows_of(samples, parts[name], name) for name in SPLITS]
    assert list(find_leaks(splits)) == []
    longest = max((len(window) for rows in splits for window in rows.windows), default=0)
    for rows in splits:
        order = list(range(len(rows.lines)))
        short = [i for i in order if len(rows.windows[i]) < longest]
        for i, j in zip(short, rng.sample(short, len(short)), strict=True):
            order[i] = j
        rows.windows, rows.users = [rows.windows[i] for i in order], [rows.users[i] for i in order]
    assert list(find_leaks(splits)) == []


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 25), st.integers(1, 6), st.randoms(use_true_random=False))
def test_rows_dealt_out_at_random_equal_a_loop(length, max_history, rng):
    """Where no item comes back: who lies behind whom in an earlier split, and agrees in enough items."""
    splits, targets = [Rows(Path(name)) for name in SPLITS], []
    for target in rng.sample(range(1, length), length - 1):
        split = rng.randrange(3)
        splits[split].add("u", tuple(range(max(0, target - max_history), target + 1)), target)
        targets.append((split, target))
    longest = min(max_history, length - 1)
    expected = set()
    for split, target in targets:
        for other_split, other in targets:
            shared = target - max(0, other - max_history) + 1
            enough = 2 if target < longest else (longest + 1) // 2 + 1
            if other_split < split and other > target and shared >= enough:
                expected.add((SPLITS[split], target))
    reported = [(level, str(path), line) for level, path, line, _ in find_leaks(splits)]
    assert sorted(reported) == sorted(("error", *leak) for leak in expected)


# --------------------------------------------------------------------------------------------------------------- damage
def text(old, new):
    def change(path):
        content = path.read_text(encoding="utf-8")
        assert old in content
        path.write_text(content.replace(old, new, 1), encoding="utf-8")

    return change


def whole(content):
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def line(number, new):
    """Put `new` in the place of a line; None takes the line away."""

    def change(path):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        lines[number - 1 : number] = [] if new is None else [new + "\n"]
        path.write_text("".join(lines), encoding="utf-8")

    return change


def item(key, value):
    """Another value of one item of a JSON file; None takes the item away."""

    def change(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop(key, None) if value is None else content.update({key: value})
        path.write_text(json.dumps(content))

    return change


def array(value):
    return lambda path: np.save(path, value)


def ids(*names):
    return lambda path: path.write_text(json.dumps({"item_ids": names}))


HOLE = np.ones((6, 4))
HOLE[4, 2] = np.nan
ITEM, INDEX, INFO = "toy.item.json", "toy.index.json", "info/toy.txt"
TRAIN, TABLE = "toy.train.inter", "train/toy.csv"
ARRAY, SIDE = "toy.emb-tfidf-td.npy", "toy.emb-tfidf-td.json"
ROW = '0,"[""It\'s number 1""]",It\'s number 2,[0],1,[\'<a_0><b_0><c_0>\'],<a_1><b_1><c_0>'  # line 2 of TABLE

ERRORS = [
    (ITEM, text('"title"', "title"), "line 3: not valid JSON"),
    (ITEM, whole("[]"), "line 1: expected an object of items"),
    (ITEM, whole(b'{"0":\n {"title": "\xff"}}'), "line 2: not UTF-8 text"),
    (ITEM, item("3", None), "item 3: is missing; ids run from 0"),
    (ITEM, item("900", {"title": "x"}), "item 900: ids run from 0 without a gap, and there are 7 items"),
    (ITEM, item("03", {"title": "x"}), "item 03: expected an item id"),
    (ITEM, item("2", {"name": "x"}), "item 2: expected an object with a text"),
    (ITEM, text('"3": {', '"2": {'), "item 2: stands there 2 times"),
    (INDEX, item("4", None), "item 4: has no SID, but stands in DIR/toy.item.json"),
    (INDEX, item("6", ["<a_7>", "<b_7>", "<c_7>"]), "item 6: is not in DIR/toy.item.json"),
    (INDEX, item("4", ["a_1"]), "item 4: expected a list of tokens"),
    (INDEX, item("4", "<a_1>"), "item 4: expected a list of tokens"),
    (INDEX, item("4", []), "item 4: expected a list of tokens"),
    (INDEX, item("4", ["<a_1>", "<b_1>"]), "item 4: its SID <a_1><b_1> is the beginning of <a_1><b_1><c_0>, item 1"),
    (INFO, line(3, "<a_0><b_2><c_0> It's number 3 2"), "line 3: expected sid<TAB>title<TAB>item_id"),
    (INFO, text("\t2\n", "\ttwo\n"), "line 3: expected sid<TAB>title<TAB>item_id"),
    (
        INFO,
        text("<b_2>", "<b_9>"),
        "line 3: item 2 has SID <a_0><b_9><c_0>, but DIR/toy.index.json says <a_0><b_2><c_0>",
    ),
    (INFO, text("It's number 3", "Else"), "line 3: item 2 has the title 'Else', but DIR/toy.item.json says \"It's n"),
    (INFO, text("\t2\n", "\t1\n"), "line 3: item 1 stands on line 2 already"),
    (INFO, text("\t5\n", "\t7\n"), "line 6: item 7 is not in DIR/toy.item.json"),
    (INFO, line(6, None), "item 5 of DIR/toy.item.json has no line"),
    ("toy.item2id", line(4, "x"), "line 4: expected the original and the mapped item id separated by a tab, got 1"),
    ("toy.item2id", line(4, "3\t1"), "line 4: mapped id '1' stands on line 3 already"),
    ("toy.item2id", line(4, "1\t2"), "line 4: original id '1' stands on line 2 already"),
    ("toy.item2id", line(4, "3\t9"), "line 4: item 9 is not in DIR/toy.item.json"),
    ("toy.item2id", line(4, "3\tnine"), "line 4: expected a whole number"),
    ("toy.item2id", line(4, None), "item 2 of DIR/toy.item.json has no line"),
    ("toy.user2id", line(1, None), "line 1: expected a header line such as original_user user_id"),
    (TRAIN, line(1, None), "line 1: expected a header line such as user_id:token"),
    (TRAIN, line(3, "1\t0"), "line 3: expected user, history and target separated by tabs, got 2 fields"),
    (TRAIN, line(3, "1\t0 x\t1"), "line 3: item ids must be whole numbers"),
    (TRAIN, line(3, "1\t0 6\t1"), "line 3: item 6 is not in DIR/toy.item.json"),
    (TRAIN, line(3, "1\t0 -1\t1"), "line 3: item ids must be whole numbers"),
    (TRAIN, line(3, "1\t\t1"), "line 3: the history is empty"),
    (TRAIN, line(3, "7\t0\t1"), "line 3: user 7 is not in the user2id file"),
    (TRAIN, line(3, "\t0\t1"), "line 3: the user id is empty"),
    (TRAIN, whole("u\th\tt\n"), "no rows below the header line"),
    (TRAIN, whole(b"u\th\tt\n0\t0\t1\n\xff\t0\t1\n"), "line 3: not UTF-8 text"),
    (TABLE, text(",item_title,", ",title,"), "line 1: missing column item_title"),
    (TABLE, line(2, ROW + ",x"), "line 2: expected 7 fields, got 8"),
    (TABLE, line(2, ROW.replace("[0]", "range(1)")), "line 2: column history_item_id: expected a list literal"),
    (TABLE, line(2, ROW.replace("[0]", "[0.0]")), "line 2: item ids must be whole numbers"),
    (TABLE, line(2, ROW.replace(",1,", ",one,")), "line 2: item ids must be whole numbers"),
    (TABLE, line(2, ROW.replace("[0]", '"[0, 2]"')), "line 2: histories of different length: 2 ids, 1 titles, 1 SIDs"),
    (TABLE, line(2, "0,[],It's number 2,[],1,[],<a_1><b_1><c_0>"), "line 2: the history is empty"),
    (TABLE, line(2, ROW.replace("[0]", "[8]")), "line 2: item 8 is not in DIR/toy.item.json"),
    (TABLE, line(2, ROW.replace("<b_0>", "<b_9>")), "line 2: item 0 has SID <a_0><b_9><c_0>, but DIR/toy.index.json"),
    (TABLE, line(2, ROW.replace("<a_1>", "<a_9>")), "line 2: item 1 has SID <a_9><b_1><c_0>, but DIR/toy.index.json"),
    (TABLE, line(2, ROW.replace("number 1", "one")), 'line 2: item 0 has the title "It\'s one", but DIR/toy.item.json'),
    (TABLE, line(2, ROW.replace("number 2", "two")), 'line 2: item 1 has the title "It\'s two", but DIR/toy.item.json'),
    (TABLE, line(2, "9" + ROW[1:]), "line 2: user 9 is not in the user2id file"),
    (TABLE, line(2, "1" + ROW[1:]), "line 2: user, history or target differ from DIR/toy.train.inter, line 2"),
    (TABLE, line(2, None), "4 rows, but DIR/toy.train.inter has 5"),
    (TABLE, text("It's number 2,[0]", "It's\nnumber\n2,[0]"), "line 4: expected 7 fields"),
    (TABLE, line(2, "x" * 200_000), "line 2: expected 7 fields, got 1"),
    (ARRAY, whole("no array"), "not a .npy array"),
    (ARRAY, array(np.ones(6)), "expected a 2-D array of numbers"),
    (ARRAY, array(np.array([["a"]])), "expected a 2-D array of numbers"),
    (ARRAY, array(np.array([[None]])), "not a .npy array"),
    (ARRAY, array(HOLE), "row 4: a value is not finite"),
    (SIDE, Path.unlink, "no such file; it names the item of each row"),
    (SIDE, whole("{\n"), "line 2: not valid JSON"),
    (SIDE, whole("{}"), 'expected an object with a list "item_ids"'),
    (SIDE, ids(*"01234"), "5 item ids for the 6 rows of DIR/toy.emb-tfidf-td.npy"),
    (SIDE, ids(*"012344"), "row 5: item 4 is row 4 already"),
    (SIDE, ids(*"012349"), "row 5: item 9 is not in DIR/toy.item.json"),
    (SIDE, ids(*"012349"), "item 5: has no row, but stands in DIR/toy.item.json"),
]


@pytest.mark.parametrize("file, change, said", ERRORS, ids=[f"{file}-{said[:40]}" for file, _, said in ERRORS])
def test_every_damage_is_named_with_file_and_place(data, capsys, file, change, said):
    change(data / file)
    status, lines = run_validate(capsys, data)
    between = ", " if said.split()[0] in ("line", "item", "row") and ": " in said else ": "
    expected = f"error: {data / file}{between}{said.replace('DIR', str(data))}"
    assert status == 1 and any(line.startswith(expected) for line in lines), lines
    assert lines[-1].startswith(f"{data}: ") and " 0 errors" not in lines[-1]


WARNINGS = [
    (ITEM, item("2", {"title": "  "}), "item 2: the title is empty"),
    (
        INDEX,
        item("4", ["<a_0>", "<b_2>", "<c_0>"]),
        "item 2: 2 items share their SID with another, such as 2 and 4 <a_0>",
    ),
    (INDEX, item("4", ["<a_0>", "<b_4>", "<b_1>"]), "item 4: token <b_1> is on level 3, but on level 2 for item 1"),
]


@pytest.mark.parametrize("file, change, said", WARNINGS, ids=[said[:30] for _, _, said in WARNINGS])
def test_warnings_leave_the_status_alone(made, tmp_path, capsys, file, change, said):
    shutil.copy(made / file, tmp_path / file)
    change(tmp_path / file)
    status, lines = run_validate(capsys, tmp_path)
    assert status == 0 and lines[0].startswith(f"warning: {tmp_path / file}, {said}")
    assert lines[-1] == f"{tmp_path}: 0 errors, 1 warning"


def test_two_line_titles_are_read_and_the_row_is_named_by_its_first_line(data, capsys):
    def change(path):
        text("It's number 2,[0]", '"It\'s\nnumber 2",[0]')(path)
        text('2,"[""It\'s number 2""]",It\'s number 3,[1],2', '2,"[""It\'s number 2""]",It\'s number 3,[1],3')(path)

    change(data / TABLE)
    status, lines = run_validate(capsys, data)
    assert status == 1 and lines[0].startswith(f"error: {data / TABLE}, line 7: item 3 has SID")
    assert lines[-1].endswith("3 errors, 0 warnings")  # SID, title, and not the row of the .inter file


def test_tables_without_other_files_agree_with_themselves(made, tmp_path, capsys):
    for split in SPLITS:
        (tmp_path / split).mkdir()
        shutil.copy(made / split / "toy.csv", tmp_path / split / "toy.csv")
    assert run_validate(capsys, tmp_path)[0] == 0
    text("<b_2>", "<b_9>")(tmp_path / "test" / "toy.csv")
    status, lines = run_validate(capsys, tmp_path)
    expected = "line 2: item 2 has SID <a_0><b_9><c_0>, but an earlier line says <a_0><b_2><c_0>"
    assert status == 1 and lines[0] == f"error: {tmp_path}/test/toy.csv, {expected}"


def test_two_indexes_must_agree(data, capsys):
    (data / "index").mkdir()
    shutil.copy(data / INDEX, data / "index")
    assert run_validate(capsys, data)[0] == 0
    item("4", ["<a_1>", "<b_9>", "<c_0>"])(data / "index" / INDEX)
    status, lines = run_validate(capsys, data)
    said = f"item 4: item 4 has SID <a_1><b_9><c_0>, but {data / INDEX} says <a_0><b_4><c_0>"
    assert status == 1 and lines[0] == f"error: {data}/index/{INDEX}, {said}"


def test_only_the_first_problems_of_a_kind_are_shown(data, capsys):
    whole("h\th\th\n" + "0\t0\t77\n" * 30 + "0\t\t1\n")(data / TRAIN)
    lines = run_validate(capsys, data, max_problems=2)[1]
    unknown = [line for line in lines if "item 77" in line]
    assert [line.split(", line ")[1][0] for line in unknown] == ["2", "3"]
    assert f"error: {data / TRAIN}: and 28 more: unknown item" in lines
    assert any("line 32: the history is empty" in line for line in lines)
    assert lines[-1] == f"{data}: 32 errors, 0 warnings"  # 30 items, a history, and the number of rows of the CSV


# -------------------------------------------------------------------------------------------------------------- leakage
def leaks(capsys, folder, **splits):
    """The problems of a dataset of .inter lines, 'user history target', told as (level, split and line, other)."""
    folder.mkdir(exist_ok=True)
    for split in SPLITS:
        rows = [row.replace(",", " ").split("/") for row in splits[split].split()]
        text = "".join("\t".join(row) + "\n" for row in [["user", "history", "target"], *rows])
        (folder / f"toy.{split}.inter").write_text(text)
    return [
        line.replace(f"{folder}/toy.", "") for line in run_validate(capsys, folder)[1] if "user" in line.split()[4:5]
    ]


def test_the_same_row_in_two_splits(tmp_path, capsys):
    reported = leaks(capsys, tmp_path, train="u/1/2 u/1,2/3 v/1,2/3", valid="u/1,2,3/4", test="u/1,2/3 v/1,2,3/9")
    assert reported == ["error: test.inter, line 2: user u: the same history and target as train.inter, line 3"]


def test_the_same_row_twice_in_one_split_is_a_warning(tmp_path, capsys):
    reported = leaks(capsys, tmp_path, train="u/1/2 u/1,2/3 u/1/2", valid="u/1,2,3/4", test="u/1,2,3,4/5")
    assert reported == ["warning: train.inter, line 4: user u: the same history and target as train.inter, line 2"]


@pytest.mark.parametrize(
    "train, valid, test, said",
    [
        ("u/1/2 u/1,2,3/4", "u/1,2/3", "u/2,3,4/5", "valid.inter, line 2: user u: the target, item 3, stands in train"),
        ("u/1/2", "u/1,2,3/4", "u/1,2/3", "test.inter, line 2: user u: the target, item 3, stands in valid"),
        # Full histories of three, the leaking row one and two rows behind.
        ("u/2,3,4/5", "u/9,1,2/3", "u/1,2,3/4", "test.inter, line 2: user u: the target, item 4, stands in train"),
        ("u/2,3,4/5", "u/0,1,2/3", "v/1,2,3/4", None),
        # The length of a short history says where it stands, so two items in common are enough.
        ("u/3,4,5,6,7,8/9", "v/1/2", "u/0,1,2,3/4", "test.inter, line 2: user u: the target, item 4, stands in train"),
        ("u/1,2,3/4", "u/2,3,4/5", "u/3,4,5/6", None),
        # Rows of the training split were left out, and the same two items came back.
        ("u/1/2 u/1,2,7/8", "u/8,1,2/9", "u/1,2,9/5", None),
        # The same row once more, the rows between being left out in part.
        ("u/1,2,3/4", "u/3,4,5/1 u/5,1,2/3", "u/1,2,3/4", None),
        # Each of the two rows may be the first; a third row fits neither.
        ("u/1,2,1/2", "u/9,9,9/8", "u/2,1,2/1", None),
        # Another user of the same items.
        ("u/1/2 v/1,2,3/4", "u/1,2/3", "u/1,2,3/4", None),
        # A user who buys one thing only.
        ("u/1,1/1 u/1/1 u/1,1,1/1", "u/1,1,1/1", "u/1,1,1/1", None),
        ("u/1/1 u/1,1/1 u/1,1,1/1 u/1,1,1/1", "u/1,1,1/1", "u/1,1,1/1", None),
    ],
)
def test_targets_that_an_earlier_split_knows(tmp_path, capsys, train, valid, test, said):
    reported = leaks(capsys, tmp_path, train=train, valid=valid, test=test)
    assert len(reported) == (said is not None) and all(line.startswith(f"error: {said}") for line in reported), reported


def test_leaks_between_tables_are_found_too(data, capsys):
    """The last test row of user 0 copied into train/toy.csv only."""
    with (data / TABLE).open("a", encoding="utf-8") as file:
        file.write((data / "test" / "toy.csv").read_text(encoding="utf-8").splitlines()[3] + "\n")
    status, lines = run_validate(capsys, data)
    assert status == 1
    said = f"line 4: user 0: the same history and target as {data / TABLE}, line 7"
    assert f"error: {data}/test/toy.csv, {said}" in lines
    assert any(f"{data}/valid/toy.csv, line 3: user 0: the target, item 4, stands in" in line for line in lines)


def test_rows_that_tables_and_inter_files_share_are_reported_once(data, capsys):
    with (data / TRAIN).open("a") as file:
        file.write("0\t2 3 4\t5\n")
    convert_dataset(ConvertFlags(dataset_name="toy", data_dir=str(data), output_dir=str(data), force=True))
    status, lines = run_validate(capsys, data)
    assert status == 1 and lines[-1] == f"{data}: 2 errors, 0 warnings"
    said = f"user 0: the same history and target as {data / TRAIN}, line 7"
    assert f"error: {data}/toy.test.inter, line 4: {said}" in lines


@pytest.mark.parametrize("split", sorted(SPLITTERS))
def test_written_datasets_end_to_end(tmp_path, capsys, split):
    random_log = random.Random(0)
    log = [(random_log.randrange(9), random_log.randrange(7), random_log.randrange(90)) for _ in range(200)]
    items = {str(i): {"title": f"T{i}"} for i in range(7)}
    table = pd.DataFrame(log, columns=["user", "item", "timestamp"])
    write_dataset(table, items, sample_flags(tmp_path, split, 10))
    assert run_validate(capsys, tmp_path)[0] == 0
    rows = (tmp_path / "toy.test.inter").read_text().splitlines()
    with (tmp_path / "toy.train.inter").open("a") as file:
        file.write(rows[-1] + "\n")
    status, lines = run_validate(capsys, tmp_path)
    same = (
        f"error: {tmp_path}/toy.test.inter, line {len(rows)}: user {rows[-1].split()[0]}: the same history and target"
    )
    assert status == 1 and any(line.startswith(same) for line in lines)


# -------------------------------------------------------------------------------------------------------------- command
def test_the_command(made, tmp_path):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "data_process.validate", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent.parent,
        )

    assert command(str(made)).returncode == 0
    wrong = command("--data_dir", str(tmp_path), "--max_problems", "1")
    assert wrong.returncode == 2 and wrong.stderr.startswith(f"error: {tmp_path}: nothing to check")
    (tmp_path / "x.item.json").write_text('{"0": {}}')
    damaged = command(str(tmp_path), "--dataset", "x")
    assert damaged.returncode == 1 and damaged.stdout.splitlines()[-1] == f"{tmp_path}: 1 error, 0 warnings"


@pytest.mark.parametrize(
    "flags, said", [({"max_problems": 0}, "--max_problems 0"), ({"data_dir": "no"}, "no such folder")]
)
def test_wrong_flags(made, flags, said):
    with pytest.raises(InputError, match=said):
        validate_folder(ValidateFlags(**{"data_dir": str(made), **flags}))
