"""The parts of an SFT run: its data, its model, its micro-batches, the arguments of its trainer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, TrainingArguments, set_seed

from minionerec.common.embeddings import fit_to_width, read_item_vectors
from minionerec.common.files import InputError
from minionerec.common.items import read_catalogue, read_preferences
from minionerec.common.processes import process_state
from minionerec.common.records import Catalogue, read_index
from minionerec.common.row_table import RowTable
from minionerec.common.step_log import choose_loggers
from minionerec.language.adapters import check_adapter_flags, wrap_with_adapters
from minionerec.language.mixture import TaskMixture
from minionerec.language.model_checks import limit_length
from minionerec.language.models import add_dropout, build_model_from_config, load_model
from minionerec.language.prompts import Encoder, PromptSet
from minionerec.language.sid_tokens import (
    add_sid_tokens,
    compute_code_directions,
    compute_start_directions,
)
from minionerec.recommenders.folds import FOLDS_FOLDER, read_parts
from minionerec.recommenders.registry import BASELINES, check_baseline_files, parse_sum
from minionerec.search.legal_softmax import CONFIG_NAME, LegalTokens
from minionerec.training.hub import check_hub_flags
from minionerec.training.optimizers import check_optimizer
from minionerec.training.settings import SFTFlags
from minionerec.training.setup import build_arguments, check_divisible, check_loading_flags, read_splits
from minionerec.training.sft_trainer import TreeBatches

# {flag: tasks that read it}; tasks of a plugin may read any.
TEACHING_FLAGS = {
    "teacher": ("teacher_sid", "walk_sid"),
    "walk_teacher": ("walk_sid", "teacher_sid"),
    "walks": ("walk_sid",),
}
NAMED_STARTS = ("text", "noise")  # of --sid_init; anything else is a file


def check_sft_flags(flags: SFTFlags) -> None:
    """Stop at flags that contradict each other.

    Raises:
        InputError: what to write instead.
    """
    check_adapter_flags(flags, flags.freeze_LLM, flags.train_from_scratch)
    check_optimizer(flags.optim)
    if flags.eval_beams < 10:
        raise InputError(f"--eval_beams {flags.eval_beams}: HR@10 needs 10 beams or more")
    if flags.tree_tokens < 1:
        raise InputError(f"--tree_tokens {flags.tree_tokens}: must be at least 1")
    for name, value in (("teacher", flags.teacher), ("walk_teacher", flags.walk_teacher or flags.teacher)):
        parse_sum(value, name)
    networks = list_teaching_networks(flags)
    names = [flags.teacher, flags.walk_teacher or ""]
    check_baseline_files("teacher" if networks else "walk_teacher", names, {"cf_path": flags.cf_path})
    for name in networks:
        read_parts(flags.cf_path, name)
    if flags.walks < 1:
        raise InputError(f"--walks {flags.walks}: must be at least 1")
    if flags.softmax == "legal" and (flags.lora or flags.freeze_LLM):
        raise InputError("--softmax legal: not with --lora or --freeze_LLM")
    check_teaching_flags(flags)
    check_loading_flags(flags)
    check_hub_flags(flags)
    if Path(flags.base_model).is_file() and not flags.train_from_scratch:
        raise InputError(
            f"--base_model {flags.base_model}: a config file has no weights; add --train_from_scratch True"
        )
    check_divisible(flags.batch_size, flags.micro_batch_size)


def list_teaching_networks(flags: SFTFlags) -> list[str]:
    """The networks in --teacher."""
    return [part for part in parse_sum(flags.teacher)[0] if BASELINES[part].file_flag == "cf_path"]


def list_teacher_folders(flags: SFTFlags) -> list[Path]:
    """What the networks of --teacher are read from beside --cf_path."""
    return [Path(flags.cf_path).parent / FOLDS_FOLDER] if list_teaching_networks(flags) else []


def check_teaching_flags(flags: SFTFlags) -> None:
    """Stop at flags of a teacher where no task has one. Their defaults, which every settings file holds, may stand.

    Raises:
        InputError: which tasks they are for.
    """
    tasks = {task.partition(":")[0] for task in flags.tasks or ()}
    defaults = {field.name: field.default for field in fields(flags)}
    for name, readers in TEACHING_FLAGS.items():
        value = getattr(flags, name)
        if value != defaults[name] and not tasks.intersection(readers) and not flags.plugin:
            raise InputError(f"--{name} {value}: none of the chosen tasks reads it; add {readers[0]} to --tasks")


@dataclass
class SFTInputs:
    """What a run reads: the catalogue with its SID tokens and texts, the rows, the tasks.

    Attributes:
        item_vectors: the embeddings [N, dim] of --sid_init, in the order of the catalogue; None where it names no file.
    """

    index: dict[int, tuple[str, ...]]
    catalogue: Catalogue
    descriptions: dict[int, str]
    preferences: dict[str, str] | None
    train_rows: RowTable
    valid_rows: RowTable
    item_vectors: np.ndarray | None = None

    @property
    def sid_tokens(self) -> list[str]:
        """The distinct tokens of all SIDs."""
        return sorted({token for tokens in self.index.values() for token in tokens})


@dataclass
class SFTModel:
    """What a run trains, and how its texts become tokens."""

    model: PreTrainedModel
    encoder: Encoder
    parameters: int
    new_tokens: int


def read_sft_data(flags: SFTFlags) -> SFTInputs:
    """Everything that can be wrong with the input is found here, before a model is loaded."""
    index = read_index(flags.sid_index_path, "sid_index_path")
    catalogue, descriptions = read_catalogue(flags.item_meta_path, index, flags.sid_index_path)
    preferences = read_preferences(flags.preference_file) if flags.preference_file else None
    _, train_rows, valid_rows = read_splits(
        flags, catalogue, flags.sid_index_path, flags.sample, flags.seed, history=True
    )
    vectors = None if flags.sid_init in NAMED_STARTS else read_item_vectors(flags.sid_init, catalogue, "sid_init")
    return SFTInputs(index, catalogue, descriptions, preferences, train_rows, valid_rows, vectors)


def build_sft_model(flags: SFTFlags, data: SFTInputs, prompts: PromptSet) -> SFTModel:
    """The base with a row for every SID token; wrapped, where only a part of it is trained."""
    set_seed(flags.seed)
    scratch, titles = flags.train_from_scratch, data.catalogue.titles
    descriptions = list(data.descriptions.values())
    if scratch:
        texts = [text for text in (*titles, *descriptions) if text]
        model, tokenizer = build_model_from_config(
            flags.base_model, texts, flags.seed, flags.attention, longest=flags.cutoff_len
        )
    else:
        model, tokenizer = load_model(
            flags.base_model, "base_model", flags.attention, flags.load_in_4bit, longest=flags.cutoff_len
        )
    directions = None
    rows, vocabulary = model.get_input_embeddings().weight.shape[0], tokenizer.get_vocab()
    if flags.sid_init != "noise" and any(vocabulary.get(token, rows) >= rows for token in data.sid_tokens):
        sids = [data.index[item] for item in data.catalogue.item_ids]
        if flags.sid_init == "text":
            directions = compute_start_directions(model, tokenizer, sids, titles, descriptions, flags.seed, scratch)
        else:
            width = model.get_input_embeddings().weight.shape[1]
            directions = compute_code_directions(sids, fit_to_width(data.item_vectors, width, flags.seed))
    # A random model's rows would take epochs to part if they started alike; a pretrained one's must not be outliers.
    spread = 1.0 if scratch else 0.1
    new_tokens = add_sid_tokens(model, tokenizer, data.sid_tokens, flags.seed, spread, directions)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model = wrap_with_adapters(model, tokenizer.convert_tokens_to_ids(data.sid_tokens), flags, flags.freeze_LLM)
    if flags.softmax == "legal":
        setattr(model.config, CONFIG_NAME, True)
    if flags.dropout:  # after the wrapping: its hooks are to stand on the layers that are called
        add_dropout(model, flags.dropout)
    encoder = Encoder(tokenizer, prompts, limit_length(flags.cutoff_len, model))
    return SFTModel(model, encoder, parameters, new_tokens)


def batch_training(
    flags: SFTFlags,
    part: TaskMixture,
    encoder: Encoder,
    processes: int | None = None,
    legal: LegalTokens | None = None,
) -> TreeBatches:
    """The micro-batches of every epoch, shuffled; of this run, or of one with other `processes`.

    Raises:
        InputError: rows too few for --batch_size.
    """
    world = processes or process_state().num_processes
    micro_batches = check_divisible(flags.batch_size, flags.micro_batch_size, world) * world
    how = {"packing": flags.packing, "tree_tokens": flags.tree_tokens, "legal": legal}
    try:
        return TreeBatches([part], flags.batch_size, micro_batches, encoder.pad_token_id, flags.seed, **how)
    except ValueError as error:
        raise InputError(f"--batch_size {flags.batch_size}: {error}") from None


def batch_validation(
    flags: SFTFlags, part: TaskMixture, encoder: Encoder, legal: LegalTokens | None = None
) -> TreeBatches:
    """The validation examples in micro-batches, in their order."""
    world = process_state().num_processes
    micro_batches = max(world, -(-len(part) // flags.micro_batch_size // world) * world)
    how = {"packing": flags.packing, "tree_tokens": flags.tree_tokens, "legal": legal}
    return TreeBatches([part], len(part), min(micro_batches, len(part)), encoder.pad_token_id, None, **how)


def build_sft_arguments(flags: SFTFlags, steps_per_epoch: int) -> TrainingArguments:
    """The arguments of the trainer, which keeps the best epoch by --best_by."""
    return build_arguments(
        TrainingArguments,
        flags,
        flags.num_epochs * steps_per_epoch,
        choose_loggers(flags),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=check_divisible(flags.batch_size, flags.micro_batch_size),
        num_train_epochs=flags.num_epochs,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="steps",
        logging_steps=1,
        save_total_limit=flags.save_total_limit,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{flags.best_by}",
        greater_is_better=flags.best_by != "loss",
    )
