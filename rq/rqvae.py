"""Train an RQ-VAE on item embeddings.

python -m rq.rqvae --data_path DIR/NAME.emb-PLM-td.npy --ckpt_dir DIR/rqvae
"""

from __future__ import annotations

from pathlib import Path

import torch

import cli
from fileio import InputError
from rq.models.rqvae import LOSSES, RQVAE
from rq.text2emb.amazon_text2emb import load_embeddings, side_file
from rq.trainer import BEST_COLLISION, BEST_LOSS, Trainer, TrainerSettings


def pick_device(device: str | None) -> torch.device:
    """The named device, or cuda where there is one, else cpu. InputError when it cannot be used."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: cannot be used here ({str(error).splitlines()[0]})") from None
    return chosen


def main(
    data_path: str,
    ckpt_dir: str,
    lr: float = 1e-3,
    epochs: int = 10_000,
    batch_size: int = 20_480,
    eval_step: int = 50,
    learner: str = "AdamW",
    lr_scheduler_type: str = "constant",
    warmup_epochs: int = 50,
    weight_decay: float = 1e-4,
    max_norm: float = 1.0,
    dropout_prob: float = 0.0,
    bn: bool = False,
    loss_type: str = "mse",
    kmeans_init: bool = True,
    kmeans_iters: int = 100,
    sk_epsilons: list[float] | None = None,
    sk_iters: int = 50,
    device: str | None = None,
    num_emb_list: list[int] | None = None,
    e_dim: int = 32,
    quant_loss_weight: float = 1.0,
    beta: float = 0.25,
    layers: list[int] | None = None,
    save_limit: int = 2,
    seed: int = 42,
    force: bool = False,
) -> None:
    """Train; CKPT_DIR then holds best_loss_model.pth, best_collision_model.pth and the last checkpoints.

    num_emb_list: codes per level, default 256,256,256; layers: hidden widths, default 2048,1024,512,256,128,64
    eval_step: epochs between collision rates and checkpoints; save_limit: checkpoints kept besides the best
    learner: adamw, adam, sgd, adagrad, rmsprop; lr_scheduler_type: constant, linear, cosine, each after warmup_epochs
    sk_epsilons: Sinkhorn regularisation per level while training, 0 for none (default); sk_iters: its rounds
    max_norm: gradients are clipped to this norm; device: default cuda where there is one
    """
    num_emb_list = num_emb_list or [256, 256, 256]
    layers = [2048, 1024, 512, 256, 128, 64] if layers is None else layers
    settings = dict(locals())
    trainer_settings = TrainerSettings(
        ckpt_dir,
        lr,
        epochs,
        batch_size,
        eval_step,
        learner,
        lr_scheduler_type,
        warmup_epochs,
        weight_decay,
        max_norm,
        save_limit,
        seed,
    )
    trainer_settings.check()
    if min([*num_emb_list, *layers, e_dim, kmeans_iters, sk_iters]) < 1:
        raise InputError("--num_emb_list, --layers, --e_dim, --kmeans_iters and --sk_iters must be at least 1")
    if sk_epsilons and (len(sk_epsilons) != len(num_emb_list) or min(sk_epsilons) < 0):
        raise InputError(f"--sk_epsilons: expected {len(num_emb_list)} numbers of 0 or more, got {sk_epsilons}")
    if loss_type not in LOSSES:
        raise InputError(f"--loss_type {loss_type}: expected one of {', '.join(LOSSES)}")
    if not 0 <= dropout_prob < 1:
        raise InputError(f"--dropout_prob {dropout_prob}: expected a number from 0 to below 1")
    chosen = pick_device(device)
    array, _ = load_embeddings(data_path, "data_path")
    if bn and min(len(array), batch_size) == 1 or bn and len(array) % batch_size == 1:
        raise InputError("--bn: the last batch would hold one item; choose another --batch_size")
    folder = Path(ckpt_dir)
    stage = cli.Stage(
        "rqvae",
        settings,
        [data_path, side_file(data_path)],
        [folder / BEST_LOSS, folder / BEST_COLLISION],
        folder / "rqvae.stage.json",
        force,
    )
    if stage.finished:
        return
    torch.manual_seed(seed)
    model = RQVAE(
        array.shape[1],
        num_emb_list,
        e_dim,
        layers,
        dropout_prob,
        bn,
        loss_type,
        quant_loss_weight,
        beta,
        kmeans_init,
        kmeans_iters,
        sk_epsilons,
        sk_iters,
    ).to(chosen)
    trainer = Trainer(model, trainer_settings, stage.tick)
    if stage.resuming and trainer.resume():
        cli.say(f"  from epoch {trainer.epoch}")
    elif not stage.resuming:
        trainer.clear()
    best_loss, best_collision = trainer.fit(torch.from_numpy(array).to(chosen))
    stage.done(items=len(array), best_loss=round(best_loss, 6), best_collision_rate=round(best_collision, 6))


if __name__ == "__main__":
    cli.run(main)
