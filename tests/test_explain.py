"""Codes explained: words against a slow twin, the tree of prefixes, the page, and the command."""

import json
import math
import random
import re
from html.parser import HTMLParser

import pytest
from tiny import make_dataset

from minionerec.common.files import InputError, read_json
from minionerec.common.texts import list_categories
from rq.explain import explain
from rq.index.explained_page import build_page
from rq.index.prefixes import explain_prefixes
from rq.settings import ExplainFlags

WORDS = "steel brass bolt nut glass flask thread long".split()


def draw_items(seed):
    """(index of SIDs of one to three tokens, some shared, items with few words) in random order."""
    rng = random.Random(seed)
    index, items = {}, {}
    for item in rng.sample(range(100), rng.choice([1, 5, 40])):
        index[item] = tuple(f"<{'abc'[level]}_{rng.choice([1, 2, 10])}>" for level in range(rng.randint(1, 3)))
        items[item] = {
            "title": " ".join(rng.choices(WORDS, k=rng.randint(0, 3))),
            "description": " ".join(rng.choices(WORDS, k=rng.randint(0, 2))),
            "categories": rng.choice(["Tools > Saws", "Tools, Lamps", ""]),
        }
    return index, items


def explain_slowly(index, items, prefix):
    """{word: weight} of a prefix, item by item."""

    def has(item, word):
        return word in (items[item]["title"] + " " + items[item]["description"]).split()

    inside = [item for item in index if index[item][: len(prefix)] == prefix]
    for length in (len(prefix) - 1, 0):
        around = [item for item in index if index[item][:length] == prefix[:length]]
        if len(around) > len(inside):
            break
    others = [item for item in around if item not in inside]
    weights = {}
    for word in WORDS:
        if sum(has(item, word) for item in index) < min(2, len(index)):
            continue
        a, b = (sum(has(item, word) for item in group) for group in (inside, others))
        ratio = (a + 0.5) / (len(inside) + 1) / ((b + 0.5) / (len(others) + 1))
        weights[word] = a / len(inside) * math.log(ratio)
    return inside, weights


@pytest.mark.parametrize("seed", range(10))
def test_prefixes_against_a_slow_twin(seed):
    index, items = draw_items(seed)
    explained = explain_prefixes(index, items, 3, 2)
    prefixes = {sid[:length] for sid in index.values() for length in range(1, len(sid) + 1)}
    assert len(explained) == len(prefixes) and {row["prefix"] for row in explained} == {"".join(p) for p in prefixes}
    for row in explained:
        prefix = tuple(re.findall("<[^>]+>", row["prefix"]))
        inside, weights = explain_slowly(index, items, prefix)
        assert (row["level"], row["items"]) == (len(prefix), len(inside))
        best = sorted((weight for weight in weights.values() if weight > 0), reverse=True)[:3]
        assert [weights[word] for word in row["words"]] == pytest.approx(best)
        titles = {items[item]["title"] for item in inside} - {""}
        assert len(row["titles"]) == min(2, len(titles)) and set(row["titles"]) <= titles
        for name, share in row["categories"]:
            assert share == round(sum(name in items[item]["categories"] for item in inside) / len(inside), 4)


def test_the_order_is_that_of_the_tree():
    index = {0: ("<a_10>", "<b_1>"), 1: ("<a_9>",), 2: ("<a_9>", "<b_11>"), 3: ("<a_9>", "<b_2>")}
    items = {item: {"title": f"title {item}"} for item in index}
    prefixes = [row["prefix"] for row in explain_prefixes(index, items, 3, 3)]
    assert prefixes == ["<a_9>", "<a_9><b_2>", "<a_9><b_11>", "<a_10>", "<a_10><b_1>"]


def test_a_word_of_the_parent_does_not_tell_its_children_apart():
    titles = ["red drill", "blue drill", "red lamp", "blue lamp"]
    index = {item: (f"<a_{item // 2}>", f"<b_{item % 2}>") for item in range(4)}
    explained = explain_prefixes(index, {item: {"title": title} for item, title in enumerate(titles)}, 1, 1)
    words = {row["prefix"]: row["words"] for row in explained}
    assert words["<a_0>"] == ["drill"] and words["<a_1>"] == ["lamp"]
    assert words["<a_0><b_0>"] == ["red"] and words["<a_1><b_1>"] == ["blue"]


@pytest.mark.parametrize(
    "value, categories",
    [
        ("Beauty > Makeup > Nails", ["Beauty", "Makeup", "Nails"]),
        ([["Tools & Home", "Saws"], ["Saws > Long"]], ["Tools & Home", "Saws", "Long"]),
        ("Action, Comedy,Comedy", ["Action", "Comedy"]),
        ("", []),
        (None, []),
    ],
)
def test_categories(value, categories):
    assert list_categories(value) == categories


class Reader(HTMLParser):
    """The tags that are open, the texts, and the attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.attributes = [], "", []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("seed", range(4))
def test_the_page_is_whole_and_needs_nothing_else(seed):
    index, items = draw_items(seed)
    next(iter(items.values()))["title"] = 'saw <script>alert("x")</script> & more'
    explained = explain_prefixes(index, items, 3, 2)
    page = build_page("toy", len(index), explained)
    reader = Reader()
    reader.feed(page)
    assert not reader.open and page.count("<script>") == 1
    assert not {name for name, _ in reader.attributes} & {"src", "href"} and "http" not in page
    nodes = [value for name, value in reader.attributes if name == "data-text"]
    assert len(nodes) == len(explained)
    for row, text in zip(explained, nodes, strict=True):
        assert row["prefix"] in text and all(word in text for word in row["words"])
        assert all(title in reader.text for title in row["titles"])


def test_the_command(tmp_path):
    paths = make_dataset(tmp_path, deep=True)
    flags = {"index": paths["sid_index_path"], "items": paths["item_meta_path"]}
    explain(ExplainFlags(**flags))
    content = read_json(tmp_path / "toy.index.explained.json")
    assert content["items"] == 30 and (tmp_path / "toy.index.explained.html").read_text().startswith("<!doctype html>")
    assert {row["prefix"] for row in content["prefixes"] if row["level"] == 1} == {f"<a_{code}>" for code in range(5)}
    explain(ExplainFlags(**flags, output=str(tmp_path / "other"), words=1, examples=1))
    assert all(len(row["titles"]) == 1 for row in read_json(tmp_path / "other.json")["prefixes"])
    with pytest.raises(InputError, match="--words 0: expected 1 or more"):
        explain(ExplainFlags(**flags, words=0))
    items = json.loads((tmp_path / "toy.item.json").read_text())
    del items["7"]
    (tmp_path / "few.item.json").write_text(json.dumps(items))
    with pytest.raises(InputError, match=r"few.item.json: item 7 of .*toy.index.json is missing"):
        explain(ExplainFlags(index=flags["index"], items=str(tmp_path / "few.item.json")))
