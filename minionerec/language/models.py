"""Models and tokenizers: loading them, building them from a config, dropout where HF models have none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
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
from minionerec.common.model_sources import (
    ADAPTER_CONFIG,
    TOKENIZER_FILES,
    check_model_source,
    is_adapter,
    translate_errors,
)
from minionerec.common.processes import process_state, say
from minionerec.language.model_checks import check_decoder_only, check_loading_report, check_weights
from minionerec.language.quantization import keep_layout, quantize_on_loading
from minionerec.search.attention_check import check_tree_attention, check_trees

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
    """The tokenizer of a HF folder, an adapter's folder or a hub name.

    Raises:
        InputError: none there, or one without words.
    """
    source, folder = check_model_source(path, flag, weights=False), Path(path)
    if is_adapter(path) and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return load_tokenizer(read_adapter_base(path, flag), flag)
    with translate_errors(path, flag, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, **source)
        if not tokenizer("Item 1", add_special_tokens=False).input_ids:
            raise InputError(f"--{flag} {path}: its tokenizer makes no tokens of a text; its files are not complete")
    return tokenizer


def load_model(
    path: str,
    flag: str,
    attention: str = "sdpa",
    in_4bit: bool = False,
    for_training: bool = True,
    longest: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (float32 weights) and tokenizer of a HF folder or hub name; an adapter's is merged into its base.

    Training keeps float32 master weights and computes in bf16 under autocast on a GPU; loading in the checkpoint's own
    dtype, the library's default, would train in bf16. With `in_4bit` the linear layers of the decoder are quantised,
    and the model is on its device. A search takes any model; prefix trees, on which models are trained, do not: one
    with windows only where they hold `longest` tokens.

    Raises:
        InputError: nothing loadable there, weights that do not fit the config or are not finite, or, for training,
            attention layers that prefix trees cannot use.
    """
    tokenizer = load_tokenizer(path, flag)
    with translate_errors(path, flag, "a causal LM"):
        try:
            if is_adapter(path):
                model = _load_adapter(path, flag, attention, in_4bit, len(tokenizer))
            else:
                model = _load_weights(path, flag, attention, in_4bit, for_training)
            check_weights(model)
            if for_training:
                try:
                    check_trees(model, longest)
                except ValueError as error:
                    raise InputError(str(error)) from None
        except InputError as error:
            text = str(error)
            if text.startswith("--") or path in text:
                raise
            raise InputError(f"--{flag} {path}: {text}") from None
    return model, tokenizer


def _load_weights(path: str, flag: str, attention: str, in_4bit: bool, for_training: bool = True) -> PreTrainedModel:
    source = check_model_source(path, flag, tokenizer=False)
    check_decoder_only(AutoConfig.from_pretrained(path, **source))
    try:
        return _read_weights(path, attention, in_4bit, source)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        if for_training:
            raise InputError(
                f"{str(error).split()[0]} has no attention of the kind sdpa, which prefix trees need for their masks; "
                "take another architecture, such as Qwen, Llama or GPT-2"
            ) from None
        return _read_weights(path, "eager", in_4bit, source)  # a search takes any attention


def _read_weights(path: str, attention: str, in_4bit: bool, source: dict[str, Any]) -> PreTrainedModel:
    options = quantize_on_loading() if in_4bit else {}
    with hide_file_progress():
        # Shapes that differ are in the report then, by name; without it a table of them is logged.
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
            **source,
        )
    check_loading_report(report)
    if in_4bit:
        keep_layout(model)
    return model


def read_adapter_base(path: str, flag: str) -> str:
    """The model that the adapter of a folder was trained on, as its config names it.

    Raises:
        InputError: it names none.
    """
    config = read_json(Path(path) / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise InputError(
            f"--{flag} {path}: an adapter that does not name the model it belongs to; give the merged model, such as "
            "the final_checkpoint of its run"
        )
    where = f"--{flag} {path}: an adapter of {base}, which"
    if is_adapter(base):
        raise InputError(f"{where} is an adapter itself; merge that one into its base first")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise InputError(f"{where} is not here; name its place as base_model_name_or_path in {ADAPTER_CONFIG}")
    return base


def _load_adapter(path: str, flag: str, attention: str, in_4bit: bool, tokens: int) -> PreTrainedModel:
    """The base of an adapter with the adapter merged into its weights; `tokens` is the size of its vocabulary."""
    from peft import PeftModel, PeftType

    check_model_source(path, flag, tokenizer=False)
    kind = read_json(Path(path) / ADAPTER_CONFIG).get("peft_type")
    if kind not in PeftType.__members__:
        raise InputError(f"an adapter of kind {kind}, which the installed version of peft does not know")
    if in_4bit:
        raise InputError("an adapter is not merged into 4-bit weights; leave --load_in_4bit out or name a whole model")
    base = read_adapter_base(path, flag)
    model = _load_weights(base, flag, attention, in_4bit)
    rows = _count_adapter_rows(Path(path)) or max(tokens, model.get_input_embeddings().weight.shape[0])
    if rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    merged = PeftModel.from_pretrained(model, path).merge_and_unload()
    merged.requires_grad_(True)  # peft froze the base; what is merged is a model like others
    say(f"[model] {path} is an adapter: merged into its base {base}")
    return merged


def _count_adapter_rows(folder: Path) -> int | None:
    """Token rows of the embedding that an adapter carries, None where it carries none."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return None
    with safe_open(file, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118, it is no dictionary
            if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight")):
                return weights.get_slice(name).get_shape()[0]
    return None


def build_model_from_config(
    path: str, texts: Iterable[str], seed: int, attention: str = "sdpa", longest: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A randomly initialised model.

    Args:
        path: a JSON config file (its "tokenizer_vocab_size" entries of byte-level BPE are trained on `texts`), or a HF
            folder, whose config and tokenizer are used without its weights.
        longest: tokens of the longest sequence, which a window of its attention must hold.
    """
    if Path(path).is_file():
        settings = read_json(path, "base_model")
        if not isinstance(settings, dict):
            raise InputError(f"--base_model {path}: expected an object of settings")
        try:
            vocab_size, model_type = int(settings.pop("tokenizer_vocab_size")), settings.pop("model_type")
        except KeyError as error:
            raise InputError(f"--base_model {path}: the config lacks {error.args[0]!r}") from None
        except (TypeError, ValueError):
            raise InputError(f"--base_model {path}: tokenizer_vocab_size must be a whole number") from None
        tokenizer = train_tokenizer(texts, vocab_size)
        with translate_errors(path, "base_model", "a config"):
            config = AutoConfig.for_model(
                model_type,
                **settings,
                vocab_size=len(tokenizer),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
    elif path.endswith(".json"):
        raise InputError(f"--base_model {path}: no such file")
    else:
        tokenizer = load_tokenizer(path, "base_model")
        source = check_model_source(path, "base_model", weights=False)
        with translate_errors(path, "base_model", "the config of a causal LM"):
            config = AutoConfig.from_pretrained(path, **source)
            if getattr(config, "quantization_config", None) is not None:
                del config.quantization_config  # of the weights, which are not read
    with translate_errors(path, "base_model", "the config of a causal LM"):
        check_decoder_only(config)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        try:
            if model.device.type != "meta":
                check_trees(model, longest)
            else:
                check_tree_attention(model, longest)
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
