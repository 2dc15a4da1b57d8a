"""The tree search against the same search over vLLM: beams, draws, and the push of new weights.

Both run the same model, random if none is named, on the same prompts and catalogue; lists and draws are compared before
anything is reported. The last line is JSON with medians in seconds.

    python -m benchmarks.bench_vllm --batch_size 16                    in an environment with vLLM (docs/vllm.md)
    python -m benchmarks.bench_vllm --model DIR --batch_size 4         a Hugging Face folder instead of random weights
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.settings import RandomModelFlags, RepeatFlags
from minionerec.common.cli import flag, parse_flags, run_command


@dataclass
class VllmBenchFlags(RandomModelFlags, RepeatFlags):
    """Benchmark."""

    model: str | None = flag(None, "a Hugging Face folder, instead of random weights")
    num_beams: int = flag(50, "beams")
    num_samples: int = flag(16, "draws of a prompt")
    batch_size: int = flag(16, "prompts, searched together")
    prompt_length: int = flag(100, "tokens of the random prompts")
    items: int = flag(3686, "items of the random catalogue, three levels of 256 codes")


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(VllmBenchFlags)

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.problems import build_random_model
from minionerec.common.processes import say
from minionerec.engines.vllm import VllmEngine
from minionerec.search.beam_search import beam_search, sample
from minionerec.search.trie import SidTrie

CODES = 256


def time_in_turns(
    repeats: int, run: Callable[[Any], Any], engines: dict[str, Any]
) -> tuple[dict[str, float], list[Any]]:
    """({engine: median seconds}, the last result of each) of runs that take turns; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    results = {}
    for turn in range(repeats + 1):
        for name, engine in engines.items():
            start = time.perf_counter()
            results[name] = run(engine)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}, list(results.values())


def bench(flags: VllmBenchFlags) -> dict[str, float]:
    """Time and compare; returns what the last line holds."""
    rng = random.Random(flags.seed)
    with tempfile.TemporaryDirectory() as folder:
        if flags.model:
            model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32).eval()
        else:
            model = build_random_model(flags.shape, flags.vocab_size + 3 * CODES, flags.seed)
            model.save_pretrained(folder)
        engine = VllmEngine(flags.model or folder, flags.prompt_length + 4, flag="bench_vllm")
    first = model.config.vocab_size - 3 * CODES
    sids = {tuple(first + level * CODES + rng.randrange(CODES) for level in range(3)) for _ in range(flags.items)}
    trie = SidTrie([[*sid, 1] for sid in sorted(sids)])
    prompts = [[rng.randrange(2, first) for _ in range(flags.prompt_length)] for _ in range(flags.batch_size)]
    engines = {"tree": model, "vllm": engine}
    figures: dict[str, float] = {}
    for name, run in (
        ("beams", lambda which: beam_search(which, trie, prompts, flags.num_beams)),
        (
            "draws",
            lambda which: sample(
                which, trie, prompts, flags.num_samples, 1.0, torch.Generator().manual_seed(flags.seed)
            ),
        ),
    ):
        seconds, (tree, theirs) = time_in_turns(flags.repeats, run, engines)
        figures |= {f"{name}_{engine_name}": round(value, 3) for engine_name, value in seconds.items()}
        figures[f"{name}_equal"] = round((tree.sequence == theirs.sequence).double().mean().item(), 4)
        figures[f"{name}_ratio"] = round(seconds["vllm"] / seconds["tree"], 1)
    pushes, _ = time_in_turns(flags.repeats, lambda which: which.load_policy(model), {"push": engine})
    figures["push"] = round(pushes["push"], 3)
    engine.close()
    say(json.dumps(figures))
    return figures


if __name__ == "__main__":
    run_command(bench, FLAGS)
