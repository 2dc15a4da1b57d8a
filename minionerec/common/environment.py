"""What a run ran on: versions, machine, commit; recorded with every stage, so that a report can say it later."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "numpy", "faiss-cpu", "scikit-learn")


@cache
def describe_environment() -> dict[str, Any]:
    """{"python", "packages", "system", "processor", "cores", "memory_gb", "accelerators", "commit"} of this process.

    Accelerators are named where torch is loaded already; nothing is imported for them. The commit is that of the code,
    with "+" where files differ from it, and None outside a git checkout.
    """
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "packages": installed,
        "system": platform.platform(),
        "processor": _name_processor(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "memory_gb": _measure_memory(),
        "accelerators": _name_accelerators(),
        "commit": _find_commit(),
    }


def _name_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _measure_memory() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _name_accelerators() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _find_commit() -> str | None:
    root = Path(__file__).parents[2]

    def ask(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        if Path(ask("rev-parse", "--show-toplevel").strip()).resolve() != root.resolve():
            return None
        changed = ask("status", "--porcelain", "--untracked-files=no")
        return ask("rev-parse", "--short=10", "HEAD").strip() + ("+" if changed.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None
