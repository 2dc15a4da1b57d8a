"""Constrained beam search: this project's tree search against the textbook way, HF `generate` with a prefix dictionary.

Both run in this process on the same random model and prompts; the lists are compared before anything is reported. The last
line is JSON with `ratio` = textbook seconds / tree seconds (medians).

    python -m benchmarks.bench_decode --shape llama-135m --num_beams 50 --prompt_length 100
"""

from __future__ import annotations

import json
import random
import statistics
import time

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LogitsProcessor, LogitsProcessorList, Qwen3Config

import cli
from beam_search import beam_search
from fileio import InputError
from LogitProcessor import SidTrie

END = 1
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


def textbook(model, sequences, prompts: torch.Tensor, num_beams: int) -> list[list[tuple[tuple[int, ...], float]]]:
    """[(tokens, score)] per prompt by HF `generate`."""
    out = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
        max_new_tokens=max(map(len, sequences)),
        length_penalty=0.0,
        eos_token_id=END,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([PrefixDictionary(sequences, prompts.shape[1])]),
        return_dict_in_generate=True,
        output_scores=True,
    )
    tokens = out.sequences[:, prompts.shape[1] :].view(len(prompts), num_beams, -1).tolist()
    scores = out.sequences_scores.view(len(prompts), num_beams).tolist()
    return [
        [(tuple(row[: row.index(END) + 1]), score) for row, score in zip(*pair) if score > -1e6]
        for pair in zip(tokens, scores)
    ]


def tree(model, trie: SidTrie, prompts: torch.Tensor, num_beams: int) -> list[list[tuple[tuple[int, ...], float]]]:
    """[(tokens, score)] per prompt by the tree search."""
    found = beam_search(model, trie, prompts.tolist(), num_beams)
    sequences = trie.sequences()
    return [
        [
            (tuple(sequences[number]), score)
            for number, score in zip(*pair)
            if number >= 0
        ]
        for pair in zip(found.sequence.tolist(), found.score.tolist())
    ]


def agree(first, second, tolerance: float = 1e-3) -> bool:
    """Same lists, where items whose scores are closer than `tolerance` may stand in either order."""
    for ours, theirs in zip(first, second):
        if len(ours) != len(theirs) or any(abs(a[1] - b[1]) > tolerance for a, b in zip(ours, theirs)):
            return False
        scores = dict(theirs)
        edge = min(scores.values()) + tolerance
        if any(tokens not in scores and score > edge for tokens, score in ours):
            return False
    return True


def bench(
    shape: str = "llama-135m",
    num_beams: int = 50,
    prompt_length: int = 100,
    prompts: int = 8,
    items: int = 3686,
    codes: int = 256,
    levels: int = 3,
    vocab_size: int = 49152,
    repeats: int = 2,
    seed: int = 0,
) -> None:
    """Run both searches `repeats` times in turn and compare.

    Args:
        shape: llama-135m or qwen3-small, with random weights. prompts: prompts per batch.
        items, codes, levels: the random catalogue. vocab_size: text vocabulary the SID tokens are added to.
    """
    if shape not in SHAPES:
        raise InputError(f"--shape {shape}: expected one of {', '.join(SHAPES)}")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    config = SHAPES[shape](vocab_size + codes * levels)
    # A wider spread than usual, so that the random model has preferences and rankings are not decided by rounding.
    config.initializer_range = 0.06
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    catalogue = {
        tuple(vocab_size + level * codes + rng.randrange(codes) for level in range(levels)) for _ in range(items)
    }
    sequences = [[*sid, END] for sid in sorted(catalogue)]
    trie = SidTrie(sequences)
    batch = torch.randint(2, vocab_size, (prompts, prompt_length))
    tree(model, trie, batch[:, :8], num_beams)  # warm up
    seconds: dict[str, list[float]] = {"tree": [], "textbook": []}
    same = True
    for _ in tqdm(range(repeats)):
        start = time.perf_counter()
        ours = tree(model, trie, batch, num_beams)
        middle = time.perf_counter()
        theirs = textbook(model, sequences, batch, num_beams)
        seconds["tree"].append(middle - start)
        seconds["textbook"].append(time.perf_counter() - middle)
        same = same and agree(ours, theirs)
    if not same:
        raise InputError("the two searches disagree: no figure is reported")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    cli.say(f"{'way':<10}{'median s':>10}")
    for name, value in medians.items():
        cli.say(f"{name:<10}{value:>10.3f}")
    print(
        json.dumps(
            {
                "benchmark": "decode",
                "shape": shape,
                "num_beams": num_beams,
                "prompt_length": prompt_length,
                "prompts": prompts,
                "items": len(sequences),
                "threads": torch.get_num_threads(),
                "agree": same,
                "tree_s": round(medians["tree"], 4),
                "textbook_s": round(medians["textbook"], 4),
                "ratio": round(medians["textbook"] / medians["tree"], 1),
            }
        )
    )


if __name__ == "__main__":
    cli.run(bench)
