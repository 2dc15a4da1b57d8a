"""GRPO over prefix trees: one row is one prompt with its group of completions, and the prompt is computed once.

Method: GRPO (arXiv 2402.03300) as used by arXiv 2510.24431, with rollouts that are constrained beam searches or constrained
samples over the catalogue, so that every completion is an item.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Sequence

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer
from trl import GRPOConfig
from trl.trainer.callbacks import SyncRefModelCallback

from beam_search import beam_search, sample
from data import Example
from LogitProcessor import SidTrie
from model_io import QuietSaves
from prefix_tree import batch_trees, tree_log_probs
from rewards import Reward


def group_advantages(rewards: Sequence[float], eps: float = 1e-4) -> torch.Tensor:
    """(r - mean) / (std + eps) within a group; all zeros where the rewards are equal or alone."""
    values = torch.tensor(rewards, dtype=torch.float32)
    if len(values) < 2 or bool((values == values[0]).all()):
        return torch.zeros_like(values)
    return (values - values.mean()) / (values.std() + eps)


def grpo_token_loss(
    log_probs: torch.Tensor, reference: torch.Tensor | None, advantages: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, KL) per completion token, [K] each.

    loss = -exp(log_probs - stop_gradient(log_probs)) * advantage + beta * KL with the k3 estimator
    KL = exp(reference - log_probs) - (reference - log_probs) - 1. Rollout and update are on-policy: the ratio is 1 and only
    its gradient matters.
    """
    policy = -torch.exp(log_probs - log_probs.detach()) * advantages
    if reference is None:
        return policy, torch.zeros_like(policy)
    difference = reference - log_probs
    divergence = torch.exp(difference) - difference - 1
    return policy + beta * divergence, divergence.detach()


class GroupTrainer(QuietSaves, Trainer):
    """A `transformers.Trainer` whose row is one prompt group, configured by TRL's `GRPOConfig`.

    `per_device_train_batch_size` counts completions, as in TRL; a batch holds that many / num_generations prompts.

    Args:
        model: the policy. reference: frozen copy for the KL term, or None where beta is 0.
        trie: the catalogue, on the model's device; sid_of_sequence: SID text of every sequence of the trie.
        reward: see `rewards.py`.
        beam_rollouts: the `num_generations` best items of a beam search, ranked; otherwise independent samples.
        add_gt: put the target in the last place of a group that lacks it.
        mask_all_zero: groups with equal rewards take no part in the loss (not even in its KL term) and cost no forward.
        validate: called without gradients on the main process's model, returns validation metrics.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reference: PreTrainedModel | None,
        args: GRPOConfig,
        train_dataset: Dataset,
        trie: SidTrie,
        sid_of_sequence: list[str],
        reward: Reward,
        pad_token_id: int,
        beam_rollouts: bool = True,
        add_gt: bool = False,
        mask_all_zero: bool = False,
        validate=None,
        callbacks=None,
    ):
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            callbacks=callbacks,
            data_collator=list,
            eval_dataset=train_dataset if validate else None,
        )
        self.reference, self.trie, self.sid_of_sequence, self.reward = reference, trie, sid_of_sequence, reward
        self.sequence_of_sid = {sid: number for number, sid in enumerate(sid_of_sequence)}
        self.completion_tokens = trie.sequences()
        self.pad_token_id, self.beam_rollouts, self.add_gt = pad_token_id, beam_rollouts, add_gt
        self.mask_all_zero, self.validate = mask_all_zero, validate
        self.model_accepts_loss_kwargs = False
        self._sums: dict[str, float] = defaultdict(float)
        self._counted = 0
        if reference is not None and args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=reference, accelerator=self.accelerator))

    def get_train_dataloader(self) -> DataLoader:
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self._train_batch_size // self.args.num_generations,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def rollout(self, examples: Sequence[Example]) -> list[list[int]]:
        """Sequence numbers of every prompt's completions, best first (beam) or in order of drawing."""
        model = self.accelerator.unwrap_model(self.model)
        prompts = [example.prompt_ids for example in examples]
        count = self.args.num_generations
        with self.compute_loss_context_manager():
            if self.beam_rollouts:
                found = beam_search(model, self.trie, prompts, count)
            else:
                found = sample(model, self.trie, prompts, count, self.args.temperature)
        groups = [[number for number in sequences if number >= 0] for sequences in found.sequence.tolist()]
        if self.add_gt:
            for group, example in zip(groups, examples):
                target = self.sequence_of_sid[example.sid]
                if target not in group:
                    group[-1] = target
        return groups

    def compute_loss(self, model, inputs: list[Example], return_outputs=False, num_items_in_batch=None):
        """Mean over the batch's completions of their mean token loss."""
        # Phase 1: rollouts, rewards, advantages.
        groups = self.rollout(inputs)
        rewards, advantages = [], []
        for example, group in zip(inputs, groups):
            rewards.append(self.reward([self.sid_of_sequence[number] for number in group], example.sid))
            advantages.append(group_advantages(rewards[-1]))
        silent = [not bool(advantage.any()) for advantage in advantages]
        kept = [place for place, zero in enumerate(silent) if not (zero and self.mask_all_zero)]
        masked_out = not kept
        if masked_out:
            kept = [0]  # every process must run backward; a loss of zero times anything keeps the gradients at zero

        # Phase 2: one tree per prompt; labels come back row by row, token by token.
        completions = [[self.completion_tokens[number] for number in groups[place]] for place in kept]
        batch = batch_trees(
            [[(inputs[place].prompt_ids, tokens) for tokens in group] for place, group in zip(kept, completions)],
            self.pad_token_id,
        ).to(self.args.device)
        lengths = torch.tensor([len(tokens) for group in completions for tokens in group])
        per_completion = torch.cat([advantages[place] for place in kept])
        total_completions = sum(len(group) for group in groups)
        weight = (1 / (lengths * total_completions)).repeat_interleave(lengths).to(self.args.device)
        token_advantages = per_completion.repeat_interleave(lengths).to(self.args.device)

        # Phase 3: policy and reference log-probabilities, loss.
        log_probs = tree_log_probs(model, batch)
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = tree_log_probs(self.reference, batch)
        token_loss, divergence = grpo_token_loss(log_probs, reference, token_advantages, self.args.beta)
        loss = (token_loss * weight).sum() * (0.0 if masked_out else 1.0)

        self._note(
            reward=sum(sum(group) / len(group) for group in rewards) / len(rewards),
            zero_advantage_share=sum(silent) / len(silent),
            rollout_hit_rate=sum(self.sequence_of_sid[example.sid] in group for example, group in zip(inputs, groups))
            / len(groups),
            kl=(divergence * weight).sum().item() / max(weight.sum().item(), 1e-12),
        )
        return loss

    def _note(self, **values: float) -> None:
        for name, value in values.items():
            self._sums[name] += value
        self._counted += 1

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self._counted and "loss" in logs:
            means = torch.tensor(
                [self._sums[name] / self._counted for name in sorted(self._sums)], device=self.args.device
            )
            means = self.accelerator.reduce(means, reduction="mean").tolist()
            logs = {**logs, **{name: round(value, 5) for name, value in zip(sorted(self._sums), means)}}
            self._sums.clear()
            self._counted = 0
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Validation metrics by beam search instead of a validation loss."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validate().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
