"""What a file is instead of what it should be: seen by its first bytes, whatever its name says."""

from __future__ import annotations

import difflib
from pathlib import Path

LFS_POINTER = b"version https://git-lfs"
LFS_ADVICE = "a git-lfs pointer and not the file itself; run `git lfs pull` in its folder, or download it"
WEB_PAGES = (b"<!doctype html", b"<html")
GZIP = b"\x1f\x8b"
# Of what no reader of texts takes. A reader of such files themselves does not ask for them.
PACKED = {
    GZIP: "packed with gzip; unpack it with gunzip",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it with unzstd",
    b"BZh": "packed with bzip2; unpack it with bunzip2",
    b"PAR1": "a Parquet file; convert it to text",
    b"\x93NUMPY": "an array of numpy, and no text",
    b"\xff\xfe": "UTF-16 text; convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text; convert it to UTF-8",
}


def describe_stand_in(start: bytes) -> str | None:
    """What stands where a file should be, with what to do: a git-lfs pointer or a web page; None for anything else.

    Args:
        start: the first bytes of the file, 64 or more where it has so many.
    """
    if start.startswith(LFS_POINTER):
        return LFS_ADVICE
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(WEB_PAGES):
        return "a web page and not the file itself; download it again, by the link to the raw file"
    return None


def name_other_kind(path: Path) -> str | None:
    """What a file that should be text is instead; None where nothing is known against it."""
    start = read_start(path)
    return describe_stand_in(start) or describe_packed(start)


def describe_packed(start: bytes, allowed: tuple[bytes, ...] = ()) -> str | None:
    """What a file that should be text is instead, with what to do; None where nothing is known against it.

    Args:
        start: its first bytes. allowed: beginnings of `PACKED` that the caller reads.
    """
    found = (text for mark, text in PACKED.items() if mark not in allowed and start.startswith(mark))
    return next(found, None)


def read_start(path: Path) -> bytes:
    """The first bytes of a file, as the functions above want them."""
    with path.open("rb") as file:
        return file.read(64)


def hint_at_missing(path: Path, *, folders: bool = False) -> str:
    """What a path that is not there may be instead, for the end of an error: "; did you mean ...?", or nothing.

    Args:
        path: that was named. folders: only a folder will do.
    """
    packed = path.with_name(f"{path.name}.gz")
    if packed.is_file():
        return f"; {packed.name} is there: unpack it with gunzip"
    near = _find_near(path, folders)
    return f"; did you mean {near}?" if near else ""


def _find_near(path: Path, folders: bool) -> Path | None:
    """The file or folder that a misspelt path may mean."""
    parts, found = path.parts, Path()
    for number, part in enumerate(parts):
        if (found / part).exists():
            found = found / part
            continue
        try:
            names = sorted(child.name for child in found.iterdir() if child.is_dir() or not folders)
        except OSError:  # no folder, or one that may not be read
            return None
        near = difflib.get_close_matches(part, names, n=1, cutoff=0.6)
        if not near:
            return None
        candidate = found.joinpath(near[0], *parts[number + 1 :])
        return candidate if candidate.exists() else found / near[0]
    return None
