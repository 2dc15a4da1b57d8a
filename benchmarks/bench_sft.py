"""SFT: prefix trees against two other ways to compute the same loss of the same rows.

`padded` is the ordinary way, shuffled rows in padded batches of 16 with logits at every position. `packed` is TRL's
SFTTrainer with `packing=True`: whole rows side by side in rows of --pack_tokens, best fit first, which see themselves
alone by their position ids, and logits at the answers only.

All run forward and backward over the same rows in this process, on copies of one model; their losses and gradients are
compared before anything is reported. Tokens are counted over the whole epoch, seconds and memory over a sample of
users. The last line is JSON: `ratio` = `time_ratio` and `token_ratio`, padded / tree, the same as packed / tree, and
`share_of_bound`: the seconds that the counted matrix products of a way would take at the fastest speed of a product in
this process, over the CPU seconds of a thread that it took, which other work on the machine hardly changes.

    python -m benchmarks.bench_sft --data_root DIR --category Industrial_and_Scientific   data in the published format
    python -m benchmarks.bench_sft                                                        rows made up here
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.settings import PublishedDataFlags, RepeatFlags
from minionerec.common.cli import flag, parse_flags, run_command


@dataclass
class SFTBenchFlags(PublishedDataFlags, RepeatFlags):
    """Benchmark."""

    base_model: str = flag("config/tiny_qwen3.json", "a config, which gets random weights")
    prompts: str = flag("worded", "prompt set")
    tasks: list[str] = flag(["next_sid", "next_title", "title_history2sid"], "tasks of the epoch")
    rows: int = flag(1000, "training rows that are timed, over all tasks")
    micro_batch_size: int = flag(32, "rows of a forward pass of the tree way")
    tree_tokens: int = flag(2048, "tokens of a tree, about")
    pack_tokens: int = flag(512, "tokens of a packed row, at most")


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(SFTBenchFlags)

import copy
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset as ListDataset
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from benchmarks.arithmetic import BACKWARD, count_forward_flops, measure_peak_gflops
from benchmarks.problems import list_sid_tokens, make_up_data, read_peak_memory_mb, read_published_data
from data import TaskInputs, build_mixture, choose_tasks
from minionerec.common.files import InputError
from minionerec.common.processes import say
from minionerec.common.texts import list_texts
from minionerec.language.examples import Example
from minionerec.language.models import build_model_from_config
from minionerec.language.prompts import Encoder, load_prompts
from minionerec.language.sid_tokens import add_sid_tokens
from minionerec.search.prefix_tree import TreeBatch, build_tree_mask, compute_tree_log_probs
from minionerec.training.sft_trainer import TreeBatches

PADDED_ROWS = 16  # of a batch, in the ordinary way


def pad_rows(examples: Sequence[Example], pad_token_id: int, rng: random.Random) -> list[tuple[torch.Tensor, ...]]:
    """Shuffled rows in batches, padded on the right.

    Returns:
        (input ids, attention mask, labels with -100 where nothing is to be predicted) per batch, each [16, longest].
    """
    order = rng.sample(examples, len(examples))
    batches = []
    for start in range(0, len(order), PADDED_ROWS):
        rows = order[start : start + PADDED_ROWS]
        width = max(len(row.prompt_ids) + len(row.target_ids) for row in rows)
        ids, labels = torch.full((len(rows), width), pad_token_id), torch.full((len(rows), width), -100)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            tokens = torch.tensor(row.prompt_ids + row.target_ids)
            ids[number, : len(tokens)], mask[number, : len(tokens)] = tokens, 1
            labels[number, len(row.prompt_ids) : len(tokens)] = tokens[len(row.prompt_ids) :]
        batches.append((ids, mask, labels))
    return batches


def run_padded(model: PreTrainedModel, batches: Sequence[tuple[torch.Tensor, ...]]) -> float:
    """Summed loss of padded batches; gradients are left in the model."""
    total = 0.0
    for ids, mask, labels in tqdm(batches, "padded", leave=False):
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
        loss.backward()
        total += loss.item()
    return total


def run_trees(model: PreTrainedModel, batches: TreeBatches) -> float:
    """Summed loss of prefix trees; gradients are left in the model."""
    total = 0.0
    for number in tqdm(range(len(batches)), "tree", leave=False):
        batch = TreeBatch(**batches[number])
        loss = -(compute_tree_log_probs(model, batch) * batch.label_weight).sum()
        loss.backward()
        total += loss.item()
    return total


def draw_users(examples: Sequence[Example], rows: int, rng: random.Random) -> list[Example]:
    """All examples of random users, until there are `rows`."""
    users = sorted({example.group for example in examples})
    rng.shuffle(users)
    by_user: dict[str, list[Example]] = {}
    for example in examples:
        by_user.setdefault(example.group, []).append(example)
    sample: list[Example] = []
    while users and len(sample) < rows:
        sample += by_user[users.pop()]
    return sample


def build_packing_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], tokens: int, folder: str
) -> SFTTrainer:
    """TRL's trainer over the rows as it packs them, a packed row a batch; the loss is on the targets only.

    Args:
        model: it is changed: its output layer is computed at the labels only.
        tokenizer: of the padding token alone, for the rows have their tokens already.
        examples: the rows.
        tokens: of a packed row, at most.
        folder: nothing is written there.
    """
    columns = {
        "input_ids": [example.prompt_ids + example.target_ids for example in examples],
        "completion_mask": [[0] * len(row.prompt_ids) + [1] * len(row.target_ids) for row in examples],
    }
    args = SFTConfig(
        output_dir=folder,
        packing=True,
        max_length=tokens,
        completion_only_loss=True,
        per_device_train_batch_size=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
    )
    return SFTTrainer(model=model, args=args, train_dataset=ListDataset.from_dict(columns), processing_class=tokenizer)


def run_packed(trainer: SFTTrainer, batches: Sequence[dict[str, torch.Tensor]]) -> float:
    """Summed loss of packed rows by TRL's own `compute_loss`; gradients are left in its model."""
    total = 0.0
    for batch in tqdm(batches, "packed", leave=False):
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(1))
        loss.backward()
        total += loss.item()
    return total


