"""The Amazon command from end to end: three forms of dump, windows, malformed lines, and a slow obvious twin."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from amazon_dump import (
    ALL,
    END,
    FORMS,
    GOOD,
    GOOD_2023,
    START,
    WINDOW,
    catalogue,
    dump,
    item_line,
    log,
    review_line,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from data_process.amazon18_data_process import process_amazon
from data_process.interactions import list_dataset_files
from data_process.settings import AmazonFlags
from minionerec.common.cli import parse_flags
from minionerec.common.files import InputError
from minionerec.common.interactions import read_inter
from minionerec.common.items import read_item_records

ROOT = Path(__file__).parent.parent


def contents(flags):
    return [path.read_bytes() for path in list_dataset_files(flags["output_path"], "toy")]


def results(flags):
    return json.loads((Path(flags["output_path"]) / "toy.data_process.stage.json").read_text())["results"]


def original_names(flags, kind):
    lines = (Path(flags["output_path"]) / f"toy.{kind}2id").read_text().splitlines()[1:]
    return [line.split("\t")[0] for line in lines]


def samples(flags, split):
    """(user, history, target) of a split, with the original ids."""
    users, items = original_names(flags, "user"), original_names(flags, "item")
    rows = zip(*read_inter(Path(flags["output_path"]) / f"toy.{split}.inter", len(items)), strict=True)
    return [(users[int(user)], [items[i] for i in history], items[target]) for user, history, target in rows]


def slow_samples(rows, titles, flags):
    """Next-item samples of every split by plain loops over the logical log; None where a split stays empty."""
    start, end = (START, END) if "st_year" in flags else (0, 10**12)
    rows = [row for row in rows if start <= row[2] < end and row[1] in titles]
    rows = [row for row in rows if flags["min_rating"] is None or row[3] >= flags["min_rating"]]
    if flags["duplicates"] == "user_item":
        rows = sorted(rows, key=lambda row: row[2])
    kept = []
    for row in rows:
        same = [old for old in kept if old[:2] == row[:2]]
        if not same or (flags["duplicates"] == "same_time" and all(old[2] != row[2] for old in same)):
            kept.append(row)
    while True:
        users, items = [row[0] for row in kept], [row[1] for row in kept]
        left = [r for r in kept if users.count(r[0]) >= flags["user_k"] and items.count(r[1]) >= flags["item_k"]]
        if len(left) == len(kept):
            break
        kept = left
    kept.sort(key=lambda row: row[2])
    made = []
    for position, (user, item, _, _) in enumerate(kept):
        history = [row[1] for row in kept[:position] if row[0] == user]
        after = sum(row[0] == user for row in kept[position + 1 :])
        if history:
            made.append((after, (user, history[-flags["max_history"] :], item)))
    n = len(made)
    cuts = {"train": (0, n * 8 // 10), "valid": (n * 8 // 10, n * 9 // 10), "test": (n * 9 // 10, n)}
    if flags["split"] == "chronological":
        parts = {name: [sample for _, sample in made[begin:end]] for name, (begin, end) in cuts.items()}
    else:
        split_of = {0: "test", 1: "valid"}
        parts = {name: [s for after, s in made if split_of.get(after, "train") == name] for name in cuts}
    return parts if all(parts.values()) else None


def random_log(seed):
    """4 users, 6 items, few times, among them those at the window's edges."""
    random = np.random.default_rng(seed)
    times = [START - 1, START, START + 1, START + 2, START + 3, END - 2, END - 1, END]
    return [
        (
            f"U{random.integers(4)}",
            f"I{random.integers(6)}",
            times[random.integers(len(times))],
            float(random.integers(1, 6)),
        )
        for _ in range(random.integers(10, 90))
    ]


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    form=st.sampled_from(FORMS),
    window=st.sampled_from([{}, WINDOW]),
    choices=st.fixed_dictionaries(
        {
            "user_k": st.integers(0, 3),
            "item_k": st.integers(0, 3),
            "max_history": st.integers(1, 3),
            "min_rating": st.sampled_from([None, 2.0]),
            "duplicates": st.sampled_from(["same_time", "user_item"]),
            "split": st.sampled_from(["chronological", "leave_one_out"]),
        }
    ),
)
def test_samples_equal_plain_loops(tmp_path_factory, seed, form, window, choices):
    rows, titles = random_log(seed), catalogue(5)
    flags = dump(tmp_path_factory.mktemp("random"), rows, titles | {"I5": "<span id="}, form) | window | choices
    expected = slow_samples(rows, titles, flags)
    if expected is None:
        with pytest.raises(InputError, match="split is empty|is left"):
            process_amazon(AmazonFlags(**flags))
    else:
        process_amazon(AmazonFlags(**flags))
        assert {split: samples(flags, split) for split in expected} == expected


