"""Semantic IDs from an RQ-KMeans+ checkpoint.

python -m rq.generate_indices_plus --ckpt_path DIR/best_collision_model.pth --data_path DIR/NAME.emb-PLM-td.npy \\
    --output_file DIR/NAME.index.json
"""

from __future__ import annotations

from minionerec.common.cli import run
from rq.index.write import generate_index
from rq.models.rqkmeans import RQKMeansPlus


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
    """Flags and files of rq.generate_indices; a checkpoint of another method is refused."""
    generate_index("generate_indices_plus", dict(locals()), only=RQKMeansPlus)


if __name__ == "__main__":
    run(main)
