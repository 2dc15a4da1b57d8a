"""Constrained beam search: this project's tree search against the textbook way, HF `generate` and a prefix dictionary.

Both run in this process on the same model, random if none is named, and the same prompts; the lists are compared before
anything is reported. Beside the seconds stand the tokens each way fed through the model, counted by a hook on it, what
the tree search should need by its formula, where its time goes, and how many of its results stay the same in bf16. The
last line is JSON with `ratio` = textbook seconds / tree seconds (medians).

    python -m benchmarks.bench_decode --prompt_length 100        random prompts and catalogue
    python -m benchmarks.bench_decode --data_root DIR --category Industrial_and_Scientific
        data in the published format; --task title_history2sid has longer prompts, --model CHECKPOINT a trained model
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.settings import PublishedDataFlags, RandomModelFlags, RepeatFlags
from minionerec.common.cli import flag, parse_flags, run_command


@dataclass
class DecodeBenchFlags(PublishedDataFlags, RandomModelFlags, RepeatFlags):
    """Benchmark."""

    num_beams: int = flag(50, "beams, at least 2")
    batch_size: int = flag(8, "prompts, searched together; with --data_root random rows of test/")
    bf16: bool = flag(True, "search once more with the weights in bf16, and compare the lists")
    task: str = flag(
        "next_sid", "what the prompts of --data_root show: SIDs or titles", choices=("next_sid", "title_history2sid")
    )
    model: str | None = flag(None, "a checkpoint trained on the SIDs of --data_root, instead of random weights")
    prompts: str | None = flag(None, "prompt set", default_text="that of the model, else worded")
    prompt_length: int = flag(100, "tokens of the random prompts without --data_root")
    items: int = flag(3686, "items of the random catalogue without --data_root")
    codes: int = flag(256, "its codes of each level")
    levels: int = flag(3, "its levels")
    repeats: int = flag(2, "runs of each way, of which medians are taken")


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(DecodeBenchFlags)

import copy
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.arithmetic import count_forward_flops, measure_peak_gflops
from benchmarks.problems import build_random_model, build_sid_model, read_published_data
from benchmarks.textbook import Ranking, search_textbook
from data import EvalSidDataset, RLSeqTitle2SidDataset
from minionerec.common.files import InputError
from minionerec.common.processes import say
from minionerec.common.records import read_rows
from minionerec.language.models import load_model
from minionerec.language.prompts import Encoder, load_checkpoint_prompts, load_prompts
from minionerec.search import beam_search as tree_search
from minionerec.search.output_head import OutputHead
from minionerec.search.prefill import SHORTEST_HEAD, PrefilledPrompts
from minionerec.search.products import multiply
from minionerec.search.trie import SidTrie

END = 1
# Task: the dataset that makes its prompts from rows.
DATASETS = {"next_sid": EvalSidDataset, "title_history2sid": RLSeqTitle2SidDataset}


@dataclass
class SearchProblem:
    """A model, what it shall search, and for whom.

    Attributes:
        prompts: n token-id lists.
        sequences: the SIDs' tokens with their end, distinct.
        end: the tokens after a SID.
    """

    model: PreTrainedModel
    prompts: list[list[int]]
    sequences: list[list[int]]
    end: list[int]

    @property
    def sid_length(self) -> int:
        """Tokens of the longest SID."""
        return max(map(len, self.sequences)) - len(self.end)


def make_up_search(flags: DecodeBenchFlags) -> SearchProblem:
    """Random prompts of one length, and random SIDs (fewer than --items where two are equal)."""
    rng, text_tokens = random.Random(flags.seed), flags.vocab_size
    model = build_random_model(flags.shape, text_tokens + flags.codes * flags.levels, flags.seed)
    sids = {
        tuple(text_tokens + level * flags.codes + rng.randrange(flags.codes) for level in range(flags.levels))
        for _ in range(flags.items)
    }
    prompts = torch.randint(2, text_tokens, (flags.batch_size, flags.prompt_length)).tolist()
    return SearchProblem(model, prompts, [[*sid, END] for sid in sorted(sids)], [END])


def read_search(flags: DecodeBenchFlags) -> SearchProblem:
    """Prompts of random test rows and the SIDs of the index, for a checkpoint or a random model.

    Raises:
        InputError: data that is missing or malformed, or too few rows.
    """
    files = sorted(Path(flags.data_root).glob(f"test/{flags.category or ''}*.csv"))
    if not files:
        raise InputError(f"--data_root {flags.data_root}: expected test/{flags.category or ''}*.csv")
    rows = read_rows(files[0])
    if len(rows) < flags.batch_size:
        raise InputError(f"--batch_size {flags.batch_size}: {files[0]} has only {len(rows)} rows")
    _, catalogue = read_published_data(flags.data_root, flags.category)
    if flags.model:
        model, tokenizer = load_model(flags.model, "model", for_training=False)
        model.eval()
        encoder = Encoder(tokenizer, load_checkpoint_prompts(flags.model, flags.prompts, None))
    else:
        model, tokenizer = build_sid_model(flags.shape, flags.vocab_size, catalogue, flags.seed)
        encoder = Encoder(tokenizer, load_prompts(flags.prompts or "worded"))
    chosen = random.Random(flags.seed).sample(rows, flags.batch_size)
    prompts = [example.prompt_ids for example in DATASETS[flags.task](chosen, encoder).examples]
    return SearchProblem(model, prompts, SidTrie(encoder.sid_ids(catalogue.sids)).sequences(), encoder.end)


def run_textbook(problem: SearchProblem, num_beams: int) -> list[Ranking]:
    """HF `generate`, every beam a row of its own."""
    return search_textbook(problem.model, problem.sequences, problem.prompts, num_beams, problem.end[-1])


def run_tree(model: PreTrainedModel, trie: SidTrie, problem: SearchProblem, num_beams: int) -> list[Ranking]:
    """`beam_search` on the prompts of a problem."""
    result = tree_search.beam_search(model, trie, problem.prompts, num_beams)
    return [
        [(tuple(problem.sequences[number]), score) for number, score in zip(*pair, strict=True) if number >= 0]
        for pair in zip(result.sequence.tolist(), result.score.tolist(), strict=True)
    ]


def agree(first: list[Ranking], second: list[Ranking], tolerance: float = 1e-3) -> bool:
    """Same lists, where items whose scores are closer than `tolerance` may stand in either order."""
    for ours, theirs in zip(first, second, strict=True):
        if len(ours) != len(theirs):
            return False
        if any(abs(a[1] - b[1]) > tolerance for a, b in zip(ours, theirs, strict=True)):
            return False
        scores = dict(theirs)
        edge = min(scores.values()) + tolerance
        for tokens, score in ours:
            # Only at the end of the list may one way have an item that the other has not.
            if abs(score - scores[tokens]) > tolerance if tokens in scores else score > edge:
                return False
    return True


class SearchMeter:
    """Counts what goes through a model, and splits the time of a tree search by phase.

    Attributes:
        tokens, padding: Counters of the tokens fed through the model, by phase ("" outside all phases).
        seconds: Counter of the time in each phase.
        attended_pairs: (query, key) pairs behind the prompts of a tree search.
    """

    def __init__(self):
        self.attended_pairs = 0
        self.tokens, self.padding, self.seconds = Counter(), Counter(), Counter()
        self._phase = ""

    @contextmanager
    def counting(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside, the tokens of every forward pass are counted."""

        def count(_module, _arguments, arguments: dict) -> None:
            ids, mask = arguments["input_ids"], arguments.get("attention_mask")
            new = ids.shape[1]
            if mask is None:
                tokens = ids.numel()
            elif mask.dim() == 2:
                tokens = int(mask[:, -new:].sum())
            else:
                tokens = ids.numel()
            self.tokens[self._phase] += tokens
            self.padding[self._phase] += ids.numel() - tokens

        handle = model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def timing(self, sid_length: int) -> Iterator[None]:
        """Inside, the parts of `beam_search` that run the model are phases; what they leave is trie and selection."""

        def step_or_tail(prompts: PrefilledPrompts, tokens: torch.Tensor, _parent: torch.Tensor, level: int) -> str:
            _, width, length = tokens.shape
            own = sum(range(level + 1, level + length + 1))
            self.attended_pairs += int(prompts.lengths.sum()) * width * length + len(tokens) * width * own
            # A SID's last token, and what follows it, are fed for the sake of the forced end alone.
            return "forced_tail" if length > 1 or level + length >= sid_length else "steps"

        prefill, extend, score = PrefilledPrompts.__init__, PrefilledPrompts.extend, OutputHead.score
        with (
            patch.object(PrefilledPrompts, "__init__", self._timed(prefill, lambda *_, **__: "prefill")),
            patch.object(PrefilledPrompts, "extend", self._timed(extend, step_or_tail)),
            patch.object(OutputHead, "score", self._timed(score, lambda *_, **__: "logits")),
        ):
            start, before = time.perf_counter(), self.seconds.total()
            yield
            inside = self.seconds.total() - before
            self.seconds["trie_and_selection"] += time.perf_counter() - start - inside

    def _timed(self, function: Callable, phase_of: Callable[..., str]) -> Callable:
        def timed(*arguments, **named):
            if self._phase:  # a part of a phase already
                return function(*arguments, **named)
            self._phase = phase_of(*arguments, **named)
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[self._phase] += time.perf_counter() - start
                self._phase = ""

        return timed


