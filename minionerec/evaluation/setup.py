"""The parts of an evaluation: its flags worked out, its files, its data."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from minionerec.common.files import InputError
from minionerec.common.items import read_item_ids
from minionerec.common.model_folder import ModelCatalogue, find_info_file, has_catalogue, read_model_catalogue
from minionerec.common.processes import is_main_process, process_state, say
from minionerec.common.records import Catalogue, Row, read_info
from minionerec.common.row_table import check_table, draw_rows, open_row_cache
from minionerec.common.stage import Stage
from minionerec.engines.settings import check_vllm_flags
from minionerec.engines.vllm import VllmEngine
from minionerec.evaluation.fusion import check_fusion_flags, split_names
from minionerec.evaluation.predictions import EvaluationFiles
from minionerec.evaluation.seen_items import check_seen_flags
from minionerec.evaluation.settings import EvaluateFlags, RecommendFlags
from minionerec.evaluation.shards import prepare_folder
from minionerec.language.models import load_model, load_tokenizer, place_for_search
from minionerec.language.prompts import resolve_prompts_file
from minionerec.recommenders.registry import is_baseline
from minionerec.search.legal_softmax import is_normalised_over_legal
from minionerec.search.scorer import Engine

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
    train_rows: Sequence[Row]
    test_rows: Sequence[Row]
    valid_rows: Sequence[Row]
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
    if flags.info_file is None:
        shared_sids = read_model_catalogue(flags.base_model, "base_model").shared_sids
        flags = replace(flags, info_file=find_info_file(flags.base_model), shared_sids=shared_sids)
    if flags.K > flags.num_beams:
        raise InputError(f"--K {flags.K}: cannot exceed --num_beams {flags.num_beams}")
    if flags.K < 1:
        raise InputError(f"--K {flags.K}: must be at least 1")
    if flags.engine == "hf" and flags.num_beams < 2:
        raise InputError("--engine hf: needs --num_beams of 2 or more")
    if flags.engine == "hf" and (flags.renormalize or flags.exclude_seen or flags.only_items):
        raise InputError("--engine hf: has neither --renormalize nor --exclude_seen nor --only_items")
    check_seen_flags(flags)
    if flags.engine == "vllm" and flags.fuse:
        raise InputError("--engine vllm: has no --fuse, which scores items that the search did not find")
    check_vllm_flags(flags, flags.engine, flags.dtype)
    check_fusion_flags(flags)
    if flags.sample < -1 or flags.sample == 0:
        raise InputError(f"--sample {flags.sample}: expected -1 (all rows) or at least 1")
    if flags.batch_size is not None and flags.batch_size < 1:
        raise InputError(f"--batch_size {flags.batch_size}: must be at least 1")
    return flags


def load_searched_model(
    flags: EvaluateFlags | RecommendFlags,
) -> tuple[PreTrainedModel | Engine, PreTrainedTokenizerBase]:
    """(the model of --base_model, on its device in evaluation mode or in vLLM's processes, its tokenizer)."""
    if flags.engine == "vllm":
        tokenizer = load_tokenizer(flags.base_model, "base_model")
        engine = VllmEngine(
            flags.base_model,
            flags.cutoff_len,
            tensor_parallel_size=flags.tensor_parallel_size,
            gpu_memory_utilization=flags.vllm_gpu_memory_utilization,
            **({"dtype": flags.dtype} if flags.dtype else {}),
        )
        engine.config = AutoConfig.from_pretrained(flags.base_model)
        return engine, tokenizer
    model, tokenizer = load_model(flags.base_model, "base_model", for_training=False)
    if flags.engine == "hf" and is_normalised_over_legal(model):
        raise InputError(f"--engine hf: {flags.base_model} was trained with --softmax legal; use --engine tree")
    return place_for_search(model, process_state().device, flags.dtype), tokenizer


def list_evaluation_inputs(flags: EvaluateFlags) -> list[str]:
    """The files and folders that a run reads; hub names are no files."""
    inputs = [flags.train_file, flags.info_file, flags.test_data_path, flags.only_items, flags.fuse_valid_file]
    inputs += [flags.cf_path, flags.item_meta_path, *(flags.plugin or ())]
    inputs += [resolve_prompts_file(flags.prompts)[0]] if flags.prompts else []
    inputs += [name for name in split_names(flags.fuse) if not is_baseline(name)]
    inputs += [flags.base_model] if Path(flags.base_model).exists() else []
    return [path for path in inputs if path]


def read_model_counts(model: str, catalogue: Catalogue) -> dict[int, int]:
    """{item id: times it was a target in training}, where a model folder knows it of the same catalogue."""
    known = read_model_catalogue(model, "base_model").catalogue if has_catalogue(model) else None
    return known.counts if known and known.sid_of == catalogue.sid_of else {}


def read_known_catalogue(flags: RecommendFlags, train_rows: Sequence[Row]) -> ModelCatalogue:
    """What is known of the items: of --info_file where it is given, of the model folder where that carries it.

    Args:
        flags: of the command.
        train_rows: of --train_file, whose popularity then counts; or none.

    Raises:
        InputError: neither of them, or broken ones.
    """
    known = read_model_catalogue(flags.base_model, "base_model") if has_catalogue(flags.base_model) else None
    if flags.info_file is not None:
        catalogue = read_info(flags.info_file, flags.shared_sids)
        if known is None or known.catalogue.sid_of != catalogue.sid_of:
            known = ModelCatalogue(catalogue)
        else:
            known = replace(known, catalogue=replace(catalogue, counts=known.catalogue.counts))
    elif known is None:
        known = read_model_catalogue(flags.base_model, "base_model")  # which says that there is none
    return replace(known, catalogue=known.catalogue.with_counts(train_rows)) if train_rows else known


def prepare_partial_files(files: EvaluationFiles, stage: Stage) -> None:
    """Keep the finished batches of a run that was cut off, remove those of another one, before anyone reads them."""
    if is_main_process():
        for folder in (files.partial, files.valid_partial):
            prepare_folder(folder, stage.resuming)
    process_state().wait_for_everyone()


def read_evaluation_data(flags: EvaluateFlags) -> EvaluationData:
    """Everything that can be wrong with the input is found here, before a model is loaded."""
    catalogue = read_info(flags.info_file, flags.shared_sids)
    cache = open_row_cache(flags, Path(flags.result_json_data).parent)
    train_rows: Sequence[Row] = []
    if flags.train_file:
        train_rows = cache.open_rows(flags.train_file, "train_file")
        catalogue = catalogue.with_counts(train_rows)
    elif counts := read_model_counts(flags.base_model, catalogue):
        catalogue = replace(catalogue, counts=counts)
    else:
        say("[evaluate] no --train_file: items that share a SID stand by id, metrics are not split by popularity")
    generator = random.Random(flags.seed)

    def read_split(path: str, flag: str, count: int) -> Sequence[Row]:
        rows = cache.open_rows(path, flag)
        check_table(rows, catalogue, path, flags.info_file, history=flags.fuse is not None)
        return draw_rows(rows, count, generator)

    test_rows = read_split(flags.test_data_path, "test_data_path", flags.sample)
    chosen_on = flags.fuse_valid_file
    valid_rows = read_split(chosen_on, "fuse_valid_file", flags.fuse_valid_sample) if chosen_on else []
    item_ids = read_item_ids(flags.only_items, catalogue.sid_of) if flags.only_items else []
    return EvaluationData(catalogue, train_rows, test_rows, valid_rows, item_ids)
