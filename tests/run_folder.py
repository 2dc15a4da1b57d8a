"""A run folder as scripts/pipeline.sh leaves it, of random lists over a toy dataset, for the tests of reports."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

from tiny import make_dataset

from minionerec.common.files import write_json
from minionerec.common.records import read_info, read_rows
from minionerec.evaluation.predictions import RankedItems, write_item_predictions, write_sid_predictions
from minionerec.recommenders.transitions import sort_by_popularity

LENGTH = 20  # of the lists
TRICKY = "<script>alert('x')</script> & \"quotes\""


def write_stage(folder: Path, name: str, stage: str, settings: dict, **results: float) -> None:
    """A stage record."""
    record = {
        "stage": stage,
        "status": "done",
        "seconds": 90.0,
        "peak_memory_mb": 300,
        "settings": settings,
        "results": results,
        "outputs": [],
        "inputs": {},
    }
    write_json(folder / f"{name}.stage.json", record)


def make_run(folder: Path, seed: int = 0, kept: str = "RL") -> dict[str, str]:
    """Write a run with a baseline, SFT, RL and a fused model; returns the paths of its data by flag name."""
    paths = make_dataset(folder / "csv", items=30, users=30, shared=False)
    records = json.loads(Path(paths["item_meta_path"]).read_text())
    for number, record in records.items():
        record["categories"] = "tools, saws" if int(number) % 2 else "tools"
    records["3"]["title"] = TRICKY
    Path(paths["item_meta_path"]).write_text(json.dumps(records))
    train, test = read_rows(paths["train_file"]), read_rows(paths["test_data_path"])
    catalogue = read_info(paths["info_file"]).with_counts(train)
    catalogue.titles[3] = TRICKY
    info = [f"{sid}\t{title}\t{item}\n" for sid, title, item in zip(*vars_of(catalogue), strict=True)]
    Path(paths["info_file"]).write_text("".join(info))
    rng = random.Random(seed)

    def rank(share: float) -> list[list[int]]:
        lists = []
        for row in test:
            ranked = rng.sample(catalogue.item_ids, LENGTH)
            if rng.random() < share:
                ranked = list(dict.fromkeys([*ranked[: rng.randrange(8)], row.item_id, *ranked]))[:LENGTH]
            lists.append(ranked)
        return lists

    common = {"train_file": paths["train_file"], "test_data_path": paths["test_data_path"]}
    common |= {"info_file": paths["info_file"], "seed": seed}
    for name, rankings in (
        ("popularity", [sort_by_popularity(catalogue)[:LENGTH]] * len(test)),
        ("content", rank(0.2)),
    ):
        lists = [RankedItems(ranked) for ranked in rankings]
        metrics = write_item_predictions(folder / "baselines" / f"{name}.json", test, lists, catalogue, LENGTH)
        write_json(folder / "baselines" / f"{name}.metrics.json", metrics)
    write_stage(folder / "baselines", "baselines", "baselines", common)
    for name, share in (("sft", 0.4), ("rl", 0.5)):
        results = [
            {"predict": [catalogue.sid_of[item] for item in ranked], "score": [-0.5 * place for place in range(LENGTH)]}
            for ranked in rank(share)
        ]
        path = folder / name / "test.json"
        metrics = write_sid_predictions(path, test, [""] * len(test), results, catalogue, LENGTH)
        write_json(folder / name / "test.metrics.json", metrics)
        write_stage(folder / name, "test", "evaluate", common)
    fused = [RankedItems(ranked, [0.9] * LENGTH) for ranked in rank(0.6)]
    metrics = write_item_predictions(folder / "rl" / "test.fused.json", test, fused, catalogue, LENGTH)
    write_json(
        folder / "rl" / "test.fused.metrics.json",
        {**metrics, "fuse": "content", "weights": {"model": 1.0, "content": 0.3}},
    )
    trained = {"seed": seed, "item_meta_path": paths["item_meta_path"], "sid_index_path": paths["sid_index_path"]}
    write_stage(folder / "sft", "sft", "sft", trained | {"eval_file": paths["eval_file"]})
    start, best = (0.2, 0.25) if kept == "RL" else (0.2, 0.2)
    figures = {"validation sum at start": start, "validation sum best": best, "steps": 40}
    write_stage(folder / "rl", "rl", "rl", trained, **figures)
    write_logs(folder)
    return paths


def vars_of(catalogue) -> tuple[list, list, list]:
    """The parallel lists of a catalogue."""
    return catalogue.sids, catalogue.titles, catalogue.item_ids


def write_logs(folder: Path) -> None:
    """steps.csv of SFT, RL and an RQ-VAE, and the SID report that goes with it."""
    sft = ["step,epoch,loss,seconds_step,eval_loss"]
    sft += [f"{step},{step / 40},{3 / step},0.1,{2 / step if step % 40 == 0 else ''}" for step in range(1, 401)]
    rl = ["step,loss,reward,reward_rule,reward_std,kl,seconds_step,eval_HR@10,eval_NDCG@10"]
    rl += [f"{step},0.1,{step / 40},{step / 80},0.3,0.01,2,{0.1 if step % 10 == 0 else ''}," for step in range(1, 41)]
    rqvae = ["step,loss,reconstruction_loss,collision_rate", "1,2,1,", "2,1,0.5,0.2"]
    for name, lines in (("sft", sft), ("rl", rl), ("rqvae", rqvae)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "steps.csv").write_text("\n".join(lines) + "\n")
    index = {str(item): [f"<a_{item % 4}>", f"<b_{item}>"] for item in range(30)}
    (folder / "data").mkdir(exist_ok=True)
    write_json(folder / "data" / "toy.index.json", index)
    levels = []
    for level, size in enumerate((4, 32)):
        used = Counter(sid[level] for sid in index.values())
        levels.append({"codes": size, "codes_used": len(used), "perplexity": float(len(used))})
    quality = {"items": 30, "levels": 2, "per_level": levels, "collision_rate": 0.0, "items_sharing_a_sid": 0}
    quality |= {"collision_rate_without_extra": 0.1, "items_with_extra_token": 0, "reconstruction_error": 0.25}
    for place in ("data", "methods/rqvae"):
        write_json(folder / place / "toy.index.quality.json", quality)
