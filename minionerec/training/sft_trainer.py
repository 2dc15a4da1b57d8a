"""Supervised training over prefix trees: loss and gradients of separate rows, every distinct prefix computed once."""

from __future__ import annotations

import math
import random
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer

from minionerec.common.row_table import ROWS_AT_ONCE
from minionerec.language.examples import Example, ExampleList, PromptDataset, TokenRow, number_groups
from minionerec.language.mixture import JoinedExamples
from minionerec.search.legal_softmax import LegalTokens, compute_legal_log_probs
from minionerec.search.prefix_tree import (
    TreeBatch,
    batch_trees,
    compute_tree_log_probs,
    count_shared_tokens,
    fill_bins,
    pack_trees,
)
from minionerec.training.callbacks import SFT_COLUMNS, LaunchedTrainer
from minionerec.training.sharded import gather_model


class TreeBatches(Dataset):
    """The micro-batches of an epoch. Rows of a group share a tree; every optimizer step gets `batch_size` rows.

    With packing "tree" the groups of a micro-batch are merged into trees of about `tree_tokens` tokens, one a row: what
    their prompts begin with is computed once too, and rows of one length need no padding. With "none" every example
    is a row of its own, padded: the ordinary way.

    Args:
        datasets: of examples; those with `set_epoch` are told the epoch. A list of `Example` is one too.
        batch_size: rows per optimizer step. Steps are evened out: an epoch of 1,100 rows and batch_size 1,000 is one
            step of 1,100.
        micro_batches: micro-batches per optimizer step, over all processes.
        seed: of the shuffling; None keeps the order (evaluation).
        packing, tree_tokens: as above.
        legal: what probabilities are over; None is the vocabulary.

    Attributes:
        examples: those of all datasets. rows: how many they are. steps: optimizer steps of an epoch.
    """

    def __init__(
        self,
        datasets: Sequence[PromptDataset | JoinedExamples | list[Example]],
        batch_size: int,
        micro_batches: int,
        pad_token_id: int,
        seed: int | None,
        packing: str = "tree",
        tree_tokens: int = 2048,
        legal: LegalTokens | None = None,
    ):
        parts = [ExampleList(part) if isinstance(part, Sequence) else part for part in datasets]
        self.examples, self.micro_batches = JoinedExamples(parts), micro_batches
        self.legal = legal
        self.packing, self.tree_tokens = packing, tree_tokens
        self.pad_token_id, self.seed = pad_token_id, seed
        self.rows = sum(map(len, parts))
        if self.rows < micro_batches:
            raise ValueError(f"{self.rows} rows cannot fill {micro_batches} micro-batches")
        # With few rows a micro-batch, steps below batch_size could leave some micro-batches of a step empty.
        self.steps = max(1, min(round(self.rows / batch_size), self.rows // micro_batches))
        self._epoch: int | None = None
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Put the examples of an epoch in order; a function of the seed and the epoch alone.

        Only numbers are held of all of them. A step's examples are read, and shared out over its micro-batches, when
        the first of these is asked for.
        """
        if epoch == self._epoch:
            return
        self._epoch = epoch
        self.examples.set_epoch(epoch)
        if len(self.examples) != self.rows:
            raise ValueError(f"epoch {epoch} has {len(self.examples):,} examples, the first {self.rows:,}")
        groups = number_groups(self.examples.list_groups())
        order = array("q", range(int(groups.max()) + 1))
        if self.seed is not None:
            random.Random(f"{self.seed}-{epoch}").shuffle(order)
        position = np.empty(len(order), np.int64)
        position[order] = np.arange(len(order))
        position = position[groups]
        self._order = np.argsort(position, kind="stable")  # the examples, group by group
        self._group = position[self._order]  # of each of them
        self._bounds = [round(step * self.rows / self.steps) for step in range(self.steps + 1)]
        self._planned: tuple[int, list[np.ndarray]] | None = None

    def plan_micro_batch(self, index: int) -> tuple[list[int], list[int]]:
        """(number of the group, number in `examples`) of every row of a micro-batch, as two lists."""
        step, part = divmod(range(len(self))[index], self.micro_batches)
        if self._planned is None or self._planned[0] != step:
            low, high = self._bounds[step : step + 2]
            plan = self._cut_by_length if self.packing == "none" else self._share_out
            self._planned = step, plan(low, high)
        places = self._planned[1][part]
        return self._group[places].tolist(), self._order[places].tolist()

    def _cut_by_length(self, low: int, high: int) -> list[np.ndarray]:
        """The rows low .. high of the order as micro-batches of equally many rows.

        Rows of like length side by side need less padding; the sum over a step does not depend on the order.
        """
        lengths = np.empty(high - low, np.int64)
        for start in range(low, high, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, high)
            tokens = self.examples.read_tokens(self._order[start:stop])
            lengths[start - low : stop - low] = [len(prompt) + len(target) for prompt, target, _ in tokens]
        order = low + np.argsort(lengths, kind="stable")
        cuts = [round(part * len(order) / self.micro_batches) for part in range(self.micro_batches + 1)]
        return [order[start:stop] for start, stop in pairwise(cuts)]

    def _share_out(self, low: int, high: int) -> list[np.ndarray]:
        """The rows low .. high of the order as micro-batches of like size in tokens.

        Groups stay whole where there are enough of them.
        """
        begins = low + np.flatnonzero(np.diff(self._group[low:high], prepend=-1))
        pieces = list(pairwise([*begins.tolist(), high]))
        while len(pieces) < self.micro_batches:
            start, stop = pieces.pop(max(range(len(pieces)), key=lambda number: pieces[number][1] - pieces[number][0]))
            middle = start + (stop - start) // 2
            pieces += [(start, middle), (middle, stop)]
        sizes = []
        for start, stop in pieces:
            size, before = 0, []
            for prompt, target, _ in self.examples.read_tokens(self._order[start:stop]):
                size += len(prompt) - count_shared_tokens(before, prompt) + len(target)
                before = prompt
            sizes.append(size)
        return [
            np.concatenate([np.arange(*pieces[number]) for number in part])
            for part in fill_bins(sizes, self.micro_batches)
        ]

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def _trim(self, row: TokenRow) -> TokenRow:
        """The row of an example, its target without the tokens after the last label."""
        prompt, target, labels = row
        if self.legal is not None:
            return self.legal.make_row(prompt, target, labels)
        return prompt, target if labels is None else target[: labels.level.max() + 1], labels

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        groups, places = self.plan_micro_batch(index)
        rows = [self._trim(row) for row in self.examples.read_tokens(places)]
        if self.packing == "none":
            return {**vars(batch_trees([[row] for row in rows], self.pad_token_id)), "end": None}
        of_group: dict[int, list] = defaultdict(list)
        for group, row in zip(groups, rows, strict=True):
            of_group[group].append(row)
        trees = list(of_group.values())
        packed = [[row for group in part for row in trees[group]] for part in pack_trees(trees, self.tree_tokens)]
        return vars(batch_trees(packed, self.pad_token_id))


def take_only(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The one batch of a list: a data loader's batch is one row of `TreeBatches`."""
    return batches[0]


class TreeTrainer(LaunchedTrainer, Trainer):
    """`transformers.Trainer` whose batch is one `TreeBatch`; the loss is the mean over all label tokens of a step.

    validate: called with the plain model on every process at every evaluation; its figures stand beside the validation
        loss.
    legal: what probabilities are over, the same as that of the batches; None is the vocabulary.
    """

    columns, shorter = SFT_COLUMNS, "--num_epochs, --sample, --early_stopping_patience"

    def __init__(
        self,
        *args,
        validate: Callable[[PreTrainedModel], dict[str, float]] | None = None,
        legal: LegalTokens | None = None,
        **kwargs,
    ):
        self.validate, self.legal = validate, legal
        super().__init__(*args, data_collator=take_only, **kwargs)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the labels of the whole step itself

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)  # TreeBatches shuffles, by seed and epoch

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        count = torch.stack([batch["label_weight"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(count).sum()

    def _compute_log_probs(self, model: torch.nn.Module, batch: TreeBatch) -> torch.Tensor:
        if self.legal is None:
            return compute_tree_log_probs(model, batch)
        return compute_legal_log_probs(model, batch, self.legal)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = TreeBatch(**inputs)
        total = -(self._compute_log_probs(model, batch) * batch.label_weight).sum()
        # Gradients are averaged over processes afterwards, while the labels are counted over all of them.
        return total * self.accelerator.num_processes / num_items_in_batch

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Mean loss per label token over the whole evaluation set, whatever its batches."""
        with gather_model(self) as model, torch.no_grad():
            loss = self._measure_loss(model, eval_dataset)
            if not math.isfinite(loss):
                self.stop_diverged(f"the validation loss is not finite ({loss})")
            metrics = {f"{metric_key_prefix}_loss": loss}
            if self.validate:
                with self.compute_loss_context_manager():
                    metrics |= {f"{metric_key_prefix}_{name}": value for name, value in self.validate(model).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure_loss(self, model: PreTrainedModel, eval_dataset: Dataset | None) -> float:
        model.eval()
        total = torch.zeros(2, device=self.args.device)
        for inputs in self.get_eval_dataloader(eval_dataset):
            batch = TreeBatch(**self._prepare_inputs(inputs))
            with self.compute_loss_context_manager():
                log_probs = self._compute_log_probs(model, batch)
            total += torch.stack((-(log_probs * batch.label_weight).sum(), batch.label_weight.sum()))
        total = self.accelerator.reduce(total)
        return (total[0] / total[1]).item()
