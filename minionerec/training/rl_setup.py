"""The parts of an RL run: its flags worked out, its data, policy and rewards, its steps and configuration."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, Trainer, set_seed

from minionerec.common.cli import recorded_settings
from minionerec.common.files import InputError
from minionerec.common.model_folder import (
    has_catalogue,
    read_model_catalogue,
    summarise_rows,
    write_model_catalogue,
)
from minionerec.common.processes import process_state, say
from minionerec.common.records import Catalogue, check_index_against_info, read_index, read_info
from minionerec.common.row_table import RowTable
from minionerec.common.step_log import choose_loggers
from minionerec.engines.prefix_scorer import PrefixEngine
from minionerec.engines.remote import RemoteEngine
from minionerec.engines.settings import check_rollout_flags
from minionerec.engines.vllm import VllmEngine
from minionerec.language.adapters import check_adapter_flags, wrap_with_adapters
from minionerec.language.catalogue_trie import CatalogueTrie, build_catalogue_trie, check_token_rows
from minionerec.language.mixture import TaskMixture
from minionerec.language.model_checks import limit_length
from minionerec.language.models import add_dropout, load_model
from minionerec.language.prompts import Encoder, PromptSet
from minionerec.search.attention_check import check_tree_attention
from minionerec.training.checkpoints import export_model
from minionerec.training.grpo_loss import CLIP, choose_loss
from minionerec.training.hub import check_hub_flags
from minionerec.training.model_card import write_model_card
from minionerec.training.optimizers import check_optimizer
from minionerec.training.rewards import DEFAULT_REWARDS, REWARDS, NamedReward, RewardInputs, build_rewards
from minionerec.training.rl_config import RLConfig
from minionerec.training.settings import RLFlags
from minionerec.training.setup import build_arguments, check_loading_flags, read_splits

PROMPTS_PER_STEP = 64


@dataclass
class RLData:
    """What a run reads: the catalogue and the rows of the splits."""

    catalogue: Catalogue
    all_train_rows: RowTable
    train_rows: RowTable
    valid_rows: RowTable


@dataclass
class Policy:
    """What a run trains, its reference, and how their texts become tokens.

    Attributes:
        reference: None where the KL term is off, or where the reference is the model without its adapters.
    """

    model: PreTrainedModel | PeftModel
    reference: PreTrainedModel | None
    encoder: Encoder
    catalogue_trie: CatalogueTrie


@dataclass
class Schedule:
    """Optimizer steps of a run, steps between two validations, and prompts of a step over all processes."""

    steps: int
    interval: int
    prompts: int


def resolve_rl_flags(flags: RLFlags, processes: int | None = None) -> RLFlags:
    """The flags with every default worked out, once they are checked against each other.

    Args:
        flags: as they were given.
        processes: how many share the run, if it is another one than this.

    Raises:
        InputError: flags that contradict each other.
    """
    generations, batch = flags.num_generations, flags.train_batch_size
    if generations < 2:
        raise InputError(f"--num_generations {generations}: a group needs at least 2 completions")
    if batch % generations or batch < generations:
        raise InputError(f"--train_batch_size {batch}: must be a multiple of num_generations {generations}")
    if flags.test_beam < 10 or flags.eval_batch_size < flags.test_beam:
        raise InputError(
            f"--eval_batch_size {flags.eval_batch_size}: must hold at least test_beam {flags.test_beam} completions, "
            "and test_beam 10 or more"
        )
    if flags.temperature <= 0:
        raise InputError(f"--temperature {flags.temperature}: must be positive")
    accumulation = flags.gradient_accumulation_steps
    if accumulation is None:
        world = processes or process_state().num_processes
        accumulation = max(1, round(PROMPTS_PER_STEP * generations / (batch * world)))
    if flags.num_iterations < 1 or accumulation < 1:
        raise InputError("--num_iterations, --gradient_accumulation_steps: must be at least 1")
    if flags.early_stopping_patience and not flags.test_during_training:
        raise InputError("--early_stopping_patience: needs --test_during_training True")
    if flags.sync_ref_model and (flags.lora or not flags.beta):
        raise InputError("--sync_ref_model True: needs a reference of its own: a beta above 0, and no --lora")
    if flags.ref_model_path and not flags.beta:
        raise InputError("--ref_model_path: has no effect with --beta 0")
    choose_loss(flags.dapo, flags.gspo, flags.dr_grpo)
    check_adapter_flags(flags)
    check_optimizer(flags.optim)
    check_rollout_flags(flags, flags.rollout_dtype, flags.load_in_4bit)
    check_loading_flags(flags)
    check_hub_flags(flags)
    sample_train = -1 if flags.sample_train is False else flags.sample_train
    if flags.tensorboard:
        flags = replace(flags, report_to=[*choose_loggers(flags), "tensorboard"])
    return replace(flags, gradient_accumulation_steps=accumulation, sample_train=sample_train)


def read_rl_data(flags: RLFlags) -> RLData:
    """The catalogue and the splits, every row checked against the catalogue."""
    catalogue = read_info(flags.info_file, flags.shared_sids)
    if flags.sid_index_path:
        index = read_index(flags.sid_index_path, "sid_index_path")
        check_index_against_info(index, catalogue, flags.sid_index_path, flags.info_file)
    names = [entry.partition(":")[0] for entry in flags.reward_type or DEFAULT_REWARDS]
    uses_items = any(REWARDS[name].uses_items for name in names if name in REWARDS)
    rows = read_splits(flags, catalogue, flags.info_file, flags.sample_train, flags.seed, history=uses_items)
    return RLData(catalogue, *rows)


def build_reward_terms(flags: RLFlags, data: RLData) -> list[NamedReward]:
    """The terms of the reward, with the files they need."""
    files = {name: getattr(flags, name) for name in ("ada_path", "cf_path", "reward_module")}
    inputs = RewardInputs(data.catalogue, data.all_train_rows, str(process_state().device), files)
    return build_rewards(flags.reward_type or DEFAULT_REWARDS, inputs)


def build_policy(flags: RLFlags, data: RLData, prompts: PromptSet) -> Policy:
    """The model on its device, wrapped where only a part of it is trained, and the reference of its KL term."""
    set_seed(flags.seed)
    how = {"attention": flags.attention, "longest": flags.cutoff_len}
    model, tokenizer = load_model(flags.model_path, "model_path", in_4bit=flags.load_in_4bit, **how)
    encoder = Encoder(tokenizer, prompts, limit_length(flags.cutoff_len, model))
    check_rollout_window(model, encoder, data.catalogue.sids, flags)
    device = process_state().device
    catalogue_trie = build_catalogue_trie(data.catalogue, encoder, device)
    check_token_rows(catalogue_trie, model, flags.model_path, "model_path")
    model.to(device)
    reference = None
    if flags.ref_model_path:
        reference, other = load_model(flags.ref_model_path, "ref_model_path", **how)
        if other.get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"--ref_model_path {flags.ref_model_path}: its vocabulary is not that of {flags.model_path}"
            )
        reference = reference.to(device).eval().requires_grad_(False)
    elif flags.beta and not flags.lora:
        reference = copy.deepcopy(model).eval().requires_grad_(False)
    tokens = {token for level in catalogue_trie.trie.level_tokens for token in level.tolist()}
    model = wrap_with_adapters(model, sorted(tokens - set(encoder.end)), flags)
    if flags.dropout:  # after the wrapping: its hooks are to stand on the layers that are called
        add_dropout(model, flags.dropout)
    return Policy(model, reference, encoder, catalogue_trie)


def check_rollout_window(model: PreTrainedModel, encoder: Encoder, sids: Sequence[str], flags: RLFlags) -> None:
    """Stop where a rollout may be longer than a window of the attention: a prompt was cut to fit its own target's SID.

    Raises:
        InputError: saying so.
    """
    lengths = [len(ids) for ids in encoder.sid_ids(sids)]
    try:
        check_tree_attention(model, encoder.cutoff_len + max(lengths) - min(lengths))
    except ValueError as error:
        raise InputError(f"--model_path {flags.model_path}: {error}") from None


def build_rollout_engine(flags: RLFlags) -> PrefixEngine | None:
    """What scores the rollouts with --use_vllm True; None where the policy does it itself."""
    if not flags.use_vllm:
        return None
    if flags.vllm_mode == "server":
        return RemoteEngine(flags.vllm_server_base_url)
    return VllmEngine(
        flags.model_path,
        flags.cutoff_len,
        tensor_parallel_size=flags.vllm_tensor_parallel_size,
        gpu_memory_utilization=flags.vllm_gpu_memory_utilization,
        flag="--use_vllm True",
    )


def try_rewards(rewards: list[NamedReward], train_set: TaskMixture, sids: list[str], generations: int) -> None:
    """Call every reward once, so that one that cannot work says so before the first step."""
    for dataset in train_set.datasets:
        completions = list(dict.fromkeys([dataset[0].sid, *sids[:generations]]))[:generations]
        for reward in rewards:
            reward(completions, dataset[0])


def plan_steps(flags: RLFlags, prompts: int, processes: int | None = None) -> Schedule:
    """How long the run is, and when it validates, for that many training prompts; `processes` as above."""
    world = processes or process_state().num_processes
    per_step = flags.train_batch_size // flags.num_generations * flags.gradient_accumulation_steps * world
    # An epoch's last step is filled up.
    updates = flags.num_train_epochs * math.ceil(prompts / per_step) * flags.num_iterations
    steps = flags.max_steps if flags.max_steps > 0 else max(1, round(updates))
    interval = max(1, round(flags.eval_step * steps) if flags.eval_step < 1 else int(flags.eval_step))
    # A checkpoint holds no rollouts that are to be used again.
    interval = -(-interval // flags.num_iterations) * flags.num_iterations
    return Schedule(steps, interval, per_step)


def build_config(flags: RLFlags, schedule: Schedule) -> RLConfig:
    """The configuration of the trainer."""
    loss = choose_loss(flags.dapo, flags.gspo, flags.dr_grpo)
    validating = flags.test_during_training
    return build_arguments(
        RLConfig,
        flags,
        schedule.steps,
        choose_loggers(flags),
        beam_search=flags.beam_search,
        dynamic_sampling=flags.dynamic_sampling,
        add_gt=flags.add_gt,
        mask_all_zero=flags.mask_all_zero,
        renormalize=flags.renormalize,
        rollout_dtype=flags.rollout_dtype,
        share_prompts=not (flags.dropout or (flags.lora and flags.lora_dropout)),
        loss_type=loss,
        importance_sampling_level="sequence" if flags.gspo else "token",
        scale_rewards="none" if loss == "dr_grpo" else "group",
        num_iterations=flags.num_iterations,
        epsilon=CLIP[loss][0] if flags.epsilon is None else flags.epsilon,
        epsilon_high=CLIP[loss][1] if flags.epsilon_high is None else flags.epsilon_high,
        per_device_train_batch_size=flags.train_batch_size,
        gradient_accumulation_steps=flags.gradient_accumulation_steps,
        num_generations=flags.num_generations,
        temperature=flags.temperature,
        beta=flags.beta,
        sync_ref_model=flags.sync_ref_model,
        ref_model_sync_steps=flags.ref_model_sync_steps,
        ref_model_mixup_alpha=flags.ref_model_mixup_alpha,
        num_train_epochs=flags.num_train_epochs,
        max_steps=flags.max_steps,
        max_grad_norm=flags.max_grad_norm,
        eval_strategy="steps" if validating else "no",
        eval_steps=schedule.interval,
        eval_on_start=False,
        per_device_eval_batch_size=flags.num_generations,
        save_strategy="steps",
        save_steps=schedule.interval,
        save_total_limit=2,  # the one before the newest, for a newest that is cut off
        load_best_model_at_end=validating,
        metric_for_best_model=flags.best_by if validating else None,
        greater_is_better=True if validating else None,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it reads the loss of every batch, and waits for the device
    )


def complete_rl_folder(folder: Path, flags: RLFlags, data: RLData, validation: dict[str, float], note: str) -> None:
    """Add the catalogue and the model card to the folder of a trained model; item texts are those of the start."""
    records = read_model_catalogue(flags.model_path).records if has_catalogue(flags.model_path) else {}
    known = summarise_rows(data.catalogue, data.all_train_rows, records, flags.cutoff_len, flags.shared_sids)
    write_model_catalogue(folder, known)
    write_model_card(
        folder,
        stage="Reinforcement learning (`rl.py`) from a fine-tuned model",
        settings=recorded_settings(flags),
        known=known,
        validation=validation,
        note=note,
    )


def train_and_export(
    flags: RLFlags, policy: Policy, trainer: Trainer, checkpoint: str | None, data: RLData
) -> dict[str, Any]:
    """Train, and keep the best validated weights, the start included; returns what the stage records."""
    start = trainer.measure() if flags.test_during_training else {}
    if start:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in start.items())
        say(f"[rl] validation before the first step: {figures}")
    trainer.train(resume_from_checkpoint=checkpoint)
    results: dict[str, Any] = {"steps": trainer.state.global_step}
    unchanged, validation, note = None, {}, ""
    if start:
        best, name = trainer.state.best_metric, flags.best_by
        results |= {f"validation {name} at start": round(start[name], 4), f"validation {name} best": round(best, 4)}
        validation = {name: best}
        if best <= start[name]:
            say("[rl] no checkpoint beat the SFT model on validation: final_checkpoint holds the SFT weights")
            unchanged, validation = flags.model_path, start
            note = "No step of it was better on the validation rows, so that these are the weights it began with."
        results["kept_sft_weights"] = unchanged is not None

    def complete(folder: Path) -> None:
        complete_rl_folder(folder, flags, data, validation, note)

    export_model(trainer, policy.encoder, Path(flags.output_dir) / "final_checkpoint", unchanged, complete)
    return results
