"""Search, training and a GRPO step of models with random weights, timed on any device against the ordinary way.

Shares of the peak are counted operations of the matrix products over seconds, divided by the most that products of
matrices reached in this process in the same precision (`benchmarks/arithmetic.py`).
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import bench_grpo
from benchmarks.arithmetic import BACKWARD, count_forward_flops, measure_peak_gflops
from benchmarks.bench_sft import count_tree_flops, pad_rows, run_padded
from benchmarks.device_checks import CheckFailed, autocast_in
from benchmarks.problems import build_random_model, read_peak_memory_mb
from benchmarks.textbook import search_textbook
from minionerec.language.examples import Example
from minionerec.search.beam_search import beam_search
from minionerec.search.prefix_tree import batch_trees, compute_tree_log_probs
from minionerec.search.trie import SidTrie

END, LEVELS = 1, 3


@dataclass(frozen=True)
class TimingSizes:
    """How large the timed problems are.

    Attributes:
        vocab_size: of the model, its last 3 x codes tokens being those of the SIDs.
        prompts, prompt_length, num_beams, items, codes: of the search.
        users, history, rows: of the training: so many rows a user, of one history of so many tokens.
        tree_users: users that share a tree.
        generations: of the GRPO step, which has half as many prompts.
        repeats: timed runs after one that warms up.
    """

    vocab_size: int
    prompts: int
    prompt_length: int
    num_beams: int
    items: int
    codes: int
    users: int
    history: int
    rows: int
    tree_users: int
    generations: int
    repeats: int


GPU_SIZES = TimingSizes(
    vocab_size=151_936,
    prompts=16,
    prompt_length=128,
    num_beams=50,
    items=3686,
    codes=256,
    users=32,
    history=256,
    rows=8,
    tree_users=8,
    generations=16,
    repeats=3,
)
TOY_SIZES = TimingSizes(
    vocab_size=400,
    prompts=2,
    prompt_length=12,
    num_beams=4,
    items=60,
    codes=8,
    users=2,
    history=40,
    rows=3,
    tree_users=2,
    generations=4,
    repeats=1,
)


def count_parameters(shape: str, vocab_size: int) -> int:
    """Weights of a shape, without making them."""
    return build_random_model(shape, vocab_size, 0, "meta").num_parameters()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_runs(run: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, float]:
    """(median seconds of `repeats` runs after one more, peak memory in MB: the device's own, else the process's)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        run()
        synchronize(device)
        if repeat:
            seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else read_peak_memory_mb()
    return statistics.median(seconds), round(memory)


