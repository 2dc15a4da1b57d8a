"""Models and tokenizers: loading them, building them from a config, dropout where HF models have none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from minionerec.common.files import InputError, read_json
from minionerec.common.processes import process_state, say
from minionerec.language.quantization import keep_layout, quantize_on_loading
from minionerec.search.attention_check import check_trees

transformers_logging.set_verbosity_error()

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What a CPU needs to multiply bfloat16 matrices faster than float32 ones, by the names of torch.cpu.get_capabilities.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
# Below it a search spends its time elsewhere than in matrices (docs/decoding_and_evaluation.md has the measurement).
BF16_PARAMETERS = 4_000_000

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


@contextmanager
def hide_file_progress() -> Iterator[None]:
    """No bar for every file read or written inside: they would bury a run's own progress."""
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def check_attention(attention: str) -> None:
    """Stop if this machine cannot train with `attention`.

    Raises:
        InputError: flex_attention, which has no backward pass on a CPU, without a CUDA device.
    """
    if attention == "flex_attention" and not torch.cuda.is_available():
        raise InputError("--attention flex_attention: trains on a CUDA device only, and there is none here; use sdpa")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware; on others it emulates them, which is slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name, False) for name in BF16_INSTRUCTIONS)


def choose_dtype(requested: str | None, model: torch.nn.Module, device: torch.device) -> torch.dtype:
    """The precision that a model searches in. Called on every process; all get the choice of the main one.

    The choice is a function of the model and the machine, not of a measurement, so that a run can be repeated.

    Args:
        requested: "float32", "bfloat16", or "auto": bfloat16 where the device has instructions for it and the model is
            so large that they pay; None is bfloat16 on a GPU and float32 elsewhere.
        model: what will search.
        device: where.
    """
    if requested is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if requested != "auto":
        return PRECISIONS[requested]
    large = sum(parameter.numel() for parameter in model.parameters()) >= BF16_PARAMETERS
    chosen = ["bfloat16" if large and has_fast_bf16(device) else "float32"]
    if process_state().num_processes > 1:
        broadcast_object_list(chosen)
    return PRECISIONS[chosen[0]]


def place_for_search(model: PreTrainedModel, device: torch.device, requested: str | None) -> PreTrainedModel:
    """The model on its device in evaluation mode, in the precision of `choose_dtype`; a chosen one is printed."""
    dtype = choose_dtype(requested, model, device)
    if requested:
        slow = dtype == torch.bfloat16 and not has_fast_bf16(device)
        note = ", for which this device has no instructions: slower than float32" if slow else ""
        say(f"[search] weights in {str(dtype).removeprefix('torch.')}{note}")
    return model.to(device, dtype=dtype).eval()


def load_tokenizer(path: str, flag: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a HF folder or hub name.

    Raises:
        InputError: none there.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--{flag} {path}: cannot be used as a causal LM with a tokenizer ({str(error).splitlines()[0]})"
        ) from None


def load_model(
    path: str, flag: str, attention: str = "sdpa", in_4bit: bool = False, for_training: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (float32 weights) and tokenizer of a HF folder or hub name.

    Training keeps float32 master weights and computes in bf16 under autocast on a GPU; loading in the checkpoint's own
    dtype, the library's default, would train in bf16. With `in_4bit` the linear layers of the decoder are quantised,
    and the model is on its device. A search takes any model; prefix trees, on which models are trained, do not.

    Raises:
        InputError: nothing loadable there, or, for training, attention layers that prefix trees cannot use.
    """
    tokenizer = load_tokenizer(path, flag)
    try:
        with hide_file_progress():
            options = quantize_on_loading() if in_4bit else {}
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation=attention, **options
            )
        if in_4bit:
            keep_layout(model)
        if for_training:
            check_trees(model)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--{flag} {path}: cannot be used as a causal LM with a tokenizer ({str(error).splitlines()[0]})"
        ) from None
    return model, tokenizer


def build_model_from_config(
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
        check_trees(model)
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
