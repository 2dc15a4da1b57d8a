"""Training of an RQ-VAE on one tensor of embeddings, with checkpoints that continue exactly.

Several processes share the rows of every batch; the main one writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from minionerec.common.embeddings import side_file_path
from minionerec.common.files import InputError, atomic_write
from minionerec.common.overflow import step_or_stop
from minionerec.common.processes import count_processes, is_main_process, say
from minionerec.common.progress import ProgressBar, foretell_epochs
from minionerec.common.sharing import (
    add_up,
    broadcast_tensor,
    broadcast_value,
    gather_rows,
    separate_random_state,
    take_part,
    wrap_model,
)
from minionerec.common.stage import open_stage
from minionerec.common.step_log import TrainingLog
from rq.index.codebook import load_checkpoint, load_items, pick_device
from rq.models.rqvae import RQVAE
from rq.settings import AutoencoderFlags, TrainerFlags

LEARNERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
BEST_LOSS, BEST_COLLISION, FINAL = "best_loss_model.pth", "best_collision_model.pth", "final_model.pth"


def check_trainer_flags(flags: TrainerFlags) -> None:
    """Refuse values that no training can have.

    Raises:
        InputError: a value outside its range.
    """
    if flags.learner.lower() not in LEARNERS:
        raise InputError(f"--learner {flags.learner}: expected one of {', '.join(LEARNERS)}")
    for name in ("epochs", "batch_size", "eval_step", "save_limit"):
        if getattr(flags, name) < 1:
            raise InputError(f"--{name} {getattr(flags, name)}: expected 1 or more")
    if not 0 < flags.lr < math.inf or flags.max_norm <= 0:
        raise InputError("--lr and --max_norm: expected numbers above 0")
    if min(flags.warmup_epochs, flags.weight_decay, flags.revive_every) < 0:
        raise InputError("--warmup_epochs, --weight_decay and --revive_every: expected 0 or more")


class Trainer:
    """Training of an RQ-VAE; all files go to settings.ckpt_dir.

    checkpoint_EPOCH.pth holds everything needed to go on: weights, optimiser, random generators, best values.

    Args:
        model: already on its device.
        settings: how to train it; a command's flags, of which those of TrainerFlags count.
        on_checkpoint: called whenever a checkpoint is written.

    Attributes:
        on_epoch: called with the number of an epoch and what was measured after it, unless it is None.

    Raises:
        InputError: a setting outside its range.
    """

    def __init__(self, model: RQVAE, settings: TrainerFlags, on_checkpoint: Callable[[], None] | None = None):
        check_trainer_flags(settings)
        self.model, self.settings = model, settings
        self.shared_model = wrap_model(model)
        self.device = next(model.parameters()).device
        self.folder = Path(settings.ckpt_dir)
        self.on_checkpoint = on_checkpoint
        self.on_epoch: Callable[[int, dict[str, float]], None] | None = None
        self.optimizer = LEARNERS[settings.learner.lower()](
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        # Row order has its own generator, so that it does not depend on how much dropout draws.
        self.order = torch.Generator().manual_seed(settings.seed)
        self.epoch = 0
        self.step = 0
        self.best_loss = math.inf
        self.best_collision = (math.inf, math.inf)

    def _recorded_settings(self) -> dict[str, Any]:
        """What decides how a training goes on; a checkpoint of other settings is not continued."""
        return {field.name: getattr(self.settings, field.name) for field in fields(TrainerFlags)}

    def _lr(self, steps_per_epoch: int) -> float:
        """Learning rate of the coming step: linear warm-up, then the schedule down to 0 at the last step."""
        warmup = self.settings.warmup_epochs * steps_per_epoch
        total = self.settings.epochs * steps_per_epoch
        if self.step < warmup:
            return self.settings.lr * (self.step + 1) / warmup
        part = (self.step - warmup) / max(1, total - warmup)
        factor = {"constant": 1.0, "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}
        return self.settings.lr * factor[self.settings.lr_scheduler_type]

    def _train_epoch(self, data: torch.Tensor) -> tuple[float, float]:
        """One pass over data [n, in_dim] in random order. Returns mean loss and mean reconstruction loss.

        Raises:
            InputError: the loss is no longer finite.
        """
        self.model.train()
        separate_random_state(self.settings.seed, self.epoch)
        n, size = len(data), self.settings.batch_size
        steps = math.ceil(n / size)
        shuffled = data[torch.randperm(n, generator=self.order).to(data.device)]
        totals = torch.zeros(2, dtype=torch.float64, device=data.device)
        for start in range(0, n, size):
            rows = shuffled[start : start + size]
            batch = take_part(rows)
            for group in self.optimizer.param_groups:
                group["lr"] = self._lr(steps)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
                output, quant_loss, _ = self.shared_model(batch, use_sk=True)
            loss, reconstruction = self.model.compute_loss(output, quant_loss, batch)
            self.optimizer.zero_grad()
            # A mean over the parts of the batch, which may differ by a row, is to be the mean over its rows.
            (loss * (len(batch) * count_processes() / len(rows))).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_norm)
            step_or_stop(self.optimizer, self._stop_diverged)
            self.step += 1
            totals += len(batch) * torch.stack([loss.detach(), reconstruction.detach()]).double()
        mean_loss, mean_reconstruction = (add_up(totals) / n).tolist()
        if not math.isfinite(mean_loss):
            self._stop_diverged(f"the loss is not finite ({mean_loss})")
        return mean_loss, mean_reconstruction

    def _stop_diverged(self, what: str) -> None:
        raise InputError(
            f"training diverged in epoch {self.epoch + 1}: {what}, at --lr {self.settings.lr:g}; try a tenth of it, or "
            "a longer --warmup_epochs; nothing is exported"
        )

    @torch.no_grad()
    def _revive(self, data: torch.Tensor) -> None:
        """Move dead codes to where data [n, in_dim] is fitted worst, and forget what the optimiser knew of them."""
        self.model.eval()
        encoded = gather_rows(torch.cat([self.model.encoder(part) for part in self._split(take_part(data))]))
        # The same draws on every process, whose order of rows must stay the same; the codes are the main one's.
        revived = broadcast_value(self.model.rq.revive(encoded, self.order))
        for layer, codes in zip(self.model.rq.vq_layers, revived, strict=True):
            layer.embedding.weight.copy_(broadcast_tensor(layer.embedding.weight))
            for name, state in self.optimizer.state.get(layer.embedding.weight, {}).items():
                if name != "step":
                    state[codes] = 0

    @torch.no_grad()
    def _valid_epoch(self, data: torch.Tensor) -> float:
        """The collision rate of data [n, in_dim]: 1 - distinct SIDs / items."""
        self.model.eval()
        parts = [self.model.get_indices(part, use_sk=False) for part in self._split(take_part(data))]
        return 1 - len(torch.unique(gather_rows(torch.cat(parts)), dim=0)) / len(data)

    def _split(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return rows.split(self.settings.batch_size)

    def _save_checkpoint(self, name: str, loss: float, collision: float, full: bool) -> None:
        """Write `name` in the checkpoint folder; `full` adds what is needed to continue the training."""
        if not is_main_process():
            return
        state: dict[str, Any] = {
            "config": self.model.config,
            "state_dict": self.model.state_dict(),
            "epoch": self.epoch,
            "loss": loss,
            "collision_rate": collision,
        }
        if full:
            state |= {
                "settings": self._recorded_settings(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "best_loss": self.best_loss,
                "best_collision": list(self.best_collision),
                "order": self.order.get_state(),
                "random": torch.get_rng_state(),
                "random_device": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            }
        with atomic_write(self.folder / name) as temporary:
            torch.save(state, temporary)

    def _checkpoints(self) -> list[Path]:
        """The continuable checkpoints, oldest first."""
        paths = self.folder.glob("checkpoint_*.pth")
        return sorted(path for path in paths if re.fullmatch(r"checkpoint_\d{8}\.pth", path.name))

    def clear(self) -> None:
        """Remove the checkpoints of an earlier training from the folder."""
        if not is_main_process():
            return
        for path in [*self._checkpoints(), *(self.folder / name for name in (BEST_LOSS, BEST_COLLISION, FINAL))]:
            path.unlink(missing_ok=True)

    def _load_newest(self) -> dict[str, Any]:
        """The newest checkpoint that is whole, {} where none is; a broken one is removed and named."""
        for path in reversed(self._checkpoints()):
            try:
                state = load_checkpoint(path)
                if "optimizer" in state and "random" in state:
                    return state
                fault = f"{path}: no optimizer or random state in it"
            except InputError as error:
                fault = str(error)
            say(f"  {fault}; going on from the checkpoint before it")
            if is_main_process():
                path.unlink(missing_ok=True)
        return {}

    def resume(self) -> bool:
        """Go on from the newest checkpoint of the same settings and model; False and a clean folder if none is."""
        state = self._load_newest()
        same = state.get("settings") == self._recorded_settings() and state["config"] == self.model.config
        if not broadcast_value(same):
            self.clear()
            return False
        self.model.load_state_dict(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.best_loss, self.best_collision = state["best_loss"], tuple(state["best_collision"])
        self.order.set_state(state["order"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_device"] is not None:
            torch.cuda.set_rng_state(state["random_device"], self.device)
        return True

    def _report_epoch(self, measured: dict[str, float]) -> None:
        if self.on_epoch:
            self.on_epoch(self.epoch, measured)

    def fit(self, data: torch.Tensor) -> tuple[float, float]:
        """Train to the end.

        Every eval_step epochs, and after the last: collision rate, best models, checkpoint. Among equal collision rates
        the lower loss is the better. As the latent space grows during training, so do the loss's quantisation part and
        often the collision rate, and both best models may be early ones that reconstruct badly: hence the final model.

        Args:
            data: the embeddings [n, in_dim], on the model's device.

        Returns:
            The best loss and the best collision rate.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        progress = ProgressBar(
            total=self.settings.epochs,
            initial=self.epoch,
            desc="rqvae",
            unit="epochs",
            mininterval=1.0,
            shorter="--epochs",
        )
        while self.epoch < self.settings.epochs:
            loss, reconstruction = self._train_epoch(data)
            self.epoch += 1
            measured = {"loss": loss, "reconstruction_loss": reconstruction}
            progress.update()
            if self.settings.revive_every and self.epoch % self.settings.revive_every == 0:
                self._revive(data)
            if self.epoch % self.settings.eval_step and self.epoch < self.settings.epochs:
                self._report_epoch(measured)
                continue
            collision = self._valid_epoch(data)
            self._report_epoch(measured | {"collision_rate": collision})
            progress.set_postfix_str(f"loss {loss:.5f}, reconstruction {reconstruction:.5f}, collision {collision:.4f}")
            if loss < self.best_loss:
                self.best_loss = loss
                self._save_checkpoint(BEST_LOSS, loss, collision, full=False)
            if (collision, loss) < self.best_collision:
                self.best_collision = (collision, loss)
                self._save_checkpoint(BEST_COLLISION, loss, collision, full=False)
            self._save_checkpoint(f"checkpoint_{self.epoch:08d}.pth", loss, collision, full=True)
            if self.epoch == self.settings.epochs:
                self._save_checkpoint(FINAL, loss, collision, full=False)
            if is_main_process():
                for path in self._checkpoints()[: -self.settings.save_limit]:
                    path.unlink()
            if self.on_checkpoint:
                self.on_checkpoint()
        progress.close()
        return self.best_loss, self.best_collision[0]


