"""What the codes of semantic IDs stand for: every prefix of an index with its words, categories and example titles.

python -m rq.explain --index DIR/NAME.index.json --items DIR/NAME.item.json

Writes NAME.index.explained.json, which `recommend.py --explained_sids` reads, and NAME.index.explained.html, a page
that needs nothing else, beside the index.
"""

from __future__ import annotations

from pathlib import Path

from minionerec.common.cli import parse_flags, run_command
from rq.settings import ExplainFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(ExplainFlags)

from minionerec.common.files import InputError, write_json, write_text
from minionerec.common.items import read_items
from minionerec.common.records import read_index
from minionerec.common.stage import open_stage
from rq.index.explained_page import build_page
from rq.index.prefixes import explain_prefixes


def explain(flags: ExplainFlags) -> None:
    """Write what every prefix of an index stands for, as JSON and as a page.

    Raises:
        InputError: a number below 1, or an item of the index that the item file lacks.
    """
    for name in ("words", "examples"):
        if getattr(flags, name) < 1:
            raise InputError(f"--{name} {getattr(flags, name)}: expected 1 or more")
    path = Path(flags.index)
    stem = flags.output or str(path.with_name(path.name.removesuffix(".json"))) + ".explained"
    figures, page = Path(f"{stem}.json"), Path(f"{stem}.html")
    stage = open_stage("explain", flags, [flags.index, flags.items], [figures, page], f"{stem}.stage.json")
    if stage.finished:
        return
    index = read_index(flags.index, "index")
    items = read_items(flags.items, index, flags.index, "items")
    prefixes = explain_prefixes(index, items, flags.words, flags.examples)
    write_json(figures, {"index": flags.index, "items": len(index), "prefixes": prefixes})
    write_text(page, build_page(path.name, len(index), prefixes))
    first = [prefix for prefix in prefixes if prefix["level"] == 1]
    stage.done(items=len(index), prefixes=len(prefixes), first_codes=len(first))


if __name__ == "__main__":
    run_command(explain, FLAGS)
