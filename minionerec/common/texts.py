"""Catalogue texts, as shops write them, into plain lines."""

from __future__ import annotations

import ast
import html
import re
import textwrap
from collections.abc import Sequence

STEPS = re.compile(r"\s*[>|;]\s*")  # what stands between the steps of a category

SHOWN_CHARACTERS = 60  # of a title that stands beside others in a line
MAX_CHARACTERS = 400  # of a description, where texts of items are compared

# Ways in which tables write that there is no value; str() of what pandas and JSON have for it, too.
MISSING = frozenset(("nan", "none", "null", "<na>", "nat", "n/a"))

_UNSEEN = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")


def list_texts(titles: Sequence[str], descriptions: Sequence[str]) -> list[str]:
    """The texts that a tokenizer from scratch is trained on: those that are not empty."""
    return [text for text in (*titles, *descriptions) if text]


def join_item_texts(titles: Sequence[str], descriptions: Sequence[str]) -> list[str]:
    """What each item is about: its title and the beginning of its description."""
    return [f"{title} {description[:MAX_CHARACTERS]}" for title, description in zip(titles, descriptions, strict=True)]


def shorten_title(title: str) -> str:
    """A title that fits a line beside others, cut between words."""
    return textwrap.shorten(title, SHOWN_CHARACTERS, placeholder=" ...") or "an item without a title"


def clean_text(value: object) -> str:
    """One line of plain text.

    Amazon writes descriptions as a list, or as the text of a list literal, with HTML. Entities are decoded once; tags
    go, scripts, styles and comments go with what they enclose. A word that stands for a missing value is no text, and
    half of a surrogate pair, which no UTF-8 file can hold, becomes "?".
    """
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    if isinstance(value, list):
        value = " ".join(clean_text(part) for part in value)
    text = html.unescape(str(value or ""))
    if "<" in text and text.strip().lower() not in MISSING:
        text = _TAG.sub(" ", _UNSEEN.sub(" ", text))
    text = " ".join(text.split())
    if text.lower() in MISSING:
        return ""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def list_categories(value: object) -> list[str]:
    """The categories of an item: the steps of `Beauty > Makeup > Nails`, of lists of them, or words with commas."""
    if isinstance(value, list):
        return list(dict.fromkeys(category for part in value for category in list_categories(part)))
    text = clean_text(value)
    parts = STEPS.split(text) if STEPS.search(text) else text.split(",")
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))
