"""A log and a catalogue as CSV files: read like the RecBole files of the same content, and wrong ones named."""

import csv
import json

import pytest

from data_process.csv_data_process import process_csv
from data_process.recbole_data_process import process_recbole
from data_process.settings import CsvFlags, RecboleFlags
from minionerec.common.files import InputError, read_json

START = 1_714_000_000
LOG = [
    (f"u{user}", f"i{(user + step) % 4}", START + 3600 * (7 * user + step)) for user in range(6) for step in range(5)
]
ITEMS = [
    ("i0", "Saw, red", "Tools", "1.5"),
    ("i1", "Drill", "Tools", ""),
    ("i2", "Lamp", "", "3"),
    ("i3", "Glue", "", ""),
]


def write(path, header, rows, separator=","):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])
    return str(path)


def flags_of(folder, log=LOG, header=("user", "item", "time"), **flags):
    folder.mkdir(exist_ok=True)
    path = write(folder / "log.csv", header, log)
    settings = {"user_k": 2, "item_k": 2, "output_path": str(folder / "out"), **flags}
    return CsvFlags(dataset="shop", interactions_file=path, **settings)


def read_outputs(folder):
    return {name: (folder / f"shop.{name}.inter").read_text() for name in ("train", "valid", "test")}


def test_the_samples_are_those_of_the_same_log_in_another_format(tmp_path):
    items = write(tmp_path / "items.csv", ("item", "title", "category", "price"), ITEMS)
    process_csv(flags_of(tmp_path, items_file=items))
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = "".join(f"{user}\t{item}\t{time}\n" for user, item, time in LOG)
    (raw / "shop.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + lines)
    (raw / "shop.item").write_text("item_id:token\ttitle:token\n" + "".join(f"{i}\t{t}\n" for i, t, _, _ in ITEMS))
    settings = {"user_k": 2, "item_k": 2, "output_path": str(tmp_path / "recbole")}
    process_recbole(RecboleFlags(dataset="shop", input_dir=str(raw), **settings))
    assert read_outputs(tmp_path / "out") == read_outputs(tmp_path / "recbole")
    records = {record["original_id"]: record for record in read_json(tmp_path / "out/shop.item.json").values()}
    saw = records["i0"]
    assert saw == {
        "title": "Saw, red",
        "description": "Categories: Tools.",
        "brand": "",
        "categories": "Tools",
        "original_id": "i0",
    }


def test_without_a_catalogue_ids_are_titles(tmp_path, capsys):
    process_csv(flags_of(tmp_path))
    assert {record["title"] for record in read_json(tmp_path / "out/shop.item.json").values()} == {
        "i0",
        "i1",
        "i2",
        "i3",
    }
    assert "no --items_file: titles are item ids" in capsys.readouterr().out


def test_every_user_has_a_line_that_recommend_reads(tmp_path):
    """Users below the k-core too; the newest items, oldest first; the users in order of their newest interaction."""
    log = [*LOG, ("a guest", "i2", START - 5), ("u0", "gone", START + 10**6)]
    process_csv(flags_of(tmp_path, log, max_history=3))
    with (tmp_path / "out/shop.users.csv").open() as file:
        users = {row["user_id"]: json.loads(row["history"]) for row in csv.DictReader(file)}
    assert list(users)[0] == "a guest" and users["a guest"] == ["i2"] and list(users)[-1] == "u5"
    assert users["u0"] == ["i2", "i3", "i0"] and len(users) == 7


@pytest.mark.parametrize("name, separator", [("log.tsv", "\t"), ("log.csv", ",")])
def test_dates_names_and_tabs(tmp_path, name, separator):
    process_csv(flags_of(tmp_path / "numbers"))
    rows = [
        (item, user, f"2024-04-{25 + (time - START) // 86400:02d}T{(time - START) // 3600 % 24:02d}:00:00Z", "5")
        for user, item, time in LOG
    ]
    path = write(tmp_path / name, ("Product_ID", "Customer", "Created_At", "stars"), rows, separator)
    flags = CsvFlags(dataset="shop", interactions_file=path, output_path=str(tmp_path / "out"), user_k=2, item_k=2)
    process_csv(flags)
    assert read_outputs(tmp_path / "out") == read_outputs(tmp_path / "numbers" / "out")


def test_ratings_and_windows(tmp_path):
    log = [(*row, 5 if row[1] != "i3" else 1) for row in LOG]
    header = ("user", "item", "time", "stars")
    process_csv(flags_of(tmp_path, log, header, min_rating=3.0, rating_field="stars", st_year=2024, st_month=1))
    results = read_json(tmp_path / "out/shop.data_process.stage.json")["results"]
    assert results["low_rating"] == sum(row[3] == 1 for row in log) and results["items"] == 3


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "log.csv: the file is empty"),
        ("user,item,time\n", "no line below the header"),
        ("u1,i1,1714000000\nu2,i2,1714000000\n", "line 1: expected a header such as user,item,time, got u1,i1,17140"),
        ("user;item;time\nu1;i1;1\n", "line 1: separated by semicolons; expected commas, or tabs in a .tsv"),
        ("user,item,time,Item\nu,i,1,i\n", "line 1: a column is named twice"),
        ("user,item,time\nu1,i1\n", "line 2: expected 3 cells, got 2"),
        (
            "who,item,time\nu,i,1\n",
            "no column is called user_id, user, userid, uid, ...; its columns are who, item, time",
        ),
        ("user,item,time\nu,i,soon\n", "line 2, column time: expected a number, got 'soon'"),
        ("user,item,time\nu,i,2024-05-01\nu,i,2024-31-01\n", "line 3, column time: expected a date from 1970 to 2099"),
        ("user,item,time\nu,i,2024-05-01\nu,i,7024-05-01\n", "line 3, column time: expected a date from 1970 to 2099"),
        ("user,item,time\nu,3,1714000000\nu,3.0,1714000000\n", "3.0 on line 3 and 3 on line 2"),
        ("user,item,time\nu,i,1714000000\n", "none of its 1 interactions is left (without_id 0"),
        ('user,item,time\nu,"i,1714000000\n', "line 2: expected 3 cells, got 2"),
    ],
)
def test_bad_logs_stop_with_one_line(tmp_path, text, message):
    (tmp_path / "log.csv").write_text(text)
    flags = CsvFlags(dataset="shop", interactions_file=str(tmp_path / "log.csv"), output_path=str(tmp_path / "out"))
    with pytest.raises(InputError, match="^[^\n]*$") as error:
        process_csv(flags)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "header, rows, message",
    [
        (("item", "name"), [("i0", "a"), ("i0", "b")], "items.csv, line 3: item 'i0' is here twice"),
        (("item", "text"), [("i0", "a")], "no column is called title, movie_title, item_title, name, ...; its columns"),
        (("item", "title"), [("B7", "a")], "none of its items stands in"),
    ],
)
def test_bad_catalogues_stop_with_one_line(tmp_path, header, rows, message):
    items = write(tmp_path / "items.csv", header, rows)
    with pytest.raises(InputError, match="^[^\n]*$") as error:
        process_csv(flags_of(tmp_path, items_file=items))
    assert message in str(error.value)
