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


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(StandInFlags)

import math
import random
import string

from minionerec.common.files import InputError, read_json, write_json


def draw_sids(count: int, codes: list[int], seed: int) -> list[list[str]]:
    """`count` different SIDs, drawn at random.

    Args:
        count: of items.
        codes: of every level. seed: of the drawing.

    Raises:
        InputError: fewer SIDs than items.
    """
    if count > math.prod(codes):
        raise InputError(f"--codes {','.join(map(str, codes))}: make fewer SIDs than there are items, {count:,}")
    numbers = random.Random(seed).sample(range(math.prod(codes)), count)
    sids = []
    for number in numbers:
        tokens = []
        for letter, size in zip(string.ascii_lowercase, codes, strict=False):
            number, code = divmod(number, size)
            tokens.append(f"<{letter}_{code}>")
        sids.append(tokens)
    return sids


def write_stand_in_sids(flags: StandInFlags) -> None:
    """Write the index."""
    items = list(read_json(flags.item_meta_path, "item_meta_path"))
    write_json(flags.output_file, dict(zip(items, draw_sids(len(items), flags.codes, flags.seed), strict=True)))


if __name__ == "__main__":
    run_command(write_stand_in_sids, FLAGS)
