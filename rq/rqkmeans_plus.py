"""RQ-KMeans+: an RQ-VAE with residual encoder, warm-started from the codebooks of a k-means run, trained on embeddings.

python -m rq.rqkmeans_plus --data_path DIR/NAME.emb-PLM-td.npy --pretrained_codebook_path DIR/NAME.index.codebooks.npz \\
    --ckpt_dir DIR/rqkmeans_plus
"""

from __future__ import annotations

from minionerec.common.cli import run
from minionerec.common.files import InputError
from rq.index.codebook import load_codebooks
from rq.models.rqkmeans import RQKMeansPlus
from rq.trainer import train


def main(
    data_path: str,
    pretrained_codebook_path: str,
    ckpt_dir: str,
    lr: float = 1e-4,
    epochs: int = 5_000,
    batch_size: int = 2_048,
    eval_step: int = 50,
    learner: str = "AdamW",
    lr_scheduler_type: str = "constant",
    warmup_epochs: int = 50,
    weight_decay: float = 0.0,
    max_norm: float = 1.0,
    dropout_prob: float = 0.0,
    bn: bool = False,
    loss_type: str = "mse",
    sk_epsilons: list[float] | None = None,
    sk_iters: int = 50,
    device: str | None = None,
    quant_loss_weight: float = 1.0,
    beta: float = 0.25,
    layers: list[int] | None = None,
    save_limit: int = 5,
    revive_every: int = 0,
    bf16: bool = False,
    seed: int = 42,
    force: bool = False,
) -> None:
    """Train z = x + MLP(x) and the codes of a k-means run; checkpoints and the other flags are those of rq.rqvae.

    pretrained_codebook_path: .npz of rq.rqkmeans_faiss or rq.rqkmeans_constrained; it sets levels and codes per level
    layers: hidden widths of both MLPs, default 2048,1024,512,256,128,64
    """
    codebooks = load_codebooks(pretrained_codebook_path, "pretrained_codebook_path")
    layers = [2048, 1024, 512, 256, 128, 64] if layers is None else layers
    settings = {**locals(), "num_emb_list": [len(codes) for codes in codebooks]}
    del settings["codebooks"]

    def build(in_dim: int) -> RQKMeansPlus:
        if codebooks[0].shape[1] != in_dim:
            raise InputError(
                f"--pretrained_codebook_path {pretrained_codebook_path}: codes of width {codebooks[0].shape[1]}, "
                f"but the embeddings of {data_path} have {in_dim} columns"
            )
        model = RQKMeansPlus(
            in_dim,
            settings["num_emb_list"],
            layers,
            dropout_prob=dropout_prob,
            bn=bn,
            loss_type=loss_type,
            quant_loss_weight=quant_loss_weight,
            beta=beta,
            sk_epsilons=sk_epsilons,
            sk_iters=sk_iters,
        )
        model.start_from(codebooks)
        return model

    train("rqkmeans_plus", settings, build, (pretrained_codebook_path,))


if __name__ == "__main__":
    run(main)
