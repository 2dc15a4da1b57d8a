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

from data import EvalSidDataset, TaskInputs, build_mixture, choose_tasks
from minionerec.common.cli import run
from minionerec.common.files import InputError
from minionerec.common.items import read_catalogue, read_preferences
from minionerec.common.processes import process_state, say
from minionerec.common.records import check_rows_against_index, read_index, read_rows
from minionerec.common.stage import Stage
from minionerec.common.texts import join_item_texts, list_texts
from minionerec.evaluation.ranking import measure_validation
from minionerec.language.adapters import (
    add_lora,
    check_adapter_checkpoint,
    check_adapter_flags,
    count_trainable_parameters,
    merge_adapters,
    train_token_rows,
)
from minionerec.language.catalogue_trie import build_catalogue_trie
from minionerec.language.models import add_dropout, build_model_from_config, check_attention, load_model
from minionerec.language.prompts import Encoder, load_prompts, resolve_prompts_file
from minionerec.language.sid_tokens import (
    add_sid_tokens,
    average_embeddings,
    compute_code_directions,
    compute_tfidf_vectors,
)
from minionerec.training.callbacks import StageTimer
from minionerec.training.checkpoints import choose_resume_checkpoint, save_checkpoint_folder
from minionerec.training.sft_trainer import PACKINGS, TreeBatches, TreeTrainer

BEST_BY = ("loss", "HR@10")


