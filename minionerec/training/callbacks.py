"""Callbacks and a mixin of the trainers: the log as a table, the time of a stage, the epoch of the training set."""

from __future__ import annotations

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from minionerec.common.stage import Stage
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

    Attributes:
        engine: see `name_engine`.
        plain_copy: what trained adapters are merged into where the engine shards weights, see `copy_before_sharding`.
    """

    def __init__(self, *arguments, args, **named):
        if args.n_gpu > 1:
            args._n_gpu = 1
        super().__init__(*arguments, args=args, **named)
        moving = getattr(args, "sync_ref_model", False)
        self.engine = check_engine(self.accelerator, self.model, moving_reference=moving)
        check_engine_savers(self.engine, args.optim, self.model)
        announce_engine(self.engine, self.accelerator)
        self.plain_copy = copy_before_sharding(self.accelerator, self.model)

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


# (key in the logs, heading, format); a key that a run never logs leaves its place empty.
RL_COLUMNS = (
    ("loss", "loss", "9.4f"),
    ("reward", "reward", "7.4f"),
    ("reward_std", "std", "6.4f"),
    ("zero_advantage_share", "zero", "5.2f"),
    ("rollout_hit_rate", "hit", "5.3f"),
    ("diversity", "divers", "6.3f"),
    ("kl", "kl", "7.4f"),
    ("entropy", "entropy", "7.3f"),
    ("grad_norm", "grad", "7.3f"),
    ("learning_rate", "lr", "7.1e"),
    ("seconds_rollout", "rollout", "6.2fs"),
    ("seconds_reference", "ref", "5.2fs"),
    ("seconds_train", "train", "5.2fs"),
)


HEADING_EVERY = 20  # rows


class TrainingTable(ProgressCallback):
    """The trainer's progress bar, with its logs as rows of a table instead of dictionaries."""

    def __init__(self, columns: tuple[tuple[str, str, str], ...] = RL_COLUMNS):
        super().__init__()
        self.columns, self._rows = columns, 0

    def _widths(self) -> list[int]:
        return [
            max(len(heading), len(f"{0.0:{form.removesuffix('s')}}") + form.endswith("s"))
            for _, heading, form in self.columns
        ]

    def format_row(self, step: int, logs: dict[str, float]) -> str:
        """One row, of the step and the columns' values."""
        cells = []
        for (key, _, form), width in zip(self.columns, self._widths(), strict=True):
            seconds, value = form.endswith("s"), logs.get(key)
            text = "" if value is None else f"{float(value):{form.removesuffix('s')}}".strip() + "s" * seconds
            cells.append(text.rjust(width))
        return f"{step:>6} " + " ".join(cells)

    def format_heading(self) -> str:
        """The row of headings."""
        return "  step " + " ".join(
            heading.rjust(width) for (_, heading, _), width in zip(self.columns, self._widths(), strict=True)
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Writes a row; validation metrics get a line of their own."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            if self._rows % HEADING_EVERY == 0:
                self.training_bar.write(self.format_heading())
            self._rows += 1
            self.training_bar.write(self.format_row(state.global_step, logs))
        measured = {key[5:]: value for key, value in logs.items() if key.startswith("eval_") and "@" in key}
        if measured:
            figures = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
            self.training_bar.write(f"{state.global_step:>6} validation: {figures}")