def count_tree_flops(model: PreTrainedModel, batch: TreeBatch, pad_token_id: int) -> int:
    """Operations of a forward pass over trees: padding counts as nothing, and no pair that is not visible."""
    real = batch.input_ids != pad_token_id
    pairs = int((build_tree_mask(batch.end).squeeze(1) & real.unsqueeze(2)).sum())
    return count_forward_flops(model.config, int(real.sum()), pairs, len(batch.node))


def count_flops(
    model: PreTrainedModel, trees: TreeBatches, padded: Sequence[tuple[torch.Tensor, ...]], rows: Sequence[Example]
) -> dict[str, int]:
    """Operations of forward and backward passes of each way, padding included where rows are padded."""
    lengths = [len(row.prompt_ids) + len(row.target_ids) for row in rows]
    labels = sum(len(row.target_ids) for row in rows)
    batches = (TreeBatch(**trees[number]) for number in range(len(trees)))
    shapes = [ids.shape for ids, *_ in padded]
    forward = {
        "tree": sum(count_tree_flops(model, batch, trees.pad_token_id) for batch in batches),
        "packed": count_forward_flops(
            model.config, sum(lengths), sum(length * (length + 1) // 2 for length in lengths), labels
        ),
        "padded": sum(
            count_forward_flops(model.config, n * width, n * width * (width + 1) // 2, n * width) for n, width in shapes
        ),
    }
    return {name: (1 + BACKWARD) * flops for name, flops in forward.items()}


def time_ways(
    ways: dict[str, tuple[Callable[[], float], PreTrainedModel]], labels: int, repeats: int
) -> tuple[dict[str, float], dict[str, float], dict[str, int], dict[str, float]]:
    """Run all ways in turn, `repeats` times; in the order of their peak memory, which only rises.

    Args:
        ways: {name: (what returns the summed loss, the model that then holds its gradients)}, "padded" the last.
        labels: tokens that are predicted.
        repeats: runs of each way.

    Returns:
        ({way: median seconds}, {way: median CPU seconds of a thread}, {way: MiB by which it raised the peak memory},
        the largest differences from padded).

    Raises:
        InputError: a way disagrees.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory, losses = {}, {}
    for _ in range(repeats):
        for name, (run, model) in ways.items():
            before = read_peak_memory_mb()
            model.zero_grad()
            start, start_cpu = time.perf_counter(), time.process_time()
            losses[name] = run()
            seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name].append((time.process_time() - start_cpu) / torch.get_num_threads())
            memory.setdefault(name, read_peak_memory_mb() - before)
    expected = list(ways["padded"][1].parameters())
    norm = sum(float(parameter.grad.double().square().sum()) for parameter in expected) ** 0.5
    differences = {"loss_difference": 0.0, "gradient_difference": 0.0}
    for name, (_, model) in ways.items():
        loss = abs(losses[name] - losses["padded"]) / labels
        pairs = zip(model.parameters(), expected, strict=True)
        gradient = sum(float((ours.grad - theirs.grad).double().square().sum()) for ours, theirs in pairs) ** 0.5 / norm
        if not (loss <= 1e-4 and gradient <= 1e-4):
            raise InputError(
                f"{name} and padded disagree (loss {loss:.1e}, gradient {gradient:.1e}): no figure is reported"
            )
        differences["loss_difference"] = max(differences["loss_difference"], loss)
        differences["gradient_difference"] = max(differences["gradient_difference"], gradient)
    wall, cpu = ({name: statistics.median(values) for name, values in of.items()} for of in (seconds, cpu_seconds))
    return wall, cpu, memory, differences


def compare_ways(
    model: PreTrainedModel, encoder: Encoder, trees: TreeBatches, sample: Sequence[Example], flags: SFTBenchFlags
) -> dict[str, Any]:
    """Seconds, memory and share of the arithmetic's bound of every way over the rows of `trees`.

    Raises:
        InputError: ways that disagree, or a row longer than a packed one may be.
    """
    longest = max(len(example.prompt_ids) + len(example.target_ids) for example in sample)
    if longest > flags.pack_tokens:
        raise InputError(f"--pack_tokens {flags.pack_tokens}: the longest row has {longest}, and would be cut")
    padded = pad_rows(sample, encoder.pad_token_id, random.Random(flags.seed))
    twin = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_packing_trainer(copy.deepcopy(model), encoder.tokenizer, sample, flags.pack_tokens, folder)
        packed = list(trainer.get_train_dataloader())
        ways = {
            "tree": (lambda: run_trees(model, trees), model),
            "packed": (lambda: run_packed(trainer, packed), trainer.model),
            "padded": (lambda: run_padded(twin, padded), twin),
        }
        labels = sum(len(example.target_ids) for example in sample)
        seconds, cpu_seconds, memory, differences = time_ways(ways, labels, flags.repeats)
    peak = measure_peak_gflops() * 1e9
    flops = count_flops(model, trees, padded, sample)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "memory": memory,
        "differences": differences,
        "share_of_bound": {name: round(flops[name] / peak / cpu_seconds[name], 3) for name in ways},
        "peak_gflops": round(peak / 1e9, 1),
    }


def bench(flags: SFTBenchFlags) -> None:
    """Compare the three ways.

    Raises:
        InputError: data that is missing or malformed, or ways that disagree.
    """
    rng = random.Random(flags.seed)
    rows, catalogue = read_published_data(flags.data_root, flags.category) if flags.data_root else make_up_data(rng)
    prompt_set = load_prompts(flags.prompts)
    weights = choose_tasks(flags.tasks, prompt_set)
    model, tokenizer = build_model_from_config(flags.base_model, list_texts(catalogue.titles, []), flags.seed)
    add_sid_tokens(model, tokenizer, list_sid_tokens(catalogue), flags.seed, 1.0)
    encoder = Encoder(tokenizer, prompt_set)
    mixture = build_mixture(weights, TaskInputs(rows, catalogue), encoder)
    examples = [mixture[number] for number in range(len(mixture))]

    def plant(examples: list[Example]) -> TreeBatches:
        count = max(1, round(len(examples) / flags.micro_batch_size))
        pad = encoder.pad_token_id
        return TreeBatches([examples], len(examples), count, pad, flags.seed, tree_tokens=flags.tree_tokens)

    # Phase 1: tokens of a whole epoch, padding included.
    trees = plant(examples)
    tree_tokens = sum(trees[number]["input_ids"].numel() for number in tqdm(range(len(trees)), "count"))
    padded_tokens = sum(ids.numel() for ids, *_ in pad_rows(examples, encoder.pad_token_id, rng))
    packed_tokens = sum(len(example.prompt_ids) + len(example.target_ids) for example in examples)

    # Phase 2: seconds and memory, on all rows of some users.
    sample = draw_users(examples, flags.rows, rng)
    figures = compare_ways(model, encoder, plant(sample), sample, flags)
    epoch = {name: value * len(examples) / len(sample) for name, value in figures["seconds"].items()}
    tokens = {"tree": tree_tokens, "packed": packed_tokens, "padded": padded_tokens}
    say(f"{'way':<10}{'tokens':>12}{'s/epoch':>10}{'peak MB':>10}{'of bound':>10}")
    for name, count in tokens.items():
        bound, memory = figures["share_of_bound"][name], figures["memory"][name]
        say(f"{name:<10}{count:>12,}{epoch[name]:>10.1f}{memory:>10,}{bound:>10.1%}")
    time_ratio, packed_ratio = (round(epoch[name] / epoch["tree"], 2) for name in ("padded", "packed"))
    report = {
        "benchmark": "sft",
        "data": flags.category or flags.data_root or "made up",
        "tasks": list(weights),
        "rows": len(examples),
        "timed_rows": len(sample),
        "threads": torch.get_num_threads(),
        "ratio": time_ratio,
        **{f"{name}_tokens": count for name, count in tokens.items()},
        "token_ratio": round(padded_tokens / tree_tokens, 2),
        "packed_token_ratio": round(packed_tokens / tree_tokens, 2),
        **{f"{name}_s_per_epoch": round(value, 1) for name, value in epoch.items()},
        "time_ratio": time_ratio,
        "packed_time_ratio": packed_ratio,
        "timed_cpu_s": {name: round(value, 2) for name, value in figures["cpu_seconds"].items()},
        **{f"{name}_peak_mb_more": value for name, value in figures["memory"].items()},
        "share_of_bound": figures["share_of_bound"],
        "peak_gflops": figures["peak_gflops"],
        **figures["differences"],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(bench, FLAGS)
