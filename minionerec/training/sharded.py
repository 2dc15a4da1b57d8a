"""Engines that shard weights (FSDP2, DeepSpeed ZeRO-3): the whole model for searches, its state for the export.

Under them a forward pass waits for every other process, so that ranks which make unequal numbers of them, as searches
do, would wait for ever, and one rank alone sees parts of the weights or none. `gather_model` and `gather_state` are the
two ways out; under all other engines they cost nothing.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from minionerec.common.files import InputError
from minionerec.common.processes import count_processes, say

SHARDING = ("FSDP2", "ZeRO-3")


def name_engine(accelerator: Accelerator) -> str:
    """The engine that really started: "one process", "DDP", "FSDP1", "FSDP2", or "ZeRO-0" to "ZeRO-3"."""
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED":
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    if kind == "FSDP":
        return "FSDP2" if accelerator.is_fsdp2 else "FSDP1"
    return "DDP" if accelerator.num_processes > 1 else "one process"


def is_sharding(accelerator: Accelerator) -> bool:
    """True where no process holds the whole weights while it trains."""
    return name_engine(accelerator) in SHARDING


def check_engine(accelerator: Accelerator, model: PreTrainedModel | PeftModel, *, moving_reference: bool) -> str:
    """Stop before the first step where the engine would not be the one asked for, or would train wrongly.

    Args:
        accelerator: of the trainer.
        model: what will be trained, not yet wrapped by the engine.
        moving_reference: the reference model of a run follows the policy.

    Returns:
        The name of the engine.

    Raises:
        InputError: what to do instead.
    """
    engine = name_engine(accelerator)
    for variable, family, hint in (
        ("ACCELERATE_USE_FSDP", "FSDP", "accelerate has no FSDP on CPUs; "),
        ("ACCELERATE_USE_DEEPSPEED", "ZeRO", ""),
    ):
        if os.environ.get(variable, "").lower() == "true" and not engine.startswith(family):
            raise InputError(
                f"the file of accelerate asks for {'DeepSpeed' if family == 'ZeRO' else family}, but {engine} started: "
                f"{hint}use config/accelerate/ddp.yaml or torchrun"
            )
    if count_processes() != accelerator.num_processes:
        raise InputError(
            f"the launcher announced {count_processes()} processes, but {accelerator.num_processes} found each other"
        )
    if engine == "FSDP1":
        raise InputError("FSDP version 1 is not supported: write fsdp_version: 2, as config/accelerate/fsdp2.yaml does")
    if engine == "FSDP2" and isinstance(model, PeftModel) and model.config.tie_word_embeddings:
        raise InputError(
            "FSDP2 with --lora or --freeze_LLM: the base ties its output layer to the embedding, which accelerate "
            "would shard twice; use config/accelerate/zero3.yaml, zero2.yaml or ddp.yaml"
        )
    if moving_reference and engine in SHARDING:
        raise InputError(
            f"--sync_ref_model True: not under {engine}, whose policy is in parts; use zero2.yaml or ddp.yaml"
        )
    return engine


def check_resumable(checkpoint: str | Path, engine: str, world: int) -> None:
    """Stop before a checkpoint of another engine is resumed, which would leave its optimizer state out, or fail late.

    Args:
        checkpoint: a checkpoint-N folder.
        engine: of this run, see `name_engine`.
        world: processes of this run.

    Raises:
        InputError: how to launch the run instead.
    """
    folder = Path(checkpoint)
    written, processes = "DDP", None
    if (folder / "latest").is_file():
        states = [path.name for path in folder.glob("global_step*/*.pt")]
        written = "ZeRO-3" if any("zero_pp" in name and "model_states" in name for name in states) else "ZeRO-2"
        processes = sum("optim_states" in name for name in states)
    elif (folder / "pytorch_model_fsdp.bin").is_file() or (folder / "optimizer.bin").is_file():
        written = "FSDP2"
    same = written == engine or (written, engine) in (("DDP", "one process"), ("ZeRO-2", "ZeRO-1"))
    if not same or processes not in (None, world):
        by = {"DDP": "DDP or one process"}.get(written, written)
        by = f"{processes} processes of {written}" if processes else by
        raise InputError(
            f"{checkpoint}: written by {by}, and this run is {engine} with {world}; launch it as before, or begin anew "
            "with --force True"
        )


def announce_engine(engine: str, accelerator: Accelerator) -> None:
    """One line at the start of a run: how many processes share it, by which engine, and on what."""
    world = accelerator.num_processes
    say(f"[launch] {world} process{'es' if world > 1 else ''}, engine: {engine}, device: {accelerator.device.type}")


def copy_before_sharding(accelerator: Accelerator, model: PreTrainedModel | PeftModel) -> PeftModel | None:
    """A plain copy of a model with adapters on the main process, into which `gather_state` is loaded to be merged.

    Adapters cannot be merged into parts of weights. Where nothing needs the copy it is None.
    """
    if not (accelerator.is_main_process and is_sharding(accelerator) and isinstance(model, PeftModel)):
        return None
    return copy.deepcopy(model).cpu()


@contextmanager
def gather_model(trainer: Trainer) -> Iterator[PreTrainedModel | PeftModel]:
    """The plain policy with whole weights; entered and left by all processes together.

    Forward passes without gradients need no other process inside, so that each may make as many as it has prompts.
    Weights are gathered once, on entering.
    """
    engine, wrapped = name_engine(trainer.accelerator), trainer.model_wrapped
    if engine == "ZeRO-3" and wrapped is not trainer.model:  # before training starts the model is still whole
        from trl.models.utils import unwrap_model_for_generation

        with unwrap_model_for_generation(wrapped, trainer.accelerator) as model:
            yield model
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    with _unshard(model):
        yield model


@contextmanager
def _unshard(model: torch.nn.Module) -> Iterator[None]:
    """Keep the weights of all FSDP2 modules whole; a model without any is left as it is."""
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for module in parts for group in module._get_fsdp_state()._fsdp_param_groups]
    # `set_reshard_after_forward` has no counterpart that reads; some groups are never resharded after a forward pass.
    before = [group.post_forward_mesh_info for group in groups]
    for module in parts:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for group, mesh in zip(groups, before, strict=True):
            group.post_forward_mesh_info = mesh
        for module in parts:
            module.reshard()


def gather_state(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """The whole state dictionary of the trained model, under the names that it has without an engine.

    Called by all processes; only the main one gets it. A weight that is tied to the embedding is left out.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return None
    tied = getattr(trainer.accelerator.unwrap_model(trainer.model), "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in state.items() if name not in tied}


def leave_zero3() -> None:
    """Let models that are loaded from now on be whole ones: while ZeRO-3 is set up they come in parts."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
