"""Training a small part of a pretrained model: only the rows of the SID tokens, or those rows and LoRA matrices.

Both wrap the model with `peft`, which keeps the pretrained weights untouched and gives the trained part parameters of
its own, so that optimizer state and checkpoints hold that part only. `merge_adapters` makes it a plain model again.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, TrainableTokensConfig, get_peft_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from minionerec.common.cli import get_default
from minionerec.common.files import InputError, read_json
from minionerec.common.settings import AdapterFlags
from minionerec.language.quantization import check_4bit, is_in_4bit, merge_4bit_layers


def check_adapter_flags(flags: AdapterFlags, freeze_LLM: bool = False, train_from_scratch: bool = False) -> None:
    """Stop if the flags contradict each other.

    Raises:
        InputError: what to write instead.
    """
    if freeze_LLM and flags.lora:
        raise InputError(
            "--freeze_LLM True and --lora True: choose one; --lora True trains the SID rows too and freezes the rest"
        )
    if (freeze_LLM or flags.lora) and train_from_scratch:
        raise InputError(
            f"--{'freeze_LLM' if freeze_LLM else 'lora'} True: a model trained from scratch has learned nothing worth "
            "keeping; leave --train_from_scratch out and name a pretrained --base_model"
        )
    if not flags.lora:
        for field in fields(AdapterFlags):
            if getattr(flags, field.name) != get_default(field):
                raise InputError(f"--{field.name}: has an effect with --lora True only")
    for name in ("lora_rank", "lora_alpha"):
        if getattr(flags, name) < 1:
            raise InputError(f"--{name} {getattr(flags, name)}: must be at least 1")
    if not 0 <= flags.lora_dropout < 1:
        raise InputError(f"--lora_dropout {flags.lora_dropout}: must be at least 0 and below 1")
    if flags.load_in_4bit:
        check_4bit()


def check_adapter_checkpoint(checkpoint: str | None, freeze_LLM: bool, lora: bool) -> None:
    """Stop if a checkpoint to go on from was written with other flags.

    Raises:
        InputError: it holds the weights of a full model, of SID rows only, or of LoRA, and the run is of another kind.
    """
    if checkpoint is None or not Path(checkpoint).is_dir():
        return  # the trainer says what is wrong with a path that is no folder
    config = Path(checkpoint) / "adapter_config.json"
    written = read_json(config).get("peft_type") if config.is_file() else None
    wanted = "LORA" if lora else "TRAINABLE_TOKENS" if freeze_LLM else None
    if written != wanted:
        kinds = {None: "full training", "LORA": "--lora True", "TRAINABLE_TOKENS": "--freeze_LLM True"}
        raise InputError(
            f"--resume_from_checkpoint {checkpoint}: a checkpoint of {kinds.get(written, written)}, but this run is "
            f"{kinds[wanted]}"
        )


def _find_row_layers(model: PreTrainedModel) -> list[str]:
    """Names of the layers that hold token rows: the input embedding and, unless tied to it, the output layer."""
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise InputError(
            f"--freeze_LLM, --lora: the output layer of {model.config.model_type} has a bias, so that its token rows "
            "cannot be trained alone; use full training"
        )
    layers = [model.get_input_embeddings()]
    if head.weight is not layers[0].weight:
        layers.append(head)
    return [next(name for name, module in model.named_modules() if module is layer) for layer in layers]


def _wrap(model: PreTrainedModel, config: LoraConfig | TrainableTokensConfig) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # tied rows stay tied
        wrapped = get_peft_model(model, config)
    # With the base's name here, saving a checkpoint looks the base up (on the hub, if it is a hub name), finds its
    # vocabulary to be smaller and writes the whole embedding matrix; None is filled in again, an empty name stays.
    wrapped.active_peft_config.base_model_name_or_path = ""
    return wrapped


def train_token_rows(model: PreTrainedModel, rows: Sequence[int]) -> PeftModel:
    """`model` with everything frozen but the given rows of its token embedding and, if untied, of its output layer.

    Rows keep their values. With tied embeddings a row is one parameter in both places.
    """
    layers = _find_row_layers(model)
    return _wrap(
        model,
        TrainableTokensConfig(task_type=TaskType.CAUSAL_LM, token_indices=sorted(set(rows)), target_modules=layers),
    )


def add_lora(model: PreTrainedModel, rows: Sequence[int], flags: AdapterFlags) -> PeftModel:
    """`model` with everything frozen but the given token rows, as in `train_token_rows`, and new LoRA matrices.

    Each chosen weight W acts as W + alpha / rank * B A with A [rank, in], random, and B [out, rank], zero
    (arXiv 2106.09685).

    Args:
        model: a plain HF model.
        rows: token ids whose rows learn.
        flags: rank, alpha, the names of the linear layers inside the decoder (None: all), dropout on what goes into A.

    Raises:
        InputError: a target that no linear layer of the decoder is named.
    """
    linear = [name for name, part in model.get_decoder().named_modules() if isinstance(part, (torch.nn.Linear, Conv1D))]
    for target in flags.lora_targets or ():
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            names = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise InputError(f"--lora_targets: the decoder has no linear layer {target!r}; it has {', '.join(names)}")
    layers = _find_row_layers(model)
    return _wrap(
        model,
        LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=flags.lora_rank,
            lora_alpha=flags.lora_alpha,
            target_modules=list(flags.lora_targets) if flags.lora_targets else "all-linear",
            lora_dropout=flags.lora_dropout,
            trainable_token_indices={name: sorted(set(rows)) for name in layers},
        ),
    )


def wrap_with_adapters(
    model: PreTrainedModel, rows: Sequence[int], flags: AdapterFlags, freeze_LLM: bool = False
) -> PreTrainedModel | PeftModel:
    """`model` so that only what the flags say learns: LoRA and token rows, token rows alone, or everything."""
    if flags.lora:
        return add_lora(model, rows, flags)
    return train_token_rows(model, rows) if freeze_LLM else model


def merge_adapters(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The plain model with what was trained written into its weights, in place; an unwrapped model as it is."""
    if not isinstance(model, PeftModel):
        return model
    if is_in_4bit(model):
        merge_4bit_layers(model)
    return model.merge_and_unload()


def count_trainable_parameters(model: torch.nn.Module) -> int:
    """Number of weights that learn; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
