"""Supervised fine-tuning: a causal LM learns to write the SID of the user's next item.

    python sft.py --base_model Qwen/Qwen2.5-0.5B --train_file ... --eval_file ... --sid_index_path X.index.json \
        --item_meta_path X.item.json --output_dir output/sft
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import torch
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed

import cli
from data import Encoder, SidItemFeatDataset, SidSFTDataset, TitleHistory2SidSFTDataset, load_prompts
from fileio import InputError, read_json
from model_io import (
    TimeKeeper,
    add_dropout,
    add_sid_tokens,
    checkpoint_to_resume,
    item_texts,
    load_model,
    model_from_config,
    process_state,
    save_checkpoint_folder,
)
from records import Catalogue, Row, check_rows_against_index, read_index, read_rows
from sft_trainer import TreeBatches, TreeTrainer

TASKS = ("next_sid", "title_history2sid", "title2sid", "sid2title")


def build_dataset(
    task: str, rows: list[Row], catalogue: Catalogue, encoder: Encoder, cutoff_len: int, cut_histories: bool, seed: int
):
    """The SFT dataset of one task."""
    if task == "next_sid":
        return SidSFTDataset(rows, encoder, cutoff_len, cut_histories, seed)
    if task == "title_history2sid":
        return TitleHistory2SidSFTDataset(rows, encoder, cutoff_len)
    return SidItemFeatDataset(catalogue, encoder, cutoff_len, (task,))


def read_items(path: str, index: dict[int, tuple[str, ...]], index_path: str) -> tuple[Catalogue, list[str]]:
    """(catalogue, descriptions) of an item.json, which must cover the index.

    Raises:
        InputError: an item that one of the two files lacks.
    """
    items = read_json(path, "item_meta_path")
    missing = sorted(set(index) - {int(key) for key in items})
    if missing:
        raise InputError(f"{path}: item {missing[0]} of {index_path} is missing")
    order = sorted(index)
    titles = [str(items[str(item)].get("title") or "") for item in order]
    descriptions = [str(items[str(item)].get("description") or "") for item in order]
    return Catalogue(["".join(index[item]) for item in order], titles, order), descriptions


def sft(
    base_model: str,
    train_file: str,
    eval_file: str,
    output_dir: str,
    sid_index_path: str,
    item_meta_path: str,
    train_from_scratch: bool = False,
    prompts: str | None = None,
    tasks: list[str] | None = None,
    cut_histories: bool | None = None,
    sample: int = -1,
    eval_sample: int = -1,
    seed: int = 42,
    batch_size: int = 1024,
    micro_batch_size: int = 16,
    num_epochs: int = 10,
    learning_rate: float = 3e-4,
    warmup_ratio: float = 0.03,
    weight_decay: float = 0.0,
    dropout: float = 0.0,
    early_stopping_patience: int = 3,
    cutoff_len: int = 512,
    gradient_checkpointing: bool = False,
    save_total_limit: int = 1,
    resume_from_checkpoint: str | None = None,
    wandb_project: str | None = None,
    wandb_run_name: str | None = None,
    force: bool = False,
) -> None:
    """Fine-tune a causal LM on next-SID prediction and, for pretrained bases, language alignment.

    Args:
        base_model: HF folder or hub name; with --train_from_scratch also a JSON config such as config/tiny_qwen3.json.
        train_file, eval_file: CSV splits.
        sid_index_path, item_meta_path: the index.json and item.json, by their full names.
        prompts: compact, worded or a YAML file; default compact from scratch, else worded.
        tasks: of next_sid, title_history2sid, title2sid, sid2title; default next_sid with compact prompts, else all.
        cut_histories: let a long user's targets share pieces of the timeline (`SidSFTDataset`); default: with compact prompts.
        sample, eval_sample: use that many random rows; -1 is all.
        batch_size: rows per optimizer step over all processes; micro_batch_size: rows per forward pass of one process.
        dropout: on embeddings and residual branches, for training from scratch.
        early_stopping_patience: epochs without a better validation loss; the best epoch is what is kept.
        wandb_project: log there; off when not given. WANDB_MODE=offline is respected.
        force: do a finished run again.
    """
    prompt_set = load_prompts(prompts or ("compact" if train_from_scratch else "worded"))
    compact = set(prompt_set.templates) == {"next_sid"}
    tasks = list(tasks or [task for task in TASKS if task in prompt_set.templates])
    cut_histories = compact if cut_histories is None else cut_histories
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"--tasks: unknown task {task!r}; known: {', '.join(TASKS)}")
        prompt_set.template(task)
    if Path(base_model).is_file() and not train_from_scratch:
        raise InputError(f"--base_model {base_model}: a config file has no weights; add --train_from_scratch True")
    world = process_state().num_processes
    if batch_size % (micro_batch_size * world):
        raise InputError(
            f"--batch_size {batch_size}: must be a multiple of micro_batch_size {micro_batch_size} x {world} process(es)"
        )

    settings = dict(locals())
    settings = {key: settings[key] for key in sft.__annotations__ if key not in ("force", "return")}
    inputs = [train_file, eval_file, sid_index_path, item_meta_path] + (
        [base_model] if Path(base_model).exists() else []
    )
    final = Path(output_dir) / "final_checkpoint"
    with process_state().main_process_first():
        stage = cli.Stage("sft", settings, inputs, [final], Path(output_dir) / "sft.stage.json", force)
    if stage.finished:
        return
    # Now, not when training begins: a run cut off before that must not leave another run's checkpoints to be resumed.
    checkpoint = checkpoint_to_resume(output_dir, resume_from_checkpoint, stage.resuming)

    # Phase 1: everything that can be wrong with the input is found before a model is loaded.
    index = read_index(sid_index_path, "sid_index_path")
    catalogue, descriptions = read_items(item_meta_path, index, sid_index_path)
    generator = random.Random(seed)
    splits = []
    for path, flag, count in ((train_file, "train_file", sample), (eval_file, "eval_file", eval_sample)):
        rows = read_rows(path, flag)
        check_rows_against_index(rows, index, path, sid_index_path)
        if 0 <= count < len(rows):
            kept = sorted(generator.sample(range(len(rows)), count))
            rows = [rows[number] for number in kept]
        splits.append(rows)

    # Phase 2: model, tokenizer, datasets.
    set_seed(seed)
    if train_from_scratch:
        model, tokenizer = model_from_config(base_model, item_texts(catalogue.titles, descriptions), seed)
    else:
        model, tokenizer = load_model(base_model, "base_model")
    sid_tokens = (token for tokens in index.values() for token in tokens)
    added = add_sid_tokens(model, tokenizer, sid_tokens, seed, spread=1.0 if train_from_scratch else 0.1)
    if dropout:
        add_dropout(model, dropout)
    encoder = Encoder(tokenizer, prompt_set)
    accumulation = batch_size // (micro_batch_size * world)
    train_parts = [
        build_dataset(task, splits[0], catalogue, encoder, cutoff_len, cut_histories, seed) for task in tasks
    ]
    eval_parts = [build_dataset("next_sid", splits[1], catalogue, encoder, cutoff_len, False, seed)]
    try:
        train_set = TreeBatches(train_parts, batch_size, accumulation * world, encoder.pad_token_id, seed)
        eval_batches = max(world, -(-len(splits[1]) // micro_batch_size // world) * world)
        eval_set = TreeBatches(
            eval_parts, len(splits[1]), min(eval_batches, len(splits[1])), encoder.pad_token_id, None
        )
    except ValueError as error:
        raise InputError(f"--batch_size {batch_size}: {error}") from None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cli.say(
        f"[sft] {parameters:,} parameters, {added} new SID tokens, {train_set.rows:,} training rows, {train_set.steps} steps an epoch"
    )

    # Phase 3: train.
    if wandb_project:
        os.environ["WANDB_PROJECT"] = wandb_project
    trainer = TreeTrainer(
        model=model,
        train_dataset=train_set,
        eval_dataset=eval_set,
        callbacks=[EarlyStoppingCallback(early_stopping_patience), TimeKeeper(stage)],
        args=TrainingArguments(
            output_dir=output_dir,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=num_epochs,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=round(warmup_ratio * num_epochs * train_set.steps),
            weight_decay=weight_decay,
            gradient_checkpointing=gradient_checkpointing,
            use_cpu=not torch.accelerator.is_available(),
            disable_tqdm=False,
            ddp_find_unused_parameters=False,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            save_total_limit=save_total_limit,
            seed=seed,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            report_to="wandb" if wandb_project else "none",
            run_name=wandb_run_name,
        ),
    )
    trainer.train(resume_from_checkpoint=checkpoint)

    # Phase 4: the best epoch, as a folder that RL and evaluation read.
    if trainer.is_world_process_zero():
        save_checkpoint_folder(model, tokenizer, prompt_set, final)
    trainer.accelerator.wait_for_everyone()
    stage.done(eval_loss=round(trainer.state.best_metric, 4), steps=trainer.state.global_step, parameters=parameters)


if __name__ == "__main__":
    cli.run(sft)
