"""What is wrong with a model folder or hub name, found before a library stumbles over it, in one line each.

All commands load models, tokenizers and encoders behind these checks: `check_model_source` looks at the files, and
`translate_errors` turns what a library raises all the same into one line.
"""

from __future__ import annotations

import os
import socket
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from minionerec.common.file_kinds import describe_stand_in, hint_at_missing, read_start
from minionerec.common.files import InputError, first_line, read_json

ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")
READ_AS_JSON = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    ADAPTER_CONFIG,
)
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
# {method in a config's "quantization_config": packages of which one must be there}
QUANTISED_BY = {
    "bitsandbytes": ("bitsandbytes",),
    "gptq": ("gptqmodel", "auto_gptq"),
    "awq": ("gptqmodel", "awq"),
    "aqlm": ("aqlm",),
    "hqq": ("hqq",),
    "quanto": ("optimum.quanto",),
    "eetq": ("eetq",),
    "compressed-tensors": ("compressed_tensors",),
    "torchao": ("torchao",),
}
HUB_SECONDS = 5  # to wait for the first answer of the hub


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds a peft adapter instead of a whole model."""
    return (Path(path) / ADAPTER_CONFIG).is_file() and not any(
        file.name.startswith(("model", "pytorch_model"))
        for pattern in WEIGHT_FILES
        for file in Path(path).glob(pattern)
    )


def check_model_source(path: str, flag: str, *, weights: bool = True, tokenizer: bool = True) -> dict[str, Any]:
    """Stop at a folder that cannot hold the model, or a hub name that nothing can come from.

    Args:
        path: a folder, or the name of a model on the hub.
        flag: the flag that named it.
        weights: whether weights are wanted from it. tokenizer: whether a tokenizer is.

    Returns:
        Arguments for every `from_pretrained` of it: what is on this disk is not asked for on the hub.

    Raises:
        InputError: what is wrong, with the file.
    """
    folder = Path(path)
    if not folder.is_dir():
        return _check_hub_name(path, flag)
    where = f"--{flag} {path}"
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    for file in files:
        _check_whole(file)
    names = {file.name for file in files}
    if "config.json" not in names and ADAPTER_CONFIG not in names and "modules.json" not in names:
        names_inside = ("final_checkpoint", *_list_folders(folder))
        inside = [name for name in names_inside if (folder / name / "config.json").is_file()]
        hint = f"; did you mean {folder / inside[0]}?" if inside else ""
        raise InputError(f"{where}: no model folder, it has no config.json{hint}")
    config = read_json(folder / "config.json") if "config.json" in names else {}
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'}: expected an object of settings")
    if "config.json" in names and "model_type" not in config and "modules.json" not in names:
        raise InputError(f"{folder / 'config.json'}: no config of a language model: it has no model_type")
    _check_quantisation(config, where)
    if weights and "modules.json" not in names:
        _check_weight_files(folder, where)
    if tokenizer and "modules.json" not in names and not names & set(TOKENIZER_FILES) and ADAPTER_CONFIG not in names:
        raise InputError(f"{where}: no tokenizer there ({', '.join(TOKENIZER_FILES[:3])}); copy it beside the weights")
    return {"local_files_only": True}


def _list_folders(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if child.is_dir())


def _check_whole(file: Path) -> None:
    """Stop at what stands in for a file, at broken settings, and at weights that are cut off."""
    start, size = read_start(file), file.stat().st_size
    problem = describe_stand_in(start)
    if problem:
        raise InputError(f"{file}: {problem}")
    if file.name in READ_AS_JSON:
        if not size:
            raise InputError(f"{file}: the file is empty; copy or download it again")
        read_json(file)
    damaged = f"{file}: cut off or damaged ({size:,} bytes); copy or download it again"
    if file.suffix == ".bin" and file.name.startswith(("pytorch_model", "adapter_model")):
        # A zip archive, whose directory is its end; files of before 2020 are bare pickles.
        if not size or start.startswith(b"PK") and not zipfile.is_zipfile(file):
            raise InputError(damaged)
    if file.suffix != ".safetensors":
        return
    length = struct.unpack("<Q", start[:8])[0] if size >= 8 else -1
    if length < 0 or length > size - 8:
        raise InputError(damaged)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        reason = first_line(error)
        raise InputError(f"{file}: cut off or damaged ({size:,} bytes; {reason}); copy or download it again") from None


def _check_weight_files(folder: Path, where: str) -> None:
    """Stop where no weights are, or a part of them is missing."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if not (folder / name).is_file():
            continue
        index = read_json(folder / name)
        parts = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(parts, dict) or not parts:
            raise InputError(f'{folder / name}: expected {{"weight_map": {{weight: file}}}}')
        missing = sorted({str(part) for part in parts.values() if not (folder / str(part)).is_file()})
        if missing:
            raise InputError(f"{folder}: {missing[0]}, which {name} names, is missing; copy or download it again")
        return
    if not any(True for pattern in WEIGHT_FILES for _ in folder.glob(pattern)):
        if (folder / ADAPTER_CONFIG).is_file() and any(folder.glob("adapter_model.*")):
            return
        name = "adapter_model" if (folder / ADAPTER_CONFIG).is_file() else "model"
        raise InputError(f"{where}: no weights there ({name}.safetensors)")
    for name in ("model.safetensors", "pytorch_model.bin"):
        stem, _, suffix = name.partition(".")
        if any(folder.glob(f"{stem}-*-of-*.{suffix}")) and not (folder / name).is_file():
            raise InputError(f"{where}: its weights are in parts, but {name}.index.json, which lists them, is missing")