SID_INITS = ("text", "noise")


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
    category: str | None = None,
    preference_file: str | None = None,
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
    sid_init: str | None = None,
    freeze_LLM: bool = False,
    lora: bool = False,
    lora_rank: int = 16,
    lora_alpha: int = 32,
    lora_targets: list[str] | None = None,
    lora_dropout: float = 0.0,
    packing: str = "tree",
    tree_tokens: int = 2048,
    attention: str = "sdpa",
    early_stopping_patience: int = 3,
    best_by: str = "loss",
    eval_beams: int = 10,
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
        tasks: with weights, such as next_sid,title2sid:0.5 (`choose_tasks`); default: next_sid, title_history2sid,
            title2sid and sid2title, as far as the prompt set has them. Both sets also know similar_sid, worded ones next_title,
            next_description, title_history2title, description2sid, sid2description, history2preference, preference2sid.
            The validation loss is that of next_sid, or of the chosen tasks if the prompt set has no next_sid.
        category: any text, for prompts that show {category}.
        preference_file: user preference texts (`read_preferences`), for the last two tasks.
        cut_histories: let a long user's targets share pieces of the timeline (`SidSFTDataset`); default: with compact prompts.
        sample, eval_sample: use that many random rows; -1 is all.
        batch_size: rows per optimizer step over all processes; micro_batch_size: rows per forward pass of one process.
        dropout: on embeddings and residual branches, for training from scratch.
        sid_init: where new SID rows start: text (what the items that use a code are about: by their words' embeddings in a
            pretrained base, by latent semantic analysis of their words from scratch) or noise. Default: text from scratch,
            noise in a pretrained base, where text was no better.
        freeze_LLM: only the token rows of the index's SIDs learn; in a base without SIDs these are its new rows.
        lora: those rows learn, and LoRA matrices of lora_rank beside every linear layer of the decoder, or beside those
            that lora_targets names (q_proj,v_proj); they act times lora_alpha / lora_rank. lora_dropout: on their input.
        packing: tree (rows that share prefixes are computed as one, trees of about tree_tokens tokens) or none (padded rows):
            the same loss and gradients; tree is several times cheaper.
        attention: sdpa, or flex_attention (CUDA only), which skips the parts of a tree that do not see each other.
        early_stopping_patience: epochs that do not better the best one, which is what is kept.
        best_by: what the best epoch has: the least validation loss (loss), or the highest HR@10 of a constrained search with
            eval_beams beams over the validation rows (HR@10).
        wandb_project: log there; off when not given. WANDB_MODE=offline is respected.
        force: do a finished run again.
    """
    prompt_set = load_prompts(prompts or ("compact" if train_from_scratch else "worded"), category)
    weights = choose_tasks(tasks, prompt_set, preference_file=preference_file)
    tasks = list(tasks or weights)
    compact = set(prompt_set.templates) == {"next_sid", "similar_sid"}
    cut_histories = compact if cut_histories is None else cut_histories
    check_adapter_flags(
        freeze_LLM,
        lora,
        train_from_scratch,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_targets=lora_targets,
        lora_dropout=lora_dropout,
    )
    if best_by not in BEST_BY or eval_beams < 10:
        raise InputError(f"--best_by {best_by}: expected one of {', '.join(BEST_BY)}, and --eval_beams of 10 or more")
    sid_init = sid_init or ("text" if train_from_scratch else "noise")
    if sid_init not in SID_INITS:
        raise InputError(f"--sid_init {sid_init}: expected one of {', '.join(SID_INITS)}")
    if packing not in PACKINGS or tree_tokens < 1:
        raise InputError(f"--packing {packing}: expected one of {', '.join(PACKINGS)}, and --tree_tokens of 1 or more")
    check_attention(attention)
    if Path(base_model).is_file() and not train_from_scratch:
        raise InputError(f"--base_model {base_model}: a config file has no weights; add --train_from_scratch True")
    world = process_state().num_processes
    if batch_size % (micro_batch_size * world):
        raise InputError(
            f"--batch_size {batch_size}: must be a multiple of micro_batch_size {micro_batch_size} x {world} process(es)"
        )

    settings = dict(locals())
    settings = {key: settings[key] for key in sft.__annotations__ if key not in ("force", "return")}
    inputs = [train_file, eval_file, sid_index_path, item_meta_path]
    inputs += [resolve_prompts_file(prompts)[0]] if prompts else []
    inputs += [path for path in (base_model, preference_file) if path and Path(path).exists()]
    final = Path(output_dir) / "final_checkpoint"
    with process_state().main_process_first():
        stage = Stage("sft", settings, inputs, [final], Path(output_dir) / "sft.stage.json", force)
    if stage.finished:
        return
    # Now, not when training begins: a run cut off before that must not leave another run's checkpoints to be resumed.
    checkpoint = choose_resume_checkpoint(output_dir, resume_from_checkpoint, stage.resuming)
    check_adapter_checkpoint(checkpoint, freeze_LLM, lora)

    # Phase 1: everything that can be wrong with the input is found before a model is loaded.
    index = read_index(sid_index_path, "sid_index_path")
    catalogue, descriptions = read_catalogue(item_meta_path, index, sid_index_path)
    preferences = read_preferences(preference_file) if preference_file else None
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
        model, tokenizer = build_model_from_config(
            base_model, list_texts(catalogue.titles, descriptions), seed, attention
        )
    else:
        model, tokenizer = load_model(base_model, "base_model", attention)
    sid_tokens = sorted({token for tokens in index.values() for token in tokens})
    directions = None
    if sid_init == "text" and not tokenizer.get_vocab().keys() >= set(sid_tokens):  # a base that has them needs none
        about = join_item_texts(catalogue.titles, descriptions)
        if train_from_scratch:
            vectors = compute_tfidf_vectors(about, model.get_input_embeddings().weight.shape[1], seed)
        else:
            vectors = average_embeddings(about, model, tokenizer)
        directions = compute_code_directions([index[item] for item in catalogue.item_ids], vectors)
    added = add_sid_tokens(model, tokenizer, sid_tokens, seed, 1.0 if train_from_scratch else 0.1, directions)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sid_rows = tokenizer.convert_tokens_to_ids(sid_tokens)
    if lora:
        model = add_lora(model, sid_rows, lora_rank, lora_alpha, lora_targets, lora_dropout)
    elif freeze_LLM:
        model = train_token_rows(model, sid_rows)
    if dropout:  # after the wrapping: its hooks are to stand on the layers that are called
        add_dropout(model, dropout)
    encoder = Encoder(tokenizer, prompt_set)
    accumulation = batch_size // (micro_batch_size * world)
    texts = dict(zip(catalogue.item_ids, descriptions)), preferences
    eval_tasks = dict.fromkeys(["next_sid"] if "next_sid" in prompt_set.templates else weights, 1.0)
    train_part = build_mixture(
        weights, TaskInputs(splits[0], catalogue, *texts, cut_histories, seed), encoder, cutoff_len
    )
    eval_part = build_mixture(eval_tasks, TaskInputs(splits[1], catalogue, *texts), encoder, cutoff_len)
    for line in train_part.report():
        say(f"[sft] {line}")
    try:
        how = {"packing": packing, "tree_tokens": tree_tokens}
        train_set = TreeBatches([train_part], batch_size, accumulation * world, encoder.pad_token_id, seed, **how)
        eval_batches = max(world, -(-len(eval_part) // micro_batch_size // world) * world)
        eval_set = TreeBatches(
            [eval_part], len(eval_part), min(eval_batches, len(eval_part)), encoder.pad_token_id, None, **how
        )
    except ValueError as error:
        raise InputError(f"--batch_size {batch_size}: {error}") from None
    trainable = count_trainable_parameters(model)
    say(
        f"[sft] {parameters:,} parameters, {trainable:,} trainable, {added} new SID tokens, {train_set.rows:,} training rows, {train_set.steps} steps an epoch"
    )

    # Phase 3: train.
    if wandb_project:
        os.environ["WANDB_PROJECT"] = wandb_project
    validate = None
    if best_by == "HR@10":
        trie, sid_of_sequence = build_catalogue_trie(catalogue, encoder, process_state().device)
        rows_to_rank = EvalSidDataset(splits[1], encoder, cutoff_len).examples

        def validate() -> dict[str, float]:
            policy = trainer.accelerator.unwrap_model(trainer.model)
            return measure_validation(policy, trie, sid_of_sequence, rows_to_rank, eval_beams, micro_batch_size)

    trainer = TreeTrainer(
        model=model,
        validate=validate,
        train_dataset=train_set,
        eval_dataset=eval_set,
        callbacks=[EarlyStoppingCallback(early_stopping_patience), StageTimer(stage)],
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
            metric_for_best_model=f"eval_{best_by}",
            greater_is_better=best_by != "loss",
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
        save_checkpoint_folder(merge_adapters(model), tokenizer, prompt_set, final)
    trainer.accelerator.wait_for_everyone()
    stage.done(
        **{f"eval_{best_by}": round(trainer.state.best_metric, 4)},
        steps=trainer.state.global_step,
        parameters=parameters,
        trainable=trainable,
    )


if __name__ == "__main__":
    run(sft)
