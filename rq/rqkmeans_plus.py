"""RQ-KMeans+: an RQ-VAE with residual encoder, started from the codebooks of a k-means run.

python -m rq.rqkmeans_plus --data_path DIR/NAME.emb-PLM-td.npy --ckpt_dir DIR/rqkmeans_plus \\
    --pretrained_codebook_path DIR/NAME.index.codebooks.npz

Encoder and decoder are z = x + MLP(x); rq.generate_indices_plus makes semantic IDs of the trained codes.
"""

from __future__ import annotations

from dataclasses import replace

from minionerec.common.cli import parse_flags, run_command
from minionerec.common.files import InputError
from rq.settings import RQKMeansPlusFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(RQKMeansPlusFlags)

from rq.index.codebook import load_codebooks
from rq.models.rqkmeans import RQKMeansPlus
from rq.trainer import train_autoencoder


def train_rqkmeans_plus(flags: RQKMeansPlusFlags) -> None:
    """Train the residual MLPs and the codes of a k-means run (introduced with GPR, 2025).

    Raises:
        InputError: codebooks that do not fit the embeddings, --num_emb_list or --e_dim.
    """
    path = flags.pretrained_codebook_path
    codebooks = load_codebooks(path, "pretrained_codebook_path")
    sizes, width = [len(codes) for codes in codebooks], codebooks[0].shape[1]
    if flags.num_emb_list not in (None, sizes):
        given = ",".join(map(str, flags.num_emb_list))
        raise InputError(f"--num_emb_list {given}: {path} has {','.join(map(str, sizes))} codes per level")
    if flags.e_dim not in (None, width):
        raise InputError(f"--e_dim {flags.e_dim}: the codes of {path} have width {width}")
    flags = replace(flags, num_emb_list=sizes)

    def build_model(in_dim: int) -> RQKMeansPlus:
        if width != in_dim:
            raise InputError(
                f"--pretrained_codebook_path {path}: codes of width {width}, "
                f"but the embeddings of {flags.data_path} have {in_dim} columns"
            )
        model = RQKMeansPlus(
            in_dim,
            sizes,
            layers=flags.layers,
            dropout_prob=flags.dropout_prob,
            bn=flags.bn,
            loss_type=flags.loss_type,
            quant_loss_weight=flags.quant_loss_weight,
            beta=flags.beta,
            sk_epsilons=flags.sk_epsilons,
            sk_iters=flags.sk_iters,
        )
        model.start_from(codebooks)
        return model

    train_autoencoder("rqkmeans_plus", flags, build_model, path)


if __name__ == "__main__":
    run_command(train_rqkmeans_plus, FLAGS, shared=True)
