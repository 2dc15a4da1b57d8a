"""A plan as lines of text."""

from __future__ import annotations

from dataclasses import fields

from minionerec.common.processes import say
from minionerec.training.plan_fitting import find_fitting
from minionerec.training.planning import GIB, LAUNCHES, Machine, Plan, Problem, make_plan

COLUMN = 34


def _line(name: str, value: str) -> str:
    return f"  {name:<{COLUMN}}{value}"


def _size(count: float) -> str:
    return f"{count / GIB:8.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:8.1f} MiB"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:,.1f} minutes"


def describe_changes(plan: Plan, problem: Problem, machine: Machine) -> str:
    """The flags in which the plan differs from the problem on that machine, as they are written."""
    changed = [
        f"--{field.name} {getattr(plan.flags, field.name)}"
        for field in fields(plan.flags)
        if getattr(plan.flags, field.name) != getattr(problem.flags, field.name)
    ]
    if plan.machine.engine != machine.engine:
        changed.append(f"LAUNCH={next(name for name, engine in LAUNCHES.items() if engine == plan.machine.engine)}")
    if plan.machine.processes != machine.processes:
        changed.append(f"{plan.machine.processes} GPUs")
    return ", ".join(changed)


def _format_model(plan: Plan, problem: Problem) -> list[str]:
    shape = plan.shape
    kinds = {"all": "all", "lora": "LoRA matrices and SID rows", "rows": "SID rows"}
    lines = [
        "Model",
        _line("parameters", f"{shape.parameters:,}, of which {shape.trainable:,} learn ({kinds[shape.trains]})"),
        _line("vocabulary", f"{shape.vocabulary:,} rows, {problem.new_tokens:,} SID tokens are new"),
    ]
    if not shape.is_known:
        lines.append(_line("", "its layers are not those of Llama: the activations are a rough figure"))
    return lines


def _format_work(plan: Plan) -> list[str]:
    work, machine = plan.work, plan.machine
    lines = [
        "Work",
        _line("examples of an epoch", f"{work.examples:,}"),
        _line("optimizer steps", f"{work.steps:,} ({work.accumulation} micro-batches each), {work.epochs:.2f} epochs"),
        _line("tokens of an epoch", f"{work.tokens:,} in prefix trees, {work.row_tokens:,} in separate rows"),
        _line("largest micro-batch", f"{work.largest.rows} trees of {work.largest.length} tokens"),
    ]
    total = sum(plan.operations.values())
    parts = ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in plan.operations.items())
    lines.append(_line("arithmetic of the run", f"{total:.2e} operations ({parts})"))
    if plan.seconds is None:
        return [*lines, _line("time", "not estimated: --peak_tflops says what a GPU reaches at best")]
    source = "measured here" if machine.measured else "as --peak_tflops says"
    speed = f"{100 * machine.utilization:.0f} % of {machine.flops / 1e12:.3g} TFLOPS ({source}) x {machine.processes}"
    return [*lines, _line("time, validation left out", f"{_duration(plan.seconds)} at {speed}")]


def _format_memory(plan: Plan) -> list[str]:
    machine, (phase, peak) = plan.machine, plan.peak
    unit = "process" if machine.device == "cpu" else "GPU"
    many = machine.processes > 1
    processes = f"{machine.processes} processes, {machine.engine}" if many else "one process"
    precision = "float32" if not plan.setting.bf16 else "bf16 over float32 weights" if plan.setting.autocast else "bf16"
    lines = [f"Memory of each {unit} ({processes}, {precision})"]
    for name, parts in plan.phases.items():
        marked = " <- the peak" if name == phase else ""
        lines.append(_line(name, f"{_size(sum(parts.values()))}{marked}"))
        lines += [_line(f"  {what}", _size(count)) for what, count in parts.items() if count]
    for name, search in plan.work.searches.items():
        lines.append(_line(f"prompts at once, {name}", f"{search.prompts:5,}"))
    lines.append(_line("before there is a model", _size(machine.reserve)))
    lines.append(_line("peak", f"{_size(peak + machine.reserve)} of {_size(machine.memory).strip()}"))
    return lines


def report_plan(problem: Problem, machine: Machine) -> Plan:
    """Print the plan of a run and, where it does not fit, the nearest setting that does; returns the plan.

    Raises:
        InputError: see `make_plan`.
    """
    plan = make_plan(problem, machine)
    lines = [*_format_model(plan, problem), *_format_work(plan), *_format_memory(plan)]
    lines += [f"Note on {note}" for note in (*problem.notes, *plan.work.notes)]
    if plan.fits:
        lines.append("It fits.")
    else:
        other = find_fitting(problem, machine)
        lines.append("It does not fit.")
        if other is None:
            lines.append(
                "Nothing that was tried fits: smaller micro-batches, gradient checkpointing, ZeRO, LoRA, GPUs."
            )
        else:
            size = _size(other.peak[1] + machine.reserve).strip()
            lines.append(f"The nearest setting that fits ({size}): {describe_changes(other, problem, machine)}")
    say("\n".join(lines))
    return plan
