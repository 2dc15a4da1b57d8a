"""Callbacks and a mixin of the trainers: the log as a table and a file, times, the epoch of the training set."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from minionerec.common.progress import ProgressBar
from minionerec.common.stage import Stage
from minionerec.common.step_log import STEPS_FILE, StepLog
from minionerec.language.models import hide_file_progress
from minionerec.training.divergence import FiniteGuard
from minionerec.training.optimizers import check_engine_savers
from minionerec.training.sharded import announce_engine, check_engine, check_resumable, copy_before_sharding


class StageTimer(TrainerCallback):
    """Notes the time a stage has taken with every checkpoint, so that a resumed run counts what came before."""

    def __init__(self, stage: Stage):
        self.stage = stage

    def on_save(self, args, state, control, **kwargs):
        self.stage.tick()


class LaunchedTrainer(FiniteGuard):
    """Mixin for a Trainer: the engine is checked and announced, and checkpoints have no bar of their own.

    A process drives one device: where it sees several, the trainer would cut batches for them by DataParallel; ours are
    whole. `accelerate launch` uses them all.

    What is logged goes to a table on the console, and step by step to OUTPUT/steps.csv.

    Attributes:
        columns: of the table.
        shorter: the flags that make a run shorter.
        engine: see `name_engine`.
        plain_copy: what trained adapters are merged into where the engine shards weights, see `copy_before_sharding`.
    """

    columns: Columns
    shorter: str

    def __init__(self, *arguments, args, **named):
        if args.n_gpu > 1:
            args._n_gpu = 1
        super().__init__(*arguments, args=args, **named)
        moving = getattr(args, "sync_ref_model", False)
        self.engine = check_engine(self.accelerator, self.model, moving_reference=moving)
        check_engine_savers(self.engine, args.optim, self.model)
        announce_engine(self.engine, self.accelerator)
        self.plain_copy = copy_before_sharding(self.accelerator, self.model)
        self.step_watch = StepWatch()
        self.remove_callback(ProgressCallback)
        for callback in (TrainingTable(self.columns, self.shorter), StepFile(), self.step_watch):
            self.add_callback(callback)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the seconds of a step to what is logged of one."""
        if "loss" in logs:
            logs["seconds_step"] = self.step_watch.read()
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint=None, **named):
        if resume_from_checkpoint:
            check_resumable(resume_from_checkpoint, self.engine, self.accelerator.num_processes)
        return super().train(resume_from_checkpoint, **named)

    def save_model(self, *args, **kwargs):
        with hide_file_progress():
            super().save_model(*args, **kwargs)


