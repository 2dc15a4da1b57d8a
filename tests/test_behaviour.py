"""Embeddings of texts and behaviour: counting beside a slow twin, lengths of the parts, SIDs and token rows."""

import json
import random

import numpy as np
import pytest
from scipy import sparse

from minionerec.common.embeddings import fit_to_width, load_embeddings, save_embeddings
from minionerec.common.files import InputError, read_json
from rq.behaviour import count_pairs, embed_behaviour, embed_pairs
from rq.rqkmeans_constrained import make_rqkmeans_constrained
from rq.settings import BehaviourFlags, RQKMeansConstrainedFlags

ITEMS = 24


def write_inter(path, samples):
    lines = [f"u\t{' '.join(map(str, history))}\t{target}" for history, target in samples]
    path.write_text("\n".join(["user_id:token\titem_id_list:token_seq\titem_id:token", *lines]) + "\n")


def random_samples(seed, count=200):
    """Items of one half are bought together, those of the other half too; the last item is never bought."""
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        half = rng.choice((range(0, ITEMS // 2), range(ITEMS // 2, ITEMS - 1)))
        samples.append((rng.choices(half, k=rng.randint(1, 4)), rng.choice(half)))
    return samples


@pytest.fixture
def files(tmp_path):
    texts = np.random.default_rng(0).standard_normal((ITEMS, 6)).astype(np.float32)
    save_embeddings(tmp_path / "toy.emb-tfidf-td.npy", texts, [str(i) for i in reversed(range(ITEMS))], "x", ["title"])
    write_inter(tmp_path / "toy.train.inter", random_samples(0))
    return tmp_path


def make_flags(files, **changes):
    given = {"data_path": str(files / "toy.emb-tfidf-td.npy"), "train_file": str(files / "toy.train.inter"), "dim": 4}
    return BehaviourFlags(**{**given, **changes})


@pytest.mark.parametrize("seed", range(3))
def test_pairs_are_counted_as_by_hand(seed):
    samples = random_samples(seed, 40)
    expected = np.zeros((ITEMS, ITEMS))
    for history, target in samples:
        for age, item in enumerate(reversed(history)):
            if item != target:
                expected[item, target] += 0.5**age
                expected[target, item] += 0.5**age
    histories, targets = zip(*samples, strict=True)
    assert np.allclose(count_pairs(histories, targets, ITEMS, 0.5).toarray(), expected)


def test_items_bought_together_are_near_each_other():
    histories, targets = zip(*random_samples(1), strict=True)
    vectors = embed_pairs(count_pairs(histories, targets, ITEMS, 0.5), 2, seed=0)
    cosines = vectors @ vectors.T
    first, second = slice(0, ITEMS // 2), slice(ITEMS // 2, ITEMS - 1)
    assert cosines[first, first].mean() > 0.9 and cosines[second, second].mean() > 0.9
    assert cosines[first, second].mean() < 0.2
    assert not vectors[-1].any()


def test_nothing_counted_gives_nothing():
    assert not embed_pairs(sparse.csr_matrix((3, 3)), 2, seed=0).any()


def test_the_parts_have_their_lengths_and_rows_keep_their_items(files):
    embed_behaviour(make_flags(files, weight=2.0, rare=3.0))
    texts, ids = load_embeddings(files / "toy.emb-tfidf-td.npy")
    joined, joined_ids = load_embeddings(files / "toy.emb-tfidf+behaviour-td.npy")
    assert joined_ids == ids and joined.shape == (ITEMS, 10)
    assert np.allclose(joined[:, :6], texts / np.linalg.norm(texts, axis=1, keepdims=True), atol=1e-6)
    targets = [target for _, target in random_samples(0)]
    for row, item in enumerate(ids):
        times = targets.count(int(item))
        assert np.linalg.norm(joined[row, 6:]) == pytest.approx(2 * (times / (times + 3)) ** 0.5, abs=1e-5)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"dim": 0}, "expected --dim >= 1"),
        ({"rare": 0.0}, "--rare above 0"),
        ({"train_file": "nowhere.inter"}, "nowhere.inter: no such file"),
        ({"data_path": "nowhere-td.npy"}, "nowhere-td.npy"),
        ({"data_path": "x.npy"}, "--output_file must be given"),
    ],
)
def test_wrong_input(files, changes, said):
    with pytest.raises(InputError, match=said):
        embed_behaviour(make_flags(files, **changes))


def test_every_item_gets_a_last_token_of_its_own(files):
    embed_behaviour(make_flags(files))
    output = files / "toy.index.json"
    make_rqkmeans_constrained(
        RQKMeansConstrainedFlags(
            data_path=str(files / "toy.emb-tfidf+behaviour-td.npy"),
            output_file=str(output),
            num_levels=1,
            codebook_size=[3],
            collisions=["own_token"],
        )
    )
    index = read_json(output)
    assert len({sid[1] for sid in index.values()}) == ITEMS and len({sid[0] for sid in index.values()}) == 3
    report = json.loads((files / "toy.index.quality.json").read_text())
    assert report["items_with_extra_token"] == ITEMS and report["collision_rate"] == 0


@pytest.mark.parametrize("width", [3, 6, 10])
def test_vectors_keep_their_products_where_they_fit(width):
    vectors = np.random.default_rng(1).standard_normal((30, 6))
    fitted = fit_to_width(vectors, width, seed=0)
    centred = vectors - vectors.mean(axis=0)
    assert fitted.shape == (30, width)
    if width >= 6:
        assert np.allclose(fitted @ fitted.T, centred @ centred.T)
    else:
        values = np.linalg.svd(centred, compute_uv=False)
        assert (fitted**2).sum() == pytest.approx((values[:width] ** 2).sum())
