"""What a training run would compute, keep in memory and take, before a GPU is rented: no weight is loaded.

python -m scripts.plan --base_model Qwen/Qwen2.5-0.5B --train_file CSV/train/NAME.csv --info_file INFO/NAME.txt \
    --gpus 8 --gpu_memory 80 --launch zero2 --peak_tflops 989

The base needs its config only, and its tokenizer for tokens to be counted with it. docs/planning.md explains the lines.
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import Flags, flag, parse_flags, run_command, same_flag
from minionerec.common.settings import AdapterFlags, CatalogueFlags, PluginFlags, PromptFlags, SeedFlags
from minionerec.training.settings import LossFlags, OptimizationFlags, RLFlags, RolloutFlags, SFTFlags, ValidationFlags


@dataclass
class MachineFlags(Flags):
    """The machine."""

    gpus: int = flag(help="GPUs that share the run; 0 is the CPU")
    gpu_memory: float | None = flag(None, "GiB of each GPU, or of the CPU", default_text="those of this machine")
    launch: str = flag(
        "auto",
        "the engine, as LAUNCH of scripts/*.sh; auto is ddp where there are several GPUs",
        choices=("auto", "cpu", "gpu", "ddp", "zero2", "zero3", "fsdp2"),
    )
    reserve: float = flag(2.0, "GiB of a GPU that are taken by CUDA, NCCL and fragments: an assumption")
    peak_tflops: float | None = flag(
        None,
        "10^12 operations a second of one GPU at best, bf16",
        default_text="on a CPU measured, else no time is told",
    )
    utilization: float = flag(0.4, "share of that peak that training reaches: an assumption")


@dataclass
class PlanFlags(MachineFlags, PluginFlags, CatalogueFlags, PromptFlags, AdapterFlags, SeedFlags):
    """The run."""

    base_model: str = flag(
        help="folder with a config.json, JSON config, or a name whose config the hub's cache has",
        aliases=("model_path",),
    )
    train_file: str = flag(help="CSV of the train split")
    stage: str = flag("sft", "which command the run is of", choices=("sft", "rl"))
    item_meta_path: str | None = same_flag(RLFlags, "item_meta_path")
    preference_file: str | None = same_flag(RLFlags, "preference_file")
    tasks: list[str] | None = same_flag(SFTFlags, "tasks")
    gradient_checkpointing: bool = same_flag(OptimizationFlags, "gradient_checkpointing")
    dropout: float = same_flag(OptimizationFlags, "dropout")


@dataclass
class SFTPlanFlags(Flags):
    """With --stage sft."""

    train_from_scratch: bool = same_flag(SFTFlags, "train_from_scratch")
    cut_histories: bool | None = same_flag(SFTFlags, "cut_histories")
    sample: int = same_flag(SFTFlags, "sample")
    batch_size: int = same_flag(SFTFlags, "batch_size")
    micro_batch_size: int = same_flag(SFTFlags, "micro_batch_size")
    num_epochs: int = same_flag(SFTFlags, "num_epochs")
    freeze_LLM: bool = same_flag(SFTFlags, "freeze_LLM")
    packing: str = same_flag(SFTFlags, "packing")
    tree_tokens: int = same_flag(SFTFlags, "tree_tokens")


@dataclass
class RLPlanFlags(Flags):
    """With --stage rl."""

    train_batch_size: int = same_flag(RLFlags, "train_batch_size")
    gradient_accumulation_steps: int | None = same_flag(RLFlags, "gradient_accumulation_steps")
    num_generations: int = same_flag(RolloutFlags, "num_generations")
    beam_search: bool = same_flag(RolloutFlags, "beam_search")
    dynamic_sampling: bool = same_flag(RolloutFlags, "dynamic_sampling")
    sample_train: int | bool = same_flag(RLFlags, "sample_train")
    num_train_epochs: float = same_flag(RLFlags, "num_train_epochs")
    max_steps: int = same_flag(RLFlags, "max_steps")
    beta: float = same_flag(LossFlags, "beta")
    num_iterations: int = same_flag(LossFlags, "num_iterations")
    sync_ref_model: bool = same_flag(LossFlags, "sync_ref_model")
    ref_model_path: str | None = same_flag(LossFlags, "ref_model_path")
    test_during_training: bool = same_flag(ValidationFlags, "test_during_training")
    test_beam: int = same_flag(ValidationFlags, "test_beam")
    eval_batch_size: int = same_flag(ValidationFlags, "eval_batch_size")


@dataclass
class PlannerFlags(PlanFlags, SFTPlanFlags, RLPlanFlags):
    """The run."""


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(PlannerFlags)

import random
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from data import RL_TASKS, TASKS, TaskInputs, build_mixture, choose_tasks
from minionerec.common.cli import get_default
from minionerec.common.files import InputError
from minionerec.common.items import read_descriptions, read_preferences
from minionerec.common.plugins import load_plugins
from minionerec.common.records import Row, check_rows, read_info, read_rows
from minionerec.common.row_table import draw_rows
from minionerec.language.adapters import check_adapter_flags
from minionerec.language.mixture import TaskMixture
from minionerec.language.prompts import Encoder, load_checkpoint_prompts, load_prompts
from minionerec.training.plan_report import report_plan
from minionerec.training.planning import Machine, Plan, Problem, choose_machine, find_base, pose_problem
from minionerec.training.rl_setup import resolve_rl_flags
from minionerec.training.setup import PUBLISHED_SHARE


def check_stage_flags(flags: PlannerFlags) -> None:
    """Stop at flags of the other stage, which would change nothing.

    Raises:
        InputError: the first of them.
    """
    stage, other = ("rl", SFTPlanFlags) if flags.stage == "rl" else ("sft", RLPlanFlags)
    for field in fields(other):
        if getattr(flags, field.name) != get_default(field):
            raise InputError(f"--{field.name}: has no effect with --stage {stage}")


def build_stage_flags(flags: PlannerFlags, machine: Machine) -> SFTFlags | RLFlags:
    """The flags that sft.py or rl.py would have, resolved.

    Raises:
        InputError: flags that contradict each other.
    """
    kind = RLFlags if flags.stage == "rl" else SFTFlags
    names = {field.name for field in fields(kind)}
    given: dict[str, Any] = {field.name: getattr(flags, field.name) for field in fields(flags) if field.name in names}
    given |= {"eval_file": "", "output_dir": ""}
    if flags.stage == "rl":
        return resolve_rl_flags(RLFlags(**given, model_path=flags.base_model), machine.processes)
    check_adapter_flags(flags, flags.freeze_LLM, flags.train_from_scratch)
    return SFTFlags(**{**given, "item_meta_path": flags.item_meta_path or ""}, sid_index_path="")


def read_machine(flags: PlannerFlags) -> Machine:
    """The machine that the flags describe."""
    sizes = {"gpu_memory": flags.gpu_memory, "reserve": flags.reserve}
    return choose_machine(
        flags.gpus, launch=flags.launch, peak_tflops=flags.peak_tflops, utilization=flags.utilization, **sizes
    )


def read_problem(flags: PlannerFlags, machine: Machine) -> Problem:
    """The run that the flags describe, with its data.

    Raises:
        InputError: flags that contradict each other, no model of that name, a broken file.
    """
    check_stage_flags(flags)
    is_rl, stage_flags = flags.stage == "rl", build_stage_flags(flags, machine)
    base = find_base(flags.base_model, "base_model")
    if flags.train_from_scratch:
        prompts = load_prompts(flags.prompts or "compact", flags.category)
    else:
        prompts = load_checkpoint_prompts(base, flags.prompts, flags.category)
    known = RL_TASKS if is_rl else TASKS
    files = {"item_meta_path": flags.item_meta_path, "preference_file": flags.preference_file}
    weights = choose_tasks(flags.tasks, prompts, known, **files)
    if isinstance(stage_flags, SFTFlags) and flags.cut_histories is None:
        stage_flags = replace(stage_flags, cut_histories=prompts.is_compact)

    catalogue = read_info(flags.info_file, flags.shared_sids)
    rows = read_rows(flags.train_file, "train_file")
    check_rows(rows, catalogue, flags.train_file, flags.info_file)
    count = stage_flags.sample_train if is_rl else stage_flags.sample
    count = round(PUBLISHED_SHARE * len(rows)) if count is True else count
    rows = draw_rows(rows, count, random.Random(flags.seed))
    descriptions = None
    if flags.item_meta_path:
        descriptions = read_descriptions(flags.item_meta_path, catalogue.item_ids, flags.info_file)
    preferences = read_preferences(flags.preference_file) if flags.preference_file else None
    cut = not is_rl and stage_flags.cut_histories

    def build(drawn: Sequence[Row], encoder: Encoder) -> TaskMixture:
        return build_mixture(
            weights, TaskInputs(drawn, catalogue, descriptions, preferences, cut, flags.seed), encoder, known
        )

    return pose_problem(stage_flags, catalogue, prompts, rows, build)


def plan(flags: PlannerFlags) -> Plan:
    """Print the plan of the run that the flags describe, and return it."""
    load_plugins(flags.plugin)
    machine = read_machine(flags)
    return report_plan(read_problem(flags, machine), machine)


if __name__ == "__main__":
    run_command(plan, FLAGS)
