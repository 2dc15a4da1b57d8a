"""What the benchmarks work on: random models, made-up or published data, and the memory of this process."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)

from benchmarks.memory import read_peak_memory_mb as read_peak_memory_mb  # for the benchmarks that have a problem
from minionerec.common.files import InputError, write_json, write_text
from minionerec.common.items import read_catalogue
from minionerec.common.records import SID_TOKEN, Catalogue, Row, read_index, read_rows
from minionerec.common.row_files import CSV_COLUMNS
from minionerec.common.texts import list_texts
from minionerec.language.models import train_tokenizer
from minionerec.language.sid_tokens import add_sid_tokens

WORDS = (
    "steel nylon pack of set with black white blue small large inch cable filter gloves tape valve bolt pump".split()
)
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
    # Heads wide enough for the kernels of flex_attention.
    "qwen3-tiny": lambda vocab: Qwen3Config(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
    ),
    # The shapes of Qwen2.5-0.5B and Qwen2.5-1.5B, whose vocabulary is 151,936.
    "qwen2.5-0.5b": lambda vocab: Qwen2Config(
        vocab_size=vocab,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": lambda vocab: Qwen2Config(
        vocab_size=vocab,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}


def build_random_model(
    shape: str, vocab_size: int, seed: int, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model of one of SHAPES with random weights, made on its device."""
    torch.manual_seed(seed)
    config = SHAPES[shape](vocab_size)
    # A wider spread than usual, so that the random model has preferences and rankings are not decided by rounding.
    config.initializer_range = 0.06
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def list_sid_tokens(catalogue: Catalogue) -> list[str]:
    """The distinct tokens of a catalogue's SIDs."""
    return list(dict.fromkeys(token for sid in catalogue.sids for token in SID_TOKEN.findall(sid)))


def build_sid_model(
    shape: str, vocab_size: int, catalogue: Catalogue, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(random model, tokenizer of the catalogue's titles) that know the catalogue's SID tokens."""
    tokenizer = train_tokenizer(list_texts(catalogue.titles, []), vocab_size)
    tokens = list_sid_tokens(catalogue)
    model = build_random_model(shape, vocab_size + len(tokens), seed)
    add_sid_tokens(model, tokenizer, tokens, seed, 1.0)
    return model, tokenizer


def make_up_data(rng: random.Random, users: int = 1500, items: int = 2000) -> tuple[list[Row], Catalogue]:
    """(rows, catalogue): users with 4 to 40 purchases, skewed item popularity, titles of 6 to 16 words."""
    titles = [" ".join(rng.choices(WORDS, k=rng.randint(6, 16))) + f" {item}" for item in range(items)]
    sids = [f"<a_{item % 50}><b_{item // 50}><c_{rng.randrange(50)}>" for item in range(items)]
    rows = []
    for user in range(users):
        bought = [int(items * rng.random() ** 3) for _ in range(min(40, 4 + int(rng.expovariate(0.3))))]
        for index in range(1, len(bought)):
            history, target = bought[max(0, index - 10) : index], bought[index]
            shown_titles, shown_sids = (tuple(texts[item] for item in history) for texts in (titles, sids))
            rows.append(Row(f"U{user}", shown_titles, tuple(history), shown_sids, titles[target], target, sids[target]))
    return rows, Catalogue(sids, titles, list(range(items)))


def write_published_data(rows: Sequence[Row], catalogue: Catalogue, folder: Path) -> dict[str, str]:
    """Write what the commands read, nine tenths of the rows as the train split; {flag: path} of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        "train_file": "train.csv",
        "eval_file": "valid.csv",
        "test_data_path": "test.csv",
        "info_file": "info.txt",
        "sid_index_path": "made_up.index.json",
        "item_meta_path": "made_up.item.json",
    }
    paths = {flag: folder / name for flag, name in names.items()}
    items = list(zip(catalogue.item_ids, catalogue.sids, catalogue.titles, strict=True))
    write_json(paths["sid_index_path"], {str(item): SID_TOKEN.findall(sid) for item, sid, _ in items})
    about = {"description": "", "brand": "", "categories": ""}
    write_json(paths["item_meta_path"], {str(item): {"title": title, **about} for item, _, title in items})
    write_text(paths["info_file"], "".join(f"{sid}\t{title}\t{item}\n" for item, sid, title in items))
    cut = len(rows) * 9 // 10
    for flag, part in (("train_file", rows[:cut]), ("eval_file", rows[cut:]), ("test_data_path", rows[cut:])):
        with paths[flag].open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS)
            writer.writeheader()
            for row in part:
                titles, ids, sids = map(list, (row.history_titles, row.history_ids, row.history_sids))
                cells = (row.user_id, titles, row.title, ids, row.item_id, sids, row.sid)
                writer.writerow(dict(zip(CSV_COLUMNS, cells, strict=True)))
    return {flag: str(path) for flag, path in paths.items()}


def read_published_data(data_root: str, category: str | None) -> tuple[list[Row], Catalogue]:
    """(train rows, catalogue) of a folder in the published format.

    Raises:
        InputError: a file that is missing or malformed.
    """
    matches = [
        sorted(Path(data_root).glob(f"{part}/{category or ''}*{end}"))
        for part, end in (("train", ".csv"), ("index", ".index.json"), ("index", ".item.json"))
    ]
    if not all(matches):
        raise InputError(f"--data_root {data_root}: expected train/*.csv, index/*.index.json and index/*.item.json")
    (train, *_), (index, *_), (items, *_) = matches
    catalogue, _ = read_catalogue(str(items), read_index(index), str(index))
    return read_rows(train), catalogue
