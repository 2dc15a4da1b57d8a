"""The page of scripts/demo.py, made with gradio, which scripts/demo.sh installs."""

from __future__ import annotations

import html
import re
from typing import Any

import gradio

from minionerec.common.files import InputError
from minionerec.common.records import SID_TOKEN
from minionerec.evaluation.histories import normalise_title
from minionerec.evaluation.recommender import Recommender
from minionerec.evaluation.requests import answer_requests, read_request
from minionerec.evaluation.search_levels import trace_levels

SHOWN = 10  # recommendations, and beams of a level
DEFAULT_WEIGHT = 0.0  # of the baselines on the page: what is shown first is the model alone
FOUND = 12  # titles that a search shows
STYLE = """
.items table, .levels table {border-collapse: collapse; border: none !important; margin: .3rem 0}
.items table {width: 100%}
.items tr, .levels tr {border: none}
.items tr {border-bottom: 1px solid #8884}
.items th {border: none !important; font-weight: normal; font-size: .85rem; padding: 0 .6rem 0 0}
.items td {padding: .4rem .6rem .4rem 0; border: none; vertical-align: top}
.items td:last-child {text-align: right; white-space: nowrap}
.items .title {font-weight: 600}
.items .more {font-size: .85rem; opacity: .75; overflow-wrap: anywhere}
.levels {display: flex; flex-wrap: wrap; gap: 1rem}
.levels table {font-size: .85rem}
.levels td {padding: .1rem .5rem .1rem 0; text-align: left; white-space: nowrap; border: none}
.levels .lost td {opacity: .5}
.levels .bar {display: inline-block; height: .6rem; background: #0072b2; vertical-align: middle; margin-right: .3rem}
"""


class DemoPage:
    """What the page's buttons do.

    Args:
        recommender: the model.
    """

    def __init__(self, recommender: Recommender):
        self.recommender = recommender
        catalogue = recommender.catalogue
        self.titles = [normalise_title(title) for title in catalogue.titles]
        # Popular items first: those that somebody who tries the page will know.
        order = sorted(range(len(catalogue.item_ids)), key=lambda n: -catalogue.counts.get(catalogue.item_ids[n], 0))
        self.by_popularity = order
        texts = recommender.known.categories.values()
        self.categories = sorted({part.strip() for text in texts for part in re.split(r"[,;>|]", text) if part.strip()})

    def find_titles(self, text: str) -> Any:
        """The choices of the list of titles that hold all words of `text`, popular ones first."""
        words = normalise_title(text).split()
        catalogue = self.recommender.catalogue
        found = [n for n in self.by_popularity if all(word in self.titles[n] for word in words)][:FOUND]
        return gradio.update(
            choices=[(catalogue.titles[n], catalogue.item_ids[n]) for n in found],
            value=None,
            label=f"Titles ({len(found)} shown): choose one to add it to the history" if found else "No such title",
        )

    def add_item(self, item: int | None, history: list[int]) -> tuple[list[int], str]:
        """The history with an item more, and as text."""
        history = [*history, item] if item is not None else history
        return history, self.describe_history(history)

    def describe_history(self, history: list[int]) -> str:
        """The history as a numbered list."""
        catalogue = self.recommender.catalogue
        titles = dict(zip(catalogue.item_ids, catalogue.titles, strict=True))
        return "\n".join(f"{n}. {titles[item]}" for n, item in enumerate(history, 1)) or "*empty: add a title*"

    def show(
        self, history: list[int], k: int, num_beams: int, fuse_weight: float, exclude_seen: bool, categories: list[str]
    ) -> tuple[str, str]:
        """(the list, the search tree), both as HTML."""
        if not history:
            raise gradio.Error("The history is empty: search a title and choose it first.", print_exception=False)
        k = min(int(k), int(num_beams))
        try:
            most = self.recommender.num_beams
            request = read_request(history, k, exclude_seen, categories, int(num_beams), most, fuse_weight)
            (answer,) = answer_requests(self.recommender, [request])
            if "error" in answer:
                raise InputError(answer["error"])
            found = self.recommender.finder.find_history(history)
            levels = trace_levels(self.recommender, found, k, exclude_seen, categories, int(num_beams))
        except InputError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        return draw_list(answer["recommendations"]), draw_levels(levels)


def format_share(value: float) -> str:
    """A probability in percent, small ones to two digits that say something."""
    return f"{value:.1%}" if value >= 0.1 else f"{100 * value:.2g}%"


