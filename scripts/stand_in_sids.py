"""Random semantic IDs, unlike each other, in place of those that a run has yet to learn.

scripts/dry_run.sh makes them in a temporary folder, so that the stages that read semantic IDs can be planned: how many
tokens a prompt has, and how large the vocabulary is, depends on the number of levels and codes alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import flag, parse_flags, run_command
from minionerec.common.settings import SeedFlags


@dataclass
class StandInFlags(SeedFlags):
    """The table."""

    item_meta_path: str = flag(help="NAME.item.json, whose items get SIDs")
    output_file: str = flag(help="NAME.index.json to write")
    codes: list[int] = flag((256, 256, 256), "codes of every level")
    own_token: bool = flag(False, "give every item one more token, which is no other's")


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(StandInFlags)

import math
import random
import string

from minionerec.common.files import read_json, write_json


def draw_sids(count: int, codes: list[int], own_token: bool, seed: int) -> list[list[str]]:
    """`count` different SIDs, drawn at random.

    Args:
        count: of items.
        codes: of every level. own_token: each item has one more token, which is no other's. Where `codes` make fewer
            SIDs than there are items, one more level tells the items apart.
        seed: of the drawing.
    """
    generator = random.Random(seed)
    possible = math.prod(codes)
    sizes = codes if count <= possible else [*codes, -(-count // possible)]
    if own_token:
        sizes, numbers = codes, [generator.randrange(possible) for _ in range(count)]
    else:
        numbers = generator.sample(range(math.prod(sizes)), count)
    sids = []
    for item, number in enumerate(numbers):
        tokens = []
        for letter, size in zip(string.ascii_lowercase, sizes, strict=False):
            number, code = divmod(number, size)
            tokens.append(f"<{letter}_{code}>")
        sids.append([*tokens, f"<{string.ascii_lowercase[len(sizes)]}_{item}>"] if own_token else tokens)
    return sids


def write_stand_in_sids(flags: StandInFlags) -> None:
    """Write the index."""
    items = list(read_json(flags.item_meta_path, "item_meta_path"))
    sids = draw_sids(len(items), flags.codes, flags.own_token, flags.seed)
    write_json(flags.output_file, dict(zip(items, sids, strict=True)))


if __name__ == "__main__":
    run_command(write_stand_in_sids, FLAGS)
