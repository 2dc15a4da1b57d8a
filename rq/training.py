"""What the commands rq.rqvae and rq.rqkmeans_plus share: flags checked, the model trained, the stage recorded."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Callable

import torch

import cli
from embeddings import side_file
from fileio import InputError
from rq.codebook import load_items, pick_device
from rq.models.rqvae import LOSSES, RQVAE
from rq.trainer import BEST_COLLISION, BEST_LOSS, FINAL, Trainer, TrainerSettings


def check_model_flags(settings: dict[str, Any]) -> None:
    """InputError for a value that no model can be built with."""
    levels = settings["num_emb_list"]
    counts = [settings[name] for name in ("e_dim", "kmeans_iters", "sk_iters") if name in settings]
    if min([*levels, *settings["layers"], *counts]) < 1:
        raise InputError("--num_emb_list, --layers, --e_dim, --kmeans_iters and --sk_iters must be at least 1")
    epsilons = settings["sk_epsilons"]
    if epsilons and (len(epsilons) != len(levels) or min(epsilons) < 0):
        raise InputError(f"--sk_epsilons: expected {len(levels)} numbers of 0 or more, got {epsilons}")
    if settings["loss_type"] not in LOSSES:
        raise InputError(f"--loss_type {settings['loss_type']}: expected one of {', '.join(LOSSES)}")
    if not 0 <= settings["dropout_prob"] < 1:
        raise InputError(f"--dropout_prob {settings['dropout_prob']}: expected a number from 0 to below 1")


def train(command: str, settings: dict[str, Any], build: Callable[[int], RQVAE], inputs: tuple[str, ...] = ()) -> None:
    """Train build(in_dim) on settings["data_path"] into settings["ckpt_dir"], resuming a run that was cut off.

    settings: the command's flags; inputs: files it reads besides the embeddings.
    """
    trainer_settings = TrainerSettings(**{field.name: settings[field.name] for field in fields(TrainerSettings)})
    trainer_settings.check()
    check_model_flags(settings)
    device = pick_device(settings["device"])
    data_path, folder = settings["data_path"], Path(settings["ckpt_dir"])
    array, _ = load_items(data_path, "data_path")
    if settings["bn"] and 1 in (min(len(array), settings["batch_size"]), len(array) % settings["batch_size"]):
        raise InputError("--bn: the last batch would hold one item; choose another --batch_size")
    stage = cli.Stage(
        command,
        settings,
        [data_path, side_file(data_path), *inputs],
        [folder / BEST_LOSS, folder / BEST_COLLISION, folder / FINAL],
        folder / f"{command}.stage.json",
        settings["force"],
    )
    if stage.finished:
        return
    torch.manual_seed(settings["seed"])
    trainer = Trainer(build(array.shape[1]).to(device), trainer_settings, stage.tick)
    if stage.resuming and trainer.resume():
        cli.say(f"  from epoch {trainer.epoch}")
    elif not stage.resuming:
        trainer.clear()
    best_loss, best_collision = trainer.fit(torch.from_numpy(array).to(device))
    stage.done(items=len(array), best_loss=round(best_loss, 6), best_collision_rate=round(best_collision, 6))
