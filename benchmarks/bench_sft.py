"""SFT: prefix trees against the ordinary way, shuffled rows in padded batches of 16 with logits at every position.

Both run forward and backward over the same rows in this process, on the same model; their losses and gradients are
compared before anything is reported. Tokens are counted over the whole epoch, seconds and memory over a sample of
users. The last line is JSON: `ratio` = `time_ratio` and `token_ratio`, padded / tree.

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


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(SFTBenchFlags)

import copy
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.problems import list_sid_tokens, make_up_data, read_peak_memory_mb, read_published_data
from data import TaskInputs, build_mixture, choose_tasks
from minionerec.common.files import InputError
from minionerec.common.processes import say
from minionerec.common.texts import list_texts
from minionerec.language.examples import Example
from minionerec.language.models import build_model_from_config
from minionerec.language.prompts import Encoder, load_prompts
from minionerec.language.sid_tokens import add_sid_tokens
from minionerec.search.prefix_tree import TreeBatch, compute_tree_log_probs
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


def time_both(
    model: PreTrainedModel, trees: TreeBatches, padded: Sequence[tuple[torch.Tensor, ...]], labels: int, repeats: int
) -> tuple[dict[str, float], dict[str, int], dict[str, float]]:
    """Run both ways; the tree way first, for its peak memory is the lower one.

    Args:
        model: the one both start from; it keeps the gradients of the tree way.
        trees: what the tree way runs over.
        padded: the same rows for the ordinary way.
        labels: tokens that are predicted.
        repeats: runs of each way.

    Returns:
        ({way: median seconds}, {way: MiB by which it raised the peak memory}, differences of the two ways).

    Raises:
        InputError: the two ways disagree.
    """
    twin = copy.deepcopy(model)
    seconds: dict[str, list[float]] = {"tree": [], "padded": []}
    memory, losses = {}, {}
    ways: tuple[tuple[str, Callable, PreTrainedModel, Any], ...] = (
        ("tree", run_trees, model, trees),
        ("padded", run_padded, twin, padded),
    )
    for name, run, policy, batches in ways:
        before = read_peak_memory_mb()
        for _ in range(repeats):
            policy.zero_grad()
            start = time.perf_counter()
            losses[name] = run(policy, batches)
            seconds[name].append(time.perf_counter() - start)
        memory[name] = read_peak_memory_mb() - before
    loss = abs(losses["tree"] - losses["padded"]) / labels
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    norm = sum(float(theirs.grad.double().square().sum()) for _, theirs in pairs) ** 0.5
    gradient = sum(float((ours.grad - theirs.grad).double().square().sum()) for ours, theirs in pairs) ** 0.5 / norm
    if loss > 1e-4 or gradient > 1e-4:
        raise InputError(f"the two ways disagree (loss {loss:.1e}, gradient {gradient:.1e}): no figure is reported")
    differences = {"loss_difference": loss, "gradient_difference": gradient}
    return {name: statistics.median(values) for name, values in seconds.items()}, memory, differences


def bench(flags: SFTBenchFlags) -> None:
    """Compare the two ways.

    Raises:
        InputError: data that is missing or malformed, or two ways that disagree.
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

    # Phase 2: seconds and memory, on all rows of some users.
    sample = draw_users(examples, flags.rows, rng)
    labels = sum(len(example.target_ids) for example in sample)
    padded = pad_rows(sample, encoder.pad_token_id, rng)
    medians, memory, differences = time_both(model, plant(sample), padded, labels, flags.repeats)
    epoch = {name: value * len(examples) / len(sample) for name, value in medians.items()}
    say(f"{'way':<10}{'tokens':>12}{'s/epoch':>10}{'peak MB':>10}")
    for name, tokens in (("tree", tree_tokens), ("padded", padded_tokens)):
        say(f"{name:<10}{tokens:>12,}{epoch[name]:>10.1f}{memory[name]:>10,}")
    time_ratio = round(medians["padded"] / medians["tree"], 2)
    report = {
        "benchmark": "sft",
        "data": flags.category or flags.data_root or "made up",
        "tasks": list(weights),
        "rows": len(examples),
        "timed_rows": len(sample),
        "threads": torch.get_num_threads(),
        "ratio": time_ratio,
        "tree_tokens": tree_tokens,
        "padded_tokens": padded_tokens,
        "token_ratio": round(padded_tokens / tree_tokens, 2),
        "tree_s_per_epoch": round(epoch["tree"], 1),
        "padded_s_per_epoch": round(epoch["padded"], 1),
        "time_ratio": time_ratio,
        "tree_peak_mb_more": memory["tree"],
        "padded_peak_mb_more": memory["padded"],
        **differences,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(bench, FLAGS)
