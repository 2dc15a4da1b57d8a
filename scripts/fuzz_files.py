"""What scripts.fuzz_readers mutates: a whole file for every reader, and a plain second reading of the same bytes."""

from __future__ import annotations

import ast
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_process.amazon_files import Dump, read_reviews, read_titles
from data_process.cleaning import LeftOut
from data_process.csv_files import read_csv_interactions, read_csv_items
from data_process.recbole_files import read_interaction_table, read_item_table
from data_process.settings import ConvertFlags, CsvFlags, RecboleFlags
from data_process.validate_items import Items, Report, check_index, check_info, check_item_file, check_names
from data_process.validate_rows import read_inter_rows, read_table_rows
from minionerec.common.cli import read_config
from minionerec.common.embeddings import load_embeddings, side_file_path
from minionerec.common.files import InputError
from minionerec.common.interactions import read_inter
from minionerec.common.items import read_item_records, read_preferences
from minionerec.common.records import read_index, read_info, read_rows
from minionerec.evaluation.predictions import read_predictions
from minionerec.evaluation.shards import find_batches, format_batch
from minionerec.evaluation.user_files import read_users
from minionerec.language.prompts import load_prompts

ITEMS = 12


# --------------------------------------------------------------------------------------------------- whole files, twins
def sid(item: int) -> list[str]:
    """The SID tokens of an item."""
    return [f"<a_{item % 3}>", f"<b_{item // 3}>", f"<c_{item % 2}>"]


TITLES = [f"Item {item}, \"n\" 'q' é" for item in range(ITEMS)]
ROWS = [(f"u{row % 4}", [row % ITEMS, (row * 5) % ITEMS], (row * 7) % ITEMS) for row in range(12)]


def make_split() -> bytes:
    """A CSV split."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid"
    writer.writerow(names.split(","))
    for user, history, target in ROWS:
        sids = ["".join(sid(item)) for item in history]
        titles = [TITLES[item] for item in history]
        writer.writerow((user, titles, TITLES[target], history, target, sids, "".join(sid(target))))
    return text.getvalue().encode()


def make_json_split() -> bytes:
    """The same as JSON lines."""
    header, *rows = csv.reader(io.StringIO(make_split().decode()))
    records = [dict(zip(header, row, strict=True)) for row in rows]
    for record in records:
        for name in ("history_item_title", "history_item_id", "history_item_sid"):
            record[name] = ast.literal_eval(record[name])
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def decode(content: bytes) -> str:
    """The text of a UTF-8 file."""
    return content.decode("utf-8-sig")


def replace_halves(value: Any) -> Any:
    """Texts of a JSON value with "?" for halves of surrogate pairs."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def read_literal(text: str) -> list:
    """A list literal, JSON first."""
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


def twin_rows(content: bytes) -> list[tuple]:
    """[(user, history ids, target)] of a CSV, read by the csv module from lines without stray carriage returns."""
    text = decode(content).replace("\r\n", "\n").replace("\r", "¤")
    csv.field_size_limit(sys.maxsize)
    header, *rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    found = []
    for row in rows:
        record = dict(zip(header, row, strict=True))
        history = [int(item) for item in read_literal(record["history_item_id"].replace("¤", "\r"))]
        found.append((record["user_id"].replace("¤", "\r"), tuple(history), int(record["item_id"].replace("¤", "\r"))))
    return found


def twin_json_rows(content: bytes) -> list[tuple]:
    """[(user, history ids, target)] of JSON lines."""
    found = []
    for line in decode(content).split("\n"):
        if line.strip():
            record = replace_halves(json.loads(line))
            history = record["history_item_id"]
            history = read_literal(history) if isinstance(history, str) else history
            found.append((str(record["user_id"]), tuple(int(item) for item in history), int(record["item_id"])))
    return found


def twin_info(content: bytes) -> list[tuple]:
    """[(SID, title, item)] of an info file."""
    lines = [line.rstrip("\r") for line in decode(content).split("\n")]
    return [(s, title, int(item)) for s, title, item in (line.split("\t") for line in lines if line.strip())]


def twin_inter(content: bytes) -> list[tuple]:
    """[(user, history, target)] of an .inter file."""
    _, *rows = (line.rstrip("\r").split("\t") for line in decode(content).removesuffix("\n").split("\n"))
    return [(user, [int(item) for item in history.split()], int(target)) for user, history, target in rows]


