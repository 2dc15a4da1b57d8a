"""Constrained RQ-KMeans: residual k-means with clusters of near-equal size on every level.

python -m rq.rqkmeans_constrained --data_path DIR/NAME.emb-PLM-td.npy --output_file DIR/NAME.index.json
python -m rq.rqkmeans_constrained --root DIR --dataset NAME     for embeddings in DIR/NAME.emb-qwen-td.npy

Writes the index, its quality report and NAME.index.codebooks.npz.
"""

from __future__ import annotations

from pathlib import Path

from minionerec.common.cli import parse_flags, run_command
from rq.settings import RQKMeansConstrainedFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(RQKMeansConstrainedFlags)

import torch

from rq.kmeans.balanced import balanced_kmeans
from rq.kmeans.residual import make_kmeans_index, resolve_files


def min_cost_flow_kmeans(
    x: torch.Tensor, n_clusters: int, iterations: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means of x [n, dim] whose every assignment is a minimum-cost flow (Bradley et al. 2000).

    By k-means-constrained: exact, for some 10,000 rows at most.

    Returns:
        The centres [K, dim] and the cluster of each row [n]; sizes are n // K or one more.
    """
    from k_means_constrained import KMeansConstrained

    smallest, rest = divmod(len(x), n_clusters)
    kmeans = KMeansConstrained(
        n_clusters,
        size_min=smallest,
        size_max=smallest + (rest > 0),
        n_init=1,
        max_iter=iterations,
        random_state=seed,
    )
    labels = torch.from_numpy(kmeans.fit_predict(x.double().cpu().numpy())).long()
    centres = torch.from_numpy(kmeans.cluster_centers_).to(x)
    return centres, labels.to(x.device)


ENGINES = {"balanced": balanced_kmeans, "min_cost_flow": min_cost_flow_kmeans}


def make_rqkmeans_constrained(flags: RQKMeansConstrainedFlags) -> None:
    """Cluster the embeddings level by level and write the index, its report and the codebooks."""
    flags = resolve_files(
        flags,
        embeddings=Path(flags.root) / f"{flags.dataset}.emb-qwen-td.npy",
        index=Path(flags.root) / f"{flags.dataset}.index.json",
    )

    def cluster(x: torch.Tensor, n_clusters: int, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        return ENGINES[flags.engine](x, n_clusters, iterations=flags.iterations, seed=flags.seed + level)

    make_kmeans_index("rqkmeans_constrained", flags, cluster)


if __name__ == "__main__":
    run_command(make_rqkmeans_constrained, FLAGS)