def draw_list(items: list[dict[str, Any]]) -> str:
    """The recommendations as a table: rank, title with reason and SID below it, probability by the model."""
    rows = []
    for rank, item in enumerate(items, 1):
        title, reason, sid = (html.escape(text) for text in (item["title"], item["reason"] or "model", item["sid"]))
        texts = f'<div class="title">{title}</div><div class="more"><span>{reason}</span> · <code>{sid}</code></div>'
        rows.append(f"<tr><td>{rank}</td><td>{texts}</td><td>{format_share(item['probability'])}</td></tr>")
    head = "<tr><th></th><th></th><th style='text-align:right'>by the model</th></tr>"
    return f'<div class="items"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def draw_levels(levels: list[list[Any]]) -> str:
    """The beams after every level as tables side by side; pale ones led to nothing."""
    parts = []
    for number, beams in enumerate(levels, 1):
        kept = sum(beam.survives for beam in beams)
        widest = max((beam.probability for beam in beams), default=1.0)
        lines = [
            f'<tr class="{"kept" if beam.survives else "lost"}"><td>{html.escape(shorten_prefix(beam.prefix))}</td>'
            f'<td><span class="bar" style="width:{4 * beam.probability / widest:.2f}rem"></span>'
            f"{format_share(beam.probability)}</td></tr>"
            for beam in beams[:SHOWN]
        ]
        outcome = "are in the list" if number == len(levels) else "went on"
        head = f"Code {number}: {len(beams)} beams, {kept} {outcome}"
        parts.append(f"<div><b>{head}</b><table>{''.join(lines)}</table></div>")
    return f'<div class="levels">{"".join(parts)}</div>'


def shorten_prefix(prefix: str) -> str:
    """The last token of a prefix with what stands before it."""
    return " ".join(token[1:-1] for token in SID_TOKEN.findall(prefix))


def build_demo_page(recommender: Recommender, name: str, batch_size: int) -> gradio.Blocks:
    """The page and its API.

    Args:
        recommender: the model.
        name: of its folder, shown at the top.
        batch_size: requests of the API that are searched together, at most.
    """
    page, most = DemoPage(recommender), recommender.num_beams

    def recommend(
        history: list[list],
        k: list[int],
        exclude_seen: list[bool],
        categories: list[list],
        num_beams: list[int],
        fuse_weight: list[float | None],
    ) -> list[list[dict]]:
        requests = []
        for *asked, weight in zip(history, k, exclude_seen, categories, num_beams, fuse_weight, strict=True):
            try:
                requests.append(read_request(*asked, most, weight))
            except InputError as error:
                requests.append(error)
        return [answer_requests(recommender, requests)]

    with gradio.Blocks(title="MiniOneRec") as blocks:
        gradio.Markdown(f"# MiniOneRec\n{len(page.titles):,} items, model `{html.escape(name)}`")
        history = gradio.State([])
        with gradio.Row():
            with gradio.Column(min_width=320):
                text = gradio.Textbox(label="Search titles", placeholder="words of a title", elem_id="search")
                titles = gradio.Radio(label="Titles", choices=[], elem_id="titles")
                gradio.Markdown("History, oldest first")
                shown = gradio.Markdown(page.describe_history([]), elem_id="history", container=True)
                with gradio.Row():
                    undo, clear = gradio.Button("Remove last"), gradio.Button("Clear")
                k = gradio.Slider(1, min(50, most), value=min(SHOWN, most), step=1, label="Items to show", elem_id="k")
                beams = gradio.Slider(1, most, value=most, step=1, label="Beams", elem_id="beams")
                weight = gradio.Slider(
                    0,
                    1,
                    value=DEFAULT_WEIGHT,
                    step=0.05,
                    label="Weight of counting and likeness of titles (above 0 they rank too, and give reasons)",
                    elem_id="weight",
                    visible=recommender.fused is not None,
                )
                unseen = gradio.Checkbox(True, label="Leave out the history", elem_id="unseen")
                chosen = gradio.Dropdown(
                    page.categories,
                    multiselect=True,
                    label="Categories",
                    visible=bool(page.categories),
                    elem_id="categories",
                )
                button = gradio.Button("Recommend", variant="primary", elem_id="go")
            with gradio.Column(scale=2, min_width=320):
                gradio.Markdown("### Recommendations")
                table = gradio.HTML("<p>Search a title, choose it, and press Recommend.</p>", elem_id="list")
                gradio.Markdown("### The search, code by code")
                tree = gradio.HTML(elem_id="tree")
        private = {"api_visibility": "private"}
        blocks.load(lambda: page.find_titles(""), None, titles, **private)
        text.change(page.find_titles, text, titles, show_progress="hidden", **private)
        titles.input(page.add_item, [titles, history], [history, shown], show_progress="hidden", **private)
        undo.click(lambda items: page.add_item(None, items[:-1]), history, [history, shown], **private)
        clear.click(lambda: page.add_item(None, []), None, [history, shown], **private)
        button.click(page.show, [history, k, beams, weight, unseen, chosen], [table, tree], **private)
        gradio.api(recommend, api_name="recommend", batch=True, max_batch_size=batch_size)
    return blocks
