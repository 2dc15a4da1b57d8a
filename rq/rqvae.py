"""Train an RQ-VAE on item embeddings: the first step of semantic IDs; rq.generate_indices is the second.

python -m rq.rqvae --data_path DIR/NAME.emb-PLM-td.npy --ckpt_dir DIR/rqvae

CKPT_DIR then holds best_loss_model.pth, best_collision_model.pth, final_model.pth and the last checkpoints.
"""

from __future__ import annotations

from minionerec.common.cli import parse_flags, run_command
from rq.settings import RQVAEFlags

if __name__ == "__main__":
    FLAGS = parse_flags(
        RQVAEFlags
    )  # before the imports below, which take seconds: --help and a wrong flag answer at once

from rq.models.rqvae import RQVAE
from rq.trainer import train_autoencoder


def train_rqvae(flags: RQVAEFlags) -> None:
    """Train an RQ-VAE (Lee et al. 2022, arXiv 2203.01941; SIDs: Rajput et al. 2023, arXiv 2305.05065)."""

    def build_model(in_dim: int) -> RQVAE:
        return RQVAE(
            in_dim,
            flags.num_emb_list,
            e_dim=flags.e_dim,
            layers=flags.layers,
            dropout_prob=flags.dropout_prob,
            bn=flags.bn,
            loss_type=flags.loss_type,
            quant_loss_weight=flags.quant_loss_weight,
            beta=flags.beta,
            kmeans_init=flags.kmeans_init,
            kmeans_iters=flags.kmeans_iters,
            sk_epsilons=flags.sk_epsilons,
            sk_iters=flags.sk_iters,
        )

    train_autoencoder("rqvae", flags, build_model)


if __name__ == "__main__":
    run_command(train_rqvae, FLAGS, shared=True)