def test_every_form_plain_or_packed_gives_the_same_bytes(tmp_path):
    made = []
    for form in FORMS:
        for packed in (False, True):
            flags = dump(tmp_path / f"{form}{packed}", form=form, packed=packed)
            process_amazon(AmazonFlags(**flags))
            made.append(contents(flags))
    process_amazon(AmazonFlags(**flags, force=True))
    made.append(contents(flags))
    assert all(files == made[0] for files in made) and len(made[0]) == 6
    items = read_item_records(Path(flags["output_path"]) / "toy.item.json")
    first = items["0"]
    assert first["title"] == f"Item & No. {original_names(flags, 'item')[0][1:]}"
    assert first["description"] == 'A bold claim. It\'s "big"'
    assert first["brand"] == "Acme" and first["categories"] == "Tools, Saws, Blades & Co"
    assert len(samples(flags, "train")) > 20


def test_lines_of_all_forms_may_stand_in_one_file(tmp_path):
    mixed = [review_line(FORMS[i % 3], *row) for i, row in enumerate(log())]
    items = [item_line(FORMS[i % 3], *pair) for i, pair in enumerate(catalogue().items())]
    flags = dump(tmp_path / "mixed", [], {}, more_reviews=mixed, more_items=items)
    plain = dump(tmp_path / "plain")
    process_amazon(AmazonFlags(**flags))
    process_amazon(AmazonFlags(**plain))
    assert contents(flags) == contents(plain)


def test_a_finished_run_is_not_repeated(tmp_path, capsys):
    flags = dump(tmp_path)
    process_amazon(AmazonFlags(**flags))
    process_amazon(AmazonFlags(**flags))
    assert "already done" in capsys.readouterr().out
    process_amazon(AmazonFlags(**flags, min_rating=2))
    assert results(flags)["low_rating"] > 0


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"reviewerID": "U0", "as', 'expected a JSON object or Python dictionary, got \'{"reviewerID"'),
        ("[1, 2]", "expected a JSON object or Python dictionary"),
        ({**GOOD, "unixReviewTime": str(START)}, "expected numbers in unixReviewTime and overall"),
        ({**GOOD, "unixReviewTime": None}, "expected numbers in unixReviewTime"),
        ({**GOOD, "overall": "five"}, "expected numbers in unixReviewTime and overall"),
        ({**GOOD, "unixReviewTime": START * 1000}, "seconds since 1970 in unixReviewTime"),
        ({**GOOD, "unixReviewTime": -1}, "seconds since 1970 in unixReviewTime"),
        ({**GOOD, "reviewerID": 7}, "expected texts in reviewerID and asin"),
        ({**GOOD, "asin": ["I0"]}, "expected texts in reviewerID and asin"),
        ({**GOOD, "reviewerID": "U 0"}, "expected reviewerID without white space, got 'U 0'"),
        ({**GOOD, "reviewerID": ""}, "expected reviewerID without white space"),
        ({key: GOOD[key] for key in ("reviewerID", "asin", "overall")}, "found no 'unixReviewTime'"),
        ({key: GOOD[key] for key in ("reviewerID", "asin", "unixReviewTime")}, "found no 'overall'"),
        ({key: GOOD_2023[key] for key in ("user_id", "parent_asin", "rating")}, "found no 'timestamp'"),
        ({**GOOD_2023, "timestamp": [1]}, "expected numbers in timestamp and rating"),
        ({**GOOD_2023, "timestamp": 10**17}, "milliseconds since 1970 in timestamp"),
    ],
)
def test_malformed_reviews_are_counted_reported_and_limited(tmp_path, capsys, line, message):
    line = line if isinstance(line, str) else json.dumps(line)
    # A line that would change the samples if it counted, between two blank ones that are no fault.
    flags = dump(tmp_path, more_reviews=["", line, " \t"]) | {"min_rating": 1}
    process_amazon(AmazonFlags(**flags, max_bad_lines=1))
    where = f"{flags['reviews_file']}, line {len(log()) + 2}: "
    out = capsys.readouterr().out
    assert out.count("left out: ") == 1 and f"left out: {where}" in out and message in out
    assert results(flags)["malformed_reviews"] == 1 and results(flags)["raw_reviews"] == len(log()) + 1
    clean_flags = dump(tmp_path / "clean") | {"min_rating": 1}
    process_amazon(AmazonFlags(**clean_flags))
    assert contents(flags) == contents(clean_flags)
    with pytest.raises(InputError, match="^[^\n]*--max_bad_lines 0$") as error:
        process_amazon(AmazonFlags(**flags, max_bad_lines=0))
    assert str(error.value).startswith(where) and message in str(error.value)


