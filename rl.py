"""Reinforcement learning: GRPO on top of an SFT checkpoint, with rollouts that are items of the catalogue by construction.

python rl.py --model_path output/sft/final_checkpoint --train_file ... --eval_file ... --info_file ... --output_dir output/rl
"""

from __future__ import annotations

import copy
import math
import os
import random
from pathlib import Path

import torch
from transformers import EarlyStoppingCallback, set_seed

from data import RL_TASKS, EvalSidDataset, TaskInputs, build_mixture, choose_tasks
from minionerec.common.cli import run
from minionerec.common.files import InputError
from minionerec.common.items import read_descriptions, read_preferences
from minionerec.common.processes import process_state, say
from minionerec.common.records import check_rows_against_catalogue, read_info, read_rows
from minionerec.common.stage import Stage
from minionerec.evaluation.ranking import measure_validation
from minionerec.language.adapters import (
    add_lora,
    check_adapter_checkpoint,
    check_adapter_flags,
    count_trainable_parameters,
    merge_adapters,
)
from minionerec.language.catalogue_trie import build_catalogue_trie
from minionerec.language.models import add_dropout, load_model
from minionerec.language.prompts import Encoder, load_checkpoint_prompts, resolve_prompts_file
from minionerec.training.callbacks import EpochSetter, StageTimer
from minionerec.training.checkpoints import choose_resume_checkpoint, save_checkpoint_folder
from minionerec.training.grpo_loss import CLIP, choose_loss
from minionerec.training.rewards import REWARDS, build_rewards
from minionerec_trainer import GroupTrainer, RLConfig

# Dense rewards let every group say something; divided by their spread, groups without the target would say as much as
# those with it, and without a strong pull to the reference a beam's wrong items are pushed down for ever.
DEFAULT_REWARDS = ("rule:0.5", "content", "transitions")


PROMPTS_PER_STEP = 64


