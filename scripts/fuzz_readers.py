"""Mutated files for every reader: each must be read to the right value or be refused in one line.

python -m scripts.fuzz_readers --files 10000

A file that is whole is mutated one to four times (bytes flipped, pieces cut out, doubled or moved, odd texts put in,
other encodings) and given to its reader. What the reader accepts is held against a second, plain reading of the same
bytes. The last line sums it up; the exit status is 1 where anything else than an `InputError` of one line was raised,
or a value was wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import Flags, flag, parse_flags, run_command


@dataclass
class FuzzFlags(Flags):
    """Mutations."""

    files: int = flag(10_000, "mutated files in all, shared out over the readers")
    seed: int = flag(0, "of the mutations")
    readers: list[str] | None = flag(None, "names of the readers to try", default_text="all")


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(FuzzFlags)

import contextlib
import io
import random
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

from minionerec.common.files import InputError
from minionerec.common.processes import say
from scripts.fuzz_files import Reader, build_readers

ODD = (
    *(
        "\x00",
        "\r",
        "\r\n",
        "\n",
        "\t",
        '"',
        "'",
        "\\",
        ",",
        "[",
        "]",
        "{",
        "}",
        ":",
        "- ",
        "&x *x",
        "!!int x",
        "%",
        "﻿",
    ),
    *(
        "nan",
        "None",
        "null",
        "true",
        "1e309",
        "-1",
        "01",
        "1_0",
        "3.0",
        "٣",
        "9" * 25,
        "9" * 5000,
        "NaN",
        "Infinity",
        "2001-99-99",
    ),
    *(
        "\\ud83d",
        "\\u0000",
        "🛠",
        "é",
        "​",
        "[" * 3000,
        "<a_1>",
        "<z_9>",
        "<script>",
        "&amp;",
        "{" * 50,
        "? [a]: b\n",
        "<<: x\n",
    ),
)


# ------------------------------------------------------------------------------------------------------------ mutations
def mutate(content: bytes, draws: random.Random) -> bytes:
    """The content after one mutation."""
    size = len(content)
    place, end = sorted((draws.randint(0, size), draws.randint(0, size)))
    end = min(end, place + draws.choice((1, 3, 20, 500)))
    piece = content[place:end]
    odd = draws.choice(ODD).encode("utf-8", "replace")
    lines = content.split(b"\n")
    one, two = draws.randrange(len(lines)), draws.randrange(len(lines))
    kind = draws.randrange(14)
    if kind == 0 and size:
        changed = bytearray(content)
        changed[min(place, size - 1)] = draws.randrange(256)
        return bytes(changed)
    if kind == 1:
        return content[:place] + content[end:]
    if kind == 2:
        return content[:end] + piece + content[end:]
    if kind == 3:
        return content[:place]
    if kind in (4, 5, 6):
        return content[:place] + odd + content[place if kind < 6 else end :]
    if kind == 7:
        lines[one], lines[two] = lines[two], lines[one]
    if kind == 8:
        lines.insert(one, lines[two])
    if kind == 9:
        del lines[one]
    if kind in (7, 8, 9):
        return b"\n".join(lines)
    if kind == 10:
        digits = [number for number, byte in enumerate(content) if 48 <= byte <= 57] or [0]
        at = draws.choice(digits)
        return content[:at] + str(draws.choice((-1, 0, 7, 99, 10**20))).encode() + content[at + 1 :]
    if kind == 11:
        return content.replace(b"\n", draws.choice((b"\r\n", b"\r", b"\n\n", b" ")))
    if kind == 12:
        return draws.choice(
            (b"", b"\n", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", content[::-1])
        )
    return content.decode("utf-8", "replace").encode(draws.choice(("utf-16", "utf-8-sig", "latin-1")), "replace")


def try_reader(reader: Reader, content: bytes, folder: Path) -> tuple[str, str]:
    """("read" | "refused" | "traceback" | "wrong", what was wrong) of one file."""
    path = folder / reader.name
    path.write_bytes(content)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            value = reader.read(path)
    except InputError as error:
        text = str(error)
        return ("refused", "") if text and len(text.splitlines()) == 1 else ("wrong", f"not one line: {text!r}")
    except Exception:
        return "traceback", traceback.format_exc(limit=-3)
    if reader.twin is None:
        return "read", ""
    try:
        expected = reader.twin(content)
    except Exception as error:
        return "wrong", f"accepted, but a plain reading fails: {error!r}"
    same = value == expected
    return ("read", "") if same else ("wrong", f"read {str(value)[:300]}, expected {str(expected)[:300]}")


def fuzz_readers(flags: FuzzFlags) -> None:
    """Mutate and read; print what went wrong, a table, and one line.

    Raises:
        InputError: a reader that there is not.
    """
    readers = build_readers()
    for name in flags.readers or ():
        if name not in readers:
            raise InputError(f"--readers {name}: expected one of {', '.join(readers)}")
    chosen = {name: reader for name, reader in readers.items() if not flags.readers or name in flags.readers}
    counts: dict[str, Counter[str]] = {name: Counter() for name in chosen}
    with tempfile.TemporaryDirectory() as folder:
        for name, reader in chosen.items():
            outcome, what = try_reader(reader, reader.content, Path(folder))
            if outcome != "read":
                raise InputError(f"{name}: its own whole file is not read: {what}")
        for number in range(flags.files):
            name = list(chosen)[number % len(chosen)]
            draws = random.Random(f"{flags.seed}-{number}")
            content = chosen[name].content
            for _ in range(draws.choice((1, 1, 1, 2, 4))):
                content = mutate(content, draws)
            outcome, what = try_reader(chosen[name], content, Path(folder))
            counts[name][outcome] += 1
            if what and sum(counts[name][kind] for kind in ("traceback", "wrong")) <= 3:
                say(f"[fuzz] {name}, file {number}: {outcome}: {what.strip()}\n  {content[:300]!r}")
    for name, count in counts.items():
        say(f"  {name:<20}" + "".join(f"{count[kind]:>8} {kind}" for kind in ("read", "refused", "traceback", "wrong")))
    total = sum(counts.values(), Counter())
    say(
        f"fuzz: {flags.files} mutated files for {len(chosen)} readers: {total['read']} read to the right value, "
        f"{total['refused']} refused in one line, {total['traceback']} tracebacks, {total['wrong']} wrong"
    )
    if total["traceback"] or total["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    run_command(fuzz_readers, FLAGS)
