"""Checkpoint folders: which one a cut-off run resumes, and the final one that the next stage reads."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from minionerec.common.files import InputError, atomic_write, first_line
from minionerec.common.processes import is_main_process, say
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
            model, state = load_model(unchanged, "model_path", for_training=False)[0], None
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
        wrong += f" ({first_line(error)})"
    if not wrong:
        broken = [name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())]
        wrong = f"weights that are not finite: {', '.join(broken[:3])}" if broken else ""
    if wrong:
        raise InputError(f"the trained model was not written: {wrong}")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-N` folders, newest first."""
    paths = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(paths, key=lambda path: -int(path.name.split("-")[-1]))


def find_checkpoint_fault(checkpoint: str | Path) -> str | None:
    """What keeps a run from going on from a checkpoint: a file that is missing or cut off. None where it is whole.

    The trainer writes trainer_state.json last. Without its optimizer or random state a run would go on all the same, to
    other weights than an undisturbed one.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "no such folder"
    if not _is_json(folder / "trainer_state.json"):
        return "trainer_state.json is missing or cut off"
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not _is_whole(file):
            return f"{file.relative_to(folder)} is cut off or damaged"
    names = {path.name for path in folder.iterdir()}
    # Engines that shard write folders and files of their own instead.
    sharded = any(name.startswith(("global_step", "optimizer_", "pytorch_model_fsdp")) for name in names)
    needed = [("scheduler.pt",)] + ([] if sharded else [("optimizer.pt", "optimizer.bin"), WEIGHTS])
    for alternatives in needed:
        if not names.intersection(alternatives):
            return f"{alternatives[0]} is missing"
    if not any(name.startswith("rng_state") for name in names):
        return "rng_state.pth is missing"
    return None


WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "adapter_model.bin",
)


def _is_whole(file: Path) -> bool:
    """Whether a file of a checkpoint has its end; other kinds of file are taken as they are."""
    if file.suffix in (".pt", ".pth", ".bin") and file.name != "training_args.bin":
        return zipfile.is_zipfile(file)  # its table of contents stands last
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return True
        except (SafetensorError, OSError, ValueError):
            return False
    return file.suffix != ".json" or _is_json(file)


def find_last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole `checkpoint-N` folder."""
    return next((str(path) for path in list_checkpoints(output_dir) if find_checkpoint_fault(path) is None), None)


def drop_broken_checkpoints(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint; those behind it, which are broken, are removed, and that is said."""
    for path in list_checkpoints(output_dir):
        fault = find_checkpoint_fault(path)
        if fault is None:
            return str(path)
        say(f"[resume] {path}: {fault}; going on from the checkpoint before it")
        shutil.rmtree(path)
    return None


def choose_resume_checkpoint(output_dir: str | Path, named: str | None, resuming: bool) -> str | None:
    """What `Trainer.train` shall go on from: the checkpoint the user named, else the last whole one of a cut-off run.

    Otherwise checkpoints in `output_dir` belong to a run with other settings and are removed. The main process decides.

    Raises:
        InputError: the named checkpoint is missing or broken.
    """
    checkpoint = [named]
    if is_main_process() and not named:
        if resuming:
            checkpoint = [drop_broken_checkpoints(output_dir)]
            if checkpoint == [None]:
                say("[resume] no whole checkpoint is there: training begins anew")
        else:
            for stale in Path(output_dir).glob("checkpoint-*"):
                shutil.rmtree(stale)
    if is_main_process() and named:
        fault = find_checkpoint_fault(named)
        if fault:
            raise InputError(f"--resume_from_checkpoint {named}: {fault}")
    return broadcast_object_list(checkpoint)[0]


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True
