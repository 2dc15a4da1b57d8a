"""Recipes of benchmark.sh: one YAML file for one row of the results table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minionerec.common.files import InputError, read_yaml

# Stages of pipeline.sh, whose sections hold flags of their commands.
STAGES = ("data", "text2emb", "behaviour", "sids", "convert", "baselines", "network", "sasrec", "gru4rec", "likeness")
STAGES += ("sft", "rl", "eval")
SOURCES = ("input_dir", "splits_dir")  # the flag of pipeline.sh that the raw files are given by
KEYS = ("dataset", "source", "published", "pipeline", *STAGES)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe: `dataset` (name of the files), `source` (one of SOURCES), `published` ({name: {metric: figure}}),
    `pipeline` (flags of pipeline.sh) and, for every stage of STAGES, the flags of its command.

    Raises:
        InputError: not such a file.
    """
    recipe = read_yaml(path, "recipe")
    if not isinstance(recipe, dict):
        raise InputError(f"{path}: expected the keys {', '.join(KEYS)}")
    unknown = [key for key in recipe if key not in KEYS]
    if unknown:
        raise InputError(f"{path}: {unknown[0]}: expected one of {', '.join(KEYS)}")
    if not isinstance(recipe.get("dataset"), str) or recipe.get("source") not in SOURCES:
        raise InputError(f"{path}: expected dataset, a name, and source, {' or '.join(SOURCES)}")
    for key in KEYS[2:]:
        recipe[key] = {} if key in recipe and recipe[key] is None else recipe.get(key)
        if recipe[key] is None:
            del recipe[key]
        elif not isinstance(recipe[key], dict):
            raise InputError(f"{path}: {key}: expected flags and their values, such as num_epochs: 3")
    return recipe