def rl(
    model_path: str,
    train_file: str,
    eval_file: str,
    info_file: str,
    output_dir: str,
    reward_type: list[str] | None = None,
    num_generations: int = 16,
    train_batch_size: int = 64,
    gradient_accumulation_steps: int | None = None,
    num_train_epochs: float = 2.0,
    max_steps: int = -1,
    learning_rate: float = 1e-5,
    warmup_ratio: float = 0.03,
    max_grad_norm: float = 0.3,
    beta: float = 1.0,
    beam_search: bool = True,
    temperature: float = 1.0,
    dynamic_sampling: bool = False,
    add_gt: bool = False,
    mask_all_zero: bool = False,
    dapo: bool = False,
    gspo: bool = False,
    dr_grpo: bool | None = None,
    num_iterations: int = 1,
    epsilon: float | None = None,
    epsilon_high: float | None = None,
    renormalize: bool = False,
    dropout: float = 0.0,
    weight_decay: float = 0.0,
    ref_model_path: str | None = None,
    sync_ref_model: bool = False,
    ref_model_sync_steps: int = 512,
    ref_model_mixup_alpha: float = 0.6,
    lora: bool = False,
    lora_rank: int = 16,
    lora_alpha: int = 32,
    lora_targets: list[str] | None = None,
    lora_dropout: float = 0.0,
    ada_path: str | None = None,
    cf_path: str | None = None,
    reward_module: str | None = None,
    test_during_training: bool = True,
    test_beam: int = 20,
    eval_step: float = 0.2,
    eval_sample: int = 1000,
    early_stopping_patience: int = 0,
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
    tensorboard: bool = False,
    force: bool = False,
) -> None:
    """GRPO from an SFT checkpoint.

    Args:
        model_path: checkpoint of sft.py. train_file, eval_file: CSV splits. info_file: the catalogue.
        reward_type: rewards with weights, such as ranking,prefix:0.5, summed; default rule:0.5,content,transitions. rule (1 for the target),
            ranking (rule + rank penalty), ranking_only, prefix (share of the target's SID tokens that the completion begins
            with), semantic (cosine of item embeddings, ada_path); what a second recommender holds likely after the history,
            against its favourite: content (likeness of titles), transitions (counts in the train rows), sasrec (a model
            folder of sasrec.py, cf_path); module (reward_module: FILE.py:FUNCTION, called as (completions, example)).
        num_generations: completions per prompt. train_batch_size, eval_batch_size: completions per device and pass.
        gradient_accumulation_steps: passes of an optimizer step; default: what makes 64 prompts on all devices together.
        max_steps: stop after that many optimizer steps; -1 goes by num_train_epochs.
        beta: weight of the KL term; 0 needs no reference model.
        beam_search: rollouts are the best num_generations items; False samples them at `temperature`.
        dynamic_sampling: find half as many again and keep the target, if it was found, and as many distinct ones as possible.
        add_gt: put the target into groups that lack it. mask_all_zero: leave groups of equal rewards out, KL term included.
        dapo: the mean over tokens and a higher upper clip. gspo: ratios of whole completions. dr_grpo: rewards are not
            divided by their spread, sums over tokens not by the completion's length; on, unless one of the others is.
            With all of them False, GRPO as first published. See `grpo_loss.py`.
        num_iterations: optimizer steps per rollout. epsilon, epsilon_high: clip of the ratio; default as in the papers.
        renormalize: probabilities over legal tokens only, in rollouts' ranks, loss and KL; False: over the vocabulary.
        dropout: on embeddings and residual branches of the policy, while it learns.
        ref_model_path: another reference for the KL term than the model the run starts from.
        sync_ref_model: move the reference towards the policy every ref_model_sync_steps, by ref_model_mixup_alpha.
        lora: LoRA matrices and the SID tokens' rows learn, as in sft.py; the reference is the model without them.
        test_during_training: measure validation HR@10 and NDCG@10 at every eval_step (below 1: share of the run) on
            eval_sample rows with test_beam beams; final_checkpoint is then the best of them by HR@10, the start included.
        early_stopping_patience: stop after so many measurements without a better one; 0 never does.
        sample_train: use that many random train rows; -1 is all.
        tasks: with weights, such as next_sid,title2sid:0.5 (`choose_tasks`); default: next_sid, title_history2sid and
            title2sid, as far as the prompt set has them. Others: description2sid, which needs item_meta_path, and
            preference2sid, which needs preference_file (`read_preferences`).
        prompts: another prompt set than the checkpoint's own. category: any text, for prompts that show {category}.
        shared_sids: accept an info file in which items share a SID.
        wandb_project: log there. tensorboard: log to runs/ below output_dir.
    """
    loss_type = choose_loss(dapo, gspo, dr_grpo)
    if num_generations < 2:
        raise InputError(f"--num_generations {num_generations}: a group needs at least 2 completions")
    if train_batch_size % num_generations or train_batch_size < num_generations:
        raise InputError(
            f"--train_batch_size {train_batch_size}: must be a multiple of num_generations {num_generations}"
        )
    if test_beam < 10 or eval_batch_size < test_beam:
        raise InputError(
            f"--eval_batch_size {eval_batch_size}: must hold at least test_beam {test_beam} completions, and test_beam 10 or more"
        )
    if temperature <= 0:
        raise InputError(f"--temperature {temperature}: must be positive")
    world = process_state().num_processes
    if gradient_accumulation_steps is None:
        gradient_accumulation_steps = max(1, round(PROMPTS_PER_STEP * num_generations / (train_batch_size * world)))
    if num_iterations < 1 or gradient_accumulation_steps < 1:
        raise InputError("--num_iterations, --gradient_accumulation_steps: must be at least 1")
    if early_stopping_patience and not test_during_training:
        raise InputError("--early_stopping_patience: needs --test_during_training True")
    if sync_ref_model and (lora or not beta):
        raise InputError("--sync_ref_model True: needs a reference of its own: a beta above 0, and no --lora")
    if ref_model_path and not beta:
        raise InputError("--ref_model_path: has no effect with --beta 0")
    lora_settings = dict(
        lora_rank=lora_rank, lora_alpha=lora_alpha, lora_targets=lora_targets, lora_dropout=lora_dropout
    )
    check_adapter_flags(False, lora, False, **lora_settings)
    settings = {key: value for key, value in locals().items() if key in rl.__annotations__ and key != "force"}
    inputs = [train_file, eval_file, info_file]
    inputs += [resolve_prompts_file(prompts)[0]] if prompts else []
    optional = [model_path, ref_model_path, item_meta_path, preference_file, ada_path, cf_path]
    optional += [reward_module.rpartition(":")[0]] if reward_module else []
    inputs += [path for path in optional if path and Path(path).exists()]
    final = Path(output_dir) / "final_checkpoint"
    with process_state().main_process_first():
        stage = Stage("rl", settings, inputs, [final], Path(output_dir) / "rl.stage.json", force)
    if stage.finished:
        return
    # Now, not when training begins: a run cut off before that must not leave another run's checkpoints to be resumed.
    checkpoint = choose_resume_checkpoint(output_dir, resume_from_checkpoint, stage.resuming)
    check_adapter_checkpoint(checkpoint, False, lora)

    # Phase 1: data, model, catalogue; everything that can be wrong is found here.
    generator = random.Random(seed)
    catalogue = read_info(info_file, shared_sids)
    known = set(catalogue.sids)
    whole, splits = [], []
    for path, flag, count in ((train_file, "train_file", sample_train), (eval_file, "eval_file", eval_sample)):
        rows = read_rows(path, flag)
        for number, row in enumerate(rows, 1):
            if row.sid not in known:
                raise InputError(f"{path}, row {number}: SID {row.sid} is not in {info_file}")
        whole.append(rows)
        splits.append(
            [rows[i] for i in sorted(generator.sample(range(len(rows)), count))] if 0 <= count < len(rows) else rows
        )
    device = process_state().device
    reward_files = {"ada_path": ada_path, "cf_path": cf_path, "reward_module": reward_module}
    rewards = build_rewards(reward_type or DEFAULT_REWARDS, catalogue, whole[0], str(device), **reward_files)
    if any(reward.name not in REWARDS for reward in rewards):  # those look at items, not at SIDs alone
        check_rows_against_catalogue(splits[0], train_file, catalogue, info_file)
    prompt_set = load_checkpoint_prompts(model_path, prompts, category)
    weights = choose_tasks(tasks, prompt_set, RL_TASKS, item_meta_path=item_meta_path, preference_file=preference_file)
    descriptions = read_descriptions(item_meta_path, catalogue.item_ids) if item_meta_path else None
    preferences = read_preferences(preference_file) if preference_file else None
    set_seed(seed)
    model, tokenizer = load_model(model_path, "model_path")
    encoder = Encoder(tokenizer, prompt_set)
    sources = TaskInputs(splits[0], catalogue, descriptions, preferences, seed=seed)
    train_set = build_mixture(weights, sources, encoder, cutoff_len, RL_TASKS)
    for line in train_set.report():
        say(f"[rl] {line}")
    for dataset in train_set.datasets:
        # Once with what a rollout may find, so that a reward that cannot work says so before the first step.
        completions = list(dict.fromkeys([dataset[0].sid, *catalogue.sids[:num_generations]]))[:num_generations]
        for reward in rewards:
            reward(completions, dataset[0])
    validation = EvalSidDataset(splits[1], encoder, cutoff_len).examples
    trie, sid_of_sequence = build_catalogue_trie(catalogue, encoder, device)
    model.to(device)
    reference = None
    if ref_model_path:
        reference, other = load_model(ref_model_path, "ref_model_path")
        if other.get_vocab() != tokenizer.get_vocab():
            raise InputError(f"--ref_model_path {ref_model_path}: its vocabulary is not that of {model_path}")
        reference = reference.to(device).eval().requires_grad_(False)
    elif beta and not lora:
        reference = copy.deepcopy(model).eval().requires_grad_(False)
    if lora:
        sid_rows = {token for level in trie.level_tokens for token in level.tolist()} - set(encoder.end)
        model = add_lora(model, sorted(sid_rows), lora_rank, lora_alpha, lora_targets, lora_dropout)
    if dropout:  # after the wrapping: its hooks are to stand on the layers that are called
        add_dropout(model, dropout)

    def validate() -> dict[str, float]:
        with trainer.compute_loss_context_manager():
            policy = trainer.accelerator.unwrap_model(trainer.model)
            batch_size = max(1, eval_batch_size // test_beam)
            return measure_validation(policy, trie, sid_of_sequence, validation, test_beam, batch_size)

    # Phase 2: train.
    if wandb_project:
        os.environ["WANDB_PROJECT"] = wandb_project
    if tensorboard:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(output_dir) / "runs"))
    per_step = train_batch_size // num_generations * gradient_accumulation_steps * world
    updates = (
        num_train_epochs * math.ceil(len(train_set) / per_step) * num_iterations
    )  # an epoch's last step is filled up
    steps = max_steps if max_steps > 0 else max(1, round(updates))
    interval = max(1, round(eval_step * steps) if eval_step < 1 else int(eval_step))
    interval = (
        -(-interval // num_iterations) * num_iterations
    )  # a checkpoint holds no rollouts that are to be used again
    say(
        f"[rl] {count_trainable_parameters(model):,} trainable parameters, {len(train_set):,} prompts, about {steps:,} steps of "
        f"{per_step} prompts x {num_generations} completions"
    )
    clip = CLIP[loss_type]
    stopping = [EarlyStoppingCallback(early_stopping_patience)] if early_stopping_patience else []
    trainer = GroupTrainer(
        model=model,
        reference=reference,
        train_dataset=train_set,
        trie=trie,
        sid_of_sequence=sid_of_sequence,
        rewards=rewards,
        pad_token_id=encoder.pad_token_id,
        validate=validate if test_during_training else None,
        callbacks=[StageTimer(stage), EpochSetter(), *stopping],
        args=RLConfig(
            output_dir=output_dir,
            beam_search=beam_search,
            dynamic_sampling=dynamic_sampling,
            add_gt=add_gt,
            mask_all_zero=mask_all_zero,
            renormalize=renormalize,
            loss_type=loss_type,
            importance_sampling_level="sequence" if gspo else "token",
            scale_rewards="none" if dr_grpo else "group",
            num_iterations=num_iterations,
            epsilon=clip[0] if epsilon is None else epsilon,
            epsilon_high=clip[1] if epsilon_high is None else epsilon_high,
            per_device_train_batch_size=train_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            num_generations=num_generations,
            temperature=temperature,
            beta=beta,
            sync_ref_model=sync_ref_model,
            ref_model_sync_steps=ref_model_sync_steps,
            ref_model_mixup_alpha=ref_model_mixup_alpha,
            num_train_epochs=num_train_epochs,
            max_steps=max_steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
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
            report_to=["wandb"] * bool(wandb_project) + ["tensorboard"] * tensorboard or "none",
            run_name=wandb_run_name,
        ),
    )
    start = validate() if test_during_training else {}
    if start:
        say(
            "[rl] validation before the first step: "
            + ", ".join(f"{name} {value:.4f}" for name, value in start.items())
        )
    trainer.train(resume_from_checkpoint=checkpoint)

    # Phase 3: keep the best validated weights, the start included.
    results = {"steps": trainer.state.global_step}
    kept = merge_adapters(model)
    if start:
        best = trainer.state.best_metric
        results |= {"validation HR@10 at start": round(start["HR@10"], 4), "validation HR@10 best": round(best, 4)}
        if best <= start["HR@10"]:
            say("[rl] no checkpoint beat the SFT model on validation: final_checkpoint holds the SFT weights")
            kept = load_model(model_path, "model_path")[0]
    if trainer.is_world_process_zero():
        save_checkpoint_folder(kept, tokenizer, prompt_set, final)
    trainer.accelerator.wait_for_everyone()
    stage.done(**results)


if __name__ == "__main__":
    run(rl)
