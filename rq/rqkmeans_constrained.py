"""Constrained RQ-KMeans: residual k-means with clusters of near-equal size on every level.

python -m rq.rqkmeans_constrained --data_path DIR/NAME.emb-PLM-td.npy --output_file DIR/NAME.index.json
"""

from __future__ import annotations

import torch

from minionerec.common.cli import run
from minionerec.common.files import InputError
from rq.kmeans.balanced import balanced_kmeans
from rq.kmeans.residual import run_method

ENGINES = ("balanced", "min_cost_flow")


def min_cost_flow_kmeans(
    x: torch.Tensor, n_clusters: int, iterations: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means of x [n, dim] whose every assignment is a minimum-cost flow (Bradley et al. 2000), by k-means-constrained.

    Returns (centres [K, dim], cluster of each row [n]); sizes are n // K or one more. Exact, for some 10,000 rows at most.
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


def main(
    data_path: str,
    output_file: str,
    num_levels: int | None = None,
    codebook_size: list[int] | None = None,
    iterations: int = 100,
    engine: str = "balanced",
    collisions: list[str] | None = None,
    sk_epsilon: float = 0.003,
    sk_iters: int = 100,
    repair_rounds: int = 20,
    device: str | None = None,
    seed: int = 42,
    force: bool = False,
) -> None:
    """Write the index, its quality report and NAME.index.codebooks.npz.

    num_levels: default 3; codebook_size: codes of every level, or a list with one number per level; default 256
    iterations: k-means rounds per level, at most
    engine: balanced (rq/balanced_kmeans.py, any size, CPU or GPU) or min_cost_flow (exact assignments, small data, CPU)
    collisions, sk_epsilon, sk_iters, repair_rounds: as in rq.generate_indices; default extra_token
    """
    settings = {**locals(), "collisions": collisions or ["extra_token"]}
    if iterations < 1:
        raise InputError(f"--iterations {iterations}: expected 1 or more")
    if engine not in ENGINES:
        raise InputError(f"--engine {engine}: expected one of {', '.join(ENGINES)}")
    kmeans = balanced_kmeans if engine == "balanced" else min_cost_flow_kmeans

    def cluster(x: torch.Tensor, n_clusters: int, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        return kmeans(x, n_clusters, iterations=iterations, seed=seed + level)

    run_method("rqkmeans_constrained", settings, cluster)


if __name__ == "__main__":
    run(main)
