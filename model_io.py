"""Models and tokenizers: loading, building from a config, adding SID tokens, and writing a checkpoint folder."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable, Iterator, Sequence

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers.utils import logging as transformers_logging

from cli import Stage, is_main_process
from fileio import InputError, atomic, read_json
from prefix_tree import check_tree_attention
from prompts import PROMPTS_FILE, PromptSet

transformers_logging.set_verbosity_error()

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


@contextmanager
def without_file_bars() -> Iterator[None]:
    """No bar for every file read or written inside: they would bury a run's own progress."""
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


class TimeKeeper(TrainerCallback):
    """Notes the time a stage has taken with every checkpoint, so that a resumed run counts what came before."""

    def __init__(self, stage: Stage):
        self.stage = stage

    def on_save(self, args, state, control, **kwargs):
        self.stage.tick()


class QuietSaves:
    """Mixin for a Trainer: checkpoints are written without a bar of their own, and a process drives one device.

    Where it sees several, the trainer would cut batches for them by DataParallel; ours are whole. `accelerate launch` uses
    them all.
    """

    def __init__(self, *arguments, args, **named):
        if args.n_gpu > 1:
            args._n_gpu = 1
        super().__init__(*arguments, args=args, **named)

    def save_model(self, *args, **kwargs):
        with without_file_bars():
            super().save_model(*args, **kwargs)


ATTENTIONS = ("sdpa", "flex_attention")


def check_attention(attention: str) -> None:
    """Stop if this machine cannot train with `attention`.

    Raises:
        InputError: an unknown name, or flex_attention, which has no backward pass on a CPU, without a CUDA device.
    """
    if attention not in ATTENTIONS:
        raise InputError(f"--attention {attention}: expected one of {', '.join(ATTENTIONS)}")
    if attention == "flex_attention" and not torch.cuda.is_available():
        raise InputError("--attention flex_attention: trains on a CUDA device only, and there is none here; use sdpa")


def load_model(path: str, flag: str, attention: str = "sdpa") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (float32 weights) and tokenizer of a HF folder or hub name.

    Training keeps float32 master weights and computes in bf16 under autocast on a GPU; loading in the checkpoint's own
    dtype, the library's default, would train in bf16.

    Raises:
        InputError: nothing loadable there, or attention layers that prefix trees cannot use.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        with without_file_bars():
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
        check_tree_attention(model)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--{flag} {path}: cannot be used as a causal LM with a tokenizer ({str(error).splitlines()[0]})"
        ) from None
    return model, tokenizer


def process_state() -> PartialState:
    """Rank, number of processes and device; with several processes on a machine without accelerator it starts gloo."""
    return PartialState(cpu=not torch.accelerator.is_available())


