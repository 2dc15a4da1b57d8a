"""The same constrained beam search in float32 and in bfloat16: what it gains in time, and what it does to the lists.

Both precisions run in turn in this process on the same prompts. Random models of several sizes are searched over a
made-up catalogue; `--model CHECKPOINT` with `--data_root` measures a trained model on the rows of its test split, and
HR@10 in both precisions at SID level. The last line is JSON with `ratio` = float32 seconds / bfloat16 seconds (medians)
of the last model, and for each model the share of the top 10 and top 50 that stays.

    python -m benchmarks.bench_dtype --batch_sizes 1,8
    python -m benchmarks.bench_dtype --model CHECKPOINT --data_root DIR --category NAME --rows 500
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.settings import PublishedDataFlags, RepeatFlags
from minionerec.common.cli import Flags, flag, parse_flags, run_command

# name: (hidden size, MLP, layers, heads, key heads, head dimension, vocabulary); Qwen3, with tied embeddings
SIZES = {
    "1M": (128, 384, 4, 4, 2, 32, 3000),
    "2M": (192, 512, 4, 4, 2, 48, 4000),
    "5M": (256, 768, 4, 4, 4, 64, 8000),
    "15M": (256, 1024, 4, 4, 2, 64, 49152),
    "30M": (384, 1024, 8, 6, 3, 64, 49152),
    "135M": (576, 1536, 30, 9, 3, 64, 49152),
}


@dataclass
class DtypeBenchFlags(PublishedDataFlags, RepeatFlags, Flags):
    """Benchmark."""

    sizes: list[str] = flag(
        ["1M", "2M", "5M", "15M", "30M", "135M"], "random Qwen3 models to search with", choices=tuple(SIZES)
    )
    batch_sizes: list[int] = flag([1, 8], "prompts that are searched together, each number measured by itself")
    num_beams: int = flag(50, "beams")
    prompt_length: int = flag(60, "tokens of the random prompts")
    items: int = flag(3686, "items of the made-up catalogue, of three levels of 256 codes")
    model: str | None = flag(None, "a checkpoint trained on the SIDs of --data_root, instead of random models")
    rows: int = flag(200, "random test rows of --data_root")
    repeats: int = flag(5, "searches in each precision, of which medians are taken; one before them warms up")


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(DtypeBenchFlags)

import copy
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from benchmarks.problems import read_published_data
from data import EvalSidDataset
from minionerec.common.files import InputError
from minionerec.common.processes import process_state, say
from minionerec.common.records import read_rows
from minionerec.evaluation.metrics import find_rank, hit_ratio
from minionerec.language.catalogue_trie import build_catalogue_trie
from minionerec.language.models import has_fast_bf16, load_model
from minionerec.language.prompts import Encoder, load_checkpoint_prompts
from minionerec.search.beam_search import SearchResult, beam_search
from minionerec.search.trie import SidTrie

PRECISIONS = ("float32", "bfloat16")
END = 1


def build_sized_model(size: str, seed: int) -> PreTrainedModel:
    """A random model of one of SIZES; its weights have a wide spread, so that rankings are not decided by rounding."""
    hidden, inner, layers, heads, key_heads, width, vocabulary = SIZES[size]
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=width,
        tie_word_embeddings=True,
        initializer_range=0.06,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


def make_up_trie(vocabulary: int, items: int, seed: int) -> SidTrie:
    """Random SIDs of three of the vocabulary's last 768 tokens (fewer than `items` where two are equal)."""
    rng = random.Random(seed)
    start = vocabulary - 3 * 256
    sids = {tuple(start + 256 * level + rng.randrange(256) for level in range(3)) for _ in range(items)}
    return SidTrie([[*sid, END] for sid in sorted(sids)])


