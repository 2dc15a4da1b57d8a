r"""Reinforcement learning: GRPO on top of an SFT checkpoint; every rollout is an item of the catalogue.

    python rl.py --model_path output/sft/final_checkpoint --train_file ... --eval_file ... --info_file ... \
        --output_dir output/rl
"""

from __future__ import annotations

from minionerec.common.cli import parse_flags, run_command
from minionerec.training.settings import RLFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(RLFlags)

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from transformers import EarlyStoppingCallback, PreTrainedModel

from data import RL_TASKS, EvalSidDataset, TaskInputs, build_mixture, choose_tasks
from minionerec.common.items import read_descriptions, read_preferences
from minionerec.common.plugins import load_plugins
from minionerec.common.processes import is_main_process, say
from minionerec.common.records import Row
from minionerec.common.stage import Stage, open_stage
from minionerec.common.step_log import prepare_loggers
from minionerec.evaluation.ranking import measure_validation
from minionerec.language.adapters import (
    check_adapter_checkpoint,
    count_trainable_parameters,
)
from minionerec.language.examples import PromptDataset
from minionerec.language.mixture import TaskMixture
from minionerec.language.prompts import Encoder, PromptSet, load_checkpoint_prompts
from minionerec.search.legal_softmax import is_normalised_over_legal
from minionerec.training.callbacks import EpochSetter, StageTimer
from minionerec.training.checkpoints import choose_resume_checkpoint
from minionerec.training.hub import push_model_folder
from minionerec.training.plan_report import report_plan
from minionerec.training.planning import Plan, find_machine, pose_problem
from minionerec.training.rewards import NamedReward
from minionerec.training.rl_setup import (
    Policy,
    RLData,
    build_config,
    build_policy,
    build_reward_terms,
    build_rollout_engine,
    plan_steps,
    read_rl_data,
    resolve_rl_flags,
    train_and_export,
    try_rewards,
)
from minionerec.training.setup import list_training_inputs
from minionerec_trainer import GroupTrainer


def choose_rl_tasks(flags: RLFlags, prompts: PromptSet) -> tuple[dict[str, float], RLFlags]:
    """({task: weight}, the flags with only those files that a chosen task reads).

    The published command gives an item.json to a run whose tasks do not read it, so that is said and not refused.
    """
    files = {"item_meta_path": flags.item_meta_path, "preference_file": flags.preference_file}
    named = [entry.partition(":")[0] for entry in flags.tasks or ()]
    readers = [task for task, kind in RL_TASKS.items() if kind.file_flag == "item_meta_path"]
    if files["item_meta_path"] and not any(name in readers for name in named):
        say("--item_meta_path: has no effect here: no chosen task shows descriptions (--tasks description2sid does)")
        files["item_meta_path"] = None
    weights = choose_tasks(flags.tasks, prompts, RL_TASKS, **files)
    return weights, replace(flags, item_meta_path=files["item_meta_path"])


def read_task_inputs(flags: RLFlags, data: RLData) -> TaskInputs:
    """What the chosen tasks are made from; like all that can be wrong with a file, read before a model is loaded."""
    descriptions = None
    if flags.item_meta_path:
        descriptions = read_descriptions(flags.item_meta_path, data.catalogue.item_ids, flags.info_file)
    preferences = read_preferences(flags.preference_file) if flags.preference_file else None
    return TaskInputs(data.train_rows, data.catalogue, descriptions, preferences, seed=flags.seed)


def build_prompts(inputs: TaskInputs, weights: dict[str, float], encoder: Encoder) -> TaskMixture:
    """The training prompts of the chosen tasks."""
    train_set = build_mixture(weights, inputs, encoder, RL_TASKS)
    for line in train_set.report():
        say(f"[rl] {line}")
    return train_set


