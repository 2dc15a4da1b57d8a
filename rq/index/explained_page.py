"""The page of explained prefixes: the tree of codes to open and close, with a field that finds words."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1c2733 }
details { margin-left: 1.1rem; border-left: 1px solid #d5dde5; padding-left: .6rem }
summary, .leaf { cursor: pointer; padding: .15rem 0 }
.leaf { margin-left: 1.1rem; padding-left: 1.4rem; cursor: auto }
code { background: #eef2f6; padding: 0 .25rem; border-radius: 3px }
.size { color: #5b6b7b } .words { font-weight: 600 } .more { color: #5b6b7b; margin: 0 0 .3rem 1.4rem }
input { font: inherit; width: 100%; padding: .4rem; margin: .6rem 0 1rem } .hidden { display: none }
"""
# A node is shown if it or what is below it has the text; what is shown because of something below it is opened.
SCRIPT = """
const field = document.querySelector("input"), roots = [...document.querySelectorAll("main > .node")];
function look(node, text) {
  const below = [...node.children].filter(child => child.classList.contains("node"));
  const inside = below.map(child => look(child, text)).some(found => found);
  const own = node.dataset.text.includes(text);
  if (own) below.forEach(child => child.classList.remove("hidden"));
  node.classList.toggle("hidden", !(own || inside));
  if (node.tagName === "DETAILS") node.open = text !== "" && inside;
  return own || inside;
}
field.addEventListener("input", () => roots.forEach(node => look(node, field.value.trim().toLowerCase())));
"""


def _describe(node: dict[str, Any]) -> tuple[str, str]:
    """(the line of a prefix, what stands below it), as HTML."""
    token = escape(node["prefix"][node["prefix"].rindex("<") :])
    words = escape(", ".join(node["words"])) or "&mdash;"
    line = f'<code>{token}</code> <span class="size">{node["items"]:,}</span> <span class="words">{words}</span>'
    shares = [f"{escape(name)} {share:.0%}" for name, share in node["categories"]]
    below = [" &middot; ".join(shares), *map(escape, node["titles"])]
    return line, "<br>".join(text for text in below if text)


def build_page(name: str, items: int, prefixes: Sequence[dict[str, Any]]) -> str:
    """A whole HTML page without other files.

    Args:
        name: of the index.
        items: how many it has.
        prefixes: of `explain_prefixes`, in the order of the tree.
    """
    parts, open_levels = [], []
    for node, following in zip(prefixes, [*prefixes[1:], None], strict=True):
        while open_levels and open_levels[-1] >= node["level"]:
            open_levels.pop()
            parts.append("</details>")
        line, below = _describe(node)
        text = escape(" ".join((node["prefix"], *node["words"], *node["titles"])).lower(), quote=True)
        if following and following["level"] > node["level"]:
            open_levels.append(node["level"])
            parts.append(f'<details class="node" data-text="{text}"><summary>{line}</summary>')
            parts.append(f'<p class="more">{below}</p>')
        else:
            parts.append(f'<div class="node leaf" data-text="{text}">{line}<br>{below}</div>')
    parts += ["</details>"] * len(open_levels)
    title = f"What the codes of {escape(name)} stand for"
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>
<body>
<h1>{title}</h1>
<p>{items:,} items. Of every prefix: its last code, how many items it has, and the words that tell it from the items
beside it; below, its categories with their share, and titles.</p>
<input type="search" placeholder="a word, a title or a code" aria-label="search">
<main>
{body}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""