def measure_peaks(device: torch.device) -> dict[str, float]:
    """What products of matrices reach, in 10^12 operations per second."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return {f"{name}_tflops": round(measure_peak_gflops(dtype, device) / 1e3, 3) for name, dtype in names.items()}


def time_search(shape: str, device: torch.device, sizes: TimingSizes, seed: int = 0) -> dict[str, float]:
    """Beam search in bfloat16 against `generate` in bfloat16.

    Random weights leave many items nearly alike, so that the lists are reported (`overlap`) and not held to anything;
    `check_search` compares them where that means something.
    """
    rng = random.Random(seed)
    first = sizes.vocab_size - LEVELS * sizes.codes
    sids = {
        tuple(first + level * sizes.codes + rng.randrange(sizes.codes) for level in range(LEVELS))
        for _ in range(sizes.items)
    }
    sequences = [[*sid, END] for sid in sorted(sids)]
    prompts = [[rng.randrange(2, first) for _ in range(sizes.prompt_length)] for _ in range(sizes.prompts)]
    model = build_random_model(shape, sizes.vocab_size, seed, device, torch.bfloat16)
    trie, found = SidTrie(sequences, device), {}

    def search() -> None:
        found["tree"] = beam_search(model, trie, prompts, sizes.num_beams).sequence.tolist()

    def generate() -> None:
        found["generate"] = search_textbook(model, sequences, prompts, sizes.num_beams, END)

    tree_s, tree_mb = time_runs(search, device, sizes.repeats)
    generate_s, generate_mb = time_runs(generate, device, 1)
    common = [
        len({tuple(sequences[number]) for number in ours if number >= 0} & {tokens for tokens, _ in theirs})
        for ours, theirs in zip(found["tree"], found["generate"], strict=True)
    ]
    # Every prompt is fed once, and each beam its three SID tokens; a beam sees the prompt and its own tokens.
    length, beams = sizes.prompt_length, sizes.num_beams
    tokens = sizes.prompts * (length + beams * LEVELS)
    own = sum(length + level for level in range(1, LEVELS + 1))
    pairs = sizes.prompts * (length * (length + 1) // 2 + beams * own)
    flops = count_forward_flops(model.config, tokens, pairs, sizes.prompts * (1 + beams * LEVELS))
    peak = measure_peak_gflops(torch.bfloat16, device) * 1e9
    return {
        "tree_s": round(tree_s, 4),
        "generate_s": round(generate_s, 4),
        "ratio": round(generate_s / tree_s, 2),
        "tree_mb": tree_mb,
        "generate_mb": generate_mb,
        "tokens_per_s": round(tokens / tree_s),
        "share_of_peak": round(flops / tree_s / peak, 4),
        "overlap": round(statistics.mean(common) / sizes.num_beams, 3),
    }


def draw_user_rows(sizes: TimingSizes, rng: random.Random) -> list[list[tuple[list[int], list[int]]]]:
    """(prompt, target) rows of each user: growing parts of one history, and four tokens."""
    groups = []
    for _ in range(sizes.users):
        history = [rng.randrange(2, sizes.vocab_size) for _ in range(sizes.history)]
        ends = [round(sizes.history * (part + 1) / sizes.rows) for part in range(sizes.rows)]
        groups.append([(history[:end], [rng.randrange(2, sizes.vocab_size) for _ in range(4)]) for end in ends])
    return groups


def time_training(
    shape: str, device: torch.device, sizes: TimingSizes, attention: str, seed: int = 0
) -> dict[str, float]:
    """Forward and backward over the same rows as trees and as padded rows, in bfloat16 on float32 weights.

    Raises:
        CheckFailed: the two losses differ by more than bfloat16 explains.
    """
    rng = random.Random(seed)
    groups = draw_user_rows(sizes, rng)
    model = build_random_model(shape, sizes.vocab_size, seed, device).train()
    parts = [
        [row for group in groups[start : start + sizes.tree_users] for row in group]
        for start in range(0, len(groups), sizes.tree_users)
    ]
    batch = batch_trees(parts, 0).to(device)
    examples = [Example("", prompt, target, "", "", "", 0) for group in groups for prompt, target in group]
    padded = [tuple(part.to(device) for part in rows) for rows in pad_rows(examples, 0, rng)]
    losses = {}

    def run_tree() -> None:
        model.zero_grad()
        with autocast_in(torch.bfloat16, device):
            # A copy makes its own mask, as the batch of every step does.
            loss = -compute_tree_log_probs(model, batch.to(device)).sum()
        loss.backward()
        losses["tree"] = loss.item()

    def run_rows() -> None:
        model.zero_grad()
        with autocast_in(torch.bfloat16, device):
            losses["padded"] = run_padded(model, padded)

    padded_s, padded_mb = time_runs(run_rows, device, sizes.repeats)
    model.set_attn_implementation(attention)
    tree_s, tree_mb = time_runs(run_tree, device, sizes.repeats)
    labels = len(batch.label_token)
    if not abs(losses["tree"] - losses["padded"]) / labels < 0.1:
        raise CheckFailed(f"the losses of trees and rows differ: {losses['tree']:.1f}, {losses['padded']:.1f}")
    peak = measure_peak_gflops(torch.bfloat16, device) * 1e9
    return {
        "tree_s": round(tree_s, 4),
        "padded_s": round(padded_s, 4),
        "ratio": round(padded_s / tree_s, 2),
        "tree_mb": tree_mb,
        "padded_mb": padded_mb,
        "tokens_per_s": round(batch.input_ids.numel() / tree_s),
        "share_of_peak": round((1 + BACKWARD) * count_tree_flops(model, batch, 0) / tree_s / peak, 4),
        "loss_off": round(abs(losses["tree"] - losses["padded"]) / labels, 5),
    }


def time_grpo(shape: str, device: torch.device, sizes: TimingSizes, seed: int = 0) -> dict[str, Any]:
    """A step of this project against the textbook step, both in float32, which `bench_grpo` also compares."""
    prompts = sizes.generations // 2
    flags = bench_grpo.GRPOBenchFlags(
        shape=shape,
        vocab_size=max(600, sizes.vocab_size),
        num_generations=sizes.generations,
        batch_size=prompts,
        prompts_per_pass=prompts,
        seed=seed,
    )
    problem = bench_grpo.build_problem(flags)
    if problem.model.device.type != device.type:
        raise CheckFailed(f"the step is on {problem.model.device}, not on {device}")
    with tempfile.TemporaryDirectory() as folder:
        trainer = bench_grpo.build_trainer(problem, flags, folder)
        figures = bench_grpo.compare_steps(problem, trainer, 1, sizes.repeats)
    return {name: figures[name] for name in ("tree_s", "textbook_s", "ratio", "phase_ratios", "gradient_difference")}
