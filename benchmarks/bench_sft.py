"""SFT: prefix trees against the ordinary way, shuffled rows in padded batches of 16 with logits at every position.

Both run forward and backward over the same rows in this process, on the same model; their losses and gradients are compared
before anything is reported. Tokens are counted over the whole epoch, seconds and memory over a sample of users. The last
line is JSON: `token_ratio` and `time_ratio`, padded / tree.

    python -m benchmarks.bench_sft --data_root DIR --category Industrial_and_Scientific   data in the published format
    python -m benchmarks.bench_sft                                                        rows made up here
"""

from __future__ import annotations

import copy
import json
import random
import resource
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from data import TaskInputs, build_mixture, choose_tasks
from minionerec.common.cli import run
from minionerec.common.files import InputError
from minionerec.common.processes import say
from minionerec.common.records import SID_TOKEN, Catalogue, Row, read_index, read_rows
from minionerec.common.texts import list_texts
from minionerec.language.models import build_model_from_config
from minionerec.language.prompts import Encoder, load_prompts
from minionerec.language.sid_tokens import add_sid_tokens
from minionerec.search.prefix_tree import TreeBatch, compute_tree_log_probs
from minionerec.training.sft_trainer import TreeBatches

PADDED_ROWS = 16  # of a batch, in the ordinary way
WORDS = (
    "steel nylon pack of set with black white blue small large inch cable filter gloves tape valve bolt pump".split()
)


def made_up(rng: random.Random, users: int = 1500, items: int = 2000) -> tuple[list[Row], Catalogue]:
    """Users with 4 to 40 purchases, skewed item popularity, titles of 6 to 16 words."""
    titles = [" ".join(rng.choices(WORDS, k=rng.randint(6, 16))) + f" {item}" for item in range(items)]
    sids = [f"<a_{item % 50}><b_{item // 50}><c_{rng.randrange(50)}>" for item in range(items)]
    rows = []
    for user in range(users):
        bought = [int(items * rng.random() ** 3) for _ in range(min(40, 4 + int(rng.expovariate(0.3))))]
        for place in range(1, len(bought)):
            history, target = bought[max(0, place - 10) : place], bought[place]
            known = tuple(tuple(table[item] for item in history) for table in (titles, sids))
            rows.append(Row(f"U{user}", known[0], tuple(history), known[1], titles[target], target, sids[target]))
    return rows, Catalogue(sids, titles, list(range(items)))


def published(data_root: str, category: str | None) -> tuple[list[Row], Catalogue]:
    """Train rows and items of a folder in the published format."""
    found = [
        sorted(Path(data_root).glob(f"{part}/{category or ''}*{end}"))
        for part, end in (("train", ".csv"), ("index", ".index.json"), ("index", ".item.json"))
    ]
    if not all(found):
        raise InputError(f"--data_root {data_root}: expected train/*.csv, index/*.index.json and index/*.item.json")
    index = read_index(found[1][0])
    items = json.loads(found[2][0].read_text(encoding="utf-8"))
    order = sorted(index)
    catalogue = Catalogue(
        ["".join(index[item]) for item in order], [items[str(item)]["title"] for item in order], order
    )
    return read_rows(found[0][0]), catalogue


def padded_batches(examples: list, pad: int, rng: random.Random) -> list[tuple[torch.Tensor, ...]]:
    """(input ids, attention mask, labels with -100 where nothing is to be predicted), [16, longest] each: shuffled rows."""
    order = rng.sample(examples, len(examples))
    batches = []
    for start in range(0, len(order), PADDED_ROWS):
        rows = order[start : start + PADDED_ROWS]
        width = max(len(row.prompt_ids) + len(row.target_ids) for row in rows)
        ids, labels = torch.full((len(rows), width), pad), torch.full((len(rows), width), -100)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            whole = torch.tensor(row.prompt_ids + row.target_ids)
            ids[number, : len(whole)], mask[number, : len(whole)] = whole, 1
            labels[number, len(row.prompt_ids) : len(whole)] = whole[len(row.prompt_ids) :]
        batches.append((ids, mask, labels))
    return batches


def run_padded(model, batches) -> float:
    """Summed loss; gradients are left in the model."""
    total = 0.0
    for ids, mask, labels in tqdm(batches, "padded", leave=False):
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
        loss.backward()
        total += loss.item()
    return total


