"""Flags that several benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import flag

SHAPE_NAMES = ("llama-135m", "qwen3-small", "qwen3-tiny", "qwen2.5-0.5b", "qwen2.5-1.5b")  # of problems.SHAPES


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

    shape: str = flag("llama-135m", "shape of a model with random weights", choices=SHAPE_NAMES)
    vocab_size: int = flag(49152, "its text vocabulary, to which the SID tokens are added")


@dataclass
class RepeatFlags:
    """Repetition."""

    repeats: int = flag(1, "runs of each way, of which medians are taken")
    seed: int = flag(0, "seed of everything random")
