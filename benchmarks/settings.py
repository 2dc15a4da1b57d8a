"""Flags that several benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import flag


@dataclass
class PublishedDataFlags:
    """Data."""

    data_root: str | None = flag(
        None, "a folder in the published format: train/, test/ and index/", default_text="data made up here"
    )
    category: str | None = flag(None, "what the names of its files begin with", default_text="any name")


@dataclass
class RandomModelFlags:
    """Model."""

    shape: str = flag("llama-135m", "shape of a model with random weights", choices=("llama-135m", "qwen3-small"))
    vocab_size: int = flag(49152, "its text vocabulary, to which the SID tokens are added")


@dataclass
class RepeatFlags:
    """Repetition."""

    repeats: int = flag(1, "runs of each way, of which medians are taken")
    seed: int = flag(0, "seed of everything random")
