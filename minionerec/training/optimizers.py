"""The optimizers of --optim: which names can run here, and under which engines."""

from __future__ import annotations

import difflib
from types import SimpleNamespace

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer
from transformers.training_args import OptimizerNames

from minionerec.common.files import InputError
from minionerec.common.processes import process_state, say
from minionerec.language.quantization import is_in_4bit

PLAIN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
# Beginnings of names that this project's trainers cannot use, and why.
UNUSABLE = {
    "galore": "it needs a list of target modules, for which there is no flag; --lora True saves that memory too",
    "apollo": "it needs a list of target modules, for which there is no flag; --lora True saves that memory too",
    "lomo": "it updates weights within the backward pass, while gradients here are summed over several passes",
    "adalomo": "it updates weights within the backward pass, while gradients here are summed over several passes",
    "schedule_free": "it keeps other weights for evaluation than for training, which searches and export do not swap",
}


def check_optimizer(name: str) -> None:
    """Stop before the run starts where the optimizer cannot run on this machine: it takes one step here.

    Args:
        name: of transformers' `OptimizerNames`.

    Raises:
        InputError: an unknown name, one whose package is missing, or one that fails on this device.
    """
    names = [known.value for known in OptimizerNames]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names
        raise InputError(f"--optim {name}: transformers has none of this name; it has {', '.join(near)}")
    reason = next((reason for start, reason in UNUSABLE.items() if name.startswith(start)), None)
    if reason:
        raise InputError(f"--optim {name}: {reason}")
    if name in PLAIN_OPTIMIZERS:
        return
    device = process_state().device
    try:
        _take_a_step(name, device)
    except Exception as error:  # of whatever package the optimizer comes from
        text = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"--optim {name}: cannot run here ({text})") from None
    if name.startswith("paged") and device.type == "cpu":
        say(f"--optim {name}: there are no pages on a CPU; the state is kept as by {name.removeprefix('paged_')}")


def _take_a_step(name: str, device: torch.device) -> None:
    """One step on a matrix that is large enough for 8-bit states."""
    weight = torch.nn.Parameter(torch.ones(128, 128, device=device))
    arguments = SimpleNamespace(
        optim=OptimizerNames(name),
        optim_args=None,
        optim_target_modules=None,
        learning_rate=1e-3,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=0.0,
    )
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, None)
    optimizer = kind([weight], **options)
    (weight**2).sum().backward()
    optimizer.step()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("its first step gives numbers that are not finite")


def check_engine_savers(engine: str, optimizer: str, model: PreTrainedModel | PeftModel) -> None:
    """Stop where a memory saver does not work under the engine.

    Args:
        engine: see `name_engine`.
        optimizer: --optim.
        model: what will be trained.

    Raises:
        InputError: what to leave out.
    """
    if engine in ("one process", "DDP"):
        return
    if is_in_4bit(model):
        raise InputError(f"--load_in_4bit True: not under {engine}; use config/accelerate/ddp.yaml or one process")
    optimizer = OptimizerNames(optimizer).value
    if optimizer not in PLAIN_OPTIMIZERS:
        raise InputError(f"--optim {optimizer}: not under {engine}, which takes {' or '.join(PLAIN_OPTIMIZERS)}")
