"""Semantic IDs from a frozen codebook: of all items, or of new items for an existing index.

    python -m rq.generate_indices --ckpt_path DIR/best_collision_model.pth --data_path DIR/NAME.emb-PLM-td.npy \
        --output_file DIR/NAME.index.json
    python -m rq.generate_indices --ckpt_path DIR/best_collision_model.pth --data_path DIR/NEW.emb-PLM-td.npy \
        --append_to DIR/NAME.index.json --output_file DIR/NEW.index.json
"""

from __future__ import annotations

from minionerec.common.cli import run
from rq.index.write import generate_index


def main(
    ckpt_path: str,
    data_path: str,
    output_file: str,
    append_to: str | None = None,
    collisions: list[str] | None = None,
    sk_epsilon: float = 0.003,
    sk_iters: int = 100,
    repair_rounds: int = 20,
    batch_size: int = 4096,
    device: str | None = None,
    force: bool = False,
) -> None:
    """Write {item id: [SID tokens]} and the quality report beside it.

    ckpt_path: an RQ-VAE or RQ-KMeans+ checkpoint, or the .npz codebooks of a k-means method
    append_to: an index made with this codebook; its SIDs are kept, the items of data_path that it lacks are added
    collisions: what happens to items that share a SID; default sinkhorn,nearest_free (with append_to: nearest_free)
        none: nothing; sinkhorn: spread over the last level, up to repair_rounds rounds, may leave some
        nearest_free: to the nearest free last-level code of the prefix, one more token where the prefix is full
        extra_token: one more token for every item of a shared SID; sinkhorn,extra_token: what is left after sinkhorn
    sk_epsilon, sk_iters: regularisation and scalings of the sinkhorn step
    """
    generate_index("generate_indices", dict(locals()))


if __name__ == "__main__":
    run(main)
