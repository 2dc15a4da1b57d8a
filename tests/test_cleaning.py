"""Members of one kind tried on every reader that may meet them: raw logs of both formats, files between stages."""

import json

import numpy as np
import pandas as pd
import pytest
from amazon_dump import GOOD, GOOD_2023, START

from convert_dataset import write_table
from data_process.amazon_files import Dump, read_reviews, read_titles
from data_process.cleaning import LeftOut, clean_title, convert_times, unify_ids
from data_process.recbole_files import read_interaction_table, read_item_table
from data_process.settings import RecboleFlags
from data_process.validate_items import Items, Report, check_item_file
from data_process.validate_rows import read_table_rows
from minionerec.common.files import InputError
from minionerec.common.interactions import read_inter
from minionerec.common.items import read_item_records, read_items
from minionerec.common.json_lists import iterate_json_list
from minionerec.common.records import read_index, read_rows

FLAGS = RecboleFlags(dataset="x", output_path="x", input_dir="x")
MISSING = ["", " ", "nan", "NaN", "None", "null", "<NA>", "NaT", "n/a"]
TITLES = {
    "Black &amp; Decker 12&quot; saw": 'Black & Decker 12" saw',
    "A <b>bold</b>\tone": "A bold one",
    '<span class="a-size">Glue</span>': "",
    "var x = getTime()": "",
    "open <div": "",
    **dict.fromkeys(MISSING, ""),
    "Nanotech": "Nanotech",
    "None the wiser": "None the wiser",
}


@pytest.mark.parametrize("title", TITLES)
def test_titles_are_cleaned_alike_by_both_readers(tmp_path, title):
    (tmp_path / "x.item").write_text(f"item_id:token\ttitle:token_seq\nA\t{title.replace(chr(9), ' ')}\n")
    records = read_item_table(tmp_path / "x.item", FLAGS)
    assert records["A"]["title"] == TITLES[title] == clean_title(title)
    (tmp_path / "meta.json").write_text(
        "".join(
            json.dumps({"asin": name, "title": text}) + "\n" for name, text in (("A", title), ("B", "a whole title"))
        )
    )
    numbers, _ = read_titles(Dump(tmp_path / "meta.json", "metadata_file", 0), 20)
    assert ("A" in numbers) == bool(TITLES[title])


@pytest.mark.parametrize("missing", MISSING)
def test_other_fields_that_are_missing_are_no_texts(tmp_path, missing):
    header = "item_id:token\ttitle:token_seq\tcategories:token_seq\tbrand:token\tsales_type:token\n"
    (tmp_path / "x.item").write_text(header + f"A\tSaw\t'Tools &amp; Home', 'Saws'\t{missing}\t{missing}\n")
    record = read_item_table(tmp_path / "x.item", FLAGS)["A"]
    assert record["brand"] == "" and record["description"] == "Categories: Tools & Home, Saws."
    assert record["categories"] == "Tools & Home, Saws"


# ---------------------------------------------------------------------------------------------------------------- times
@pytest.mark.parametrize("ticks, unit", [(1, "seconds"), (1_000, "milliseconds"), (1_000_000, "microseconds")])
def test_the_unit_of_times_is_told_by_their_size(tmp_path, capsys, ticks, unit):
    seconds = [START, START + 86_400, START + 7]
    values = pd.Series([float(second * ticks) for second in seconds])
    assert convert_times("x", "t", values, needs_unit=True).tolist() == seconds
    assert (unit in capsys.readouterr().out) == (ticks > 1)
    for good, name in ((GOOD, "unixReviewTime"), (GOOD_2023, "timestamp")):
        path = tmp_path / f"{name}.json"
        path.write_text("".join(json.dumps({**good, name: second * ticks}) + "\n" for second in seconds))
        dump = Dump(path, "reviews_file", 0)
        assert read_reviews(dump, {"I0": 0}, START, START + 10, None).table["timestamp"].tolist() == [START, START + 7]


