"""Supervised training over prefix trees: the loss and gradients of separate rows, every distinct prefix computed once."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Sequence

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer

from data import Example
from model_io import QuietSaves
from prefix_tree import TreeBatch, batch_trees, tree_log_probs


class TreeBatches(Dataset):
    """The micro-batches of an epoch. Rows of a group share a tree; every optimizer step gets `batch_size` rows.

    Args:
        datasets: datasets of `Example`; those with `set_epoch` are told the epoch.
        batch_size: rows per optimizer step. Steps are evened out: an epoch of 1,100 rows and batch_size 1,000 is one
            step of 1,100.
        micro_batches: micro-batches per optimizer step, over all processes.
        seed: of the shuffling; None keeps the order (evaluation).
    """

    def __init__(
        self, datasets: Sequence[Dataset], batch_size: int, micro_batches: int, pad_token_id: int, seed: int | None
    ):
        self.datasets, self.micro_batches = list(datasets), micro_batches
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
                groups[f"{type(dataset).__name__}/{example.group}"].append(example)
        order = list(groups.values())
        if self.seed is not None:
            random.Random(f"{self.seed}-{epoch}").shuffle(order)
        flat = [(group, example) for group, examples in enumerate(order) for example in examples]
        bounds = [round(step * len(flat) / self.steps) for step in range(self.steps + 1)]
        self.plan: list[list[tuple[int, Example]]] = []
        for low, high in zip(bounds, bounds[1:]):
            rows = flat[low:high]
            # Trees of similar size side by side need less padding. The sum over a step does not depend on the order.
            size: dict[int, int] = defaultdict(int)
            before: tuple[int, list[int]] = (-1, [])
            for group, example in rows:
                shared = _shared(before[1], example.prompt_ids) if before[0] == group else 0
                size[group] += len(example.prompt_ids) - shared
                before = (group, example.prompt_ids)
            rows.sort(key=lambda row: (size[row[0]], row[0]))
            cuts = [round(part * len(rows) / self.micro_batches) for part in range(self.micro_batches + 1)]
            self.plan += [rows[start:stop] for start, stop in zip(cuts, cuts[1:])]

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        groups: dict[int, list] = defaultdict(list)
        for group, example in self.plan[index]:
            groups[group].append((example.prompt_ids, example.target_ids))
        return vars(batch_trees(list(groups.values()), self.pad_token_id))


def _shared(first: list[int], second: list[int]) -> int:
    """Length of the common prefix."""
    if second[: len(first)] == first:
        return len(first)
    return next(
        (place for place, pair in enumerate(zip(first, second)) if pair[0] != pair[1]), min(len(first), len(second))
    )


class TreeTrainer(QuietSaves, Trainer):
    """`transformers.Trainer` whose batch is one `TreeBatch`; the loss is the mean over all label tokens of a step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, data_collator=lambda batch: batch[0], **kwargs)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the labels of the whole step itself

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)  # TreeBatches shuffles, by seed and epoch

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        count = torch.stack([batch["label_weight"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(count).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = TreeBatch(**inputs)
        total = -(tree_log_probs(model, batch) * batch.label_weight).sum()
        # Gradients are averaged over processes afterwards, while the labels are counted over all of them.
        return total * self.accelerator.num_processes / num_items_in_batch

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Mean loss per label token over the whole evaluation set, whatever its batches."""
        self.model.eval()
        total = torch.zeros(2, device=self.args.device)
        with torch.no_grad():
            for inputs in self.get_eval_dataloader(eval_dataset):
                batch = TreeBatch(**self._prepare_inputs(inputs))
                with self.compute_loss_context_manager():
                    log_probs = tree_log_probs(self.model, batch)
                total += torch.stack((-(log_probs * batch.label_weight).sum(), batch.label_weight.sum()))
        total = self.accelerator.reduce(total)
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1]).item()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
