"""What sft.py and rl.py set up alike: splits, checks of flags, arguments of the trainer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from minionerec.common.files import InputError
from minionerec.common.processes import computes_on_cpu, process_state, say
from minionerec.common.records import Catalogue
from minionerec.common.row_table import RowTable, check_table, draw_rows, open_row_cache
from minionerec.language.models import check_attention, has_fast_bf16
from minionerec.language.prompts import resolve_prompts_file
from minionerec.training.settings import OptimizationFlags, SplitFlags

PUBLISHED_SHARE = 0.8  # of the train rows that the published --sample_train True keeps
Arguments = TypeVar("Arguments", bound=TrainingArguments)


def list_training_inputs(flags: Any, required: Sequence[str], optional: Sequence[str]) -> list[str]:
    """The files and folders that a run reads, for its stage.

    Args:
        flags: of the command.
        required: flags of files that must be there.
        optional: flags that may be None, or name a model on the hub.
    """
    paths = [getattr(flags, name) for name in optional]
    inputs = [getattr(flags, name) for name in required] + [path for path in paths if path and Path(path).exists()]
    if flags.prompts:
        inputs.append(resolve_prompts_file(flags.prompts)[0])
    return [*inputs, *(flags.plugin or ())]


def read_splits(
    flags: SplitFlags,
    catalogue: Catalogue,
    source: str,
    train_sample: int | bool,
    seed: int,
    *,
    history: bool,
) -> tuple[RowTable, RowTable, RowTable]:
    """(all train rows, the drawn ones, the drawn validation rows).

    Args:
        flags: train_file, eval_file and eval_sample, and how rows are kept.
        catalogue: read from the file `source`; the rows' items must be in it.
        train_sample: train rows to draw; -1 is all, True the published share of them.
        seed: of the drawing.
        history: check the items of the histories too.

    Raises:
        InputError: a broken file, or an item outside the catalogue.
    """
    generator = random.Random(seed)
    cache = open_row_cache(flags, Path(flags.output_dir))
    splits = []
    for path, name, count in (
        (flags.train_file, "train_file", train_sample),
        (flags.eval_file, "eval_file", flags.eval_sample),
    ):
        rows = cache.open_rows(path, name)
        check_table(rows, catalogue, path, source, history=history)
        count = round(PUBLISHED_SHARE * len(rows)) if count is True else count
        splits += [rows, draw_rows(rows, count, generator)]
    return splits[0], splits[1], splits[3]


def build_arguments(
    kind: type[Arguments], flags: OptimizationFlags, steps: int, report_to: list[str], **specific: Any
) -> Arguments:
    """The arguments of a trainer: what SFT and RL have in common, and what is specific to one of them.

    Args:
        kind: `TrainingArguments` or a class derived from it.
        steps: optimizer steps of the run, of which warmup_ratio are warm-up.
        report_to: names of the loggers, may be empty.
    """
    on_cpu = computes_on_cpu()
    pinned = not on_cpu and torch.cuda.is_available()
    return kind(
        output_dir=flags.output_dir,
        learning_rate=flags.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(flags.warmup_ratio * steps),
        weight_decay=flags.weight_decay,
        optim=flags.optim,
        gradient_checkpointing=flags.gradient_checkpointing,
        use_cpu=on_cpu,
        disable_tqdm=False,
        ddp_find_unused_parameters=False,
        bf16=trains_in_bf16(flags.bf16),
        seed=flags.seed,
        remove_unused_columns=False,
        dataloader_num_workers=flags.dataloader_num_workers,
        # Copies to the GPU then run beside its computing.
        dataloader_pin_memory=pinned,
        accelerator_config={"non_blocking": pinned},
        report_to=report_to or "none",
        run_name=flags.wandb_run_name,
        **specific,
    )


def trains_in_bf16(requested: bool | None) -> bool:
    """Whether training computes in bfloat16 autocast: as `--bf16` says, else on a GPU that has it.

    Raises:
        InputError: asked for on a GPU that lacks it.
    """
    on_gpu = not computes_on_cpu() and torch.cuda.is_available()
    has_it = on_gpu and torch.cuda.is_bf16_supported()
    if requested and on_gpu and not has_it:
        raise InputError("--bf16 True: this GPU has no bfloat16")
    if requested and not on_gpu and not has_fast_bf16(torch.device("cpu")):
        say("  --bf16 True: this CPU has no bfloat16 instructions; --bf16 False is many times faster")
    return has_it if requested is None else requested


def check_loading_flags(flags: OptimizationFlags) -> None:
    """Stop at an attention that this machine cannot train with, and at fewer than no workers.

    Raises:
        InputError: what to write instead.
    """
    check_attention(flags.attention)
    if flags.dataloader_num_workers < 0:
        raise InputError(f"--dataloader_num_workers {flags.dataloader_num_workers}: expected 0 or more")


def check_divisible(batch_size: int, micro_batch_size: int, processes: int | None = None) -> int:
    """Forward passes of an optimizer step on each process, of this run or of one with other `processes`.

    Raises:
        InputError: batches that do not divide evenly.
    """
    world = processes or process_state().num_processes
    if micro_batch_size < 1 or batch_size < 1 or batch_size % (micro_batch_size * world):
        raise InputError(
            f"--batch_size {batch_size}: must be a multiple of micro_batch_size {micro_batch_size} x {world} "
            "process(es)"
        )
    return batch_size // (micro_batch_size * world)
