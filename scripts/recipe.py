"""The arguments of pipeline.sh that a recipe of config/benchmarks stands for, one a line.

python -m scripts.recipe --recipe config/benchmarks/industrial.yaml --data DIR --output_dir OUT --seed 42
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import flag, parse_flags, run_command
from minionerec.common.settings import SeedFlags


@dataclass
class RecipeFlags(SeedFlags):
    """Recipe and run."""

    recipe: str = flag(help="a file such as those of config/benchmarks")
    data: str = flag(help="folder of the raw files")
    output_dir: str = flag(help="folder of the run")


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(RecipeFlags)

import shlex
from typing import Any

from minionerec.common.processes import say
from scripts.benchmark_recipe import STAGES, read_recipe


def format_value(value: Any, names: dict[str, str]) -> str:
    """A value as it stands on a command line; {DATA}, {OUT}, {NAME} and {EMBEDDINGS} become paths and names."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    for name, path in names.items():
        text = text.replace(f"{{{name}}}", path)
    return text


def list_arguments(recipe: dict[str, Any], flags: RecipeFlags) -> list[str]:
    """The arguments of pipeline.sh for one seed.

    Args:
        recipe: of `read_recipe`.
        flags: where the data are, where the run goes, and its seed.
    """
    data, name = f"{flags.output_dir}/data", recipe["dataset"]
    kind = "behaviour" if "behaviour" in recipe else "tfidf"
    names = {"DATA": data, "OUT": flags.output_dir, "NAME": name, "EMBEDDINGS": f"{data}/{name}.emb-{kind}-td.npy"}
    arguments = ["--dataset", name, f"--{recipe['source']}", flags.data, "--output_dir", flags.output_dir]
    arguments += ["--seed", str(flags.seed)]
    for key, value in recipe.get("pipeline", {}).items():
        arguments += [f"--{key}", format_value(value, names)]
    for stage in STAGES:
        if stage in recipe:
            words = [word for key, value in recipe[stage].items() for word in (f"--{key}", format_value(value, names))]
            arguments += [f"--{stage}", shlex.join(words) or "default"] if words or stage == "behaviour" else []
    return arguments


def print_arguments(flags: RecipeFlags) -> None:
    """Print them."""
    for argument in list_arguments(read_recipe(flags.recipe), flags):
        say(argument)


if __name__ == "__main__":
    run_command(print_arguments, FLAGS)
