"""Put measured figures into the model card of a model folder, and send the folder to the Hugging Face hub if wanted.

python -m scripts.model_card --model output/rl/final_checkpoint --metrics output/rl/test.metrics.json
python -m scripts.model_card --model output/rl/final_checkpoint --push_to_hub True --hub_model_id my-name/my-model
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import flag, parse_flags, run_command
from minionerec.common.settings import DryRunFlags, HubFlags


@dataclass
class ModelCardFlags(HubFlags, DryRunFlags):
    """The card."""

    model: str = flag(help="final_checkpoint of sft.py or rl.py")
    metrics: str | None = flag(None, "NAME.metrics.json of evaluate.py for this model")
    split: str = flag("test", "what the rows of --metrics are called in the card")


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(ModelCardFlags)

from minionerec.common.files import InputError, read_json
from minionerec.common.processes import say, say_outputs
from minionerec.training.hub import check_hub_flags, push_model_folder
from minionerec.training.model_card import CARD_FILE, add_results

SHOWN = ("HR@1", "HR@5", "HR@10", "HR@20", "HR@50", "NDCG@5", "NDCG@10", "NDCG@20", "NDCG@50")


def complete_model_card(flags: ModelCardFlags) -> None:
    """Add figures to a card and push the folder.

    Raises:
        InputError: nothing to do, a file that evaluate.py did not write, or a folder without a card.
    """
    check_hub_flags(flags)
    if flags.metrics is None and not flags.push_to_hub:
        raise InputError("expected --metrics, --push_to_hub True, or both")
    if flags.metrics is not None:
        content = read_json(flags.metrics, "metrics")
        items = content.get("item") if isinstance(content, dict) else None
        if not isinstance(items, dict) or not all(isinstance(value, float | int) for value in items.values()):
            raise InputError(f"--metrics {flags.metrics}: expected a NAME.metrics.json of evaluate.py")
        if flags.dry_run:
            say_outputs([f"{flags.model}/{CARD_FILE}"], dry_run=True)
            return
        add_results(flags.model, flags.split, {name: items[name] for name in SHOWN if name in items})
        say(f"[model_card] {flags.model}/{CARD_FILE} says the figures of {flags.metrics}")
    if flags.dry_run:
        say(f"[model_card] not sent, dry run: {flags.model} to {flags.hub_model_id}")
        return
    push_model_folder(flags.model, flags)


if __name__ == "__main__":
    run_command(complete_model_card, FLAGS)
