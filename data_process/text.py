"""Catalogue texts, as shops write them, into plain lines."""

from __future__ import annotations

import ast
import html
import re

_UNSEEN = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")


def clean(value: object) -> str:
    """One line of plain text; Amazon writes descriptions as a list, or as the text of a list literal, with HTML.

    Entities are decoded once; tags go, scripts, styles and comments go with what they enclose.
    """
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    if isinstance(value, list):
        value = " ".join(clean(part) for part in value)
    text = html.unescape(str(value or ""))
    if "<" in text:
        text = _TAG.sub(" ", _UNSEEN.sub(" ", text))
    return " ".join(text.split())
