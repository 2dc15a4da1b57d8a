"""CSV splits and info file from interactions and SIDs, and every input that must stop the command."""

import ast
import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from convert_dataset import convert_dataset
from data_process.settings import ConvertFlags
from minionerec.common.files import InputError
from minionerec.common.row_files import CSV_COLUMNS

ITEMS = {
    str(i): {"title": title, "description": "", "brand": "", "categories": ""}
    for i, title in enumerate(["Plain", 'It\'s a "quote", really', "Tab\there\nand line", "ünïcode ,"])
}
INDEX = {
    "0": ["<a_1>", "<b_2>"],
    "1": ["<a_1>", "<b_3>"],
    "2": ["<a_0>", "<b_0>", "<c_0>"],
    "3": ["<a_0>", "<b_0>", "<c_1>"],
}
HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
ROWS = {"train": "u1\t0\t1\nu1\t0 1\t2\nu2\t3\t3\n", "valid": "u1\t0 1 2\t3\n", "test": "007\t2 2\t0\n"}


def write(folder, items=ITEMS, index=INDEX, **rows):
    (folder / "toy.item.json").write_text(json.dumps(items))
    (folder / "toy.index.json").write_text(json.dumps(index))
    for split, text in {**ROWS, **rows}.items():
        (folder / f"toy.{split}.inter").write_text(HEADER + text)
    return {"dataset_name": "toy", "data_dir": str(folder), "output_dir": str(folder / "csv")}


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_rows_equal_a_loop_over_the_inter_lines(tmp_path):
    convert_dataset(ConvertFlags(**write(tmp_path)))
    titles = [" ".join(item["title"].split()) for item in ITEMS.values()]
    sids = ["".join(tokens) for tokens in INDEX.values()]
    for split, text in ROWS.items():
        rows = read(tmp_path / "csv" / split / "toy.csv")
        assert list(rows[0]) == list(CSV_COLUMNS)
        for row, line in zip(rows, text.splitlines(), strict=True):
            user, history, target = line.split("\t")
            history, target = [int(item) for item in history.split()], int(target)
            assert row["user_id"] == user and row["item_id"] == str(target)
            assert row["item_title"] == titles[target] and row["item_sid"] == sids[target]
            assert ast.literal_eval(row["history_item_id"]) == history
            assert ast.literal_eval(row["history_item_title"]) == [titles[item] for item in history]
            assert ast.literal_eval(row["history_item_sid"]) == [sids[item] for item in history]
    info = (tmp_path / "csv" / "info" / "toy.txt").read_text(encoding="utf-8").splitlines()
    assert info == [f"{sid}\t{title}\t{item}" for item, (sid, title) in enumerate(zip(sids, titles, strict=True))]
    assert titles[2] == "Tab here and line"


def test_pandas_and_the_published_layout_agree(tmp_path):
    import pandas as pd

    convert_dataset(ConvertFlags(**write(tmp_path), category="Toys"))
    table = pd.read_csv(tmp_path / "csv" / "train" / "Toys.csv", dtype={"user_id": str})
    assert table["item_id"].tolist() == [1, 2, 3] and table["history_item_id"][1] == "[0, 1]"
    assert table["history_item_sid"][0] == "['<a_1><b_2>']"


def test_runs_once_and_again_when_an_input_changes(tmp_path, capsys):
    flags = write(tmp_path)
    convert_dataset(ConvertFlags(**flags))
    path = tmp_path / "csv" / "test" / "toy.csv"
    time = path.stat().st_mtime_ns
    convert_dataset(ConvertFlags(**flags))
    assert "already done" in capsys.readouterr().out and path.stat().st_mtime_ns == time
    convert_dataset(ConvertFlags(**flags, force=True))
    assert path.stat().st_mtime_ns != time
    write(tmp_path, test="u9\t1\t1\nu9\t1\t2\n")
    convert_dataset(ConvertFlags(**flags))
    assert len(read(path)) == 2


def test_files_elsewhere(tmp_path):
    flags = write(tmp_path)
    (tmp_path / "toy.index.json").rename(tmp_path / "other.json")
    convert_dataset(
        ConvertFlags(**flags, index_file=str(tmp_path / "other.json"), item_file=str(tmp_path / "toy.item.json"))
    )
    assert (tmp_path / "csv" / "info" / "toy.txt").exists()


