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

import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import set_seed

from data import EvalSidDataset
from LogitProcessor import hf_rank_sids
from minionerec.common.files import InputError, write_json
from minionerec.common.items import read_item_ids
from minionerec.common.plugins import load_plugins
from minionerec.common.processes import is_main_process, process_state, say
from minionerec.common.records import Catalogue, Row, check_rows, draw_rows, read_info, read_rows
from minionerec.common.stage import Stage, open_stage
from minionerec.evaluation.fusion import Fusion, check_fusion_flags
from minionerec.evaluation.metrics import format_metrics, score_predictions
from minionerec.evaluation.plot import draw_metrics
from minionerec.evaluation.predict import SplitRanker
from minionerec.evaluation.predictions import EvaluationFiles, build_sid_predictions
from minionerec.evaluation.shards import prepare_folder
from minionerec.language.catalogue_trie import build_catalogue_trie
from minionerec.language.examples import Example
from minionerec.language.models import load_model
from minionerec.language.prompts import Encoder, load_checkpoint_prompts, resolve_prompts_file
from minionerec.recommenders.registry import BASELINES, BaselineInputs

DEFAULT_LENGTH = 50  # of the lists


@dataclass
class EvaluationData:
    """What a run reads.

    Attributes:
        catalogue: the items, with their popularity where --train_file is given.
        train_rows: all of the train split, or none.
        test_rows: the rows to rank for.
        valid_rows: those that a weight is chosen on, or none.
        item_ids: the items of --only_items, or none.
    """

    catalogue: Catalogue
    train_rows: list[Row]
    test_rows: list[Row]
    valid_rows: list[Row]
    item_ids: list[int]


def resolve_evaluate_flags(flags: EvaluateFlags) -> EvaluateFlags:
    """The flags with every default worked out, once they are checked against each other.

    Raises:
        InputError: flags that contradict each other.
    """
    if flags.num_beams < 1:
        raise InputError(f"--num_beams {flags.num_beams}: must be at least 1")
    # The published command line knows 0 as "not given".
    flags = replace(flags, K=flags.K or min(DEFAULT_LENGTH, flags.num_beams), train_file=flags.train_file or None)
    if flags.K > flags.num_beams:
        raise InputError(f"--K {flags.K}: cannot exceed --num_beams {flags.num_beams}")
    if flags.K < 1:
        raise InputError(f"--K {flags.K}: must be at least 1")
    if flags.engine == "hf" and flags.num_beams < 2:
        raise InputError("--engine hf: needs --num_beams of 2 or more")
    if flags.engine == "hf" and (flags.renormalize or flags.exclude_seen or flags.only_items):
        raise InputError("--engine hf: has neither --renormalize nor --exclude_seen nor --only_items")
    check_fusion_flags(flags)
    if flags.sample < -1 or flags.sample == 0:
        raise InputError(f"--sample {flags.sample}: expected -1 (all rows) or at least 1")
    if flags.batch_size is not None and flags.batch_size < 1:
        raise InputError(f"--batch_size {flags.batch_size}: must be at least 1")
    return flags


def list_evaluation_inputs(flags: EvaluateFlags) -> list[str]:
    """The files and folders that a run reads; hub names are no files."""
    inputs = [flags.train_file, flags.info_file, flags.test_data_path, flags.only_items, flags.fuse_valid_file]
    inputs += [flags.cf_path, *(flags.plugin or ())]
    inputs += [resolve_prompts_file(flags.prompts)[0]] if flags.prompts else []
    inputs += [flags.fuse] if flags.fuse not in BASELINES else []
    inputs += [flags.base_model] if Path(flags.base_model).exists() else []
    return [path for path in inputs if path]


def prepare_partial_files(files: EvaluationFiles, stage: Stage) -> None:
    """Keep the finished batches of a run that was cut off, remove those of another one, before anyone reads them."""
    if is_main_process():
        for folder in (files.partial, files.valid_partial):
            prepare_folder(folder, stage.resuming)
    process_state().wait_for_everyone()


