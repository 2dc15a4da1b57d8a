"""A SID method of one's own: on every level, codes stand at items that are far from each other.

python -m docs.examples.sid_method --data_path DIR/NAME.emb-tfidf-td.npy --output_file OUT/NAME.index.json
"""

from minionerec.common.cli import parse_flags, run_command
from rq.settings import KMeansFlags

if __name__ == "__main__":
    FLAGS = parse_flags(KMeansFlags)

from dataclasses import replace

import torch

from rq.kmeans.residual import make_kmeans_index


def cluster_by_farthest_points(x, n_codes, level):
    """(centres [n_codes, dim], code of each item [n]) of the residuals x [n, dim] of one level."""
    centres = [x[x.norm(dim=1).argmax()]]
    distances = (x - centres[0]).norm(dim=1)
    for _ in range(n_codes - 1):
        centres.append(x[distances.argmax()])
        distances = torch.minimum(distances, (x - centres[-1]).norm(dim=1))
    centres = torch.stack(centres)
    return centres, torch.cdist(x, centres).argmin(dim=1)


def make_index(flags: KMeansFlags) -> None:
    flags = replace(flags, collisions=flags.collisions or ["nearest_free"])
    make_kmeans_index("farthest_points", flags, cluster_by_farthest_points)


if __name__ == "__main__":
    run_command(make_index, FLAGS)
