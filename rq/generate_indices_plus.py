r"""Semantic IDs from an RQ-KMeans+ checkpoint; rq.generate_indices does the same for a checkpoint of any method.

python -m rq.generate_indices_plus --ckpt_path DIR/best_collision_model.pth --data_path DIR/NAME.emb-PLM-td.npy \
    --output_file DIR/NAME.index.json
"""

from __future__ import annotations

from minionerec.common.cli import parse_flags, run_command
from rq.settings import IndexPlusFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(IndexPlusFlags)

from rq.index.write import make_frozen_index
from rq.models.rqkmeans import RQKMeansPlus


def generate_indices_plus(flags: IndexPlusFlags) -> None:
    """Write the index of an RQ-KMeans+ checkpoint; a checkpoint of another method is refused."""
    make_frozen_index("generate_indices_plus", flags, expected=RQKMeansPlus)


if __name__ == "__main__":
    run_command(generate_indices_plus, FLAGS)
