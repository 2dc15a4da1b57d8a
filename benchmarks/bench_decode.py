"""Constrained beam search: this project's tree search against the textbook way, HF `generate` with a prefix dictionary.

Both run in this process on the same model, random if none is named, and the same prompts; the lists are compared before
anything is reported. Beside the seconds stand the tokens each way fed through the model, counted by a hook on it, what the
tree search should need by its formula, where its time goes, and how many of its results stay the same in bf16. The last
line is JSON with `ratio` = textbook seconds / tree seconds (medians).

    python -m benchmarks.bench_decode --data_root DIR --category Industrial_and_Scientific   data in the published format
    python -m benchmarks.bench_decode --data_root DIR --category Industrial_and_Scientific --task title_history2sid
                                                                                             longer prompts: titles
    python -m benchmarks.bench_decode --data_root DIR --category Industrial_and_Scientific --model CHECKPOINT
                                                                                             a trained model of those items
    python -m benchmarks.bench_decode --prompt_length 100                                    random prompts and catalogue
"""

from __future__ import annotations

import copy
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    Qwen3Config,
)

from benchmarks.bench_sft import published
from data import EvalSidDataset, RLSeqTitle2SidDataset
from LogitProcessor import pad_left
from minionerec.common.cli import run
from minionerec.common.files import InputError
from minionerec.common.processes import say
from minionerec.common.records import SID_TOKEN, read_rows
from minionerec.common.texts import list_texts
from minionerec.language.models import load_model, train_tokenizer
from minionerec.language.prompts import Encoder, load_checkpoint_prompts, load_prompts
from minionerec.language.sid_tokens import add_sid_tokens
from minionerec.search import beam_search as search
from minionerec.search.prefill import SHORTEST_HEAD
from minionerec.search.trie import SidTrie

