"""Checkpoint folders: which one a cut-off run resumes, and the final one that the next stage reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from minionerec.common.files import InputError, atomic_write
from minionerec.common.processes import is_main_process
from minionerec.language.adapters import merge_adapters
from minionerec.language.models import hide_file_progress, load_model
from minionerec.language.prompts import PROMPTS_FILE, Encoder, PromptSet
from minionerec.training.sharded import gather_state, is_sharding, leave_zero3


def save_checkpoint_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSet,
    path: str | Path,
    state: dict[str, torch.Tensor] | None = None,
    complete: Callable[[Path], None] | None = None,
) -> None:
    """Write weights, tokenizer and prompts as one HF folder that appears whole or not at all. Main process only.

    Args:
        model, tokenizer, prompts: what is written.
        path: of the folder.
        state: the weights where they are not the model's own, as under engines that shard.
        complete: adds what else belongs to the folder.

    Raises:
        InputError: the weights cannot be loaded again, or are not finite.
    """
    with atomic_write(path) as folder, hide_file_progress():
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        (folder / PROMPTS_FILE).write_text(prompts.to_yaml(), encoding="utf-8")
        check_checkpoint_folder(folder)
        if complete:
            complete(folder)


def export_model(
    trainer: Trainer,
    encoder: Encoder,
    path: str | Path,
    unchanged: str | None = None,
    complete: Callable[[Path], None] | None = None,
) -> None:
    """Write what was trained as a plain HF folder that the next stage reads, whatever the engine.

    Called on every process; one of them writes, and the folder appears only once it was loaded again.

    Args:
        trainer: whose model it is; adapters are merged into it.
        encoder: its tokenizer and prompts.
        path: of the folder.
        unchanged: a model to write instead of the trained one.
        complete: called on the writing process with the folder, to add what else belongs to it.

    Raises:
        InputError: what was written is not a whole, finite model.
    """
    sharding = is_sharding(trainer.accelerator)
    state = gather_state(trainer) if sharding and not unchanged else None
    if sharding:
        leave_zero3()
    if trainer.is_world_process_zero():
        model = trainer.model
        if unchanged:
            model, state = load_model(unchanged, "model_path")[0], None
        elif trainer.plain_copy is not None:
            trainer.plain_copy.load_state_dict(state)
            model, state = trainer.plain_copy, None
        elif sharding:
            model = trainer.accelerator.unwrap_model(model)
        save_checkpoint_folder(merge_adapters(model), encoder.tokenizer, encoder.prompts, path, state, complete)
    trainer.accelerator.wait_for_everyone()


def check_checkpoint_folder(folder: str | Path) -> None:
    """Load a written model again: every weight of its config is there, in its shape, and finite.

    Raises:
        InputError: what is wrong with it.
    """
    wrong = "cannot be loaded again"
    try:
        with hide_file_progress():
            model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        names = sorted({str(name) for key in ("missing_keys", "unexpected_keys") for name in report[key]})
        wrong = f"its weights are not those of its config: {', '.join(names[:3])}" if names else ""
    except (OSError, ValueError, RuntimeError) as error:
        wrong += f" ({str(error).splitlines()[0]})"
    if not wrong:
        broken = [name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())]
        wrong = f"weights that are not finite: {', '.join(broken[:3])}" if broken else ""
    if wrong:
        raise InputError(f"the trained model was not written: {wrong}")


def find_last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete `checkpoint-N` folder; the trainer writes trainer_state.json last."""
    complete = [
        path
        for path in Path(output_dir).glob("checkpoint-*")
        if path.name.split("-")[-1].isdigit() and _is_json(path / "trainer_state.json")
    ]
    return str(max(complete, key=lambda path: int(path.name.split("-")[-1]))) if complete else None


def choose_resume_checkpoint(output_dir: str | Path, named: str | None, resuming: bool) -> str | None:
    """What `Trainer.train` shall go on from: the checkpoint the user named, else the last one of a cut-off run.

    Otherwise checkpoints in `output_dir` belong to a run with other settings and are removed. The main process decides.
    """
    checkpoint = [named]
    if is_main_process() and not named:
        if resuming:
            checkpoint = [find_last_checkpoint(output_dir)]
        else:
            for stale in Path(output_dir).glob("checkpoint-*"):
                shutil.rmtree(stale)
    return broadcast_object_list(checkpoint)[0]


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True
