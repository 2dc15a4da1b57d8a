"""GRPO over prefix trees: one row is one prompt with its group of completions, and the prompt is computed once.

Method: GRPO (arXiv 2402.03300) as used by arXiv 2510.24431, with rollouts that are constrained beam searches or
constrained samples over the catalogue, so that every completion is an item. The formulas stand in
`minionerec/training/grpo_loss.py`.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_model, save_model
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from trl.trainer.callbacks import SyncRefModelCallback

from minionerec.common.files import InputError
from minionerec.engines.prefix_scorer import PrefixEngine
from minionerec.language.catalogue_trie import CatalogueTrie
from minionerec.language.examples import Example, ExampleList, PromptDataset
from minionerec.language.mixture import JoinedExamples
from minionerec.search.attention_check import find_obstacle
from minionerec.search.label_scores import score_labels
from minionerec.search.modes import evaluation_mode
from minionerec.search.prefix_tree import compute_label_logits
from minionerec.search.shared_prompts import SharedPrompts
from minionerec.search.tree_scorer import choose_batch_size
from minionerec.training.callbacks import RL_COLUMNS, LaunchedTrainer
from minionerec.training.groups import GroupBatch, GroupBatcher, StepSampler
from minionerec.training.grpo_loss import (
    LOSSES,
    compute_advantages,
    compute_policy_loss,
    estimate_kl,
)
from minionerec.training.reference import store_linear_weights
from minionerec.training.rewards import NamedReward
from minionerec.training.rl_config import RLConfig
from minionerec.training.rollouts import choose_rollout_dtype, compute_in, roll_out
from minionerec.training.sharded import gather_model, is_sharding
from minionerec.training.step_clock import StepClock

REFERENCE_FILE = "reference.safetensors"
LOSS_METRICS = ("kl", "entropy", "clip_share", "seconds_reference")  # what a step without a loss does not note


class GroupTrainer(LaunchedTrainer, Trainer):
    """A `transformers.Trainer` whose row is one prompt group, configured by `RLConfig`.

    All prompts of an optimizer step are rolled out together before its first forward pass, so that means are taken over
    the step, whatever its batches and processes; with num_iterations > 1 the same rollouts serve that many steps.

    Args:
        model: the policy, plain or with adapters of `peft`.
        reference: frozen model for the KL term; None where beta is 0, or where the policy without adapters is meant.
        args: the configuration.
        train_dataset: examples whose targets are in the trie.
        catalogue_trie: the catalogue, on the model's device.
        rewards: the terms of the reward, see `minionerec/training/rewards.py`.
        pad_token_id: of the tokenizer.
        validate: called with the plain policy on every process, returns validation metrics.
        callbacks: of the `Trainer`.
        rollout_engine: what rolls out instead of the policy, and is given the policy's weights before it does.

    Attributes:
        clock: seconds of "rollout", "reference" and "train" (the policy's forward and backward) since the last log; of
            "push" as well, the weights' way to a rollout engine.

    Raises:
        InputError: settings that do not fit together, a target outside the trie, a reference of another vocabulary.
    """

    columns, shorter = RL_COLUMNS, "--max_steps, --num_train_epochs, --sample_train"

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        reference: PreTrainedModel | None,
        args: RLConfig,
        train_dataset: PromptDataset | JoinedExamples | list[Example],
        *,
        catalogue_trie: CatalogueTrie,
        rewards: Sequence[NamedReward],
        pad_token_id: int,
        validate: Callable[[PreTrainedModel | PeftModel], dict[str, float]] | None = None,
        callbacks: Sequence | None = None,
        rollout_engine: PrefixEngine | None = None,
    ):
        self.catalogue_trie, self.trie = catalogue_trie, catalogue_trie.trie
        train_dataset = ExampleList(train_dataset) if isinstance(train_dataset, list) else train_dataset
        self._check(model, reference, args, train_dataset)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            callbacks=callbacks,
            data_collator=list,
            eval_dataset=train_dataset if validate else None,
        )
        self.reference, self.rewards = reference, rewards
        # One that follows the policy in small steps needs all its bits.
        if reference is not None and args.bf16 and not args.sync_ref_model:
            store_linear_weights(reference, torch.bfloat16)
        self.pad_token_id, self.validate = pad_token_id, validate
        self.rollout_engine = rollout_engine
        self.temperature = 1.0 if args.beam_search else args.temperature
        self.batcher = GroupBatcher(self.trie, args, pad_token_id, self.temperature)
        self.completion_tokens = self.batcher.completion_tokens
        self.model_accepts_loss_kwargs = True  # the weights of a batch are those of the mean over the whole step
        self.rollout_dtype = choose_rollout_dtype(args.rollout_dtype, model, args.device, args.bf16)
        self._step_batches: list[dict[str, GroupBatch]] = []
        self.clock = StepClock(self.args.device)
        self._sums: dict[str, tuple[float | torch.Tensor, int]] = {}  # (total, count) of each metric
        self._rollout_batch = 0  # prompts per forward pass of the rollouts, once they are counted
        self._logged_step: int | None = None
        if rollout_engine is not None and is_sharding(self.accelerator):
            raise InputError("--use_vllm True: not where the weights are in parts; launch with ddp.yaml or zero2.yaml")
        if args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=reference, accelerator=self.accelerator))

    def _check(self, model, reference, args: RLConfig, train_dataset) -> None:
        if args.loss_type not in LOSSES:
            raise InputError(f"loss_type {args.loss_type}: expected one of {', '.join(LOSSES)}")
        if args.per_device_train_batch_size % args.num_generations:
            raise InputError(
                f"--train_batch_size {args.per_device_train_batch_size}: must be a multiple of num_generations "
                f"{args.num_generations}"
            )
        if args.beta and reference is None and not isinstance(model, PeftModel):
            raise InputError(f"--beta {args.beta}: the KL term needs a reference model")
        if args.sync_ref_model and (reference is None or not args.beta):
            raise InputError("--sync_ref_model: there is no copy to sync; it needs a beta above 0 and full training")
        if reference is not None:
            sizes = [other.get_output_embeddings().weight.shape[0] for other in (model, reference)]
            if sizes[0] != sizes[1]:
                raise InputError(f"the reference has a vocabulary of {sizes[1]} tokens, the policy one of {sizes[0]}")
        strangers = train_dataset.list_sids() - self.catalogue_trie.number_of.keys()
        if strangers:
            raise InputError(f"training prompts: target {min(strangers)} is not in the trie")

    # ---------------------------------------------------------------------------------------------------------- batches
    def get_train_dataloader(self) -> DataLoader:
        prompts = self._train_batch_size // self.args.num_generations
        step = prompts * self.args.gradient_accumulation_steps * self.args.world_size
        sampler = StepSampler(
            len(self.train_dataset),
            step,
            self.args.num_iterations,
            self.args.seed,
            lambda: int(self.state.epoch or 0),
        )
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=prompts,
            sampler_fn=lambda _: sampler,
            is_training=True,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, GroupBatch]], torch.Tensor | None]:
        """The batches of one optimizer step: rolled out, or those of the step before where it is one more update."""
        drawn, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not drawn:
            return [], None
        if self._logged_step is None:
            self._logged_step = self.state.global_step
        if self.state.global_step % self.args.num_iterations == 0 or not self._step_batches:
            with self.clock.time("rollout"):
                self._step_batches = self._make_step([example for batch in drawn for example in batch], len(drawn))
        return self._step_batches, torch.ones((), device=device)

    def share_prompts(self, examples: Sequence[Example], batches: int) -> SharedPrompts | None:
        """The prompts of a step, for its rollout and its first update; None where these must compute them apart.

        They differ with dropout, in another precision and in an engine of their own. Gradient checkpointing keeps no
        keys and values, launches of several processes follow one forward pass at a time, and flex_attention has no mask
        for some queries. A model whose attention the search does not know is searched without keys. A step in several
        batches would hold the activations of all at once, and one that may leave groups out would go back through their
        prompts.
        """
        args, model = self.args, self.model
        attention = model.config._attn_implementation
        if (
            not args.share_prompts
            or self.rollout_engine is not None
            or self.rollout_dtype is not None
            or batches > 1
            or args.world_size > 1
            or self.engine != "one process"
            or args.gradient_checkpointing
            or getattr(model, "is_gradient_checkpointing", False)
            or args.mask_all_zero
            or not args.beta
            or attention not in ("sdpa", "eager")
            or getattr(model.config, "attention_dropout", 0)
        ):
            return None
        prompts = [example.prompt_ids for example in examples]
        policy = self.accelerator.unwrap_model(model)
        if find_obstacle(policy, max(map(len, prompts)) + self.trie.depth) is not None:
            return None
        completion_tokens = args.num_generations * (self.trie.depth - 1)
        return SharedPrompts(policy, prompts, args.tree_tokens, self.pad_token_id, completion_tokens)

    def rollout(self, examples: Sequence[Example], shared: SharedPrompts | None = None) -> list[list[int]]:
        """Sequence numbers of every prompt's completions, see `roll_out`."""
        args = self.args
        with self._open_rollout_model() as policy, self.compute_loss_context_manager():
            if not self._rollout_batch and self.rollout_engine is not None:
                self._rollout_batch = len(examples)  # the engine itself decides what it computes together
            if not self._rollout_batch:
                beams = args.num_generations * 3 // 2 if args.dynamic_sampling else args.num_generations
                longest = int(self.train_dataset.count_prompt_tokens().max())
                self._rollout_batch = choose_batch_size(policy, self.trie, longest, beams)
            return roll_out(
                policy,
                self.trie,
                [example.prompt_ids for example in examples],
                targets=[self.catalogue_trie.number_of[example.sid] for example in examples],
                count=args.num_generations,
                batch_size=self._rollout_batch,
                beams=args.beam_search,
                temperature=args.temperature,
                dynamic=args.dynamic_sampling,
                add_target=args.add_gt,
                renormalize=args.renormalize,
                seed=f"{args.seed}-{self.state.global_step}-{args.process_index}",
                shared=shared,
            )

    @contextlib.contextmanager
    def _open_rollout_model(self) -> Iterator[PreTrainedModel | PeftModel | PrefixEngine]:
        """The policy, or the engine with the policy's weights of now; called by all processes."""
        if self.rollout_engine is None:
            with gather_model(self) as policy, compute_in(self.rollout_dtype, policy):
                yield policy
            return
        with self.clock.time("push"):
            if self.accelerator.is_main_process:
                self.rollout_engine.load_policy(self.accelerator.unwrap_model(self.model))
            self.accelerator.wait_for_everyone()
        yield self.rollout_engine

    def reward_groups(self, examples: Sequence[Example], groups: Sequence[Sequence[int]]) -> list[list[float]]:
        """The weighted sum of the reward's terms for every completion."""
        totals = []
        for example, group in zip(examples, groups, strict=True):
            completions = [self.catalogue_trie.sids[number] for number in group]
            total = [0.0] * len(group)
            for term in self.rewards:
                values = term(completions, example)
                self._note(f"reward_{term.name}", sum(values) / len(values))
                total = [before + term.weight * value for before, value in zip(total, values, strict=True)]
            totals.append(total)
        return totals

    def _make_step(self, examples: Sequence[Example], batches: int) -> list[dict[str, GroupBatch]]:
        # Phase 1: rollouts, rewards, advantages.
        shared = self.share_prompts(examples, batches)
        groups = self.rollout(examples, shared)
        rewards = self.reward_groups(examples, groups)
        scale = self.args.loss_type != "dr_grpo"
        advantages = [compute_advantages(values, scale=scale) for values in rewards]
        silent = [not bool(values.any()) for values in advantages]
        lengths = [len(self.completion_tokens[number]) for group in groups for number in group]
        targets = [self.catalogue_trie.number_of[example.sid] for example in examples]
        hits = sum(target in group for target, group in zip(targets, groups, strict=True))
        prompts = len(examples)
        self._note("reward", sum(sum(values) / len(values) for values in rewards), prompts)
        self._note("reward_std", sum(statistics.pstdev(values) for values in rewards), prompts)
        self._note("zero_advantage_share", sum(silent), prompts)
        self._note("rollout_hit_rate", hits, prompts)
        self._note("diversity", sum(len(set(group)) / len(group) for group in groups), prompts)
        self._note("completion_length", sum(lengths), len(lengths))

        # Phase 2: what the mean of the step is taken over, on all processes.
        counts = self.accelerator.reduce(torch.tensor([len(lengths), sum(lengths)], device=self.args.device)).tolist()

        # Phase 3: the groups that take part, shared out over the step's batches. Without a KL term a silent group has
        # no gradient, masked or not.
        leave_out = self.args.mask_all_zero or not self.args.beta
        kept = [number for number, zero in enumerate(silent) if not (zero and leave_out)]
        bounds = [round(part * len(kept) / batches) for part in range(batches + 1)]
        step = []
        for low, high in pairwise(bounds):
            numbers = kept[low:high]
            if numbers:
                step.append(self.batcher.build(examples, groups, advantages, numbers, counts, shared))
            elif self.args.world_size > 1:
                # Gradients are averaged in backward, so that every process needs a forward pass; this counts nothing.
                shortest = min(range(len(examples)), key=lambda number: len(examples[number].prompt_ids))
                step.append(self.batcher.build(examples, groups, advantages, [shortest], counts))
                step[-1].weight.zero_()
            else:
                step.append(GroupBatch(None))
        return [{"groups": batch} for batch in step]

    # ------------------------------------------------------------------------------------------------------------- loss
    def compute_loss(self, model, inputs: dict[str, GroupBatch], return_outputs=False, num_items_in_batch=None):
        """The batch's share of the step's loss: sum over labels of weight * (policy loss + beta * KL)."""
        batch, args = inputs["groups"], self.args
        if batch.tree is None:
            return sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad) * 0.0
        log_probs, entropy = batch.first_pass() if batch.first_pass else self._score(model, batch)
        batch.first_pass = None
        if batch.old is None:
            batch.old = log_probs.detach()
        loss, clipped = compute_policy_loss(
            log_probs,
            batch.old,
            batch.advantages,
            args.epsilon,
            args.epsilon_high,
            batch.lengths if args.loss_type == "gspo" else None,
        )
        counted = batch.weight.sum().clamp(min=1e-12)
        if args.beta:
            if batch.reference is None:
                batch.reference = self._reference_log_probs(model, batch)
            divergence = estimate_kl(log_probs, batch.reference)
            loss = loss + args.beta * divergence
            self._note("kl", (divergence.detach() * batch.weight).sum() / counted)
        self._note("entropy", (entropy * batch.weight).sum() / counted)
        self._note("clip_share", (clipped * batch.weight).sum() / counted)
        # Gradients are averaged over processes afterwards, while the weights count the completions of all of them.
        return (loss * batch.weight).sum() * args.world_size

    def _score(self, model: torch.nn.Module, batch: GroupBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probabilities [K], entropies [K]) of the labels of a batch under a model."""
        logits, tree = compute_label_logits(model, batch.tree), batch.tree
        return score_labels(logits, tree.label_row, tree.label_token, batch.legal, self.temperature)

    def _reference_log_probs(self, model: torch.nn.Module, batch: GroupBatch) -> torch.Tensor:
        inner = self.accelerator.unwrap_model(model)
        without = inner.disable_adapter() if self.reference is None else contextlib.nullcontext()
        reference = self.reference or inner
        # Under the policy's autocast, which accelerate gives only to the models that it prepares.
        with self.clock.time("reference"), without, evaluation_mode(reference), self.accelerator.autocast():
            return self._score(reference, batch)[0]

    def training_step(self, model, inputs, num_items_in_batch=None):
        """`Trainer.training_step`, timed."""
        with self.clock.time("train"):
            return super().training_step(model, inputs, num_items_in_batch)

    # --------------------------------------------------------------------------------------------------- what is logged
    def _note(self, name: str, total: float | torch.Tensor, count: int = 1) -> None:
        """Adds to a metric; a tensor stays where it is until it is logged, as reading it would wait for the device."""
        before, counted = self._sums.get(name, (0.0, 0))
        self._sums[name] = (before + total, counted + count)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the means since the last log, over all processes; seconds are per optimizer step."""
        if self._sums and "loss" in logs:
            for phase, seconds in self.clock.read().items():
                self._note(f"seconds_{phase}", seconds)
            # Every process must reduce the same names, and one whose groups were all silent has no KL to report.
            names = sorted({*self._sums, *LOSS_METRICS} - (set() if self.args.beta else {"kl", "seconds_reference"}))
            sums = [self._sums.get(name, (0.0, 0)) for name in names]
            totals = torch.stack(
                [
                    torch.as_tensor(value, dtype=torch.float32, device=self.args.device)
                    for pair in sums
                    for value in pair
                ]
            )
            totals = self.accelerator.reduce(totals, reduction="sum").view(-1, 2)
            steps = max(1, self.state.global_step - self._logged_step)
            for name, (total, count) in zip(names, totals.tolist(), strict=True):
                divisor = steps * self.args.world_size if name.startswith("seconds") else max(count, 1.0)
                logs[name] = round(total / divisor, 6)
            self._sums.clear()
            self._logged_step = self.state.global_step
        super().log(logs, *args, **kwargs)

    def measure(self) -> dict[str, float]:
        """What `validate` says of the policy as it is now; called by all processes."""
        with gather_model(self) as policy, self.compute_loss_context_manager():
            return self.validate(policy)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Validation metrics by beam search instead of a validation loss."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measure().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ------------------------------------------------------------------------------------------- a reference that moves
    def _save_checkpoint(self, model, trial) -> None:
        if self.args.sync_ref_model and self.args.should_save:
            # First, as the trainer writes last what says that a checkpoint is complete.
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.reference, str(folder / REFERENCE_FILE))
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.sync_ref_model:
            load_model(self.reference, os.path.join(resume_from_checkpoint, REFERENCE_FILE))
