"""Train an RQ-VAE on item embeddings.

python -m rq.rqvae --data_path DIR/NAME.emb-PLM-td.npy --ckpt_dir DIR/rqvae
"""

from __future__ import annotations

from minionerec.common.cli import run
from rq.models.rqvae import RQVAE
from rq.trainer import train


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
    revive_every: int = 0,
    bf16: bool = False,
    seed: int = 42,
    force: bool = False,
) -> None:
    """Train; CKPT_DIR then holds best_loss_model.pth, best_collision_model.pth, final_model.pth, the last checkpoints.

    num_emb_list: codes per level, default 256,256,256; layers: hidden widths, default 2048,1024,512,256,128,64
    eval_step: epochs between collision rates and checkpoints; save_limit: checkpoints kept besides the best
    learner: adamw, adam, sgd, adagrad, rmsprop; lr_scheduler_type: constant, linear, cosine, each after warmup_epochs
    sk_epsilons: Sinkhorn regularisation per level while training, 0 for none (default); sk_iters: its rounds
    max_norm: gradients are clipped to this norm; device: default cuda where there is one
    revive_every: every so many epochs, codes that no item uses move to items that are fitted badly; 0: never
    bf16: run the MLPs in bfloat16 autocast, for GPUs; weights, distances and losses stay float32
    """
    num_emb_list = num_emb_list or [256, 256, 256]
    layers = [2048, 1024, 512, 256, 128, 64] if layers is None else layers
    settings = dict(locals())
    train(
        "rqvae",
        settings,
        lambda in_dim: RQVAE(
            in_dim,
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
        ),
    )


if __name__ == "__main__":
    run(main)
