"""Reinforcement learning: GRPO on top of an SFT checkpoint, with rollouts that are items of the catalogue by construction.

python rl.py --model_path output/sft/final_checkpoint --train_file ... --eval_file ... --info_file ... --output_dir output/rl
"""

from __future__ import annotations

import copy
import os
import random
from pathlib import Path

import torch
from transformers import TrainerCallback, set_seed
from trl import GRPOConfig

import cli
from data import EvalSidDataset
from fileio import InputError
from minionerec_trainer import GroupTrainer
from model_io import TimeKeeper, checkpoint_to_resume, load_model, process_state, save_checkpoint_folder
from prompts import Encoder, checkpoint_prompts, prompts_file
from ranking import build_trie, validation_metrics
from records import read_info, read_rows
from rewards import REWARDS
from tasks import RL_TASKS, Inputs, choose_tasks, make_mixture, read_descriptions, read_preferences


class FreshExamples(TrainerCallback):
    """Tells the training set the epoch, so that weights below 1 take other examples; data loaders do not in every setting."""

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch or 0))


def rl(
    model_path: str,
    train_file: str,
    eval_file: str,
    info_file: str,
    output_dir: str,
    reward_type: str = "ranking",
    num_generations: int = 16,
    train_batch_size: int = 64,
    gradient_accumulation_steps: int = 1,
    num_train_epochs: float = 2.0,
    max_steps: int = -1,
    learning_rate: float = 1e-5,
    warmup_ratio: float = 0.03,
    max_grad_norm: float = 0.3,
    beta: float = 1e-3,
    beam_search: bool = True,
    temperature: float = 1.0,
    add_gt: bool = False,
    mask_all_zero: bool = False,
    sync_ref_model: bool = False,
    test_during_training: bool = True,
    test_beam: int = 20,
    eval_step: float = 0.2,
    eval_sample: int = 1000,
    eval_batch_size: int = 640,
    sample_train: int = -1,
    tasks: list[str] | None = None,
    prompts: str | None = None,
    category: str | None = None,
    item_meta_path: str | None = None,
    preference_file: str | None = None,
    cutoff_len: int = 512,
    shared_sids: bool = False,
    gradient_checkpointing: bool = False,
    seed: int = 42,
    resume_from_checkpoint: str | None = None,
    wandb_project: str | None = None,
    wandb_run_name: str | None = None,
    force: bool = False,
) -> None:
    """GRPO from an SFT checkpoint.

    Args:
        model_path: checkpoint of sft.py. train_file, eval_file: CSV splits. info_file: the catalogue.
        reward_type: rule, ranking (rule + rank penalty) or ranking_only.
        num_generations: completions per prompt. train_batch_size, eval_batch_size: completions per device and pass.
        max_steps: stop after that many optimizer steps; -1 goes by num_train_epochs.
        beam_search: rollouts are the best num_generations items; False samples them at `temperature`.
        add_gt: put the target into groups that lack it. mask_all_zero: leave groups of equal rewards out.
        sync_ref_model: let the KL reference follow the policy slowly.
        test_during_training: measure validation HR@10 and NDCG@10 at every eval_step (below 1: share of the run) on
            eval_sample rows with test_beam beams; final_checkpoint is then the best of them by HR@10, the start included.
        sample_train: use that many random train rows; -1 is all.
        tasks: with weights, such as next_sid,title2sid:0.5 (`choose_tasks`); default: next_sid, title_history2sid and
            title2sid, as far as the prompt set has them. Others: description2sid, which needs item_meta_path, and
            preference2sid, which needs preference_file (`read_preferences`).
        prompts: another prompt set than the checkpoint's own. category: any text, for prompts that show {category}.
        shared_sids: accept an info file in which items share a SID.
    """
    if reward_type not in REWARDS:
        raise InputError(f"--reward_type {reward_type}: expected one of {', '.join(REWARDS)}")
    if num_generations < 2:
        raise InputError(f"--num_generations {num_generations}: a group needs at least 2 completions")
    if train_batch_size % num_generations or train_batch_size < num_generations:
        raise InputError(
            f"--train_batch_size {train_batch_size}: must be a multiple of num_generations {num_generations}"
        )
    if eval_batch_size < test_beam:
        raise InputError(f"--eval_batch_size {eval_batch_size}: must hold at least test_beam {test_beam} completions")
    if temperature <= 0:
        raise InputError(f"--temperature {temperature}: must be positive")
    settings = {key: value for key, value in locals().items() if key in rl.__annotations__ and key != "force"}
    inputs = [train_file, eval_file, info_file]
    inputs += [prompts_file(prompts)[0]] if prompts else []
    inputs += [path for path in (model_path, item_meta_path, preference_file) if path and Path(path).exists()]
    final = Path(output_dir) / "final_checkpoint"
    with process_state().main_process_first():
        stage = cli.Stage("rl", settings, inputs, [final], Path(output_dir) / "rl.stage.json", force)
    if stage.finished:
        return
    # Now, not when training begins: a run cut off before that must not leave another run's checkpoints to be resumed.
    checkpoint = checkpoint_to_resume(output_dir, resume_from_checkpoint, stage.resuming)

    # Phase 1: data, model, catalogue; everything that can be wrong is found here.
    generator = random.Random(seed)
    catalogue = read_info(info_file, shared_sids)
    known = set(catalogue.sids)
    splits = []
    for path, flag, count in ((train_file, "train_file", sample_train), (eval_file, "eval_file", eval_sample)):
        rows = read_rows(path, flag)
        for number, row in enumerate(rows, 1):
            if row.sid not in known:
                raise InputError(f"{path}, row {number}: SID {row.sid} is not in {info_file}")
        splits.append(
            [rows[i] for i in sorted(generator.sample(range(len(rows)), count))] if 0 <= count < len(rows) else rows
        )
    prompt_set = checkpoint_prompts(model_path, prompts, category)
    weights = choose_tasks(tasks, prompt_set, RL_TASKS, item_meta_path=item_meta_path, preference_file=preference_file)
    descriptions = read_descriptions(item_meta_path, catalogue.item_ids) if item_meta_path else None
    preferences = read_preferences(preference_file) if preference_file else None
    set_seed(seed)
    model, tokenizer = load_model(model_path, "model_path")
    encoder = Encoder(tokenizer, prompt_set)
    sources = Inputs(splits[0], catalogue, descriptions, preferences, seed=seed)
    train_set = make_mixture(weights, sources, encoder, cutoff_len, RL_TASKS)
    for line in train_set.report():
        cli.say(f"[rl] {line}")
    validation = EvalSidDataset(splits[1], encoder, cutoff_len).examples
    device = process_state().device
    trie, sid_of_sequence = build_trie(catalogue, encoder, device)
    model.to(device)

    def validate() -> dict[str, float]:
        with trainer.compute_loss_context_manager():
            policy = trainer.accelerator.unwrap_model(trainer.model)
            batch_size = max(1, eval_batch_size // test_beam)
            return validation_metrics(policy, trie, sid_of_sequence, validation, test_beam, batch_size)

    # Phase 2: train.
    reference = None
    if beta:
        reference = copy.deepcopy(model).eval().requires_grad_(False)
    if wandb_project:
        os.environ["WANDB_PROJECT"] = wandb_project
    world = process_state().num_processes
    per_step = train_batch_size // num_generations * gradient_accumulation_steps * world
    steps = max_steps if max_steps > 0 else max(1, round(num_train_epochs * len(train_set) / per_step))
    interval = max(1, round(eval_step * steps) if eval_step < 1 else int(eval_step))
    cli.say(
        f"[rl] {len(train_set):,} prompts, about {steps:,} steps of {per_step} prompts x {num_generations} completions"
    )
    trainer = GroupTrainer(
        model=model,
        reference=reference,
        train_dataset=train_set,
        trie=trie,
        sid_of_sequence=sid_of_sequence,
        reward=REWARDS[reward_type],
        pad_token_id=encoder.pad_token_id,
        beam_rollouts=beam_search,
        add_gt=add_gt,
        mask_all_zero=mask_all_zero,
        validate=validate if test_during_training else None,
        callbacks=[TimeKeeper(stage), FreshExamples()],
        args=GRPOConfig(
            output_dir=output_dir,
            per_device_train_batch_size=train_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            num_generations=num_generations,
            temperature=temperature,
            beta=beta,
            sync_ref_model=sync_ref_model,
            num_train_epochs=num_train_epochs,
            max_steps=max_steps,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=round(warmup_ratio * steps),
            max_grad_norm=max_grad_norm,
            gradient_checkpointing=gradient_checkpointing,
            use_cpu=not torch.accelerator.is_available(),
            disable_tqdm=False,
            ddp_find_unused_parameters=False,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            eval_strategy="steps" if test_during_training else "no",
            eval_steps=interval,
            eval_on_start=False,
            per_device_eval_batch_size=num_generations,
            save_strategy="steps",
            save_steps=interval,
            save_total_limit=1,
            load_best_model_at_end=test_during_training,
            metric_for_best_model="HR@10" if test_during_training else None,
            greater_is_better=True if test_during_training else None,
            logging_steps=max(1, steps // 20),
            seed=seed,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            report_to="wandb" if wandb_project else "none",
            run_name=wandb_run_name,
        ),
    )
    start = validate() if test_during_training else {}
    if start:
        cli.say(
            "[rl] validation before the first step: "
            + ", ".join(f"{name} {value:.4f}" for name, value in start.items())
        )
    trainer.train(resume_from_checkpoint=checkpoint)

    # Phase 3: keep the best validated weights, the start included.
    results = {"steps": trainer.state.global_step}
    if start:
        best = trainer.state.best_metric
        results |= {"validation HR@10 at start": round(start["HR@10"], 4), "validation HR@10 best": round(best, 4)}
        if best <= start["HR@10"]:
            cli.say("[rl] no checkpoint beat the SFT model on validation: final_checkpoint holds the SFT weights")
            model.load_state_dict(load_model(model_path, "model_path")[0].state_dict())
    if trainer.is_world_process_zero():
        save_checkpoint_folder(model, tokenizer, prompt_set, final)
    trainer.accelerator.wait_for_everyone()
    stage.done(**results)


if __name__ == "__main__":
    cli.run(rl)