def test_only_the_first_malformed_lines_are_shown(tmp_path, capsys):
    flags = dump(tmp_path, more_reviews=["{"] * 30, more_items=["{", '{"title": "Saw"}', '{"asin": 5, "title": "Saw"}'])
    process_amazon(AmazonFlags(**flags))
    out = capsys.readouterr().out
    assert out.count(f"left out: {flags['reviews_file']}") == 5
    assert out.count(f"left out: {flags['metadata_file']}") == 3
    assert f"{flags['metadata_file']}, line 7: expected an item with a text asin" in out
    assert results(flags)["malformed_reviews"] == 30 and results(flags)["malformed_metadata"] == 3


def test_a_rating_is_needed_only_to_compare_it(tmp_path):
    rows = [
        json.dumps({**GOOD, "reviewerID": f"U{u}", "unixReviewTime": START + t}) for t in range(4) for u in range(3)
    ]
    rows = [line.replace(', "overall": 5.0', "") for line in rows]
    flags = dump(tmp_path, [], more_reviews=rows)
    process_amazon(AmazonFlags(**flags))
    assert results(flags)["interactions"] == 12
    with pytest.raises(InputError, match="line 1: .*found no 'overall' .no line of the file is good"):
        process_amazon(AmazonFlags(**flags, min_rating=1, max_bad_lines=50))


def test_window_edges_are_utc_in_every_zone(tmp_path):
    """Every user has a review at the first and the last second of the window, and one a second outside on each side."""
    times = (START - 1, START, END - 1, END)
    rows = [(f"U{user}", f"I{i}", time, 5.0) for user in range(12) for i, time in enumerate(times)]
    made = []
    for zone in ("UTC", "America/Los_Angeles", "Asia/Tokyo"):
        flags = dump(tmp_path / zone.replace("/", "_"), rows, form="2023") | WINDOW
        subprocess.run(
            [sys.executable, "-m", "data_process.amazon18_data_process", *(f"--{k}={v}" for k, v in flags.items())],
            check=True,
            env={**os.environ, "TZ": zone},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        made.append(contents(flags))
        assert results(flags)["outside_window"] == 24
        assert original_names(flags, "item") == ["I1", "I2"] and len(original_names(flags, "user")) == 12
    assert made[0] == made[1] == made[2]


def test_the_first_valid_record_of_an_item_counts(tmp_path):
    titles = catalogue() | {"I0": "<div>", "I1": "First"}
    again = [item_line("2018", *pair) for pair in (("I0", "Second"), ("I0", "Third"), ("I1", "Other"))]
    flags = dump(tmp_path, titles=titles, more_items=again)
    process_amazon(AmazonFlags(**flags))
    items = read_item_records(Path(flags["output_path"]) / "toy.item.json")
    by_name = dict(zip(original_names(flags, "item"), items.values(), strict=True))
    assert by_name["I0"]["title"] == "Second" and by_name["I1"]["title"] == "First"
    assert results(flags)["items_with_title"] == 5 and results(flags)["metadata_lines"] == 8


def test_longer_titles_can_be_allowed(tmp_path):
    flags = dump(tmp_path, titles=catalogue() | {"I0": "word " * 21})
    process_amazon(AmazonFlags(**flags))
    left = results(flags)
    assert left["without_title"] == sum(row[1] == "I0" for row in log()) and left["items"] == 4
    process_amazon(AmazonFlags(**flags, max_title_words=21))
    assert results(flags)["without_title"] == 0 and results(flags)["items"] == 5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"user_k": -1}, "--user_k -1: expected 0 or more"),
        ({"max_history": 0}, "--max_history 0: expected 1 or more"),
        ({"max_title_words": 0}, "--max_title_words 0"),
        ({"max_bad_lines": -1}, "--max_bad_lines -1"),
        ({"st_year": 2018, "ed_year": 2017}, "the time window is empty"),
        ({"reviews_file": "none.json"}, "--reviews_file: none.json: no such file"),
        ({"metadata_file": "none.json"}, "--metadata_file: none.json: no such file"),
        ({"st_year": 2020}, "none of its 54 reviews is left (outside_window 54, low_rating 0, without_title 0"),
        ({"min_rating": 9}, "is left (outside_window 0, low_rating 54"),
        ({"user_k": 100}, "duplicates 0, k_core 54"),
        ({**ALL, "split": "leave_one_out", "duplicates": "user_item", "max_title_words": 1}, "with a valid title"),
    ],
)
def test_wrong_flags_stop_with_one_line(tmp_path, changes, message):
    with pytest.raises(InputError, match="^[^\n]*$") as error:
        process_amazon(AmazonFlags(**{**dump(tmp_path), **changes}))
    assert message in str(error.value)


