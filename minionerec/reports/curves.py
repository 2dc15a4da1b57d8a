"""Training curves of a run, read from the trainers' own logs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minionerec.common.files import read_json
from minionerec.common.step_log import STEPS_FILE, read_steps
from minionerec.reports.runs import NETWORKS, TRAINED, Run

POINTS = 300  # of a curve; longer ones are shown as means of neighbouring steps

# title, unit of the y axis, {key in the log: name}; a trailing * takes every key that begins so.
PANELS = (
    ("loss", "loss", {"loss": "train", "eval_loss": "validation", "reconstruction_loss": "reconstruction"}),
    ("validation", "metric", {"eval_HR@10": "HR@10", "eval_NDCG@10": "NDCG@10"}),
    ("reward", "reward", {"reward": "sum", "reward_*": ""}),
    ("KL to the reference", "nats per token", {"kl": "KL"}),
    ("time of a step", "seconds", {"seconds_*": ""}),
    ("collision rate", "share of items", {"collision_rate": "before repair"}),
)
NOT_SHOWN = ("reward_std",)


@dataclass
class Panel:
    """One picture of curves: {name: (steps, values)}."""

    title: str
    unit: str
    curves: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)


@dataclass
class Training:
    """The curves of one trainer, what its steps are called, and the file that they come from."""

    name: str
    step_name: str
    panels: list[Panel]
    source: str


def thin_out(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """At most POINTS points, each the mean of neighbouring ones."""
    size = -(-len(steps) // POINTS)
    if size <= 1:
        return steps, values
    starts = range(0, len(steps), size)
    parts = [(steps[start : start + size], values[start : start + size]) for start in starts]
    return [sum(part) / len(part) for part, _ in parts], [sum(part) / len(part) for _, part in parts]


def draw_up_panels(rows: list[dict[str, float]]) -> list[Panel]:
    """The panels of a log's rows that have something to show."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    panels = []
    for title, unit, wanted in PANELS:
        panel = Panel(title, unit)
        for key in keys:
            if key in NOT_SHOWN:
                continue
            prefix = next((name[:-1] for name in wanted if name.endswith("*") and key.startswith(name[:-1])), None)
            name = wanted.get(key) or (key.removeprefix(prefix).replace("_", " ") if prefix else None)
            if name is None:
                continue
            points = [(row["step"], row[key]) for row in rows if key in row]
            panel.curves[name] = thin_out([float(x) for x, _ in points], [float(y) for _, y in points])
        if panel.curves:
            panels.append(panel)
    return panels


def read_history(folder: Path) -> tuple[list[dict[str, Any]], Path] | None:
    """(rows, file) of a trainer's log: steps.csv, else that of its last checkpoint, else epochs.json; None without."""
    if (folder / STEPS_FILE).is_file():
        return read_steps(folder / STEPS_FILE), folder / STEPS_FILE
    states = sorted(
        folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.rpartition("-")[2])
    )
    if states:
        rows = [row for row in read_json(states[-1])["log_history"] if "train_runtime" not in row]
        return [{key: value for key, value in row.items() if isinstance(value, int | float)} for row in rows], states[
            -1
        ]
    path = folder / "epochs.json"
    if not path.is_file():
        return None
    rows = [{"step": row["epoch"], "loss": row["loss"]} for row in read_json(path)]
    for row, epoch in zip(rows, read_json(path), strict=True):
        row |= {f"eval_{name}": epoch[name] for name in ("HR@10", "NDCG@10") if name in epoch}
    return rows, path


def read_trainings(run: Run) -> list[Training]:
    """The trainings of a run: SFT and RL first, then networks and semantic IDs."""
    folders = sorted({path.parent for name in (STEPS_FILE, "epochs.json") for path in run.folder.rglob(name)})
    folders += sorted({path.parent.parent for path in run.folder.rglob("checkpoint-*/trainer_state.json")})
    names = {**TRAINED, **NETWORKS}
    order = list(names)
    trainings = []
    for folder in sorted(
        dict.fromkeys(folders), key=lambda path: (order.index(path.name) if path.name in order else 99, str(path))
    ):
        found = read_history(folder)
        if found is None:
            continue
        rows, path = found
        panels = draw_up_panels(rows)
        if panels:
            relative = folder.relative_to(run.folder).as_posix()
            counted = "step" if folder.name in TRAINED or path.name.startswith("trainer") else "epoch"
            source = path.relative_to(run.folder).as_posix()
            trainings.append(Training(names.get(folder.name, relative), counted, panels, source))
    return trainings
