"""RQ-KMeans: residual k-means by faiss.

python -m rq.rqkmeans_faiss --data_path DIR/NAME.emb-PLM-td.npy --output_file DIR/NAME.index.json
"""

from __future__ import annotations

import faiss
import torch

from minionerec.common.cli import run
from minionerec.common.files import InputError
from rq.kmeans.assignment import balanced_assign
from rq.kmeans.residual import run_method


def faiss_kmeans(x: torch.Tensor, n_clusters: int, iterations: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means over all of x [n, dim]. Returns (centres [K, dim], nearest centre of each row [n]) on the device of x."""
    points = x.cpu().numpy()
    # By default faiss warns below 39 points a centre and samples 256 a centre; here every point counts.
    kmeans = faiss.Kmeans(
        points.shape[1],
        n_clusters,
        niter=iterations,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(x),
    )
    kmeans.train(points)
    labels = kmeans.assign(points)[1]
    return torch.from_numpy(kmeans.centroids).to(x.device), torch.from_numpy(labels).to(x.device)


def uniform_mapping(x: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [n, dim] assigned to centres [K, dim] in numbers n // K or one more, at least total distance (nearly).

    Returns (the means of the items of each centre, since those are what a code then stands for; labels [n]).
    """
    labels = balanced_assign(x, centres)[0]
    sums = torch.zeros_like(centres, dtype=torch.float64).index_add_(0, labels, x.double())
    return (sums / torch.bincount(labels, minlength=len(centres))[:, None]).to(x.dtype), labels


def main(
    data_path: str,
    output_file: str,
    num_levels: int | None = None,
    codebook_size: list[int] | None = None,
    iterations: int = 50,
    uniform: bool = False,
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
    iterations: k-means rounds per level (on the CPU; device is where the rest runs)
    uniform: assign the items of each level to its centres in equal numbers, at least total distance; a code then is the
        mean of its items
    collisions, sk_epsilon, sk_iters, repair_rounds: as in rq.generate_indices; default nearest_free
    """
    settings = {**locals(), "collisions": collisions or ["nearest_free"]}
    if iterations < 1:
        raise InputError(f"--iterations {iterations}: expected 1 or more")

    def cluster(x: torch.Tensor, n_clusters: int, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        centres, labels = faiss_kmeans(x, n_clusters, iterations, seed + level)
        return uniform_mapping(x, centres) if uniform else (centres, labels)

    run_method("rqkmeans_faiss", settings, cluster)


if __name__ == "__main__":
    run(main)
