"""Semantic IDs of all items from a trained RQ-VAE.

    python -m rq.generate_indices --ckpt_path DIR/best_collision_model.pth --data_path DIR/NAME.emb-PLM-td.npy \
        --output_file DIR/NAME.index.json
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import cli
from fileio import InputError, write_json
from rq.collisions import colliding_rows, collision_rate, extra_level, relocate, sid_tokens, sinkhorn_repair
from rq.models.rqvae import RQVAE
from rq.models.vq import squared_distances
from rq.rqvae import pick_device
from rq.text2emb.amazon_text2emb import load_embeddings, side_file
from rq.trainer import load_model


@torch.no_grad()
def quantise(model: RQVAE, array: np.ndarray, batch_size: int, device: torch.device) -> tuple[np.ndarray, torch.Tensor]:
    """Nearest codes [n, levels] of array [n, in_dim], and what the last level quantises, [n, e_dim] on the device."""
    codes, residuals = [], []
    for part in torch.from_numpy(array).split(batch_size):
        encoded = model.encoder(part.to(device))
        indices = model.rq(encoded, use_sk=False)[2]
        for level, layer in enumerate(model.rq.vq_layers[:-1]):
            encoded = encoded - layer.embedding(indices[:, level])
        codes.append(indices.cpu().numpy())
        residuals.append(encoded)
    return np.concatenate(codes), torch.cat(residuals)


def main(
    ckpt_path: str,
    data_path: str,
    output_file: str,
    dedup: bool = True,
    sk_epsilon: float = 0.003,
    sk_iters: int = 100,
    repair_rounds: int = 20,
    batch_size: int = 4096,
    device: str | None = None,
    force: bool = False,
) -> None:
    """Write {item id: [SID tokens]} and print how many items share a SID after each step.

    Nearest codes first; then up to repair_rounds rounds of Sinkhorn over the last level (regularisation sk_epsilon,
    sk_iters scalings) for the items that collide; then, with dedup, no two items share a SID: what still collides goes
    to free last-level codes of its prefix, and where a prefix is full, every item of a shared SID gets one more token.
    """
    settings = dict(locals())
    if sk_epsilon <= 0 or sk_iters < 1 or repair_rounds < 0 or batch_size < 1:
        raise InputError("expected --sk_epsilon above 0, --sk_iters and --batch_size >= 1, --repair_rounds >= 0")
    chosen = pick_device(device)
    output = Path(output_file)
    stage = cli.Stage(
        "generate_indices",
        settings,
        [ckpt_path, data_path, side_file(data_path)],
        [output],
        output.with_name(f"{output.name}.stage.json"),
        force,
    )
    if stage.finished:
        return
    model = load_model(ckpt_path).to(chosen)
    array, item_ids = load_embeddings(data_path, "data_path")
    in_dim = model.config["in_dim"]
    if array.shape[1] != in_dim:
        raise InputError(f"{data_path}: {array.shape[1]} columns, but {ckpt_path} was trained on {in_dim}")
    codes, residuals = quantise(model, array, batch_size, chosen)
    last = model.rq.vq_layers[-1].embedding.weight.detach()

    def distances(rows: np.ndarray) -> torch.Tensor:
        return squared_distances(residuals[torch.from_numpy(rows).to(chosen)], last)

    results = {"items": len(codes), "collision_rate_nearest": round(collision_rate(codes), 6)}
    codes, rounds = sinkhorn_repair(codes, distances, sk_epsilon, sk_iters, repair_rounds)
    results |= {"sinkhorn_rounds": rounds, "collision_rate_sinkhorn": round(collision_rate(codes), 6)}
    extra = None
    if dedup:
        codes, moved = relocate(codes, distances)
        extra = extra_level(codes)
        results |= {"moved_to_free_codes": len(moved), "items_with_extra_token": int((extra >= 0).sum())}
    sids = sid_tokens(codes, extra)
    shared = len(colliding_rows(codes)) if extra is None else 0
    used = [f"{len(np.unique(codes[:, level]))}/{size}" for level, size in enumerate(model.config["num_emb_list"])]
    results |= {
        "collision_rate_final": round(1 - len(set(map(tuple, sids))) / len(sids), 6),
        "items_sharing_a_sid": shared,
        "codes_used_per_level": " ".join(used),
    }
    # Numeric ids in numeric order, whatever the order of the embedding rows.
    order = sorted(range(len(item_ids)), key=lambda row: (not item_ids[row].isdigit(), item_ids[row].zfill(20)))
    write_json(output, {item_ids[row]: sids[row] for row in order}, indent=None)
    stage.done(**results)


if __name__ == "__main__":
    cli.run(main)