def model_from_config(
    path: str, texts: Iterable[str], seed: int, attention: str = "sdpa"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A randomly initialised model.

    Args:
        path: a JSON config file (its "tokenizer_vocab_size" entries of byte-level BPE are trained on `texts`), or a HF
            folder, whose config and tokenizer are used without its weights.
    """
    if Path(path).is_file():
        settings = dict(read_json(path, "base_model"))
        try:
            vocab_size, model_type = int(settings.pop("tokenizer_vocab_size")), settings.pop("model_type")
        except KeyError as error:
            raise InputError(f"--base_model {path}: the config lacks {error.args[0]!r}") from None
        tokenizer = train_tokenizer(texts, vocab_size)
        try:
            config = AutoConfig.for_model(
                model_type,
                **settings,
                vocab_size=len(tokenizer),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        except ValueError as error:
            raise InputError(f"--base_model {path}: no usable config ({str(error).splitlines()[0][:100]})") from None
    elif path.endswith(".json"):
        raise InputError(f"--base_model {path}: no such file")
    else:
        try:
            tokenizer, config = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise InputError(
                f"--base_model {path}: no config and tokenizer there ({str(error).splitlines()[0]})"
            ) from None
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    try:
        check_tree_attention(model)
    except ValueError as error:
        raise InputError(f"--base_model {path}: {error}") from None
    return model, tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with start, end and padding tokens; the start token stands before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def _sid_order(token: str) -> tuple:
    level, number = (
        re.fullmatch(r"<(\D*?)_?(\d*)>", token).groups() if re.fullmatch(r"<(\D*?)_?(\d*)>", token) else (token, "")
    )
    return level, int(number or 0), token


# How much of a new row's spread is direction, where there is one; the rest is noise, so that no two rows are equal.
DIRECTED = 0.95


def add_sid_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Iterable[str],
    seed: int,
    spread: float = 0.1,
    directions: dict[str, np.ndarray] | None = None,
) -> int:
    """Give every SID token of the index a row of its own; returns how many were new.

    New rows start at the mean of the old ones plus noise of `spread` times their standard deviation: a tenth in a pretrained
    model, so that no new token begins as an outlier; 1 in a random model, where rows that start alike would take epochs to
    part. Only rows past the old tokenizer's are touched; a vocabulary padded beyond it is used up first.

    directions: token -> vector [hidden], of standard deviation 1 over all tokens (`sid_init.code_directions`): the noise
    is then mostly replaced by it.
    """
    known = len(tokenizer)
    added = tokenizer.add_tokens([AddedToken(token, normalized=False) for token in sorted(set(tokens), key=_sid_order)])
    if not added:
        return 0
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for layer in [model.get_input_embeddings()] + ([] if tied else [model.get_output_embeddings()]):
        with torch.no_grad():
            old = layer.weight[:known]
            noise = torch.randn(added, old.shape[1], generator=generator).to(old)
            if directions:
                named = tokenizer.convert_ids_to_tokens(range(known, len(tokenizer)))
                directed = torch.from_numpy(np.stack([directions[token] for token in named])).to(old)
                noise = DIRECTED * directed + (1 - DIRECTED**2) ** 0.5 * noise
            layer.weight[known : len(tokenizer)] = old.mean(dim=0) + spread * old.std(dim=0) * noise
    return added


def add_dropout(model: PreTrainedModel, probability: float) -> None:
    """Dropout on the embeddings and on what attention and MLP add to the residual stream, where HF models have none.

    Active in training mode only and not part of the saved model.

    Raises:
        InputError: an architecture without the usual layer names.
    """

    def drop(module, _arguments, output):
        return torch.nn.functional.dropout(output, probability, module.training)

    try:
        layers = model.get_decoder().layers
        targets = [model.get_input_embeddings()] + [
            part for layer in layers for part in (layer.self_attn.o_proj, layer.mlp)
        ]
    except AttributeError as error:
        raise InputError(f"--dropout: this architecture has no place for it ({error})") from None
    for module in targets:
        module.register_forward_hook(drop)


def save_checkpoint_folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: PromptSet, path: str | Path
) -> None:
    """Write weights, tokenizer and prompts as one HF folder that appears whole or not at all. Main process only."""
    with atomic(path) as folder, without_file_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / PROMPTS_FILE).write_text(prompts.to_yaml(), encoding="utf-8")


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete `checkpoint-N` folder; the trainer writes trainer_state.json last."""
    found = [
        path
        for path in Path(output_dir).glob("checkpoint-*")
        if path.name.split("-")[-1].isdigit() and _is_json(path / "trainer_state.json")
    ]
    return str(max(found, key=lambda path: int(path.name.split("-")[-1]))) if found else None


def checkpoint_to_resume(output_dir: str | Path, named: str | None, resuming: bool) -> str | None:
    """What `Trainer.train` shall go on from: the checkpoint the user named, else the last one of a cut-off run.

    Otherwise checkpoints in `output_dir` belong to a run with other settings and are removed. The main process decides.
    """
    checkpoint = [named]
    if is_main_process() and not named:
        if resuming:
            checkpoint = [last_checkpoint(output_dir)]
        else:
            for stale in Path(output_dir).glob("checkpoint-*"):
                shutil.rmtree(stale)
    return broadcast_object_list(checkpoint)[0]


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True


def item_texts(titles: Sequence[str], descriptions: Sequence[str]) -> list[str]:
    """What a tokenizer from scratch is trained on."""
    return [text for text in (*titles, *descriptions) if text]