@pytest.mark.parametrize(
    "values, message",
    [
        ([1.5e9, 1.5e12], "line 2 is a time in seconds, line 3 one in milliseconds"),
        ([1.5e15, 1.5e12], "milliseconds, line 2 one in microseconds"),
        ([1.5e9, 1e10], "line 3, column t: 10000000000 is no time"),
        ([1.5e9, 1e20], "is no time since 1970"),
        ([20_180_101.0, 20_180_102.0], "line 2, column t: 20180101 is no time"),
        ([3.0, 4.0], "is no time since 1970"),
    ],
)
def test_ambiguous_times_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        convert_times("x", "t", pd.Series(values), needs_unit=True)


def test_times_that_only_give_an_order_need_no_unit():
    assert convert_times("x", "t", pd.Series([3.0, 0.0, 20_180_101.0]), needs_unit=False).tolist() == [3, 0, 20_180_101]


# ------------------------------------------------------------------------------------------------------------------ ids
@pytest.mark.parametrize(
    "ids, expected",
    [
        (["3.0", "4.0", "3.0"], ["3", "4", "3"]),
        (["3", "4"], ["3", "4"]),
        (["3.0", "nan", ""], ["3", "nan", ""]),
        (["3.0", "B4"], ["3.0", "B4"]),
        (["3.5", "4.0"], ["3.5", "4.0"]),
        (["3.0", "3"], None),
    ],
)
def test_ids_of_a_column_that_became_floats(ids, expected):
    if expected is None:
        with pytest.raises(InputError, match="3.0 on line 2 and 3 on line 3; write every id in one way"):
            unify_ids("x", "item_id", pd.Series(ids))
    else:
        assert unify_ids("x", "item_id", pd.Series(ids)).tolist() == expected


def test_every_interaction_that_is_left_out_has_a_reason(tmp_path):
    rows = [("u", "1.0", 5, START), ("nan", "1.0", 5, START), ("u", "1.0", 5, 1), ("u", "1.0", 1, START)]
    rows += [("u", "9.0", 5, START), ("u", "2.0", 5, START), ("u", "", 5, START)]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (tmp_path / "x.inter").write_text(header + "".join("\t".join(map(str, row)) + "\n" for row in rows))
    flags = RecboleFlags(dataset="x", output_path="x", input_dir="x", min_rating=2.0, st_year=1990)
    left_out = LeftOut()
    records = {"1": {"title": "t"}, "2": {"title": ""}}
    table, count = read_interaction_table(tmp_path / "x.inter", flags, records, left_out)
    assert count == 7 and len(table) == 1 and table["item"].tolist() == ["1"]
    assert dict(left_out) == dict(without_id=2, outside_window=1, low_rating=1, not_in_item_file=1, without_title=1)
    assert left_out.describe().startswith("without_id 2, outside_window 1")
    with pytest.raises(InputError, match="none of its items stands in the .item file: '1' here, 'B7' there"):
        read_interaction_table(tmp_path / "x.inter", flags, {"B7": {"title": "t"}}, LeftOut())


# ------------------------------------------------------------------------------------------------ written and read back
@pytest.mark.parametrize(
    "title", ["Drill bit\rset", "a\r\nb", "a\nb", '"', "x,y", "\r", "'", "é🛠", "\ufdd1", "\\ud83d"]
)
@pytest.mark.parametrize("quoted", [True, False])
def test_any_title_of_a_csv_is_read_back(tmp_path, title, quoted):
    """Unquoted: as some versions of Python write a carriage return."""
    path = tmp_path / "x.csv"
    write_table(path, [("u", [0, 1], 2)], ["a", "b", title], ["<a_1>", "<a_2>", "<a_3>"])
    if not quoted:
        path.write_bytes(path.read_bytes().replace(f'"{title}"'.encode(), title.encode()))
        if title in ('"', "x,y") or "\n" in title:
            return
    (row,) = read_rows(path)
    assert row.title == title and row.history_ids == (0, 1)
    report = Report(3)
    read_table_rows(report, path, Items(), None)
    assert not report.count("error")


def test_a_history_of_any_length_is_read_back(tmp_path):
    titles = [f"City council votes again on the plan for the new harbour, part {n}" for n in range(24)]
    history = [n % 24 for n in range(4_000)]
    write_table(tmp_path / "x.csv", [("u", history, 3)], titles, [f"<a_{n}>" for n in range(24)])
    (row,) = read_rows(tmp_path / "x.csv")
    assert list(row.history_ids) == history and len(row.history_titles) == 4_000


