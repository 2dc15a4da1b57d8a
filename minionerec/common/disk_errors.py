"""Disks that are full or cannot be written, in one line."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

# What libraries say where a write failed, without the number of the error.
FULL_DISK = ("no space left", "disk quota", "pytorchstreamwriter failed", "file write failed", "os error 28")
FULL_DISK += ("iostream error", "inline_container")  # of torch.save
READ_ONLY = ("read-only file system", "permission denied", "os error 30", "os error 13")
OUTPUT_FLAGS = ("output_dir", "output_path", "ckpt_dir", "output_file", "result_json_data", "output", "root", "run_dir")


def explain_disk_error(error: BaseException, flags: Any) -> str | None:
    """One line for a disk that is full or cannot be written, None for any other error.

    Args:
        error: what a command ended with; what it came from is looked at too.
        flags: those of the command, which name its output where the error names no file.
    """
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen).lower()
        number = seen.errno if isinstance(seen, OSError) else None
        full = number in (errno.ENOSPC, errno.EDQUOT) or any(words in text for words in FULL_DISK)
        closed = number in (errno.EROFS, errno.EACCES, errno.EPERM) or any(words in text for words in READ_ONLY)
        if full or closed:
            named = getattr(seen, "filename", None) or next(
                (value for name in OUTPUT_FLAGS if isinstance(value := getattr(flags, name, None), str)), "."
            )
            folder = Path(os.fsdecode(named)).absolute()
            while not folder.is_dir():
                folder = folder.parent
            if closed:
                return f"{named}: cannot be written (read-only, or not yours: {folder}); choose another output"
            free = shutil.disk_usage(folder).free
            return f"{named}: the disk is full ({free / 2**20:,.0f} MiB free at {folder}); make room and start again"
        seen = seen.__cause__ or seen.__context__
    return None