def run_tree(model, batches: TreeBatches) -> float:
    total = 0.0
    for number in tqdm(range(len(batches)), "tree", leave=False):
        batch = TreeBatch(**batches[number])
        loss = -(compute_tree_log_probs(model, batch) * batch.label_weight).sum()
        loss.backward()
        total += loss.item()
    return total


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def bench(
    data_root: str | None = None,
    category: str | None = None,
    base_model: str = "config/tiny_qwen3.json",
    prompts: str = "worded",
    tasks: list[str] | None = None,
    rows: int = 1000,
    micro_batch_size: int = 32,
    tree_tokens: int = 2048,
    repeats: int = 1,
    seed: int = 0,
) -> None:
    """Compare the two ways.

    Args:
        tasks: default next_sid,next_title,title_history2sid; rows: training rows that are timed, over all tasks.
        micro_batch_size: rows per forward pass of the tree way. base_model: a config, with random weights.
    """
    rng = random.Random(seed)
    split, catalogue = published(data_root, category) if data_root else made_up(rng)
    prompt_set = load_prompts(prompts)
    weights = choose_tasks(tasks or ["next_sid", "next_title", "title_history2sid"], prompt_set)
    model, tokenizer = build_model_from_config(base_model, list_texts(catalogue.titles, []), seed)
    add_sid_tokens(model, tokenizer, (token for sid in catalogue.sids for token in SID_TOKEN.findall(sid)), seed, 1.0)
    encoder = Encoder(tokenizer, prompt_set)
    mixture = build_mixture(weights, TaskInputs(split, catalogue), encoder, 512)
    examples = [mixture[number] for number in range(len(mixture))]

    def trees(examples: list) -> TreeBatches:
        count = max(1, round(len(examples) / micro_batch_size))
        return TreeBatches([examples], len(examples), count, encoder.pad_token_id, seed, tree_tokens=tree_tokens)

    # Phase 1: tokens of a whole epoch, padding included.
    whole = trees(examples)
    tree_tokens_epoch = sum(whole[number]["input_ids"].numel() for number in tqdm(range(len(whole)), "count"))
    padded_tokens = sum(ids.numel() for ids, *_ in padded_batches(examples, encoder.pad_token_id, rng))

    # Phase 2: seconds, on all rows of some users; the tree way first, for its peak memory is the lower one.
    users = sorted({example.group for example in examples})
    rng.shuffle(users)
    by_user: dict[str, list] = {}
    for example in examples:
        by_user.setdefault(example.group, []).append(example)
    sample: list = []
    while users and len(sample) < rows:
        sample += by_user[users.pop()]
    some_trees, some_padded = trees(sample), padded_batches(sample, encoder.pad_token_id, rng)
    twin = copy.deepcopy(model)
    seconds: dict[str, list[float]] = {"tree": [], "padded": []}
    memory, losses = {}, {}
    for name, way, policy, batches in (
        ("tree", run_tree, model, some_trees),
        ("padded", run_padded, twin, some_padded),
    ):
        before = peak_mb()
        for _ in range(repeats):
            policy.zero_grad()
            start = time.perf_counter()
            losses[name] = way(policy, batches)
            seconds[name].append(time.perf_counter() - start)
        memory[name] = peak_mb() - before
    labels = sum(len(example.target_ids) for example in sample)
    difference = abs(losses["tree"] - losses["padded"]) / labels
    pairs = list(zip(model.parameters(), twin.parameters()))
    norm = sum(float(theirs.grad.double().square().sum()) for _, theirs in pairs) ** 0.5
    gradient = sum(float((ours.grad - theirs.grad).double().square().sum()) for ours, theirs in pairs) ** 0.5 / norm
    if difference > 1e-4 or gradient > 1e-4:
        raise InputError(
            f"the two ways disagree (loss {difference:.1e}, gradient {gradient:.1e}): no figure is reported"
        )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    epoch = {name: value * len(examples) / len(sample) for name, value in medians.items()}
    say(f"{'way':<10}{'tokens':>12}{'s/epoch':>10}{'peak MB':>10}")
    for name, tokens in (("tree", tree_tokens_epoch), ("padded", padded_tokens)):
        say(f"{name:<10}{tokens:>12,}{epoch[name]:>10.1f}{memory[name]:>10,}")
    print(
        json.dumps(
            {
                "benchmark": "sft",
                "data": category or data_root or "made up",
                "tasks": list(weights),
                "rows": len(examples),
                "timed_rows": len(sample),
                "threads": torch.get_num_threads(),
                "tree_tokens": tree_tokens_epoch,
                "padded_tokens": padded_tokens,
                "token_ratio": round(padded_tokens / tree_tokens_epoch, 2),
                "tree_s_per_epoch": round(epoch["tree"], 1),
                "padded_s_per_epoch": round(epoch["padded"], 1),
                "time_ratio": round(medians["padded"] / medians["tree"], 2),
                "tree_peak_mb_more": memory["tree"],
                "padded_peak_mb_more": memory["padded"],
                "loss_difference": difference,
                "gradient_difference": gradient,
            }
        )
    )


if __name__ == "__main__":
    run(bench)
