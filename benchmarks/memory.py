"""The memory of this process; it imports nothing that would add to it."""

from __future__ import annotations

import resource
import sys


def read_peak_memory_mb() -> int:
    """Largest resident memory of this process so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20
