"""What a file is instead of what it should be: seen by its first bytes, whatever its name says."""

from __future__ import annotations

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