END = 1
# Task: the dataset that makes its prompts from rows.
TASKS = {"next_sid": EvalSidDataset, "title_history2sid": RLSeqTitle2SidDataset}
SHAPES = {
    # The shape of a 135M-parameter Llama.
    "llama-135m": lambda vocab: LlamaConfig(
        vocab_size=vocab,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "qwen3-small": lambda vocab: Qwen3Config(
        vocab_size=vocab,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    ),
}


Found = list[list[tuple[tuple[int, ...], float]]]  # [(tokens, score)] per prompt, best first


@dataclass
class Task:
    """A model, what it shall search, and for whom.

    Attributes:
        prompts: n token-id lists. sequences: the SIDs' tokens with their end, distinct. end: the tokens after a SID.
    """

    model: PreTrainedModel
    prompts: list[list[int]]
    sequences: list[list[int]]
    end: list[int]

    @property
    def sid_length(self) -> int:
        """Tokens of the longest SID."""
        return max(map(len, self.sequences)) - len(self.end)


def random_model(shape: str, vocab_size: int, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = SHAPES[shape](vocab_size)
    # A wider spread than usual, so that the random model has preferences and rankings are not decided by rounding.
    config.initializer_range = 0.06
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


def made_up(
    shape: str, vocab_size: int, prompts: int, length: int, items: int, codes: int, levels: int, seed: int
) -> Task:
    """Random prompts of one length, and `items` random SIDs (fewer where two are equal)."""
    rng = random.Random(seed)
    model = random_model(shape, vocab_size + codes * levels, seed)
    catalogue = {
        tuple(vocab_size + level * codes + rng.randrange(codes) for level in range(levels)) for _ in range(items)
    }
    batch = torch.randint(2, vocab_size, (prompts, length)).tolist()
    return Task(model, batch, [[*sid, END] for sid in sorted(catalogue)], [END])


def from_published(
    shape: str,
    vocab_size: int,
    prompts: int,
    data_root: str,
    category: str | None,
    prompt_set: str | None,
    task: str,
    checkpoint: str | None,
    seed: int,
) -> Task:
    """Prompts of random test rows and the SIDs of the index, for a checkpoint, or a random model and a tokenizer of the titles."""
    files = sorted(Path(data_root).glob(f"test/{category or ''}*.csv"))
    if not files:
        raise InputError(f"--data_root {data_root}: expected test/{category or ''}*.csv")
    rows = read_rows(files[0])
    if len(rows) < prompts:
        raise InputError(f"--batch_size {prompts}: {files[0]} has only {len(rows)} rows")
    _, catalogue = published(data_root, category)
    if checkpoint:
        model, tokenizer = load_model(checkpoint, "model")
        model.eval()
        encoder = Encoder(tokenizer, load_checkpoint_prompts(checkpoint, prompt_set, None))
    else:
        tokenizer = train_tokenizer(list_texts(catalogue.titles, []), vocab_size)
        sid_tokens = {token for sid in catalogue.sids for token in SID_TOKEN.findall(sid)}
        model = random_model(shape, vocab_size + len(sid_tokens), seed)
        add_sid_tokens(model, tokenizer, sid_tokens, seed, 1.0)
        encoder = Encoder(tokenizer, load_prompts(prompt_set or "worded"))
    examples = TASKS[task](random.Random(seed).sample(rows, prompts), encoder, 512).examples
    sequences = SidTrie(encoder.sid_ids(catalogue.sids)).sequences()
    return Task(model, [example.prompt_ids for example in examples], sequences, encoder.end)


class PrefixDictionary(LogitsProcessor):
    """The textbook processor: looks every beam's generated tokens up in a Python dictionary."""

    def __init__(self, sequences: list[list[int]], prompt_length: int):
        self.prompt_length = prompt_length
        self.allowed: dict[tuple[int, ...], set[int]] = {}
        for sequence in sequences:
            for place, token in enumerate(sequence):
                self.allowed.setdefault(tuple(sequence[:place]), set()).add(token)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        masked = torch.full_like(scores, float("-inf"))
        for row, ids in enumerate(input_ids.tolist()):
            allowed = list(self.allowed.get(tuple(ids[self.prompt_length :]), ()))
            masked[row, allowed] = scores[row, allowed]
        return masked


def textbook(task: Task, num_beams: int) -> Found:
    """HF `generate`, every beam a row of its own."""
    ids, mask = pad_left(task.prompts, task.end[-1])
    out = task.model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
        max_new_tokens=max(map(len, task.sequences)),
        length_penalty=0.0,
        eos_token_id=task.end[-1],
        pad_token_id=task.end[-1],
        logits_processor=LogitsProcessorList([PrefixDictionary(task.sequences, ids.shape[1])]),
        return_dict_in_generate=True,
        output_scores=True,
    )
    tokens = out.sequences[:, ids.shape[1] :].view(len(ids), num_beams, -1).tolist()
    scores = out.sequences_scores.view(len(ids), num_beams).tolist()
    return [
        [(tuple(row[: row.index(task.end[-1]) + 1]), score) for row, score in zip(*pair) if score > -1e6]
        for pair in zip(tokens, scores)
    ]


def tree(model: PreTrainedModel, trie: SidTrie, task: Task, num_beams: int) -> Found:
    """`beam_search` on the prompts of `task`."""
    found = search.beam_search(model, trie, task.prompts, num_beams)
    return [
        [(tuple(task.sequences[number]), score) for number, score in zip(*pair) if number >= 0]
        for pair in zip(found.sequence.tolist(), found.score.tolist())
    ]


def agree(first: Found, second: Found, tolerance: float = 1e-3) -> bool:
    """Same lists, where items whose scores are closer than `tolerance` may stand in either order."""
    for ours, theirs in zip(first, second, strict=True):
        if len(ours) != len(theirs) or any(abs(a[1] - b[1]) > tolerance for a, b in zip(ours, theirs)):
            return False
        scores = dict(theirs)
        edge = min(scores.values()) + tolerance
        for tokens, score in ours:
            # Only at the end of the list may one way have an item that the other has not.
            if abs(score - scores[tokens]) > tolerance if tokens in scores else score > edge:
                return False
    return True


class Meter:
    """Counts what goes through a model, and splits the time of a tree search by phase.

    Attributes:
        tokens, padding: Counters of the tokens fed through the model, by phase ("" outside all phases).
        seconds: Counter of the time in each phase.
    """

    def __init__(self):
        self.tokens, self.padding, self.seconds = Counter(), Counter(), Counter()
        self._phase = ""

    @contextmanager
    def counting(self, model: PreTrainedModel) -> Iterator[None]:
        def count(_module, _arguments, arguments: dict) -> None:
            ids, mask = arguments["input_ids"], arguments.get("attention_mask")
            new = ids.shape[1]
            if mask is None:
                real = ids.numel()
            elif mask.dim() == 2:
                real = int(mask[:, -new:].sum())
            elif self._phase == "prefill":
                real = int(mask[:, 0, -1, -new:].sum())  # a prompt's last token sees all its real ones
            else:
                real = ids.numel()
            self.tokens[self._phase] += real
            self.padding[self._phase] += ids.numel() - real

        handle = model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def timing(self, sid_length: int) -> Iterator[None]:
        """Inside, the parts of `beam_search` that run the model are phases; what they leave is trie and selection."""

        def step_or_tail(_rows, _tokens, depth: torch.Tensor, _visible) -> str:
            # A SID's last token, and what follows it, are fed for the sake of the forced end alone.
            return "forced_tail" if int(depth.max()) >= sid_length - 1 else "steps"

        rows = search.PromptRows
        with (
            patch.object(rows, "__init__", self._timed(rows.__init__, lambda *_, **__: "prefill")),
            patch.object(rows, "extend", self._timed(rows.extend, step_or_tail)),
            patch.object(search, "_score_forced", self._timed(search._score_forced, lambda *_: "forced_tail")),
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


def formula(task: Task, num_beams: int) -> int:
    """Tokens the tree search should need: per prompt, prompt + num_beams * (SID length - 1) + scored tail.

    The tail scores what must follow a SID: it feeds its last token, and all end tokens but the last.
    """
    return sum(len(prompt) + num_beams * (task.sid_length - 1 + len(task.end)) for prompt in task.prompts)


def common_tokens(prompts: list[list[int]]) -> int:
    """Prompt tokens that need not be computed because all prompts begin with them and they are prefilled once."""
    head = len(os.path.commonprefix([prompt[:-1] for prompt in prompts]))
    return (len(prompts) - 1) * head if head >= SHORTEST_HEAD else 0


def overlap(first: Found, second: Found, k: int) -> float:
    """Mean share of the top k of `first` that are in the top k of `second`, in any order."""
    shares = []
    for ours, theirs in zip(first, second, strict=True):
        best = {tokens for tokens, _ in ours[:k]}
        shares.append(len(best & {tokens for tokens, _ in theirs[:k]}) / len(best))
    return statistics.mean(shares)


def bench(
    data_root: str | None = None,
    category: str | None = None,
    prompts: str | None = None,
    task: str = "next_sid",
    model: str | None = None,
    shape: str = "llama-135m",
    num_beams: int = 50,
    batch_size: int = 8,
    prompt_length: int = 100,
    items: int = 3686,
    codes: int = 256,
    levels: int = 3,
    vocab_size: int = 49152,
    bf16: bool = True,
    repeats: int = 2,
    seed: int = 0,
) -> None:
    """Run both searches `repeats` times in turn and compare.

    Args:
        data_root: a folder in the published format: prompts are made from rows of test/, the catalogue is that of index/.
            category: what its files' names begin with. prompts: the prompt set; default worded, or the checkpoint's.
            task: next_sid, or title_history2sid, whose prompts are longer. model: a checkpoint trained on these SIDs.
        shape: without --model: llama-135m or qwen3-small, with random weights. batch_size: prompts, searched together.
        prompt_length, items, codes, levels: the random prompts and catalogue without --data_root.
        vocab_size: text vocabulary the SID tokens are added to.
        bf16: search once more with the weights in bf16, and compare the lists.
    """
    if shape not in SHAPES:
        raise InputError(f"--shape {shape}: expected one of {', '.join(SHAPES)}")
    if task not in TASKS:
        raise InputError(f"--task {task}: expected one of {', '.join(TASKS)}")
    if model and not data_root:
        raise InputError("--model: needs --data_root, the prompts and items it was trained for")
    if num_beams < 2 or batch_size < 1 or repeats < 1:
        raise InputError("--num_beams must be at least 2, --batch_size and --repeats at least 1")
    if data_root:
        work = from_published(shape, vocab_size, batch_size, data_root, category, prompts, task, model, seed)
    else:
        work = made_up(shape, vocab_size, batch_size, prompt_length, items, codes, levels, seed)
    trie = SidTrie(work.sequences)

    # Phase 1: both ways in turn.
    warm_up = Task(work.model, [work.prompts[0][:8]], work.sequences, work.end)
    tree(work.model, trie, warm_up, num_beams)
    textbook(warm_up, num_beams)
    seconds: dict[str, list[float]] = {"tree": [], "textbook": []}
    for _ in tqdm(range(repeats)):
        meters = {"tree": Meter(), "textbook": Meter()}
        start = time.perf_counter()
        with meters["tree"].counting(work.model), meters["tree"].timing(work.sid_length):
            ours = tree(work.model, trie, work, num_beams)
        middle = time.perf_counter()
        with meters["textbook"].counting(work.model):
            theirs = textbook(work, num_beams)
        seconds["tree"].append(middle - start)
        seconds["textbook"].append(time.perf_counter() - middle)
        if not agree(ours, theirs):
            raise InputError("the two searches disagree: no figure is reported")

    # Phase 2: tokens against the formula. Catalogues with fewer prefixes than beams need fewer.
    tokens, unshared, common = meters["tree"].tokens.total(), formula(work, num_beams), common_tokens(work.prompts)
    off = tokens / (unshared - common) - 1
    if off > 0.05:
        raise InputError(f"{tokens} tokens were fed, the formula says {unshared - common}: no figure is reported")

    # Phase 3: the same lists in half the precision?
    same_in_bf16 = None
    if bf16:
        rounded = tree(copy.deepcopy(work.model).to(torch.bfloat16), trie, work, num_beams)
        same_in_bf16 = {
            f"top_{k}": round(overlap(ours, rounded, k), 4) for k in sorted({min(10, num_beams), num_beams})
        }

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    say(f"{'way':<10}{'median s':>10}{'tokens':>10}{'padding':>10}")
    for name, meter in meters.items():
        say(f"{name:<10}{medians[name]:>10.3f}{meter.tokens.total():>10,}{meter.padding.total():>10,}")
    say(
        f"formula: {unshared:,} tokens, {unshared - common:,} with what all prompts begin with computed once: {off:+.1%}"
    )
    lengths = [len(prompt) for prompt in work.prompts]
    print(
        json.dumps(
            {
                "benchmark": "decode",
                "data": category or data_root or "made up",
                "task": task if data_root else None,
                "model": model,
                "shape": None if model else shape,
                "parameters": work.model.num_parameters(),
                "num_beams": num_beams,
                "batch_size": batch_size,
                "prompt_lengths": [min(lengths), round(statistics.mean(lengths), 1), max(lengths)],
                "items": len(work.sequences),
                "threads": torch.get_num_threads(),
                "agree": True,
                "tree_s": round(medians["tree"], 4),
                "textbook_s": round(medians["textbook"], 4),
                "ratio": round(medians["textbook"] / medians["tree"], 1),
                "tokens": tokens,
                "tokens_by_phase": dict(meters["tree"].tokens),
                "padding": meters["tree"].padding.total(),
                "formula_tokens": unshared - common,
                "formula_tokens_without_common": unshared,
                "tokens_off": round(off, 4),
                "textbook_tokens": meters["textbook"].tokens.total(),
                "textbook_padding": meters["textbook"].padding.total(),
                "token_ratio": round(meters["textbook"].tokens.total() / tokens, 1),
                "phases_s": {name: round(value, 4) for name, value in meters["tree"].seconds.items()},
                "bf16_overlap": same_in_bf16,
            }
        )
    )


if __name__ == "__main__":
    run(bench)