class EpochSetter(TrainerCallback):
    """Tells the training set the epoch, so that weights below 1 take other examples in every epoch.

    Data loaders do not do so in every setting.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch or 0))


# (key in the logs, heading, format, meaning); a key that a run never logs leaves its place empty.
Columns = tuple[tuple[str, str, str, str], ...]
SFT_COLUMNS: Columns = (
    ("epoch", "epoch", "5.2f", ""),
    ("loss", "loss", "9.4f", "nats per label token"),
    ("grad_norm", "grad", "7.3f", "norm of the gradient before clipping"),
    ("learning_rate", "lr", "7.1e", "learning rate"),
    ("seconds_step", "step", "6.2fs", "seconds of an optimizer step"),
)
RL_COLUMNS: Columns = (
    ("loss", "loss", "9.4f", ""),
    ("reward", "reward", "7.4f", "mean over completions"),
    ("reward_std", "std", "6.4f", "of the rewards within a group"),
    ("zero_advantage_share", "zero", "5.2f", "share of groups with equal rewards"),
    ("rollout_hit_rate", "hit", "5.3f", "share of groups that hold the target"),
    ("diversity", "divers", "6.3f", "distinct completions of a group"),
    ("kl", "kl", "7.4f", "nats per token from the reference"),
    ("entropy", "entropy", "7.3f", "nats per token"),
    ("grad_norm", "grad", "7.3f", "norm of the gradient before clipping"),
    ("learning_rate", "lr", "7.1e", "learning rate"),
    ("seconds_rollout", "rollout", "6.2fs", ""),
    ("seconds_reference", "ref", "5.2fs", ""),
    ("seconds_train", "train", "5.2fs", "seconds of a step's parts"),
)
LEGEND_WIDTH = 118  # columns
HEADING_EVERY = 20  # rows
ROWS = 20  # of a whole run, about
LAST_VALUE = ("epoch", "learning_rate")  # what a row says as it is at its end, and not as a mean over its steps


class StepFile(TrainerCallback):
    """All steps of a training in OUTPUT/steps.csv; a resumed run goes on behind the step it starts from."""

    def __init__(self) -> None:
        self._steps: StepLog | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._steps = StepLog(Path(args.output_dir) / STEPS_FILE, state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._steps and logs and "train_runtime" not in logs:
            self._steps.add(state.global_step, logs)


class StepWatch(TrainerCallback):
    """Seconds and number of optimizer steps, without what happens between them, such as validation."""

    def __init__(self) -> None:
        self.seconds, self.steps, self._start = 0.0, 0, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self._start
        self.steps += 1

    def read(self) -> float:
        """Seconds of a step since the last call, which this one forgets."""
        mean = self.seconds / max(self.steps, 1)
        self.seconds, self.steps = 0.0, 0
        return round(mean, 4)


class TrainingTable(TrainerCallback):
    """The logs of a training as rows of a table under a progress bar: means over the steps since the row before."""

    def __init__(self, columns: Columns = RL_COLUMNS, shorter: str = ""):
        self.columns, self.shorter, self.bar = columns, shorter, None
        self._rows, self._every, self._legend = 0, 1, True
        self._waiting: list[dict[str, float]] = []

    def _widths(self) -> list[int]:
        return [
            max(len(heading), len(f"{0.0:{form.removesuffix('s')}}") + form.endswith("s"))
            for _, heading, form, _ in self.columns
        ]

    def format_row(self, step: int, logs: dict[str, float]) -> str:
        """One row, of the step and the columns' values."""
        cells = []
        for (key, _, form, _), width in zip(self.columns, self._widths(), strict=True):
            seconds, value = form.endswith("s"), logs.get(key)
            text = "" if value is None else f"{float(value):{form.removesuffix('s')}}".strip() + "s" * seconds
            cells.append(text.rjust(width))
        return f"{step:>6} " + " ".join(cells)

    def format_heading(self) -> str:
        """The row of headings."""
        return "  step " + " ".join(
            heading.rjust(width) for (_, heading, _, _), width in zip(self.columns, self._widths(), strict=True)
        )

    def format_legend(self) -> str:
        """What the headings mean."""
        text = "; ".join(f"{heading}: {meaning}" for _, heading, _, meaning in self.columns if meaning)
        return textwrap.fill(text, LEGEND_WIDTH, initial_indent=" " * 7, subsequent_indent=" " * 7)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._every = max(1, state.max_steps // ROWS)
            self.bar = ProgressBar(
                total=state.max_steps,
                initial=state.global_step,
                desc="training",
                unit="steps",
                dynamic_ncols=True,
                shorter=self.shorter,
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Writes a row now and then; validation metrics get a line of their own."""
        if not state.is_world_process_zero or self.bar is None or not logs:
            return
        if "loss" in logs:
            self._waiting.append(logs)
            if state.global_step % self._every == 0 or state.global_step == state.max_steps:
                self._write_row(state.global_step)
        measured = {key[5:]: value for key, value in logs.items() if key.startswith("eval_")}
        if measured:
            figures = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
            self.bar.say(f"{state.global_step:>6} validation: {figures}")

    def _write_row(self, step: int) -> None:
        if self._rows % HEADING_EVERY == 0:
            self.bar.say(self.format_heading())
        if self._legend:
            self.bar.say(self.format_legend())
            self._legend = False
        self._rows += 1
        values = {}
        for key, *_ in self.columns:
            known = [logs[key] for logs in self._waiting if key in logs]
            if known:
                values[key] = known[-1] if key in LAST_VALUE else sum(map(float, known)) / len(known)
        self._waiting.clear()
        self.bar.say(self.format_row(step, values))
