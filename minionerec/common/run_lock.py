"""One run at a time into one output, and what killed runs left behind removed by the next one.

The lock is a lock of the operating system on a small file beside the stage's record, which a killed process loses with
its life: a file that nobody holds is stale, whatever stands in it. What stands there, host and process, is for people.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from minionerec.common.files import TEMPORARY, InputError, is_running

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None

_HELD: dict[Path, int] = {}  # lock file -> descriptor, of this process


def take_lock(path: Path, what: str) -> None:
    """Hold the lock file `path` until `release_lock` or the end of this process.

    Args:
        path: of the lock file.
        what: the output that it guards, for the error.

    Raises:
        InputError: another process holds it.
    """
    path = path.absolute()
    if fcntl is None or path in _HELD:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise InputError(
                f"{what}: another run is writing there ({_read_holder(path)}); wait for it, or choose another output"
            ) from None
        except OSError:  # a disk without locks
            os.close(descriptor)
            return
        # Whoever held it before may have removed the file between the two calls: then this is not the one others see.
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            break
        os.close(descriptor)
    holder = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(holder).encode())
    if not _HELD:
        atexit.register(_release_all, os.getpid())
    _HELD[path] = descriptor


def release_lock(path: Path) -> None:
    """Remove the lock file and let others have it; nothing where it is not held."""
    descriptor = _HELD.pop(path.absolute(), None)
    if descriptor is not None:
        path.unlink(missing_ok=True)  # while it is held, so that nobody else's is removed
        os.close(descriptor)


def _release_all(process: int) -> None:
    if os.getpid() == process:  # a forked child has no lock, but this list
        for path in list(_HELD):
            release_lock(path)


def _read_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"it holds {path}"


def remove_stale_files(folder: Path, outputs: Iterable[Path]) -> list[Path]:
    """Remove the temporary files that killed runs left in a folder and beside outputs; returns their paths.

    Called by who holds the lock. A temporary file of an output belongs to no living run then; of other files in the
    folder only those of dead processes of this machine are removed. An old folder that stepped aside for a new one
    that never came takes its place again.
    """
    names = {path.absolute() for path in outputs}
    removed = []
    for parent in {folder.absolute(), *(path.parent for path in names)}:
        for path in sorted(parent.glob("*.tmp-*")) if parent.is_dir() else ():
            match = re.fullmatch(TEMPORARY, path.name)
            if not match:
                continue
            target, own = parent / match["name"], match["host"] == socket.gethostname()
            if int(match["process"]) == os.getpid() and own:
                continue
            if target not in names and (not own or is_running(int(match["process"]))):
                continue
            if match["aside"] and not target.exists():
                os.rename(path, target)
                continue
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            removed.append(path)
    return removed
