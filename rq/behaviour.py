r"""Embeddings that know texts and behaviour: what an item is about, and what it is bought with.

python -m rq.behaviour --data_path DIR/NAME.emb-PLM-td.npy --train_file DIR/NAME.train.inter

Writes DIR/NAME.emb-PLM+behaviour-td.npy and its side file, which every method of semantic IDs and `sft.py --sid_init`
read like any other embeddings.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from minionerec.common.cli import parse_flags, run_command
from rq.settings import BehaviourFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(BehaviourFlags)

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import normalize

from minionerec.common.embeddings import BEHAVIOUR_FIELD, load_embeddings, save_embeddings, side_file_path
from minionerec.common.files import InputError
from minionerec.common.interactions import read_inter
from minionerec.common.stage import open_stage


def count_pairs(
    histories: Sequence[Sequence[int]], targets: Sequence[int], count: int, decay: float
) -> sparse.csr_matrix:
    """How often two items stand in one history: the last item and the target of a sample count 1, others less.

    Args:
        histories, targets: of the train samples, oldest first, as numbers below `count`.
        count: items.
        decay: what a pair loses with every item between the two.

    Returns:
        float64 [count, count], symmetric, nothing on the diagonal.
    """
    rows, columns, weights = [], [], []
    for history, target in zip(histories, targets, strict=True):
        for age, item in enumerate(reversed(history)):
            rows.append(item)
            columns.append(target)
            weights.append(decay**age)
    table = sparse.coo_matrix((weights, (rows, columns)), shape=(count, count)).tocsr()
    table = table + table.T
    table.setdiag(0)
    table.eliminate_zeros()
    return table.tocsr()


def embed_pairs(pairs: sparse.csr_matrix, dim: int, seed: int) -> np.ndarray:
    """Positive pointwise mutual information of the pairs, reduced to `dim` dimensions (Levy and Goldberg 2014).

    Returns:
        float64 [N, dim] or fewer columns, rows of length 1; zeros for items that stand with no other.
    """
    table = pairs.tocoo()
    totals = np.asarray(pairs.sum(axis=1)).ravel()
    information = np.log(table.data * totals.sum() / (totals[table.row] * totals[table.col]))
    positive = sparse.csr_matrix((np.maximum(information, 0), (table.row, table.col)), shape=pairs.shape)
    components = min(dim, pairs.shape[0] - 1)
    if components < 1 or not positive.nnz:
        return np.zeros((pairs.shape[0], 1))
    svd = TruncatedSVD(components, random_state=seed)
    # Singular values count half: else the first few directions, which tell popular items, would decide alone.
    return normalize(svd.fit_transform(positive) / np.sqrt(np.maximum(svd.singular_values_, 1e-9)))


def join_behaviour(
    texts: np.ndarray, pairs: sparse.csr_matrix, occurrences: np.ndarray, flags: BehaviourFlags
) -> np.ndarray:
    """Text and behaviour side by side.

    Args:
        texts: embeddings [N, dim].
        pairs: see `count_pairs`.
        occurrences: [N], how often each item is a target.
        flags: dim, weight, rare and seed.

    Returns:
        float32 [N, dim + behaviour]: the text part of length 1, the other of length
        weight * sqrt(occurrences / (occurrences + rare)), so that texts decide where hardly anything was counted.
    """
    length = flags.weight * np.sqrt(occurrences / (occurrences + flags.rare))
    behaviour = embed_pairs(pairs, flags.dim, flags.seed) * length[:, None]
    return np.concatenate([normalize(texts.astype(np.float64)), behaviour], axis=1).astype(np.float32)


def check_behaviour_flags(flags: BehaviourFlags) -> BehaviourFlags:
    """The flags with the output file worked out.

    Raises:
        InputError: a number out of range, or a name that tells no output file.
    """
    if flags.dim < 1 or flags.weight < 0 or flags.rare <= 0 or not 0 <= flags.decay <= 1:
        raise InputError("expected --dim >= 1, --weight >= 0, --rare above 0 and --decay from 0 to 1")
    path = Path(flags.data_path)
    if flags.output_file is None and not path.name.endswith("-td.npy"):
        raise InputError(f"--data_path {path}: not of the form NAME.emb-PLM-td.npy, so --output_file must be given")
    default = path.with_name(f"{path.name.removesuffix('-td.npy')}+behaviour-td.npy")
    return replace(flags, output_file=flags.output_file or str(default))


def embed_behaviour(flags: BehaviourFlags) -> None:
    """Add what the train split says of the items to their embeddings."""
    flags = check_behaviour_flags(flags)
    output = Path(flags.output_file)
    stage = open_stage(
        "behaviour",
        flags,
        inputs=[flags.data_path, side_file_path(flags.data_path), flags.train_file],
        outputs=[output, side_file_path(output)],
        record=output.with_suffix(".stage.json"),
    )
    if stage.finished:
        return
    texts, item_ids = load_embeddings(flags.data_path, "data_path")
    row_of = {item: row for row, item in enumerate(item_ids)}
    _, histories, targets = read_inter(flags.train_file, len(item_ids), "train_file")
    strangers = [
        item for item in {*targets, *(item for history in histories for item in history)} if str(item) not in row_of
    ]
    if strangers:
        raise InputError(f"{flags.train_file}: item {min(strangers)} has no embedding in {flags.data_path}")
    histories = [[row_of[str(item)] for item in history] for history in histories]
    targets = [row_of[str(item)] for item in targets]
    pairs = count_pairs(histories, targets, len(item_ids), flags.decay)
    occurrences = np.bincount(targets, minlength=len(item_ids))
    array = join_behaviour(texts, pairs, occurrences, flags)
    save_embeddings(output, array, item_ids, f"{flags.data_path} + {flags.train_file}", ["texts", BEHAVIOUR_FIELD])
    stage.done(items=len(array), dim=array.shape[1], items_without_behaviour=int((pairs.getnnz(axis=1) == 0).sum()))


if __name__ == "__main__":
    run_command(embed_behaviour, FLAGS)
