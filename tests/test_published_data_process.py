"""Published splits into items and samples: the same rows come back with other SIDs, and wrong files are named."""

import csv
import json
import shutil

import pytest
from tiny import make_dataset

from convert_dataset import convert_dataset
from data_process.published_data_process import process_published
from data_process.settings import ConvertFlags, PublishedFlags
from minionerec.common.files import InputError
from minionerec.common.records import read_rows


@pytest.fixture
def splits(tmp_path):
    """A folder in the published format, whose names have a suffix behind the dataset's."""
    paths = make_dataset(tmp_path / "made")
    root = tmp_path / "published"
    for flag, place in (
        ("train_file", "train/toy_5_2020.csv"),
        ("eval_file", "valid/toy_5_2020.csv"),
        ("test_data_path", "test/toy_5_2020.csv"),
        ("item_meta_path", "index/toy.item.json"),
    ):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(paths[flag], root / place)
    return root


def test_the_rows_come_back_with_other_sids(splits, tmp_path):
    process_published(PublishedFlags(dataset="toy", splits_dir=str(splits), output_path=str(tmp_path / "data")))
    assert json.loads((tmp_path / "data/toy.item.json").read_text()) == json.loads(
        (splits / "index/toy.item.json").read_text()
    )
    index = {str(item): ["<a_0>", f"<b_{item}>"] for item in range(30)}
    (tmp_path / "data/toy.index.json").write_text(json.dumps(index))
    convert_dataset(ConvertFlags(dataset_name="toy", data_dir=str(tmp_path / "data"), output_dir=str(tmp_path / "csv")))
    for split in ("train", "valid", "test"):
        before = read_rows(splits / f"{split}/toy_5_2020.csv")
        after = read_rows(tmp_path / f"csv/{split}/toy.csv")
        assert [(r.user_id, r.history_ids, r.item_id, r.title) for r in after] == [
            (r.user_id, r.history_ids, r.item_id, r.title) for r in before
        ]
        assert {r.sid for r in after} <= {f"<a_0><b_{item}>" for item in range(30)}


def test_files_that_cannot_be(splits, tmp_path):
    flags = PublishedFlags(dataset="toy", splits_dir=str(splits), output_path=str(tmp_path / "data"))
    path = splits / "test/toy_5_2020.csv"
    with path.open() as file:
        rows = list(csv.reader(file))
    for column, value, said in ((4, "99", "row 1: item 99 is not in"), (0, "a\tb", "row 1: the user id has a tab")):
        changed = [rows[0], [value if place == column else cell for place, cell in enumerate(rows[1])]]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(changed)
        with pytest.raises(InputError, match=said):
            process_published(flags)
    shutil.copy(path, splits / "test/toy_6.csv")
    with pytest.raises(InputError, match=r"test/toy\*.csv: 2 files match, expected one"):
        process_published(flags)
    with pytest.raises(InputError, match=r"games\*.item.json: no files match"):
        process_published(PublishedFlags(dataset="games", splits_dir=str(splits), output_path=str(tmp_path)))
