"""The nearest setting of a training run that fits the memory of a machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from minionerec.common.files import InputError
from minionerec.training.planning import Machine, Plan, Problem, make_plan
from minionerec.training.settings import RLFlags, SFTFlags


def _halve(size: int, least: int = 1) -> list[int]:
    """`size` and its halves, as long as they are whole and at least `least`."""
    sizes = [size]
    while sizes[-1] % 2 == 0 and sizes[-1] // 2 >= least:
        sizes.append(sizes[-1] // 2)
    return sizes


def _list_smaller(flags: SFTFlags | RLFlags) -> list[dict[str, int]]:
    """The flags' own batches, then halves of them, with as many rows or prompts a step as before."""
    if isinstance(flags, SFTFlags):
        return [{"micro_batch_size": size} for size in _halve(flags.micro_batch_size)]
    prompts = flags.train_batch_size // flags.num_generations
    return [
        {
            "train_batch_size": part * flags.num_generations,
            "gradient_accumulation_steps": flags.gradient_accumulation_steps * (prompts // part),
            "eval_batch_size": validated,
        }
        for part in _halve(prompts)
        for validated in _halve(flags.eval_batch_size, flags.test_beam)
    ]


def _list_engines(machine: Machine) -> list[str]:
    later = {"DDP": ["ZeRO-2", "ZeRO-3"], "ZeRO-2": ["ZeRO-3"]}.get(machine.engine, [])
    return [machine.engine, *(later if machine.device != "cpu" else [])]


def list_changes(flags: SFTFlags | RLFlags, machine: Machine) -> Iterator[tuple[SFTFlags | RLFlags, Machine]]:
    """Settings to try, in the order of least change.

    Smaller batches come first, of the validation and then of a forward pass, which change no result; then gradient
    checkpointing, which only takes time; then an engine that shards more; then LoRA, which trains something else; then
    2, 4 and 8 times the GPUs.
    """
    scratch = getattr(flags, "train_from_scratch", False) or getattr(flags, "freeze_LLM", False)
    more = [1, 2, 4, 8] if machine.device != "cpu" else [1]
    loras = [flags.lora] if flags.lora or scratch else [False, True]
    for times, lora in product(more, loras):
        engines = _list_engines(machine) if times == 1 or machine.processes > 1 else ["DDP", "ZeRO-2", "ZeRO-3"]
        checkpointings = [True] if flags.gradient_checkpointing else [False, True]
        for engine, checkpointing, smaller in product(engines, checkpointings, _list_smaller(flags)):
            changes = {"lora": lora, "gradient_checkpointing": checkpointing, **smaller}
            if isinstance(flags, RLFlags):  # as many prompts a step, on more GPUs
                if smaller["gradient_accumulation_steps"] % times:
                    continue
                changes["gradient_accumulation_steps"] = smaller["gradient_accumulation_steps"] // times
            yield replace(flags, **changes), replace(machine, engine=engine, processes=machine.processes * times)


def find_fitting(problem: Problem, machine: Machine) -> Plan | None:
    """The plan of the first setting of `list_changes` that fits; None if none does."""
    for flags, changed in list_changes(problem.flags, machine):
        try:
            plan = make_plan(problem, changed, flags)
        except InputError:  # batches that do not divide among so many GPUs, an engine that refuses the flags
            continue
        if plan.fits:
            return plan
    return None