def test_swapped_empty_and_foreign_files_stop_with_one_line(tmp_path):
    def check(message, **changes):
        with pytest.raises(InputError, match="^[^\n]*$") as error:
            process_amazon(AmazonFlags(**(flags | changes)))
        assert message in str(error.value)

    flags = dump(tmp_path)
    check("no line of the file is good", reviews_file=flags["metadata_file"])
    check("line 1: expected a review with reviewerID, asin and unixReviewTime", reviews_file=flags["metadata_file"])
    check("none of its 54 lines is an item with a valid title", metadata_file=flags["reviews_file"])
    check("empty.json: the file is empty", reviews_file=write(tmp_path / "empty.json", []))
    check("blank.json: the file is empty", metadata_file=write(tmp_path / "blank.json", ["", " "]))
    check("line 1: expected a JSON object", reviews_file=write(tmp_path / "a.csv", ["a,b", "1,2"]))


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-9], lambda content: content[:20], lambda c: c[:-6] + b"123456"]
)
@pytest.mark.parametrize("flag", ["reviews_file", "metadata_file"])
def test_a_damaged_gzip_file_stops_with_one_line(tmp_path, damage, flag):
    flags = dump(tmp_path, packed=True)
    path = Path(flags[flag])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="^[^\n]*damaged gzip file[^\n]*$") as error:
        process_amazon(AmazonFlags(**flags))
    assert str(path) in str(error.value)
    assert not any(path.exists() for path in list_dataset_files(flags["output_path"], "toy"))


def test_command_line_refuses_an_unknown_flag(tmp_path, capsys):
    flags = [f"--{key}={value}" for key, value in dump(tmp_path).items()]
    with pytest.raises(SystemExit) as stop:
        parse_flags(AmazonFlags, [*flags, "--min_ratng", "3"])
    assert stop.value.code == 2 and "--min_rating" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("--split=random", "--split random: expected one of chronological, leave_one_out"),
        ("--duplicates=none", "--duplicates none: expected one of same_time, user_item"),
    ],
)
def test_command_line_refuses_what_is_no_choice(tmp_path, capsys, wrong, message):
    with pytest.raises(SystemExit, match="2"):
        parse_flags(AmazonFlags, [*(f"--{key}={value}" for key, value in dump(tmp_path).items()), wrong])
    assert capsys.readouterr().err == f"error: {message}\n"


def test_dumps_are_found_as_the_published_script_finds_them(tmp_path, monkeypatch):
    flags = dump(tmp_path)
    process_amazon(AmazonFlags(**flags))
    expected = contents(flags)
    monkeypatch.chdir(tmp_path)
    named = {name: value for name, value in flags.items() if not name.endswith("_file")}
    with pytest.raises(InputError, match="^missing flag: --metadata_file, and this folder has no meta_toy.json$"):
        process_amazon(AmazonFlags(**named))
    Path(flags["metadata_file"]).rename("meta_toy.json")
    with pytest.raises(InputError, match="--reviews_file, and this folder has no toy_5.json or toy.json$"):
        process_amazon(AmazonFlags(**named))
    Path(flags["reviews_file"]).rename("toy_5.json")
    write(tmp_path / "toy.json", ["{"])  # the reviews after 5-core come first
    process_amazon(AmazonFlags(**named, force=True))
    assert contents(flags) == expected


def test_benchmark_compares_both_ways(tmp_path):
    command = [sys.executable, "benchmarks/bench_data.py", "--reviews", "2000", "--work_dir", str(tmp_path)]
    done = subprocess.run(
        command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (
        figures["agree"]
        and figures["interactions"] > 100
        and figures["streaming_s"] > 0
        and not list(tmp_path.iterdir())
    )
