"""Python files of a user that add a task, a reward or a baseline without a change to the project."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from minionerec.common.files import InputError


def load_module(path: str, flag: str) -> ModuleType:
    """Run a Python file that the user named, as a module.

    Raises:
        InputError: no such Python file, or one that fails while it is run.
    """
    if not path.endswith(".py") or not Path(path).is_file():
        raise InputError(f"--{flag} {path}: expected a Python file that exists")
    spec = importlib.util.spec_from_file_location(f"{flag}_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # what it defines goes to worker processes, which look it up by this name
    try:
        spec.loader.exec_module(module)
    except InputError:
        raise
    except Exception as error:  # whatever a user's file may raise
        raise InputError(f"--{flag} {path}: does not load ({error!r})") from None
    return module


def load_plugins(paths: Sequence[str] | None) -> None:
    """Run the files of --plugin; each registers what it adds."""
    for path in paths or ():
        load_module(path, "plugin")