def test_shared_sids_only_on_request(tmp_path):
    flags = write(tmp_path, index={**INDEX, "3": INDEX["0"]})
    with pytest.raises(InputError, match="items 0 and 3 share the SID <a_1><b_2>"):
        convert_dataset(ConvertFlags(**flags))
    convert_dataset(ConvertFlags(**flags, shared_sids=True))
    assert read(tmp_path / "csv" / "train" / "toy.csv")[2]["item_sid"] == "<a_1><b_2>"


def rows_of(folder, split):
    return [
        (row["user_id"], row["history_item_id"], row["item_id"]) for row in read(folder / "csv" / split / "toy.csv")
    ]


def test_random_rows_of_valid_and_test(tmp_path):
    lines = "".join(f"u{number}\t0 1\t{number % 4}\n" for number in range(50))
    flags = write(tmp_path, valid=lines, test=lines)
    convert_dataset(ConvertFlags(**flags))
    whole = rows_of(tmp_path, "valid")
    convert_dataset(ConvertFlags(**flags, max_valid_samples=10, max_test_samples=20))
    valid, test = rows_of(tmp_path, "valid"), rows_of(tmp_path, "test")
    assert len(valid) == 10 and len(test) == 20 and len(rows_of(tmp_path, "train")) == 3
    # The rows of the published conversion, which draws them with random.sample, in the order of time.
    drawn = random.Random(42).sample(whole, 10)
    assert valid == [row for row in whole if row in drawn]
    convert_dataset(ConvertFlags(**flags, max_valid_samples=10, seed=7))
    assert len(rows_of(tmp_path, "valid")) == 10 and rows_of(tmp_path, "valid") != valid
    convert_dataset(ConvertFlags(**flags, max_valid_samples=50, max_test_samples=99))
    assert rows_of(tmp_path, "valid") == whole == rows_of(tmp_path, "test")
    with pytest.raises(InputError, match="--max_test_samples 0: expected 1 or more"):
        convert_dataset(ConvertFlags(**flags, max_test_samples=0))


def test_the_longest_train_row_of_every_user(tmp_path):
    train = "u1\t0\t1\nu2\t3\t3\nu1\t0 1\t2\nu1\t1 2\t3\nu3\t2\t2\nu2\t3\t0\n"
    flags = write(tmp_path, train=train)
    convert_dataset(ConvertFlags(**flags, keep_longest_only=True))
    assert rows_of(tmp_path, "train") == [("u1", "[0, 1]", "2"), ("u2", "[3]", "3"), ("u3", "[2]", "2")]
    assert len(rows_of(tmp_path, "valid")) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"index": {key: INDEX[key] for key in "013"}}, "toy.index.json: item 2 has no SID"),
        ({"index": {**INDEX, "2": []}}, "toy.index.json, item 2: expected a list of tokens"),
        ({"index": {**INDEX, "2": "<a_1>"}}, "item 2: expected a list of tokens"),
        ({"index": {**INDEX, "2": ["<a _1>"]}}, "item 2: expected a list of tokens"),
        ({"index": {**INDEX, "4": ["<a_9>"]}}, "item 4 is not among the 4 items"),
        ({"index": []}, "toy.index.json: expected an object"),
        ({"items": {key: ITEMS[key] for key in "013"}}, "toy.item.json: item ids must be 0..2, found '3'"),
        ({"train": "u1\t0\n"}, "toy.train.inter, line 2: expected user, history and target"),
        ({"valid": "u1\t0\t9\n"}, "toy.valid.inter, line 2: item 9 is not among the 4 items"),
        ({"valid": "u1\t0, 1\t2\n"}, "toy.valid.inter, line 2: item ids must be integers"),
        ({"test": ""}, "toy.test.inter: the split is empty"),
    ],
)
def test_bad_inputs_stop_before_anything_is_written(tmp_path, changes, message):
    flags = write(tmp_path, **changes)
    with pytest.raises(InputError, match="^[^\n]*$") as error:
        convert_dataset(ConvertFlags(**flags))
    assert message in str(error.value)
    assert not list((tmp_path / "csv").rglob("*.csv"))


def test_the_command_ends_with_one_line_and_status_2(tmp_path):
    flags = write(tmp_path, test="")
    root = Path(__file__).parent.parent
    for arguments in ([f"--{name}={value}" for name, value in flags.items()], ["--dataset", "toy"]):
        run = subprocess.run(
            [sys.executable, str(root / "convert_dataset.py"), *arguments],
            capture_output=True,
            text=True,
            cwd=root,
        )
        assert run.returncode == 2 and len(run.stderr.splitlines()) == 1 and run.stderr.startswith("error: ")
