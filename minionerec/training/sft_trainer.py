"""Supervised training over prefix trees: loss and gradients of separate rows, every distinct prefix computed once."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer

from minionerec.language.examples import Example
from minionerec.search.prefix_tree import (
    TreeBatch,
    batch_trees,
    compute_tree_log_probs,
    count_shared_tokens,
    fill_bins,
    pack_trees,
)
from minionerec.training.callbacks import LaunchedTrainer
from minionerec.training.sharded import gather_model


class TreeBatches(Dataset):
    """The micro-batches of an epoch. Rows of a group share a tree; every optimizer step gets `batch_size` rows.

    With packing "tree" the groups of a micro-batch are merged into trees of about `tree_tokens` tokens, one a row: what
    their prompts begin with is computed once too, and rows of one length need no padding. With "none" every example
    is a row of its own, padded: the ordinary way.

    Args:
        datasets: datasets of `Example`; those with `set_epoch` are told the epoch.
        batch_size: rows per optimizer step. Steps are evened out: an epoch of 1,100 rows and batch_size 1,000 is one
            step of 1,100.
        micro_batches: micro-batches per optimizer step, over all processes.
        seed: of the shuffling; None keeps the order (evaluation).
        packing, tree_tokens: as above.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        batch_size: int,
        micro_batches: int,
        pad_token_id: int,
        seed: int | None,
        packing: str = "tree",
        tree_tokens: int = 2048,
    ):
        self.datasets, self.micro_batches = list(datasets), micro_batches
        self.packing, self.tree_tokens = packing, tree_tokens
        self.pad_token_id, self.seed = pad_token_id, seed
        self.rows = sum(len(dataset) for dataset in self.datasets)
        if self.rows < micro_batches:
            raise ValueError(f"{self.rows} rows cannot fill {micro_batches} micro-batches")
        # With few rows a micro-batch, steps below batch_size could leave some micro-batches of a step empty.
        self.steps = max(1, min(round(self.rows / batch_size), self.rows // micro_batches))
        self._epoch: int | None = None
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._epoch = epoch
        for dataset in self.datasets:
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)
        groups: dict[str, list[Example]] = defaultdict(list)
        for dataset in self.datasets:
            for example in (dataset[index] for index in range(len(dataset))):
                groups[example.group].append(example)
        order = list(groups.values())
        if self.seed is not None:
            random.Random(f"{self.seed}-{epoch}").shuffle(order)
        flat = [(group, example) for group, examples in enumerate(order) for example in examples]
        bounds = [round(step * len(flat) / self.steps) for step in range(self.steps + 1)]
        self.plan: list[list[tuple[int, Example]]] = []
        for low, high in pairwise(bounds):
            rows = flat[low:high]
            if self.packing == "none":
                # Rows of like length side by side need less padding; the sum over a step does not depend on the order.
                rows.sort(key=lambda row: len(row[1].prompt_ids) + len(row[1].target_ids))
                cuts = [round(part * len(rows) / self.micro_batches) for part in range(self.micro_batches + 1)]
                self.plan += [rows[start:stop] for start, stop in pairwise(cuts)]
            else:
                self.plan += self._share_out(rows)

    def _share_out(self, rows: list[tuple[int, Example]]) -> list[list[tuple[int, Example]]]:
        """The rows of a step as micro-batches of like size in tokens.

        Groups stay whole where there are enough of them.
        """
        whole: dict[int, list[tuple[int, Example]]] = defaultdict(list)
        for row in rows:
            whole[row[0]].append(row)
        pieces = list(whole.values())
        while len(pieces) < self.micro_batches:
            longest = pieces.pop(max(range(len(pieces)), key=lambda number: len(pieces[number])))
            pieces += [longest[: len(longest) // 2], longest[len(longest) // 2 :]]
        sizes = []
        for piece in pieces:
            size, before = 0, []
            for _, example in piece:
                size += (
                    len(example.prompt_ids) - count_shared_tokens(before, example.prompt_ids) + len(example.target_ids)
                )
                before = example.prompt_ids
            sizes.append(size)
        return [[row for group in part for row in pieces[group]] for part in fill_bins(sizes, self.micro_batches)]

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.packing == "none":
            rows = [(example.prompt_ids, example.target_ids, example.labels) for _, example in self.plan[index]]
            return {**vars(batch_trees([[row] for row in rows], self.pad_token_id)), "end": None}
        groups: dict[int, list] = defaultdict(list)
        for group, example in self.plan[index]:
            groups[group].append((example.prompt_ids, example.target_ids, example.labels))
        trees = list(groups.values())
        packed = [[row for group in part for row in trees[group]] for part in pack_trees(trees, self.tree_tokens)]
        return vars(batch_trees(packed, self.pad_token_id))


def take_only(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The one batch of a list: a data loader's batch is one row of `TreeBatches`."""
    return batches[0]


class TreeTrainer(LaunchedTrainer, Trainer):
    """`transformers.Trainer` whose batch is one `TreeBatch`; the loss is the mean over all label tokens of a step.

    validate: called with the plain model on every process at every evaluation; its figures stand beside the validation
        loss.
    """

    def __init__(self, *args, validate: Callable[[PreTrainedModel], dict[str, float]] | None = None, **kwargs):
        self.validate = validate
        super().__init__(*args, data_collator=take_only, **kwargs)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the labels of the whole step itself

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)  # TreeBatches shuffles, by seed and epoch

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        count = torch.stack([batch["label_weight"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(count).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = TreeBatch(**inputs)
        total = -(compute_tree_log_probs(model, batch) * batch.label_weight).sum()
        # Gradients are averaged over processes afterwards, while the labels are counted over all of them.
        return total * self.accelerator.num_processes / num_items_in_batch

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Mean loss per label token over the whole evaluation set, whatever its batches."""
        with gather_model(self) as model, torch.no_grad():
            metrics = {f"{metric_key_prefix}_loss": self._measure_loss(model, eval_dataset)}
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
                log_probs = compute_tree_log_probs(model, batch)
            total += torch.stack((-(log_probs * batch.label_weight).sum(), batch.label_weight.sum()))
        total = self.accelerator.reduce(total)
        return (total[0] / total[1]).item()
