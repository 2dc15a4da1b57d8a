"""Evaluation: exact constrained beam search over the catalogue, then HR@K and NDCG@K at SID and item level.

    python evaluate.py --base_model output/sft/final_checkpoint --train_file ... --info_file ... --test_data_path ... \
        --result_json_data output/sft/test.json
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import set_seed

import cli
from data import EvalSidDataset
from fileio import InputError, write_json
from metrics import popularity, score_predictions, table
from model_io import load_model, process_state
from prompts import Encoder, checkpoint_prompts, prompts_file
from ranking import build_trie, rank_sids
from records import read_info, read_rows


def evaluate(
    base_model: str,
    train_file: str,
    info_file: str,
    test_data_path: str,
    result_json_data: str,
    batch_size: int = 32,
    num_beams: int = 50,
    K: int = 50,
    length_penalty: float = 0.0,
    cutoff_len: int = 512,
    prompts: str | None = None,
    category: str | None = None,
    shared_sids: bool = False,
    sample: int = -1,
    seed: int = 42,
    force: bool = False,
) -> None:
    """Rank the catalogue for every test row and measure.

    Args:
        base_model: checkpoint of sft.py or rl.py.
        train_file: CSV of the train split; its target counts order the items that share a SID.
        info_file: the catalogue. shared_sids: accept items that share a SID there.
        result_json_data: the predictions are written there, the metrics beside it (NAME.metrics.json).
        batch_size: prompts per forward pass. num_beams: beams of the search. K: length of the lists, at most num_beams.
        prompts: another prompt set than the checkpoint's own. category: any text, for prompts that show {category}.
        sample: evaluate that many random rows (-1: all), for a quick look.
    """
    if K > num_beams:
        raise InputError(f"--K {K}: cannot exceed --num_beams {num_beams}")
    output = Path(result_json_data)
    metrics_file = output.with_name(f"{output.stem}.metrics.json")
    settings = {key: value for key, value in locals().items() if key in evaluate.__annotations__ and key != "force"}
    inputs = [train_file, info_file, test_data_path, *([prompts_file(prompts)[0]] if prompts else [])]
    inputs += [base_model] if Path(base_model).exists() else []
    record = output.with_name(f"{output.stem}.stage.json")
    stage = cli.Stage("evaluate", settings, inputs, [output, metrics_file], record, force)
    if stage.finished:
        return

    catalogue = read_info(info_file, shared_sids)
    counts = popularity(row.item_id for row in read_rows(train_file, "train_file"))
    rows = read_rows(test_data_path, "test_data_path")
    known = dict(zip(catalogue.item_ids, catalogue.sids))
    for number, row in enumerate(rows, 1):
        if known.get(row.item_id) != row.sid:
            raise InputError(
                f"{test_data_path}, row {number}: item {row.item_id} with SID {row.sid} is not in {info_file}"
            )
    if 0 <= sample < len(rows):
        chosen = (
            torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:sample].sort().values.tolist()
        )
        rows = [rows[place] for place in chosen]

    set_seed(seed)
    model, tokenizer = load_model(base_model, "base_model")
    encoder = Encoder(tokenizer, checkpoint_prompts(base_model, prompts, category))
    device = process_state().device
    trie, sid_of_sequence = build_trie(catalogue, encoder, device)
    model.to(device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    examples = EvalSidDataset(rows, encoder, cutoff_len).examples
    ranked, scores = rank_sids(model, trie, sid_of_sequence, examples, num_beams, batch_size, length_penalty)

    predictions = [
        {
            "user_id": row.user_id,
            "item_id": row.item_id,
            "input": example.prompt,
            "output": row.sid,
            "predict": best[:K],
            "score": [round(value, 6) for value in values[:K]],
        }
        for row, example, best, values in zip(rows, examples, ranked, scores)
    ]
    histories = [row.history_sids for row in rows]
    results = score_predictions(predictions, catalogue.sids, catalogue.item_ids, counts, K, histories)
    write_json(output, predictions, indent=None)
    write_json(metrics_file, results)
    cli.say(table({base_model: results}))
    if results["items_sharing_a_sid"]:
        cli.say(
            f"{results['items_sharing_a_sid']} items share a SID; at item level the most popular of them comes first"
        )
    stage.done(rows=len(rows), illegal=results["illegal"], short_lists=results["short_lists"])


if __name__ == "__main__":
    cli.run(evaluate)