def build_rl_trainer(
    flags: RLFlags,
    policy: Policy,
    train_set: TaskMixture,
    rewards: list[NamedReward],
    valid: PromptDataset,
    stage: Stage,
) -> GroupTrainer:
    """The trainer, with its validation by search."""
    schedule = plan_steps(flags, len(train_set))
    say(
        f"[rl] {count_trainable_parameters(policy.model):,} trainable parameters, {len(train_set):,} prompts, about "
        f"{schedule.steps:,} steps of {schedule.prompts} prompts x {flags.num_generations} completions"
    )

    def validate(model: PreTrainedModel | PeftModel) -> dict[str, float]:
        batch_size = max(1, flags.eval_batch_size // flags.test_beam)
        return measure_validation(model, policy.catalogue_trie, valid, flags.test_beam, batch_size)

    patience = flags.early_stopping_patience
    return GroupTrainer(
        model=policy.model,
        reference=policy.reference,
        args=build_config(flags, schedule),
        train_dataset=train_set,
        catalogue_trie=policy.catalogue_trie,
        rewards=rewards,
        pad_token_id=policy.encoder.pad_token_id,
        validate=validate if flags.test_during_training else None,
        rollout_engine=build_rollout_engine(flags),
        callbacks=[StageTimer(stage), EpochSetter(), *([EarlyStoppingCallback(patience)] if patience else [])],
    )


def plan_rl(flags: RLFlags) -> Plan:
    """Print the plan of the run and return it."""
    data = read_rl_data(flags)
    prompts = load_checkpoint_prompts(flags.model_path, flags.prompts, flags.category)
    weights, flags = choose_rl_tasks(flags, prompts)
    inputs = read_task_inputs(flags, data)

    def build(rows: Sequence[Row], encoder: Encoder) -> TaskMixture:
        return build_mixture(weights, replace(inputs, rows=rows), encoder, RL_TASKS)

    problem = pose_problem(flags, data.catalogue, prompts, data.train_rows, build, add_tokens=False)
    return report_plan(problem, find_machine())


def rl(flags: RLFlags) -> None:
    """GRPO from an SFT checkpoint."""
    load_plugins(flags.plugin)
    flags = resolve_rl_flags(flags)
    output, final = Path(flags.output_dir), Path(flags.output_dir) / "final_checkpoint"
    optional = ("model_path", "ref_model_path", "item_meta_path", "preference_file")
    optional += ("ada_path", "cf_path", "sid_index_path")
    files = list_training_inputs(flags, ("train_file", "eval_file", "info_file"), optional)
    files += [flags.reward_module.rpartition(":")[0]] if flags.reward_module else []
    stage = open_stage("rl", flags, files, [final], output / "rl.stage.json", trains_in=output)
    if flags.dry_run:
        plan_rl(flags)
    if stage.finished:
        return
    # Now, not when training begins: a run cut off before that must not leave another run's checkpoints to be resumed.
    checkpoint = choose_resume_checkpoint(output, flags.resume_from_checkpoint, stage.resuming)
    prepare_loggers(flags, output, resuming=checkpoint is not None)
    check_adapter_checkpoint(checkpoint, False, flags.lora)

    data = read_rl_data(flags)
    rewards = build_reward_terms(flags, data)
    prompts = load_checkpoint_prompts(flags.model_path, flags.prompts, flags.category)
    weights, flags = choose_rl_tasks(flags, prompts)
    inputs = read_task_inputs(flags, data)
    policy = build_policy(flags, data, prompts)
    flags = replace(flags, renormalize=flags.renormalize or is_normalised_over_legal(policy.model))
    train_set = build_prompts(inputs, weights, policy.encoder)
    try_rewards(rewards, train_set, data.catalogue.sids, flags.num_generations)
    valid = EvalSidDataset(data.valid_rows, policy.encoder)
    trainer = build_rl_trainer(flags, policy, train_set, rewards, valid, stage)
    results = train_and_export(flags, policy, trainer, checkpoint, data)
    if is_main_process():
        push_model_folder(final, flags)
    stage.done(**results)


if __name__ == "__main__":
    run_command(rl, FLAGS, shared=True)
