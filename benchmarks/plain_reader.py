"""The plain way to hold training data: every row and every example is a Python object, and an epoch lists them all.

It is what the reader of larger data is measured against, and compared with number by number in the tests.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.utils.data import Dataset

from minionerec.common.records import Row
from minionerec.language.examples import Example
from minionerec.language.prompts import Encoder
from minionerec.search.prefix_tree import batch_trees, count_shared_tokens, fill_bins, pack_trees


class PlainSidDataset(Dataset):
    """History SIDs -> next SID; with `cut_histories` the timelines of long users are cut anew in every epoch."""

    def __init__(self, rows: Sequence[Row], encoder: Encoder, cut_histories: bool, seed: int):
        self.rows, self.encoder, self.cut_histories, self.seed = rows, encoder, cut_histories, seed
        self.whole = [self._make_example(row, row.history_sids, row.user_id) for row in rows]
        self.set_epoch(0)

    def _make_example(self, row: Row, history: Sequence[str], group: str) -> Example:
        prompt, target = (
            self.encoder.prompts.prompt("next_sid", history),
            self.encoder.prompts.target("next_sid", row.sid),
        )
        (ids,), (target_ids,) = self.encoder.prompt_ids([prompt]), self.encoder.target_ids("next_sid", [target])
        return Example(prompt, ids, target_ids, group, row.user_id, row.sid, row.item_id, target, row.history_ids)

    def set_epoch(self, epoch: int) -> None:
        """The examples of an epoch."""
        self.examples = list(self.whole)
        if not self.cut_histories:
            return
        generator = random.Random(f"{self.seed}-{epoch}")
        longest = max(len(row.history_sids) for row in self.rows)
        rows_of_user = Counter(row.user_id for row in self.rows)
        phase: dict[str, int] = {}
        position: Counter[str] = Counter()
        for number, row in enumerate(self.rows):
            user = row.user_id
            if rows_of_user[user] <= longest:
                continue
            if user not in phase:
                phase[user] = generator.randrange(longest)
            piece, position_in_piece = divmod(position[user] + phase[user], longest)
            position[user] += 1
            history = row.history_sids[-(position_in_piece + 1) :]
            self.examples[number] = self._make_example(row, history, f"{user}/{piece}")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


class PlainTreeBatches(Dataset):
    """What `TreeBatches` plans, with lists of examples."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        batch_size: int,
        micro_batches: int,
        pad_token_id: int,
        seed: int | None,
        *,
        packing: str = "tree",
        tree_tokens: int = 2048,
    ):
        self.datasets, self.micro_batches = list(datasets), micro_batches
        self.packing, self.tree_tokens = packing, tree_tokens
        self.pad_token_id, self.seed = pad_token_id, seed
        self.rows = sum(len(dataset) for dataset in self.datasets)
        self.steps = max(1, min(round(self.rows / batch_size), self.rows // micro_batches))
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Plan all steps of an epoch."""
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
                rows.sort(key=lambda row: len(row[1].prompt_ids) + len(row[1].target_ids))
                cuts = [round(part * len(rows) / self.micro_batches) for part in range(self.micro_batches + 1)]
                self.plan += [rows[start:stop] for start, stop in pairwise(cuts)]
            else:
                self.plan += self._share_out(rows)

    def _share_out(self, rows: list[tuple[int, Example]]) -> list[list[tuple[int, Example]]]:
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
                prompt = example.prompt_ids
                size += len(prompt) - count_shared_tokens(before, prompt) + len(example.target_ids)
                before = prompt
            sizes.append(size)
        return [[row for group in part for row in pieces[group]] for part in fill_bins(sizes, self.micro_batches)]

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.packing == "none":
            rows = [(example.prompt_ids, example.target_ids) for _, example in self.plan[index]]
            return {**vars(batch_trees([[row] for row in rows], self.pad_token_id)), "end": None}
        groups: dict[int, list] = defaultdict(list)
        for group, example in self.plan[index]:
            groups[group].append((example.prompt_ids, example.target_ids))
        trees = list(groups.values())
        packed = [[row for group in part for row in trees[group]] for part in pack_trees(trees, self.tree_tokens)]
        return vars(batch_trees(packed, self.pad_token_id))