def read_evaluation_data(flags: EvaluateFlags) -> EvaluationData:
    """Everything that can be wrong with the input is found here, before a model is loaded."""
    catalogue = read_info(flags.info_file, flags.shared_sids)
    train_rows: list[Row] = []
    if flags.train_file:
        train_rows = read_rows(flags.train_file, "train_file")
        catalogue = catalogue.with_counts(train_rows)
    else:
        say("[evaluate] no --train_file: items that share a SID stand by id, metrics are not split by popularity")
    generator = random.Random(flags.seed)

    def read_split(path: str, flag: str, count: int) -> list[Row]:
        rows = read_rows(path, flag)
        check_rows(rows, catalogue, path, flags.info_file, history=flags.fuse is not None)
        return draw_rows(rows, count, generator)

    test_rows = read_split(flags.test_data_path, "test_data_path", flags.sample)
    chosen_on = flags.fuse_valid_file
    valid_rows = read_split(chosen_on, "fuse_valid_file", flags.fuse_valid_sample) if chosen_on else []
    item_ids = read_item_ids(flags.only_items, catalogue.sid_of) if flags.only_items else []
    return EvaluationData(catalogue, train_rows, test_rows, valid_rows, item_ids)


def load_ranker(flags: EvaluateFlags, data: EvaluationData) -> SplitRanker:
    """The model on its device, with the catalogue in its tokens."""
    set_seed(flags.seed)
    model, tokenizer = load_model(flags.base_model, "base_model")
    prompts = load_checkpoint_prompts(flags.base_model, flags.prompts, flags.category)
    encoder = Encoder(tokenizer, prompts, flags.cutoff_len)
    device = process_state().device
    catalogue_trie = build_catalogue_trie(data.catalogue, encoder, device)
    model.to(device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    sids = {data.catalogue.sid_of[item] for item in data.item_ids}
    included = sorted(catalogue_trie.number_of[sid] for sid in sids) or None
    return SplitRanker(model, encoder, catalogue_trie, flags, included=included, rank_by_generate=hf_rank_sids)


def build_examples(rows: list[Row], encoder: Encoder, path: str) -> list[Example]:
    """One example for every row of the split `path`.

    Raises:
        InputError: a row without one.
    """
    examples = EvalSidDataset(rows, encoder).examples
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
    fusion = Fusion(flags, BaselineInputs(data.train_rows, data.catalogue, files={"cf_path": flags.cf_path}))
    ranker = load_ranker(flags, data)

    def rank(rows: list[Row], path: str, folder: Path) -> tuple[list[Example], list[dict] | None]:
        examples = build_examples(rows, ranker.encoder, path)
        scorer = fusion.build_scorer(rows, ranker.model, ranker.encoder)
        return examples, ranker.rank(rows, examples, folder, stage.tick, scorer)

    if fusion.lacks_weight:
        _, valid_results = rank(data.valid_rows, flags.fuse_valid_file, files.valid_partial)
        if valid_results is not None:
            fusion.choose_weight(data.valid_rows, valid_results)
    examples, results = rank(data.test_rows, flags.test_data_path, files.partial)
    if results is None:
        return  # another process than the main one

    predictions = build_sid_predictions(data.test_rows, [example.prompt for example in examples], results)
    histories = [row.history_sids for row in data.test_rows]
    metrics = score_predictions(predictions, data.catalogue, flags.K, histories)
    write_json(files.predictions, predictions, indent=None)
    write_json(files.metrics, metrics)
    columns = {flags.base_model: metrics, **fusion.write(data.test_rows, results, files)}
    say(format_metrics(columns))
    if metrics["items_sharing_a_sid"]:
        order = "the most popular of them" if flags.train_file else "the one with the lowest id"
        say(f"{metrics['items_sharing_a_sid']} items share a SID; at item level {order} comes first")
    draw_metrics(columns, files.picture)
    stage.done(rows=len(predictions), illegal=metrics["illegal"], short_lists=metrics["short_lists"])
    for folder in (files.partial, files.valid_partial):
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    run_command(evaluate, FLAGS)
