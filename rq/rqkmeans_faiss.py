"""RQ-KMeans: residual k-means by faiss.

python -m rq.rqkmeans_faiss --data_path DIR/NAME.emb-PLM-td.npy --output_file DIR/NAME.index.json
python -m rq.rqkmeans_faiss --dataset NAME     for embeddings in data/Amazon/index/NAME.emb-qwen-td.npy

Writes the index, its quality report and NAME.index.codebooks.npz. faiss runs on the CPU, the rest on --device.
"""

from __future__ import annotations

from pathlib import Path

from minionerec.common.cli import parse_flags, run_command
from rq.settings import RQKMeansFaissFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(RQKMeansFaissFlags)

import faiss
import torch

from rq.kmeans.assignment import balanced_assign
from rq.kmeans.residual import make_kmeans_index, resolve_files

PUBLISHED_FOLDER = Path("data/Amazon/index")  # of the embeddings


def faiss_kmeans(x: torch.Tensor, n_clusters: int, iterations: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means over all of x [n, dim].

    Returns:
        The centres [K, dim] and the nearest centre of each row [n], on the device of x.
    """
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


def map_uniformly(x: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [n, dim] assigned to centres [K, dim] in numbers n // K or one more, at least total distance (nearly).

    Returns:
        The means [K, dim] of the items of each centre, since those are what a code then stands for, and the labels [n].
    """
    labels = balanced_assign(x, centres)[0]
    sums = torch.zeros_like(centres, dtype=torch.float64).index_add_(0, labels, x.double())
    return (sums / torch.bincount(labels, minlength=len(centres))[:, None]).to(x.dtype), labels


def make_rqkmeans_faiss(flags: RQKMeansFaissFlags) -> None:
    """Cluster the embeddings level by level and write the index, its report and the codebooks."""
    folder = Path(flags.output_root) / f"{flags.dataset}"
    flags = resolve_files(
        flags,
        embeddings=PUBLISHED_FOLDER / f"{flags.dataset}.emb-qwen-td.npy",
        index=folder / f"{flags.dataset}.faiss-rq.index.json",
    )

    def cluster(x: torch.Tensor, n_clusters: int, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        centres, labels = faiss_kmeans(x, n_clusters, flags.iterations, flags.seed + level)
        return map_uniformly(x, centres) if flags.uniform else (centres, labels)

    make_kmeans_index("rqkmeans_faiss", flags, cluster)


if __name__ == "__main__":
    run_command(make_rqkmeans_faiss, FLAGS)
