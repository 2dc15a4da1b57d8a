"""JSON lists as streams: the bytes of `write_json`, the elements and errors of `read_json`, whatever the window."""

import json
import random

import pytest

from minionerec.common import json_lists
from minionerec.common.files import InputError, read_json, write_json
from minionerec.common.json_lists import iterate_json_list, write_json_list


def random_value(rng, depth=0):
    """A JSON value with texts of several bytes a character, quotes, brackets and numbers of any length."""
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {str(n): random_value(rng, depth + 1) for n in range(rng.randrange(4))}
    text = "".join(rng.choices('aü牛"\\],[{}\n\u2028 ', k=rng.randrange(12)))
    return [None, rng.random() < 0.5, rng.randrange(10 ** rng.randrange(1, 20)), rng.gauss(0, 1), text, -1e-300][kind]


@pytest.mark.parametrize("seed", range(12))
def test_a_list_as_a_stream(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(json_lists, "CHUNK", [1, 3, 17, 2**20][seed % 4])
    rng = random.Random(seed)
    values = [random_value(rng) for _ in range([0, 1, 30][seed % 3])]
    write_json(tmp_path / "a.json", values, indent=None)
    write_json_list(tmp_path / "b.json", iter(values))
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()

    # As others may write it: indented, with a byte-order mark, ASCII alone, no end of the last line.
    for number, text in enumerate(
        (json.dumps(values), json.dumps(values, indent=1, ensure_ascii=False), f"\ufeff \n{json.dumps(values)}\t\n")
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(text, encoding="utf-8")
        found = list(iterate_json_list(path, "a", "a list"))
        assert [value for value, _, _ in found] == values
        content = path.read_bytes()
        assert [json.loads(content[start : start + size]) for _, start, size in found] == values


@pytest.mark.parametrize("chunk", [1, 5, 2**20])
@pytest.mark.parametrize(
    "text",
    ["", "[", "[1", "[1,", "[1 2]", "[1]\n x", "[1, {]", '[1,\n"a', "what?", "[\n\n nul]", "[1, [2,\n3}]", "[[1], -]"],
)
def test_errors_are_those_of_the_whole_file(tmp_path, monkeypatch, chunk, text):
    monkeypatch.setattr(json_lists, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError) as whole:
        read_json(path, "a")
    with pytest.raises(InputError) as streamed:
        list(iterate_json_list(path, "a", "a list"))
    assert str(streamed.value) == str(whole.value)


def test_what_is_no_list(tmp_path):
    for value in ({"a": 1}, 7, "[1]"):
        write_json(tmp_path / "a.json", value)
        with pytest.raises(InputError, match="--a: .*a.json: expected a list of numbers"):
            list(iterate_json_list(tmp_path / "a.json", "a", "a list of numbers"))
    (tmp_path / "a.json").write_bytes(b'["\xff"]')
    with pytest.raises(InputError, match="not a UTF-8 text file"):
        list(iterate_json_list(tmp_path / "a.json", "a", "a list"))
    with pytest.raises(InputError, match="--a: .*none.json: no such file"):
        list(iterate_json_list(tmp_path / "none.json", "a", "a list"))


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_what_json_can_name_and_no_file_can_hold(tmp_path, monkeypatch, chunk):
    """Halves of surrogate pairs, as `read_json` reads them, and numbers of thousands of digits."""
    monkeypatch.setattr(json_lists, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(r'[{"a\ud83d": ["b\uDC01", "\ud83d\ude00"]}, "c\\ud83d", "d"]')
    assert [value for value, _, _ in iterate_json_list(path, "a", "a list")] == read_json(path, "a")
    path.write_text("[1,\n" + "9" * 5000 + "]")
    with pytest.raises(InputError, match="a.json, line 2: not valid JSON .a number with too many digits"):
        list(iterate_json_list(path, "a", "a list"))