def count_formula_tokens(problem: SearchProblem, num_beams: int) -> int:
    """Tokens the tree search should need: per prompt, prompt + num_beams * (SID length - 1) + scored tail.

    The tail scores what must follow a SID: it feeds its last token, and all end tokens but the last.
    """
    beam = problem.sid_length - 1 + len(problem.end)
    return sum(len(prompt) + num_beams * beam for prompt in problem.prompts)


def count_common_tokens(prompts: list[list[int]]) -> int:
    """Prompt tokens that need not be computed because all prompts begin with them and they are prefilled once."""
    head = len(os.path.commonprefix([prompt[:-1] for prompt in prompts]))
    return (len(prompts) - 1) * head if head >= SHORTEST_HEAD else 0


def bound_by_arithmetic(problem: SearchProblem, meter: SearchMeter, seconds: float) -> dict[str, float]:
    """Which share of the time of a tree search its matrix products would take at the peak of this process."""
    lengths = [len(prompt) for prompt in problem.prompts]
    saved, copies = count_common_tokens(problem.prompts), len(lengths) - 1
    head = saved // copies if copies else 0
    pairs = sum(length * (length + 1) // 2 for length in lengths) - copies * head * (head + 1) // 2
    logit_rows = len(lengths) + meter.tokens["steps"] + meter.tokens["forced_tail"]
    flops = count_forward_flops(problem.model.config, meter.tokens.total(), pairs + meter.attended_pairs, logit_rows)
    peak = measure_peak_gflops(problem.model.dtype, problem.model.device, product=multiply)
    bound = flops / peak / 1e9
    say(f"arithmetic: {flops / 1e9:.0f} GFLOP, at most {peak:.0f} GFLOP/s here: {bound:.2f} s, {bound / seconds:.0%}")
    return {
        "gflop": round(flops / 1e9, 1),
        "peak_gflops": round(peak, 1),
        "arithmetic_s": round(bound, 4),
        "arithmetic_share": round(bound / seconds, 3),
    }


def measure_overlap(first: list[Ranking], second: list[Ranking], k: int) -> float:
    """Mean share of the top k of `first` that are in the top k of `second`, in any order."""
    shares = []
    for ours, theirs in zip(first, second, strict=True):
        best = {tokens for tokens, _ in ours[:k]}
        shares.append(len(best & {tokens for tokens, _ in theirs[:k]}) / len(best))
    return statistics.mean(shares)


def time_searches(
    problem: SearchProblem, trie: SidTrie, num_beams: int, repeats: int
) -> tuple[list[Ranking], dict[str, float], dict[str, SearchMeter]]:
    """Run both ways in turn.

    Returns:
        (the tree search's rankings, {way: median seconds, way_cpu: those of the processor}, {way: meter of the last
        run}).

    Raises:
        InputError: the two ways disagree.
    """
    warm_up = SearchProblem(problem.model, [problem.prompts[0][:8]], problem.sequences, problem.end)
    run_tree(problem.model, trie, warm_up, num_beams)
    run_textbook(warm_up, num_beams)
    seconds: dict[str, list[float]] = {"tree": [], "textbook": [], "tree_cpu": [], "textbook_cpu": []}
    for _ in tqdm(range(repeats)):
        meters = {"tree": SearchMeter(), "textbook": SearchMeter()}
        start, start_cpu = time.perf_counter(), time.process_time()
        with meters["tree"].counting(problem.model), meters["tree"].timing(problem.sid_length):
            ours = run_tree(problem.model, trie, problem, num_beams)
        middle, middle_cpu = time.perf_counter(), time.process_time()
        with meters["textbook"].counting(problem.model):
            theirs = run_textbook(problem, num_beams)
        seconds["tree"].append(middle - start)
        seconds["textbook"].append(time.perf_counter() - middle)
        seconds["tree_cpu"].append(middle_cpu - start_cpu)
        seconds["textbook_cpu"].append(time.process_time() - middle_cpu)
        if not agree(ours, theirs):
            raise InputError("the two searches disagree: no figure is reported")
    return ours, {name: statistics.median(values) for name, values in seconds.items()}, meters


def count_tokens(problem: SearchProblem, num_beams: int, tokens: int) -> dict[str, Any]:
    """Compare the tokens fed with the formula. Catalogues with fewer prefixes than beams need fewer.

    Raises:
        InputError: more tokens than the formula allows.
    """
    unshared, common = count_formula_tokens(problem, num_beams), count_common_tokens(problem.prompts)
    off = tokens / (unshared - common) - 1
    if off > 0.05:
        raise InputError(f"{tokens} tokens were fed, the formula says {unshared - common}: no figure is reported")
    say(f"formula: {unshared:,} tokens, {unshared - common:,} with the common head computed once: {off:+.1%}")
    return {
        "formula_tokens": unshared - common,
        "formula_tokens_without_common": unshared,
        "tokens_off": round(off, 4),
    }


def bench(flags: DecodeBenchFlags) -> None:
    """Run both searches in turn and compare.

    Raises:
        InputError: flags that do not fit together, data that is missing, or searches that disagree.
    """
    if flags.model and not flags.data_root:
        raise InputError("--model: needs --data_root, the prompts and items it was trained for")
    if flags.num_beams < 2 or flags.batch_size < 1 or flags.repeats < 1:
        raise InputError("--num_beams must be at least 2, --batch_size and --repeats at least 1")
    problem = read_search(flags) if flags.data_root else make_up_search(flags)
    trie = SidTrie(problem.sequences)
    rankings, medians, meters = time_searches(problem, trie, flags.num_beams, flags.repeats)
    bf16_overlap = None
    if flags.bf16:
        rounded = run_tree(copy.deepcopy(problem.model).to(torch.bfloat16), trie, problem, flags.num_beams)
        sizes = sorted({min(10, flags.num_beams), flags.num_beams})
        bf16_overlap = {f"top_{k}": round(measure_overlap(rankings, rounded, k), 4) for k in sizes}
    say(f"{'way':<10}{'median s':>10}{'cpu s':>10}{'tokens':>10}{'padding':>10}")
    for name, meter in meters.items():
        times = f"{medians[name]:>10.3f}{medians[name + '_cpu']:>10.3f}"
        say(f"{name:<10}{times}{meter.tokens.total():>10,}{meter.padding.total():>10,}")
    tokens, lengths = meters["tree"].tokens.total(), [len(prompt) for prompt in problem.prompts]
    # One thread's processor seconds leave out the time it waited for other work on the machine.
    alone = problem.model.device.type == "cpu" and torch.get_num_threads() == 1
    seconds = medians["tree_cpu" if alone else "tree"]
    report = {
        "benchmark": "decode",
        "data": flags.category or flags.data_root or "made up",
        "task": flags.task if flags.data_root else None,
        "model": flags.model,
        "shape": None if flags.model else flags.shape,
        "parameters": problem.model.num_parameters(),
        "num_beams": flags.num_beams,
        "batch_size": flags.batch_size,
        "prompt_lengths": [min(lengths), round(statistics.mean(lengths), 1), max(lengths)],
        "items": len(problem.sequences),
        "threads": torch.get_num_threads(),
        "agree": True,
        "tree_s": round(medians["tree"], 4),
        "textbook_s": round(medians["textbook"], 4),
        "ratio": round(medians["textbook"] / medians["tree"], 1),
        "tree_cpu_s": round(medians["tree_cpu"], 4),
        "textbook_cpu_s": round(medians["textbook_cpu"], 4),
        "cpu_ratio": round(medians["textbook_cpu"] / medians["tree_cpu"], 1),
        "tokens": tokens,
        "tokens_by_phase": dict(meters["tree"].tokens),
        "padding": meters["tree"].padding.total(),
        **count_tokens(problem, flags.num_beams, tokens),
        **bound_by_arithmetic(problem, meters["tree"], seconds),
        "textbook_tokens": meters["textbook"].tokens.total(),
        "textbook_padding": meters["textbook"].padding.total(),
        "token_ratio": round(meters["textbook"].tokens.total() / tokens, 1),
        "phases_s": {name: round(value, 4) for name, value in meters["tree"].seconds.items()},
        "bf16_overlap": bf16_overlap,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(bench, FLAGS)
