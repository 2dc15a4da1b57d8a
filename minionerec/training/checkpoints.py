"""Checkpoint folders: which one a cut-off run resumes, and the final one that the next stage reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from minionerec.common.files import atomic_write
from minionerec.common.processes import is_main_process
from minionerec.language.adapters import merge_adapters
from minionerec.language.models import hide_file_progress
from minionerec.language.prompts import PROMPTS_FILE, Encoder, PromptSet


def save_checkpoint_folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: PromptSet, path: str | Path
) -> None:
    """Write weights, tokenizer and prompts as one HF folder that appears whole or not at all. Main process only."""
    with atomic_write(path) as folder, hide_file_progress():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / PROMPTS_FILE).write_text(prompts.to_yaml(), encoding="utf-8")


def export_model(trainer: Trainer, model: PreTrainedModel | PeftModel, encoder: Encoder, path: str | Path) -> None:
    """Write the model as a plain HF folder that the next stage reads; called on every process, one of them writes.

    Args:
        trainer: knows the processes.
        model: the trained model; adapters are merged into it.
        encoder: its tokenizer and prompts.
        path: of the folder.
    """
    if trainer.is_world_process_zero():
        save_checkpoint_folder(merge_adapters(model), encoder.tokenizer, encoder.prompts, path)
    trainer.accelerator.wait_for_everyone()


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
