"""Single lines and columns of Amazon dumps: titles, texts, what a line may be, duplicates, and the memory of a pass."""

import json
import tracemalloc

import pandas as pd
import pytest
from amazon_dump import GOOD, GOOD_2023, START, write

from data_process.amazon18_data_process import drop_duplicates
from data_process.amazon_files import Dump, clean_title, join_categories, parse_line, read_reviews
from minionerec.common.texts import clean_text


@pytest.mark.parametrize(
    "title, plain",
    [
        ("  A&amp;B \n Saw ", "A&B Saw"),
        ("A <b>fine</b> saw", "A fine saw"),
        ("5 < 6 inch", "5 < 6 inch"),
        ("I <3 saws", "I <3 saws"),
        ("[Import] Saw", "[Import] Saw"),
        ("T&uuml;rlen", "Türlen"),
        (" ".join(["word"] * 20), " ".join(["word"] * 20)),
        (" ".join(["word"] * 21), ""),
        ("", ""),
        (" \n", ""),
        ("<br>", ""),
        (None, ""),
        (5, ""),
        (["Saw"], ""),
        ('<span id="productTitle">Saw', ""),
        ("&lt;span id=x&gt; Saw", ""),
        ("<SPAN>Saw</SPAN>", ""),
        ('Saw <i class="a', ""),
        ("var aPageStart = (new Date()).getTime();", ""),
        ("(function() { run })", ""),
        ("Multi Function (black)", "Multi Function (black)"),
    ],
)
def test_title_rules(title, plain):
    assert clean_title(title, 20) == plain


@pytest.mark.parametrize(
    "value, text",
    [
        ("a <script>var x = 1 < 2;</script> b", "a b"),
        ("a <STYLE type='x'>p {}</style\n> b <!-- <p> c --> d", "a b d"),
        ("a <script> never closed", "a never closed"),
        (["<p>a</p>", ["b", None]], "a b"),
    ],
)
def test_scripts_and_comments_go_with_their_content(value, text):
    assert clean_text(value) == text


@pytest.mark.parametrize(
    "record, text",
    [
        ({"categories": [["A", "B"], ["A", "C"]]}, "A, B, C"),
        ({"category": ["A", "B &amp; C", "<i>D</i>", ""]}, "A, B & C, D"),
        ({"categories": [], "main_category": "Books"}, "Books"),
        ({"categories": None}, ""),
        ({}, ""),
    ],
)
def test_category_text(record, text):
    assert join_categories(record) == text


@pytest.mark.parametrize(
    "line, value",
    [
        (b'{"a": 1.5}\r\n', {"a": 1.5}),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'{"a": "\\ud83d\\ude00 \\ud83d"}', {"a": "😀 ?"}),
        (b"{'a': 'it\\'s', 'b': [1, (2, None)], 'c': True}", {"a": "it's", "b": [1, [2, None]], "c": True}),
        (b"{'a': 'caf\\xe9'}", {"a": "café"}),
        (b"{'a': __import__('os').getcwd()}", None),
        (b"{'a': {1, 2}}", None),
        (b"{'a': b'x'}", None),
        (b'{"a": NaN}', None),
        (b'{"a": 1', None),
        (b'{"a": "\xff"}', None),
        (b"{'a': " + b"[" * 5000, None),
        (b"\n", None),
    ],
)
def test_a_line_is_json_or_a_literal_or_nothing(line, value):
    assert parse_line(line) == value


def test_duplicates():
    table = pd.DataFrame(
        [(0, 0, 9.0), (0, 0, 5.0), (0, 1, 5.0), (0, 0, 5.0), (1, 0, 5.0), (0, 0, 9.0), (0, 0, 5.5)],
        columns=["user", "item", "timestamp"],
    )
    assert drop_duplicates(table, "same_time").index.tolist() == [0, 1, 2, 4, 6]
    assert drop_duplicates(table, "user_item").index.tolist() == [1, 2, 4]


def test_milliseconds_tell_reviews_apart(tmp_path):
    lines = [json.dumps({**GOOD_2023, "timestamp": START * 1000 + ms}) for ms in (2, 1, 2, 0)]
    path = write(tmp_path / "r.json", lines)
    reviews = read_reviews(Dump(path, "reviews_file", 0), {"I0": 0}, START, START + 1, None)
    assert reviews.table["timestamp"].tolist() == [START + 0.002, START + 0.001, START + 0.002, START]
    assert len(drop_duplicates(reviews.table, "same_time")) == 3


@pytest.mark.parametrize("packed", [False, True])
def test_memory_does_not_grow_with_lines_that_are_left_out(tmp_path, packed):
    """20 MB of reviews outside the window or of unknown items take no more than the blocks that are read."""
    lines = [
        json.dumps({**GOOD, "reviewerID": f"U{i}", "asin": f"I{i % 2}", "reviewText": "x" * 2000})
        for i in range(10_000)
    ]
    lines = [line.replace(str(START), str(START - 5)) if i % 2 == 0 else line for i, line in enumerate(lines)]
    source = Dump(write(tmp_path / "r.json", lines, packed), "reviews_file", 0)
    tracemalloc.start()
    reviews = read_reviews(source, {"I0": 0}, START, None, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (reviews.outside_window, reviews.without_title, len(reviews.table)) == (5000, 5000, 0)
    assert peak < 6_000_000
