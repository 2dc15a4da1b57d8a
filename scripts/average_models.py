"""One model whose weights are the mean of several that were trained on from the same one (a model soup).

    python -m scripts.average_models --models A/final_checkpoint B/final_checkpoint --output_dir SOUP/final_checkpoint

Models that began from one trained model and differ in the seed of a further training agree in what they know and differ
in what they got wrong, and the mean of their weights ranks better than each (Wortsman et al., arXiv 2203.05482). Models
that were trained from scratch with other seeds have no common weights to take a mean of: nothing good comes of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import flag, parse_flags, run_command
from minionerec.common.settings import DryRunFlags


@dataclass
class AverageFlags(DryRunFlags):
    """The models."""

    models: list[str] = flag(help="final_checkpoint folders, two or more, of one catalogue and one architecture")
    output_dir: str = flag(help="folder of the model that is made")


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(AverageFlags)

from pathlib import Path

from minionerec.common.files import InputError
from minionerec.common.model_folder import has_catalogue, read_model_catalogue, write_model_catalogue
from minionerec.common.processes import say_outputs
from minionerec.language.models import load_model
from minionerec.language.prompts import load_checkpoint_prompts
from minionerec.training.checkpoints import save_checkpoint_folder
from minionerec.training.model_card import write_model_card


def average_models(flags: AverageFlags) -> None:
    """Write the model with the mean weights; tokenizer, prompts and catalogue are those of the first.

    Raises:
        InputError: fewer than two models, or models that are not alike.
    """
    first, *others = flags.models
    if not others:
        raise InputError("--models: expected two or more")
    if Path(flags.output_dir).resolve() in {Path(path).resolve() for path in flags.models}:
        raise InputError(f"--output_dir {flags.output_dir}: is one of --models")
    if flags.dry_run:
        say_outputs([flags.output_dir], dry_run=True)
        return
    model, tokenizer = load_model(first, "models", for_training=False)
    total = {name: weight.double() for name, weight in model.state_dict().items()}
    for path in others:
        other, other_tokenizer = load_model(path, "models", for_training=False)
        if other_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise InputError(f"--models {path}: its tokenizer is not that of {first}")
        weights = other.state_dict()
        if {name: weight.shape for name, weight in weights.items()} != {n: w.shape for n, w in total.items()}:
            raise InputError(f"--models {path}: its layers are not those of {first}")
        for name, weight in weights.items():
            total[name] += weight
    model.load_state_dict({name: (weight / len(flags.models)).float() for name, weight in total.items()})

    def complete(folder: Path) -> None:
        if has_catalogue(first):
            known = read_model_catalogue(first, "models")
            write_model_catalogue(folder, known)
            stage = f"The mean of the weights of {len(flags.models)} models that were trained on from one"
            write_model_card(folder, stage=stage, settings={"models": flags.models}, known=known, validation={})

    save_checkpoint_folder(model, tokenizer, load_checkpoint_prompts(first), flags.output_dir, complete=complete)
    say_outputs([flags.output_dir])


if __name__ == "__main__":
    run_command(average_models, FLAGS)
