r"""Semantic IDs from a frozen codebook: of all items, or of new items for an existing index.

python -m rq.generate_indices --ckpt_path DIR/best_collision_model.pth --data_path DIR/NAME.emb-PLM-td.npy \
    --output_file DIR/NAME.index.json
python -m rq.generate_indices --ckpt_path DIR/best_collision_model.pth --data_path DIR/NEW.emb-PLM-td.npy \
    --append_to DIR/NAME.index.json --output_file DIR/NEW.index.json

Writes {item id: [SID tokens]} and the quality report beside it.
"""

from __future__ import annotations

from minionerec.common.cli import parse_flags, run_command
from rq.settings import IndexFlags

if __name__ == "__main__":
    FLAGS = parse_flags(IndexFlags)  # before the import below, which takes seconds

from rq.index.write import make_frozen_index


def generate_indices(flags: IndexFlags) -> None:
    """Write the index of an RQ-VAE, an RQ-KMeans+ model or the codebooks of a k-means method."""
    make_frozen_index("generate_indices", flags)


if __name__ == "__main__":
    run_command(generate_indices, FLAGS)