def test_half_a_surrogate_pair_is_a_question_mark_and_the_validator_says_so(tmp_path):
    path = tmp_path / "x.item.json"
    path.write_text('{"0": {"title": "Party hat \\ud83d"}, "1": {"title": "whole \\ud83d\\ude00"}}')
    titles = [record["title"] for record in read_item_records(path).values()]
    assert titles == ["Party hat ?", "whole \U0001f600"]
    report = Report(3)
    check_item_file(report, path, Items())
    assert report.count("warning") == 1 and not report.count("error")
    write_table(tmp_path / "x.csv", [("u", [0], 1)], titles, ["<a_1>", "<a_2>"])
    assert read_rows(tmp_path / "x.csv")[0].history_titles == ("Party hat ?",)


# ------------------------------------------------------------------------------------------- files of other projects
@pytest.mark.parametrize(
    "content, message",
    [
        ({"B000": {"title": "a"}}, "item 'B000': items are named by their numbers"),
        ([{"title": "a"}], "expected an object of items, .* got a list"),
        ({"0": "a title"}, "item 0: expected an object with a text \"title\", got 'a title'"),
        ({"0": {"name": "a"}}, 'item 0: expected an object with a text "title"'),
        ({"1": {"title": "a"}}, "item 0 of index.json is missing"),
        ({}, "expected an object of items"),
        ("text", "expected an object of items"),
    ],
)
def test_item_files_as_other_projects_write_them(tmp_path, content, message):
    path = tmp_path / "x.item.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_items(path, [0], "index.json")


def test_lists_of_texts_become_one_text(tmp_path):
    path = tmp_path / "x.item.json"
    path.write_text(
        json.dumps({"0": {"title": "a", "description": ["one", "second <b>part</b> &amp; more"], "brand": None}})
    )
    assert read_items(path, [0], "x")[0] == {"title": "a", "description": "one second part & more", "brand": ""}


@pytest.mark.parametrize("key", ["01", "+1", "1_0", "1.0", " 1", "٣", "-1", "x"])
def test_item_ids_are_whole_numbers_for_every_reader(tmp_path, key):
    (tmp_path / "x.index.json").write_text(json.dumps({key: ["<a_1>"]}))
    with pytest.raises(InputError, match="not a whole number"):
        read_index(tmp_path / "x.index.json")
    (tmp_path / "x.item.json").write_text(json.dumps({key: {"title": "t"}}))
    with pytest.raises(InputError, match="named by their numbers"):
        read_item_records(tmp_path / "x.item.json")
    (tmp_path / "x.inter").write_text(f"user_id:token\titem_id_list:token_seq\titem_id:token\nu\t0\t{key}\n")
    with pytest.raises(InputError, match="line 2: item ids must be integers"):
        read_inter(tmp_path / "x.inter", 99)


@pytest.mark.parametrize(
    "read, text",
    [
        (read_index, '{"0": ["<a_1>"], "0": ["<a_2>"]}'),
        (read_item_records, '{"0": {"title": "a"}, "0": {"title": "b"}}'),
    ],
)
def test_an_item_that_stands_there_twice_is_refused(tmp_path, read, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match="item 0 stands there twice"):
        read(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000, '{"0": NaN', "\ufeff", "\x00"])
def test_json_that_no_parser_takes_is_one_line(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match="^[^\n]*x.json[^\n]*$"):
        read_index(tmp_path / "x.json")
    assert np.isfinite(len(text))


@pytest.mark.parametrize(
    "text", ['[\n {"a": 1}3.0,\n {"a": 2}]', "[1 2]", '[{"a": 1}x]', "[" * 100_000, '[{"a": 1}]]', "[1,]", "["]
)
def test_a_list_that_is_read_element_by_element_is_as_strict_as_a_whole_one(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match="x.json, line .*: not valid JSON"):
        list(iterate_json_list(tmp_path / "x.json", "f", "a list"))
