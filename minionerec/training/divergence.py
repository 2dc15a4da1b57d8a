"""A training whose numbers are no longer finite is stopped before it is written down as a success."""

from __future__ import annotations

import math

import torch

from minionerec.common.files import InputError
from minionerec.language.model_checks import find_broken_weights
from minionerec.search.beam_search import BrokenLogitsError


class FiniteGuard:
    """Mixin for a Trainer: loss and gradient of every optimizer step must be finite, and the weights before every save.

    One number a step is read from the device. Where several processes share the work, a gradient that is not finite on
    one is so on all, so that all stop together.
    """

    def __init__(self, *arguments, **named):
        self._step_loss: torch.Tensor | float = 0.0
        super().__init__(*arguments, **named)

    def training_step(self, *arguments, **named):
        """`Trainer.training_step`; its loss is remembered."""
        loss = super().training_step(*arguments, **named)
        self._step_loss = self._step_loss + loss.detach()
        return loss

    def train(self, *arguments, **named):
        """`Trainer.train`, in which a model whose weights are broken may be asked for rollouts or a validation."""
        try:
            return super().train(*arguments, **named)
        except BrokenLogitsError:
            self.stop_diverged("the model's logits are not finite", before=True)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss, self._step_loss = float(self._step_loss), 0.0
        for name, value in (("loss", loss), ("gradient", 0.0 if norm is None else float(norm))):
            if not math.isfinite(value):
                self.stop_diverged(f"the {name} is not finite ({value})")
        return norm

    def _maybe_log_save_evaluate(self, *arguments, **named):
        if self.control.should_evaluate or self.control.should_save:
            broken = find_broken_weights(self.model)
            if broken:
                self.stop_diverged(f"weights are not finite after it ({broken[0]})")
        return super()._maybe_log_save_evaluate(*arguments, **named)

    def stop_diverged(self, what: str, *, before: bool = False) -> None:
        """End the run.

        Args:
            what: is not finite.
            before: it was so before this step, by the update of the step before.

        Raises:
            InputError: what happened at which step, and what to try.
        """
        from minionerec.training.checkpoints import find_last_checkpoint  # checkpoints.py knows trainers

        step, rate = self.state.global_step + (not before), self._get_learning_rate()
        rate = f"{float(rate):.3g} (of --learning_rate {self.args.learning_rate:g})"
        last = find_last_checkpoint(self.args.output_dir)
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise InputError(
            f"training diverged at step {step}: {what}, at a learning rate of {rate}; try a tenth of it, or a longer "
            f"--warmup_ratio; nothing is exported, {kept}"
        )
