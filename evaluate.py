r"""Evaluation: exact constrained beam search over the catalogue, then HR@K and NDCG@K at SID and item level.

    python evaluate.py --base_model output/sft/final_checkpoint --train_file ... --info_file ... --test_data_path ... \
        --result_json_data output/sft/test.json

Several processes (`accelerate launch evaluate.py ...`, `torchrun --nproc_per_node 2 evaluate.py ...`) share the rows
and write the same one file.
"""

from __future__ import annotations

from minionerec.common.cli import parse_flags, run_command
from minionerec.evaluation.settings import EvaluateFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(EvaluateFlags)

import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

from data import EvalSidDataset
from LogitProcessor import hf_rank_sids
from minionerec.common.files import InputError, write_json
from minionerec.common.plugins import load_plugins
from minionerec.common.processes import process_state, say
from minionerec.common.records import Row
from minionerec.common.stage import open_stage, read_results
from minionerec.evaluation.fusion import Fusion, read_baseline_inputs
from minionerec.evaluation.metrics import format_metrics
from minionerec.evaluation.plot import draw_metrics
from minionerec.evaluation.predict import SplitRanker
from minionerec.evaluation.predictions import EvaluationFiles, write_sid_predictions
from minionerec.evaluation.setup import (
    EvaluationData,
    list_evaluation_inputs,
    load_searched_model,
    prepare_partial_files,
    read_evaluation_data,
    resolve_evaluate_flags,
)
from minionerec.evaluation.shards import RowResults
from minionerec.language.catalogue_trie import build_catalogue_trie, check_token_rows
from minionerec.language.model_checks import limit_length
from minionerec.language.prompts import Encoder, load_checkpoint_prompts


def load_ranker(flags: EvaluateFlags, data: EvaluationData) -> SplitRanker:
    """The model on its device or in vLLM, with the catalogue in its tokens."""
    set_seed(flags.seed)
    model, tokenizer = load_searched_model(flags)
    prompts = load_checkpoint_prompts(flags.base_model, flags.prompts, flags.category)
    encoder = Encoder(tokenizer, prompts, limit_length(flags.cutoff_len, model))
    catalogue_trie = build_catalogue_trie(data.catalogue, encoder, process_state().device)
    check_token_rows(catalogue_trie, model, flags.base_model, "base_model")
    sids = {data.catalogue.sid_of[item] for item in data.item_ids}
    included = sorted(catalogue_trie.number_of[sid] for sid in sids) or None
    return SplitRanker(model, encoder, catalogue_trie, flags, included=included, rank_by_generate=hf_rank_sids)


def build_examples(rows: Sequence[Row], encoder: Encoder, path: str) -> EvalSidDataset:
    """One example for every row of the split `path`.

    Raises:
        InputError: a row without one.
    """
    examples = EvalSidDataset(rows, encoder)
    if len(examples) < len(rows):
        raise InputError(f"{path}: {len(rows) - len(examples)} rows have a history of empty SIDs")
    return examples


def evaluate(flags: EvaluateFlags) -> None:
    """Rank the catalogue for every test row and measure."""
    load_plugins(flags.plugin)
    flags = resolve_evaluate_flags(flags)
    files = EvaluationFiles(Path(flags.result_json_data))
    outputs = [files.predictions, files.metrics, files.picture]
    outputs += [files.fused, files.fused_metrics] if flags.fuse else []
    stage = open_stage("evaluate", flags, list_evaluation_inputs(flags), outputs, files.record)
    if stage.finished:
        return
    prepare_partial_files(files, stage)

    data = read_evaluation_data(flags)
    inputs = read_baseline_inputs(flags, flags.info_file, data.catalogue, data.train_rows, data.valid_rows)
    fusion = Fusion(flags, inputs)
    ranker = load_ranker(flags, data)

    def rank(rows: Sequence[Row], path: str, folder: Path) -> tuple[EvalSidDataset, RowResults | None]:
        examples = build_examples(rows, ranker.encoder, path)
        scorer = fusion.build_scorer(rows, ranker.model, ranker.encoder)
        return examples, ranker.rank(rows, examples, folder, stage.tick, scorer)

    if fusion.lacks_weights:
        _, valid_results = rank(data.valid_rows, flags.fuse_valid_file, files.valid_partial)
        if valid_results is not None:
            fusion.choose_weights(data.valid_rows, valid_results)
    examples, results = rank(data.test_rows, flags.test_data_path, files.partial)
    if results is None:
        return  # another process than the main one

    prompts = examples.iterate_prompts()
    metrics = write_sid_predictions(files.predictions, data.test_rows, prompts, results, data.catalogue, flags.K)
    if read_results(Path(flags.base_model).parent / "rl.stage.json").get("kept_sft_weights"):
        metrics["kept_weights"] = True
        say(f"[evaluate] {flags.base_model}: RL kept the SFT weights, since no checkpoint of it was better")
    write_json(files.metrics, metrics)
    columns = {flags.base_model: metrics, **fusion.write(data.test_rows, results, files)}
    say(format_metrics(columns))
    if metrics["items_sharing_a_sid"]:
        order = "the most popular of them" if flags.train_file else "the one with the lowest id"
        say(f"{metrics['items_sharing_a_sid']} items share a SID; at item level {order} comes first")
    draw_metrics(columns, files.picture, f"{Path(flags.test_data_path).stem}, {flags.base_model}")
    stage.done(rows=metrics["rows"], illegal=metrics["illegal"], short_lists=metrics["short_lists"])
    for folder in (files.partial, files.valid_partial):
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    run_command(evaluate, FLAGS, shared=True)