def _check_quantisation(config: dict[str, Any], where: str) -> None:
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    packages = QUANTISED_BY.get(str(method).lower(), ()) if method else ()
    if packages and not any(_has_package(name) for name in packages):
        raise InputError(
            f"{where}: its weights are quantised with {method}, which needs the package {' or '.join(packages)}; "
            "install it, or take the model's unquantised weights"
        )


def _has_package(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _check_hub_name(path: str, flag: str) -> dict[str, Any]:
    """What `check_model_source` does for a path that is no folder."""
    where = f"--{flag} {path}"
    if Path(path).is_file():
        raise InputError(f"{where}: a file; expected a model folder or the name of a model on the hub")
    local = path.startswith(("/", ".", "~")) or path.count("/") > 1 or ("/" in path and Path(path).parent.is_dir())
    if local and not _is_cached(path):
        raise InputError(f"{where}: no such folder{hint_at_missing(Path(path), folders=True)}")
    if _is_cached(path):
        return {} if _reach_hub() is None else {"local_files_only": True}
    reason = _reach_hub()
    if reason:
        hint = hint_at_missing(Path(path), folders=True)
        raise InputError(f"{where}: no such folder, no such model in the hub's cache, and {reason}{hint}")
    return {}


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", ADAPTER_CONFIG))
    except HFValidationError:
        return False


def _reach_hub() -> str | None:
    """Why the hub cannot be asked, None where it can: one short try; the library itself would go on for minutes."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = urlsplit(constants.ENDPOINT)
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return None
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=HUB_SECONDS).close()
    except OSError:
        return f"the hub ({address.hostname}) cannot be reached"
    return None


@contextmanager
def translate_errors(path: str, flag: str, purpose: str) -> Iterator[None]:
    """Whatever a library raises while it loads something becomes one line; what is one already stays.

    Args:
        path: what is loaded. flag: the flag that named it. purpose: what it is wanted as, such as "a causal LM".

    Raises:
        InputError: the library's reason, in one line.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # A line that ends with a colon announces what the next one says.
        reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else ""
        name = "" if isinstance(error, (OSError, ValueError)) and reason else f"{type(error).__name__}: "
        text = f"{name}{reason[:300]}".removesuffix(": ")
        raise InputError(f"--{flag} {path}: cannot be used as {purpose} ({text})") from None
