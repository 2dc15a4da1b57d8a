"""Tiny random models, catalogues and datasets for the tests, and the textbook search with their end token."""

from __future__ import annotations

import csv
import json
import random
from itertools import pairwise
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LogitsProcessor, Qwen2Config, Qwen3Config

from benchmarks.textbook import PrefixDictionary, search_textbook
from minionerec.common.row_files import CSV_COLUMNS
from minionerec.language.examples import Example

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
END = 1


def tiny_model(kind: str, vocab_size: int, seed: int = 0, **changes):
    """A random two-layer model whose logits differ enough for rankings to be unambiguous."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
    )
    config = CONFIGS[kind](**{**settings, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def random_catalogue(
    rng: random.Random, size: int, depth: int, codes: int, vocab_size: int, mixed: bool
) -> list[list[int]]:
    """Up to `size` distinct sequences that share prefixes, each closed by END; with `mixed`, of 1..depth tokens."""
    distinct = set()
    for _ in range(size):
        length = rng.randint(1, depth) if mixed else depth
        distinct.add(tuple(rng.randint(2, min(vocab_size - 1, 1 + codes)) for _ in range(length)) + (END,))
    sequences = [list(sequence) for sequence in distinct]
    rng.shuffle(sequences)
    return sequences


def random_examples(rng, rows, users):
    """Rows of users whose prompts are nested, of different sizes, with targets of one to three tokens."""
    base = {user: [rng.randint(3, 39) for _ in range(rng.randint(2, 15))] for user in range(users)}
    examples = []
    for row in range(rows):
        user = rng.randrange(users)
        prompt = base[user][: rng.randint(1, len(base[user]))]
        target = [rng.randint(3, 39) for _ in range(rng.randint(0, 2))] + [1]
        examples.append(Example("", prompt, target, f"U{user}", f"U{user}", "", row))
    return examples


def list_plan(batches):
    """[(number of the group, example), ...] of every micro-batch of an epoch of `TreeBatches`."""
    parts = [batches.plan_micro_batch(index) for index in range(len(batches))]
    return [[(group, batches.examples[place]) for group, place in zip(*part, strict=True)] for part in parts]


def random_prompts(rng: random.Random, count: int, vocab_size: int, longest: int = 20) -> list[list[int]]:
    return [[rng.randint(2, vocab_size - 1) for _ in range(rng.randint(1, longest))] for _ in range(count)]


class Renormalize(LogitsProcessor):
    """HF's `renormalize_logits`, but a beam without any legal token stays at -inf, not NaN, which spoils all beams."""

    def __call__(self, input_ids, scores):
        return scores.log_softmax(-1).nan_to_num(nan=float("-inf"), neginf=float("-inf"))


def rank_by_textbook(model, sequences, prompts, num_beams, length_penalty=0.0, processor=None, renormalize=False):
    """[(tokens up to END, score)] per prompt by HF `generate`, see `search_textbook`."""
    processors = [processor or PrefixDictionary(sequences, max(map(len, prompts)))]
    processors += [Renormalize()] if renormalize else []
    rankings = search_textbook(
        model, sequences, prompts, num_beams, END, length_penalty=length_penalty, processors=processors
    )
    return [[(list(tokens), score) for tokens, score in ranking] for ranking in rankings]


def make_dataset(
    folder: Path, items: int = 30, users: int = 24, seed: int = 0, deep: bool = False, shared: bool = False
) -> dict[str, str]:
    """A small dataset in the project's own formats; returns the paths by flag name.

    `deep` gives some SIDs a 4th token; `shared` gives item 2 the SID of item 1, and item 7 that of item 4.
    """
    rng = random.Random(seed)
    index, meta = {}, {}
    for item in range(items):
        index[str(item)] = [f"<a_{item % 5}>", f"<b_{item // 5}>", f"<c_{item % 3}>"] + (
            [f"<d_{item}>"] if deep and item % 2 else []
        )
        meta[str(item)] = {
            "title": f"Item number {item}, 'quoted'",
            "description": f"Thing {item % 7}",
            "brand": "",
            "categories": "",
        }
    if shared:
        index["2"], index["7"] = index["1"], index["4"]
    sid = {item: "".join(index[str(item)]) for item in range(items)}
    title = {item: meta[str(item)]["title"] for item in range(items)}
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        "sid_index_path": folder / "toy.index.json",
        "item_meta_path": folder / "toy.item.json",
        "info_file": folder / "info.txt",
        "train_file": folder / "train.csv",
        "eval_file": folder / "valid.csv",
        "test_data_path": folder / "test.csv",
    }
    paths["sid_index_path"].write_text(json.dumps(index))
    paths["item_meta_path"].write_text(json.dumps(meta))
    paths["info_file"].write_text("".join(f"{sid[item]}\t{title[item]}\t{item}\n" for item in range(items)))
    samples = []
    for user in range(users):
        start = rng.randrange(items)
        timeline = [(start + step * (1 + user % 2)) % items for step in range(rng.randint(4, 16))]
        samples += [
            (f"U{user}", timeline[max(0, index - 10) : index], timeline[index]) for index in range(1, len(timeline))
        ]
    cuts = [0, int(len(samples) * 0.7), int(len(samples) * 0.85), len(samples)]
    for name, (low, high) in zip(("train_file", "eval_file", "test_data_path"), pairwise(cuts), strict=True):
        with paths[name].open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(CSV_COLUMNS)
            for user, history, target in samples[low:high]:
                writer.writerow(
                    [
                        user,
                        [title[i] for i in history],
                        title[target],
                        history,
                        target,
                        [sid[i] for i in history],
                        sid[target],
                    ]
                )
    return {name: str(path) for name, path in paths.items()}


TINY_CONFIG = {
    "model_type": "qwen3",
    "tokenizer_vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def write_config(folder: Path) -> str:
    path = folder / "tiny.json"
    path.write_text(json.dumps(TINY_CONFIG))
    return str(path)