def convert_rows(rows: list) -> list[tuple]:
    """The parts of `Row`s that twins read too."""
    return [(row.user_id, row.history_ids, row.item_id) for row in rows]


# -------------------------------------------------------------------------------------------------------------- readers
@dataclass(frozen=True)
class Reader:
    """One reader of one kind of file.

    Attributes:
        name: of the file that it is given. content: a whole one.
        read: gives what is compared, or raises `InputError`. twin: the same, read plainly from the bytes.
    """

    name: str
    content: bytes
    read: Callable[[Path], Any]
    twin: Callable[[bytes], Any] | None = None


def read_plain_json(content: bytes) -> Any:
    """A JSON file, as a twin."""
    return replace_halves(json.loads(decode(content)))


def format_objects(records: Iterable[dict]) -> bytes:
    """One object a line."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


INDEX = json.dumps({str(item): sid(item) for item in range(ITEMS)}, indent=1).encode()
RECORDS = {str(item): {"title": title, "description": "d", "brand": "b"} for item, title in enumerate(TITLES)}
RECORDS_FILE = json.dumps(RECORDS, indent=1, ensure_ascii=False).encode()
INFO = "".join(f"{''.join(sid(item))}\t{title}\t{item}\n" for item, title in enumerate(TITLES)).encode()
INTER = "user_id:token\titem_id_list:token_seq\titem_id:token\n" + "".join(
    f"{user}\t{' '.join(map(str, history))}\t{target}\n" for user, history, target in ROWS
)


def read_catalogue_lines(path: Path) -> list[tuple]:
    """[(SID, title, item)] of `read_info`."""
    catalogue = read_info(path, True)
    return list(zip(catalogue.sids, catalogue.titles, catalogue.item_ids, strict=True))


def build_file_readers() -> dict[str, Reader]:
    """Readers of the files that pass between stages."""
    predictions = [
        {"user_id": user, "item_id": target, "input": "x", "output": "".join(sid(target)), "predict": ["<a_1>"]}
        for user, _, target in ROWS
    ]
    preferences = json.dumps({f"u{n}": f"likes {n}" for n in range(5)}, indent=1).encode()
    return {
        "CSV": Reader("x.csv", make_split(), lambda path: convert_rows(read_rows(path)), twin_rows),
        "JSON lines": Reader("x.jsonl", make_json_split(), lambda path: convert_rows(read_rows(path)), twin_json_rows),
        "index": Reader(
            "x.index.json",
            INDEX,
            lambda path: {str(item): list(tokens) for item, tokens in read_index(path).items()},
            read_plain_json,
        ),
        "items": Reader(
            "x.item.json",
            RECORDS_FILE,
            lambda path: {item: record["title"] for item, record in read_item_records(path).items()},
            lambda content: {item: record["title"] for item, record in read_plain_json(content).items()},
        ),
        "info": Reader("x.txt", INFO, read_catalogue_lines, twin_info),
        ".inter": Reader(
            "x.train.inter",
            INTER.encode(),
            lambda path: list(zip(*read_inter(path, ITEMS), strict=True)),
            twin_inter,
        ),
        "predictions": Reader(
            "test.json",
            json.dumps(predictions, indent=1).encode(),
            lambda path: list(read_predictions(str(path), "fuse")),
            read_plain_json,
        ),
        "preferences": Reader(
            "p.json",
            preferences,
            read_preferences,
            lambda content: {user: " ".join(text.split()) for user, text in read_plain_json(content).items()},
        ),
    }


def build_other_readers() -> dict[str, Reader]:
    """Readers of settings, of what a run keeps, and of files of users."""
    prompt = {"prompt": "{history}\n", "target": "{sid}"}
    prompts = yaml.safe_dump({"mine": {"separator": ", ", "next_sid": prompt}}).encode()
    settings = b"dataset_name: toy\ndata_dir: data\noutput_dir: out\nmax_test_samples: 5\nshared_sids: true\n"
    shard = b"".join(format_batch([n], [{"predict": ["<a_1>"]}]) for n in range(5))
    users = "user_id,history\n" + "".join(f"u{n},\"['Item 1', 'Item {n}']\"\n" for n in range(8))
    user_lines = format_objects({"user_id": f"u{n}", "history": ["Item 1", n]} for n in range(8))
    array = io.BytesIO()
    np.save(array, np.arange(24, dtype=np.float32).reshape(6, 4))

    def read_array(path: Path) -> None:
        side_file_path(path).write_text(json.dumps({"item_ids": [str(n) for n in range(6)]}))
        load_embeddings(path)

    return {
        "prompts": Reader("mine.yaml", prompts, load_prompts),
        "settings": Reader("settings.yaml", settings, lambda path: read_config(str(path), ConvertFlags)),
        "partial results": Reader("rank0.jsonl", shard, lambda path: list(find_batches(path))),
        "users, CSV": Reader("users.csv", users.encode(), lambda path: list(read_users(str(path)))),
        "users, JSON lines": Reader("users.jsonl", user_lines, lambda path: list(read_users(str(path)))),
        "embeddings": Reader("x.emb-y-td.npy", array.getvalue(), read_array),
    }


def build_log_readers() -> dict[str, Reader]:
    """Readers of raw logs."""
    log = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    log += "".join(f"u{n % 4}\t{n % ITEMS}\t5.0\t{1_500_000_000 + n}\n" for n in range(40))
    table = "item_id:token\ttitle:token_seq\tbrand:token\n"
    table += "".join(f"{n}\t{title}\tb\n" for n, title in enumerate(TITLES))
    meta = format_objects({"asin": f"B{n}", "title": title} for n, title in enumerate(TITLES))
    reviews = format_objects(
        {"reviewerID": f"u{n % 4}", "asin": f"B{n % ITEMS}", "overall": 5, "unixReviewTime": 1_500_000_000 + n}
        for n in range(30)
    )
    flags = RecboleFlags(dataset="x", output_path="x", input_dir="x", min_rating=1.0)
    titled = {str(n): {"title": "t"} for n in range(ITEMS)}
    numbers = {f"B{n}": n for n in range(ITEMS)}

    def read_dump(path: Path) -> None:
        read_reviews(Dump(path, "reviews_file", 3), numbers, None, None, 1.0)

    def read_csv_log(path: Path) -> None:
        csv_flags = CsvFlags(dataset="x", output_path="x", interactions_file=str(path), min_rating=1.0)
        read_csv_interactions(csv_flags, titled, LeftOut())

    csv_log = "user,item,rating,date\n"
    csv_log += "".join(f"u{n % 4},{n % ITEMS},5.0,2024-05-{n % 28 + 1:02} 08:00\n" for n in range(40))
    csv_items = "item,title,brand,year\n"
    csv_items += "".join(f'{n},"{title}",b,{1990 + n}\n' for n, title in enumerate(TITLES))
    csv_flags = CsvFlags(dataset="x", output_path="x", interactions_file="x")

    return {
        "CSV log": Reader("log.csv", csv_log.encode(), read_csv_log),
        "CSV items": Reader("items.csv", csv_items.encode(), lambda path: read_csv_items(path, csv_flags)),
        "RecBole log": Reader(
            "x.inter", log.encode(), lambda path: read_interaction_table(path, flags, titled, LeftOut())
        ),
        "RecBole items": Reader("x.item", table.encode(), lambda path: read_item_table(path, flags)),
        "Amazon items": Reader("meta.json", meta, lambda path: read_titles(Dump(path, "metadata_file", 3), 20)),
        "Amazon reviews": Reader("reviews.json", reviews, read_dump),
    }


def validate(check: Callable[..., Any], *arguments: Any) -> Callable[[Path], None]:
    """A check of the validator, which must report and never raise."""

    def read(path: Path) -> None:
        report = Report(3)
        check(report, path, *arguments, Items(), *([None] if check in (read_inter_rows, read_table_rows) else []))
        if report.count("error"):
            raise InputError(next(texts[0] for key, texts in report.texts.items() if key[0] == "error"))

    return read


def build_validators() -> dict[str, Reader]:
    """The validator's own readers."""
    names = "original_item\titem_id\n" + "".join(f"B{item}\t{item}\n" for item in range(ITEMS))
    return {
        "validator, items": Reader("x.item.json", RECORDS_FILE, validate(check_item_file)),
        "validator, index": Reader("x.index.json", INDEX, validate(check_index)),
        "validator, info": Reader("x.txt", INFO, validate(check_info)),
        "validator, names": Reader("x.item2id", names.encode(), validate(check_names, "item")),
        "validator, .inter": Reader("x.train.inter", INTER.encode(), validate(read_inter_rows)),
        "validator, CSV": Reader("x.csv", make_split(), validate(read_table_rows)),
    }


def build_readers() -> dict[str, Reader]:
    """All readers by name."""
    return build_file_readers() | build_other_readers() | build_log_readers() | build_validators()