def search_in_turn(
    model: PreTrainedModel, trie: SidTrie, batches: Sequence[list[list[int]]], num_beams: int, repeats: int
) -> tuple[dict[str, list[SearchResult]], dict[str, float]]:
    """({precision: results, batch by batch}, {precision: median seconds of all batches})."""
    models = {"float32": model, "bfloat16": copy.deepcopy(model).to(torch.bfloat16)}
    results: dict[str, list[SearchResult]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    for name in PRECISIONS:
        beam_search(models[name], trie, batches[0], num_beams)
    for _ in range(repeats):
        for name in PRECISIONS:
            started = time.perf_counter()
            results[name] = [beam_search(models[name], trie, batch, num_beams) for batch in batches]
            seconds[name].append(time.perf_counter() - started)
    return results, {name: statistics.median(values) for name, values in seconds.items()}


def list_rankings(results: Sequence[SearchResult]) -> list[list[int]]:
    """The sequence numbers of every prompt, best first."""
    return [[number for number in row if number >= 0] for result in results for row in result.sequence.tolist()]


def share_kept(first: Sequence[list[int]], second: Sequence[list[int]], k: int) -> float:
    """Mean share of the top k of `first` that are in the top k of `second`, in any order."""
    shares = [len(set(a[:k]) & set(b[:k])) / len(a[:k]) for a, b in zip(first, second, strict=True)]
    return round(statistics.mean(shares), 4)


def share_equal(first: Sequence[list[int]], second: Sequence[list[int]], k: int) -> float:
    """Share of the prompts whose top k are the same in the same order."""
    return round(statistics.mean(a[:k] == b[:k] for a, b in zip(first, second, strict=True)), 4)


def compare_precisions(
    model: PreTrainedModel, trie: SidTrie, batches: Sequence[list[list[int]]], flags: DtypeBenchFlags
) -> tuple[dict[str, Any], dict[str, list[list[int]]]]:
    """(the figures of one model and batch size, {precision: rankings})."""
    results, seconds = search_in_turn(model, trie, batches, flags.num_beams, flags.repeats)
    rankings = {name: list_rankings(found) for name, found in results.items()}
    lists = rankings["float32"], rankings["bfloat16"]
    sizes = sorted({min(10, flags.num_beams), flags.num_beams})
    return {
        "parameters": model.num_parameters(),
        "batch_size": len(batches[0]),
        **{f"{name}_s": round(value, 4) for name, value in seconds.items()},
        "ratio": round(seconds["float32"] / seconds["bfloat16"], 2),
        **{f"kept_top_{k}": share_kept(*lists, k) for k in sizes},
        **{f"equal_top_{k}": share_equal(*lists, k) for k in sizes},
    }, rankings


def bench_random(flags: DtypeBenchFlags) -> list[dict[str, Any]]:
    """Every size and batch size in turn."""
    figures = []
    for size in flags.sizes:
        model = build_sized_model(size, flags.seed)
        vocabulary = SIZES[size][-1]
        trie = make_up_trie(vocabulary, flags.items, flags.seed)
        for count in flags.batch_sizes:
            prompts = torch.randint(2, vocabulary - 3 * 256, (count, flags.prompt_length)).tolist()
            report, _ = compare_precisions(model, trie, [prompts], flags)
            say(f"{size:>5} {count:>3} prompts: {report['float32_s']:.3f} s, bfloat16 {report['bfloat16_s']:.3f} s")
            figures.append({"model": size, **report})
    return figures


def bench_trained(flags: DtypeBenchFlags) -> list[dict[str, Any]]:
    """A checkpoint on test rows of its data, with HR@10 at SID level.

    Raises:
        InputError: data that is missing, or too few rows.
    """
    files = sorted(Path(flags.data_root).glob(f"test/{flags.category or ''}*.csv"))
    if not files:
        raise InputError(f"--data_root {flags.data_root}: expected test/{flags.category or ''}*.csv")
    rows = read_rows(files[0])
    rows = random.Random(flags.seed).sample(rows, min(flags.rows, len(rows)))
    _, catalogue = read_published_data(flags.data_root, flags.category)
    model, tokenizer = load_model(flags.model, "model", for_training=False)
    encoder = Encoder(tokenizer, load_checkpoint_prompts(flags.model, None, None))
    catalogue_trie = build_catalogue_trie(catalogue, encoder, "cpu")
    examples = sorted(EvalSidDataset(rows, encoder).examples, key=lambda example: len(example.prompt_ids))
    figures = []
    for count in flags.batch_sizes:
        prompts = [example.prompt_ids for example in examples]
        batches = [prompts[start : start + count] for start in range(0, len(prompts), count)]
        report, rankings = compare_precisions(model.eval(), catalogue_trie.trie, batches, flags)
        for name, found in rankings.items():
            lists = [[catalogue_trie.sids[number] for number in ranking] for ranking in found]
            ranks = [find_rank(example.sid, ranked) for example, ranked in zip(examples, lists, strict=True)]
            report[f"{name}_HR@10"] = round(hit_ratio(ranks, 10), 4)
        figures.append({"model": flags.model, "rows": len(examples), **report})
    return figures


def bench(flags: DtypeBenchFlags) -> None:
    """Search in both precisions and compare.

    Raises:
        InputError: flags that do not fit together, or data that is missing.
    """
    if (flags.model is None) != (flags.data_root is None):
        raise InputError("--model and --data_root go together: prompts and items are those it was trained for")
    if min(flags.num_beams, flags.repeats, flags.rows, *flags.batch_sizes) < 1:
        raise InputError("--num_beams, --repeats, --rows, --batch_sizes: must be at least 1")
    figures = bench_trained(flags) if flags.model else bench_random(flags)
    report = {
        "benchmark": "dtype",
        "ratio": figures[-1]["ratio"],
        "num_beams": flags.num_beams,
        "threads": torch.get_num_threads(),
        "bf16_instructions": has_fast_bf16(process_state().device),
        "models": figures,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(bench, FLAGS)
