"""What stands where a file should be is said by every reader: pointers, web pages, packed files, other separators."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import make_dataset

from data_process.amazon_files import Dump
from data_process.recbole_files import read_atomic
from data_process.settings import ValidateFlags
from data_process.validate import validate_folder
from minionerec.common.embeddings import load_embeddings
from minionerec.common.file_kinds import hint_at_missing
from minionerec.common.files import InputError, read_json, read_lines, read_yaml
from minionerec.common.items import read_items
from minionerec.common.json_lists import iterate_json_list
from minionerec.common.records import read_index, read_info, read_rows
from rq.index.codebook import load_codebooks

STAND_INS = {
    "a git-lfs pointer and not the file itself": b"version https://git-lfs.github.com/spec/v1\nsize 9\n",
    "a web page and not the file itself": b"\n <!DOCTYPE html>\n<html lang=en>404: Not Found</html>",
}
PACKED = {
    "packed with gzip": gzip.compress(b"text"),
    "a zip archive": b"PK\x03\x04rest",
    "a Parquet file": b"PAR1rest",
    "UTF-16 text": "text".encode("utf-16"),
}
# {reader: whether it reads text}
READERS: dict[str, tuple[Callable[[Path], object], bool]] = {
    "rows": (read_rows, True),
    "index": (read_index, True),
    "info": (read_info, True),
    "items": (lambda path: read_items(path, {0: ("<a_0>",)}, "index.json"), True),
    "json": (read_json, True),
    "json list": (lambda path: list(iterate_json_list(path, "input", "a list")), True),
    "yaml": (read_yaml, True),
    "lines": (lambda path: list(read_lines(path)), True),
    "recbole": (read_atomic, True),
    "embeddings": (load_embeddings, False),
    "codebooks": (load_codebooks, False),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_says_what_a_file_is_instead(tmp_path, reader):
    read, is_text = READERS[reader]
    for message, content in (STAND_INS | PACKED if is_text else STAND_INS).items():
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"file: {message}") as error:
            read(path)
        assert len(str(error.value).splitlines()) == 1


def test_a_dump_may_be_packed_with_gzip_and_nothing_else(tmp_path):
    path = tmp_path / "meta.json"
    for message, content in (STAND_INS | PACKED).items():
        path.write_bytes(content)
        if "gzip" in message:
            assert list(Dump(path, "metadata_file", 1).iterate_lines()) == [(1, b"text")]
            continue
        with pytest.raises(InputError, match=message):
            Dump(path, "metadata_file", 1)


def test_a_parquet_split_is_no_text_and_may_be_a_pointer(tmp_path):
    (tmp_path / "a.parquet").write_bytes(next(iter(STAND_INS.values())))
    with pytest.raises(InputError, match="a.parquet: a git-lfs pointer"):
        read_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize("message", [*STAND_INS, *PACKED])
def test_the_validator_says_the_same(tmp_path, capsys, message):
    for name in ("toy.item.json", "toy.index.json", "toy.train.inter", "train/toy.csv", "info/toy.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((STAND_INS | PACKED)[message])
    with pytest.raises(SystemExit):
        validate_folder(ValidateFlags(data_dir=str(tmp_path)))
    assert capsys.readouterr().out.count(f": {message}") >= 5


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_another_separator_is_named(tmp_path, separator):
    paths = make_dataset(tmp_path)
    text = Path(paths["train_file"]).read_text()
    Path(paths["train_file"]).write_text(text.replace(",", separator))
    with pytest.raises(InputError, match="line 1: missing column .*; its columns are separated by .*, and commas are"):
        read_rows(paths["train_file"])
    Path(paths["train_file"]).write_text("")
    with pytest.raises(InputError, match="the file is empty"):
        read_rows(paths["train_file"])


def test_ids_that_became_floats_are_named(tmp_path):
    paths = make_dataset(tmp_path)
    head, first, *_ = Path(paths["train_file"]).read_text().splitlines()
    item = json.loads(json.dumps(read_rows(paths["train_file"])[0].item_id))
    Path(paths["train_file"]).write_text(f"{head}\n{first.replace(f',{item},', f',{item}.0,')}\n")
    with pytest.raises(InputError, match=rf"item ids must be whole numbers, '{item}.0' is not"):
        read_rows(paths["train_file"])


def test_a_missing_file_names_what_is_near(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "toy.csv").write_text("x")
    (tmp_path / "train" / "other.csv.gz").write_bytes(b"")
    assert hint_at_missing(tmp_path / "tarin" / "toy.csv") == f"; did you mean {tmp_path / 'train' / 'toy.csv'}?"
    assert hint_at_missing(tmp_path / "train" / "other.csv").endswith("other.csv.gz is there: unpack it with gunzip")
    assert hint_at_missing(tmp_path / "elsewhere" / "toy.csv") == ""
    with pytest.raises(InputError, match="no such file; did you mean .*toy.csv"):
        read_json(tmp_path / "train" / "toy.cvs")


def test_a_key_that_stands_twice_in_yaml_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    for text, message in {
        "a: 1\nb: 2\na: 3\n": r"a.yaml, line 3: not valid YAML \(a stands there twice",
        "a: {b: 1, b: 2}\n": "line 1: .*b stands there twice",
        "\ta: 1\n": "line 1: .*cannot start any token",
    }.items():
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_yaml(path)
    path.write_text("a: &x {b: 1}\nc: {<<: *x, b: 2}\n")
    assert read_yaml(path) == {"a": {"b": 1}, "c": {"b": 2}}


def test_an_array_of_numbers_is_no_text(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 2)))
    with pytest.raises(InputError, match="an array of numpy, and no text"):
        read_json(tmp_path / "a.npy")