def check_model_flags(flags: AutoencoderFlags) -> None:
    """Refuse values that no model can be built with.

    Raises:
        InputError: a value outside its range.
    """
    levels = flags.num_emb_list
    counts = [
        getattr(flags, name) for name in ("e_dim", "kmeans_iters", "sk_iters") if getattr(flags, name) is not None
    ]
    if min([*levels, *flags.layers, *counts]) < 1:
        raise InputError("--num_emb_list, --layers, --e_dim, --kmeans_iters and --sk_iters must be at least 1")
    epsilons = flags.sk_epsilons
    if epsilons and (len(epsilons) != len(levels) or min(epsilons) < 0):
        raise InputError(f"--sk_epsilons: expected {len(levels)} numbers of 0 or more, got {epsilons}")
    if not 0 <= flags.dropout_prob < 1:
        raise InputError(f"--dropout_prob {flags.dropout_prob}: expected a number from 0 to below 1")


def train_autoencoder(
    name: str, flags: AutoencoderFlags, build_model: Callable[[int], RQVAE], codebooks_file: str | None = None
) -> None:
    """Train a model on the embeddings of flags.data_path into flags.ckpt_dir, resuming a run that was cut off.

    Args:
        name: of the stage.
        flags: the command's flags, resolved.
        build_model: the model for embeddings of a width.
        codebooks_file: a file that it reads besides the embeddings.

    Raises:
        InputError: a flag outside its range, or embeddings that cannot be read.
    """
    check_trainer_flags(flags)
    check_model_flags(flags)
    device = pick_device(flags.device)
    folder = Path(flags.ckpt_dir)
    array, _ = load_items(flags.data_path, "data_path")
    smallest = min(len(array), flags.batch_size, len(array) % flags.batch_size or flags.batch_size)
    if flags.bn and smallest == 1:
        raise InputError("--bn: the last batch would hold one item; choose another --batch_size")
    if flags.bn and count_processes() > 1:
        raise InputError("--bn: statistics of parts of a batch are not those of the batch; launch one process")
    if smallest < count_processes():
        raise InputError(
            f"--batch_size {flags.batch_size}: the last of its batches holds {smallest} of the {len(array)} items, and "
            f"{count_processes()} processes share it; choose another"
        )
    stage = open_stage(
        name,
        flags,
        inputs=[flags.data_path, side_file_path(flags.data_path), codebooks_file],
        outputs=[folder / BEST_LOSS, folder / BEST_COLLISION, folder / FINAL],
        record=folder / f"{name}.stage.json",
        trains_in=folder,
    )
    if stage.finished and not flags.dry_run:
        return
    torch.manual_seed(flags.seed)
    trainer = Trainer(build_model(array.shape[1]).to(device), flags, stage.tick)
    if flags.dry_run:
        data = torch.from_numpy(array).to(device)
        foretell_epochs(lambda: trainer._train_epoch(data), flags.epochs, "--epochs")
        return
    if stage.resuming and trainer.resume():
        say(f"  from epoch {trainer.epoch}")
    elif not stage.resuming:
        trainer.clear()
    log = TrainingLog(folder, flags, stage.settings, trainer.epoch)
    trainer.on_epoch = log.add
    best_loss, best_collision = trainer.fit(torch.from_numpy(array).to(device))
    log.close()
    stage.done(items=len(array), best_loss=round(best_loss, 6), best_collision_rate=round(best_collision, 6))
