"""The k-means methods: levels against a loop, clusters against what k-means must be, RQ-KMeans+, the commands."""

import argparse
import json

import numpy as np
import pytest
import torch

from minionerec.common.embeddings import save_embeddings
from minionerec.common.files import InputError, read_json
from rq.generate_indices import generate_indices
from rq.generate_indices_plus import generate_indices_plus
from rq.index.codebook import (
    compute_reconstruction_error,
    load_checkpoint,
    load_codebooks,
    load_frozen_model,
    load_items,
    quantise,
)
from rq.kmeans.residual import expand_level_sizes, residual_kmeans
from rq.models.rqkmeans import RQKMeans, RQKMeansPlus
from rq.models.rqvae import RQVAE
from rq.rqkmeans_constrained import make_rqkmeans_constrained, min_cost_flow_kmeans
from rq.rqkmeans_faiss import faiss_kmeans, make_rqkmeans_faiss, map_uniformly
from rq.rqkmeans_plus import train_rqkmeans_plus
from rq.rqvae import train_rqvae
from rq.settings import (
    IndexFlags,
    IndexPlusFlags,
    RQKMeansConstrainedFlags,
    RQKMeansFaissFlags,
    RQKMeansPlusFlags,
    RQVAEFlags,
)
from rq.trainer import BEST_LOSS


def mixture(n=120, dim=6, groups=9, seed=0):
    random = np.random.default_rng(seed)
    centres = random.standard_normal((groups, dim))
    points = centres[random.integers(groups, size=n)] + 0.4 * random.standard_normal((n, dim))
    return points.astype(np.float32)


def save(folder, array, ids=None):
    path = folder / "toy.emb-x-td.npy"
    save_embeddings(path, array, ids or [str(i) for i in range(len(array))], "x", ["title"])
    return str(path)


COMMANDS = {
    "faiss": (make_rqkmeans_faiss, RQKMeansFaissFlags, {}),
    "uniform": (make_rqkmeans_faiss, RQKMeansFaissFlags, {"uniform": True}),
    "balanced": (make_rqkmeans_constrained, RQKMeansConstrainedFlags, {}),
    "min_cost_flow": (make_rqkmeans_constrained, RQKMeansConstrainedFlags, {"engine": "min_cost_flow"}),
}


def command(kind, folder, array, ids=None, **flags):
    make, flags_class, options = COMMANDS[kind]
    output = folder / f"{kind}.index.json"
    flags = {"codebook_size": [7, 5, 4], "iterations": 20, "device": "cpu", **options, **flags}
    make(flags_class(data_path=save(folder, array, ids), output_file=str(output), **flags))
    return output


def test_levels_equal_a_loop():
    x = torch.from_numpy(mixture())
    books = [torch.randn(size, 6) for size in (4, 3, 5)]

    def nearest(residual, size, level):
        assert size == len(books[level])
        return books[level], torch.cdist(residual, books[level]).argmin(1)

    codebooks, codes = residual_kmeans(x, [4, 3, 5], nearest)
    assert all(torch.equal(a, b) for a, b in zip(codebooks, books, strict=True))
    for row in range(len(x)):
        left = x[row].clone()
        for level, book in enumerate(books):
            distances = [float(((left - code) ** 2).sum()) for code in book]
            assert codes[row, level] == min(range(len(book)), key=distances.__getitem__)
            left -= book[codes[row, level]]
    model = RQKMeans(books).eval()
    assert np.array_equal(quantise(model, x.numpy(), 50), codes)
    decoded = torch.stack([sum(book[code] for book, code in zip(books, row, strict=True)) for row in codes.tolist()])
    slow = float((decoded - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
    assert compute_reconstruction_error(model, x.numpy(), codes, 50) == pytest.approx(slow, rel=1e-5)


def slow_lloyd(points, centres, rounds):
    for _ in range(rounds):
        labels = [min(range(len(centres)), key=lambda k: ((p - centres[k]) ** 2).sum()) for p in points]
        centres = np.array([points[np.array(labels) == k].mean(0) for k in range(len(centres))])
    return centres, np.array(labels)


@pytest.mark.parametrize("codes", [1, 5, 12])
def test_faiss_ends_where_plain_lloyd_stays(codes):
    points = mixture(150, groups=codes)
    centres, labels = faiss_kmeans(torch.from_numpy(points), codes, 60, seed=1)
    assert centres.shape == (codes, 6) and labels.dtype == torch.int64
    slow_centres, slow_labels = slow_lloyd(points, centres.numpy(), 1)
    assert labels.tolist() == slow_labels.tolist()
    np.testing.assert_allclose(centres.numpy(), slow_centres, atol=1e-4)
    again, _ = faiss_kmeans(torch.from_numpy(points), codes, 60, seed=1)
    assert torch.equal(again, centres)


def test_uniform_mapping_is_balanced_cheap_and_refits_the_centres():
    from scipy.optimize import linear_sum_assignment

    x = torch.from_numpy(mixture(60))
    given = torch.from_numpy(mixture(12, seed=5))
    centres, labels = map_uniformly(x, given)
    assert torch.bincount(labels, minlength=12).tolist() == [5] * 12
    torch.testing.assert_close(centres, torch.stack([x[labels == k].mean(0) for k in range(12)]))
    costs = torch.cdist(x, given).square().double().numpy()
    rows, columns = linear_sum_assignment(np.repeat(costs, 5, axis=1))
    best = np.repeat(costs, 5, axis=1)[rows, columns].sum()
    assert best * (1 - 1e-6) <= costs[np.arange(60), labels].sum() <= 1.01 * best


@pytest.mark.parametrize("kind", ["uniform", "balanced", "min_cost_flow"])
@pytest.mark.parametrize("n", [60, 97])
def test_constrained_methods_fill_every_code_alike(tmp_path, kind, n):
    output = command(kind, tmp_path, mixture(n), collisions=["none"])
    index = read_json(output)
    for level, size in enumerate((7, 5, 4)):
        counts = np.bincount([int(sid[level][3:-1]) for sid in index.values()], minlength=size)
        assert counts.min() >= n // size and counts.max() <= -(-n // size)


def test_engines_are_of_one_quality():
    from rq.kmeans.balanced import balanced_kmeans

    x = torch.from_numpy(mixture(300))
    inertia = []
    for engine in (balanced_kmeans, min_cost_flow_kmeans):
        centres, labels = engine(x, 11, iterations=50, seed=0)
        assert centres.shape == (11, 6) and centres.dtype == x.dtype and labels.shape == (300,)
        means = torch.stack([x[labels == k].mean(0) for k in range(11)])
        torch.testing.assert_close(centres, means, atol=1e-3, rtol=1e-3)
        inertia.append(float((x - centres[labels]).pow(2).sum()))
    assert inertia[0] == pytest.approx(inertia[1], rel=0.1)  # from different starts


@pytest.mark.parametrize("kind", COMMANDS)
def test_command_writes_index_report_and_codebooks(tmp_path, capsys, kind):
    array = mixture()
    output = command(kind, tmp_path, array)
    index = read_json(output)
    assert list(index) == [str(i) for i in range(120)] and len(set(map(tuple, index.values()))) == 120
    report = read_json(tmp_path / f"{kind}.index.quality.json")
    assert report["items"] == 120 and report["collision_rate"] == 0 and report["codebook_sizes"] == [7, 5, 4]
    assert report["codebook_reconstruction_error"] < 1
    assert (tmp_path / f"{kind}.index.quality.png").read_bytes().startswith(b"\x89PNG")
    books = load_codebooks(tmp_path / f"{kind}.index.codebooks.npz")
    assert [tuple(book.shape) for book in books] == [(7, 6), (5, 6), (4, 6)]
    record = json.loads((tmp_path / f"{kind}.index.stage.json").read_text())
    assert record["status"] == "done" and record["results"]["collision_rate_before"] > 0
    before = output.read_bytes()
    capsys.readouterr()
    command(kind, tmp_path, array)
    # The embeddings were written anew, so the stage is done again, with the same outcome.
    assert output.read_bytes() == before


def test_rows_in_another_order_give_the_same_index(tmp_path):
    array = mixture()
    ids = [str(i) for i in range(len(array))]
    order = np.random.default_rng(0).permutation(len(array))
    (tmp_path / "other").mkdir()
    for kind in ("faiss", "balanced"):
        straight = command(kind, tmp_path, array, ids)
        shuffled = command(kind, tmp_path / "other", array[order], [ids[i] for i in order])
        assert straight.read_bytes() == shuffled.read_bytes()
    sorted_array, sorted_ids = load_items(save(tmp_path, array[order], [ids[i] for i in order]))
    assert sorted_ids == ids and np.array_equal(sorted_array, array)


def test_levels_of_one_size_or_a_list():
    assert expand_level_sizes(None, None) == [256] * 3 and expand_level_sizes([100], 4) == [100] * 4
    assert expand_level_sizes([10, 20], None) == [10, 20] == expand_level_sizes([10, 20], 2)
    for wrong in (([10, 20], 3), ([0], 3), ([4], 0), ([4], 26)):
        with pytest.raises(InputError, match="num_levels|codebook_size"):
            expand_level_sizes(*wrong)


@pytest.mark.parametrize("kind", COMMANDS)
def test_one_item_and_equal_items_have_a_defined_result(tmp_path, kind):
    one = read_json(command(kind, tmp_path, mixture(1), codebook_size=[1], num_levels=3))
    assert one == {"0": ["<a_0>", "<b_0>", "<c_0>"]}
    equal = read_json(command(kind, tmp_path, np.ones((30, 4), dtype=np.float32), codebook_size=[3], num_levels=2))
    assert len(set(map(tuple, equal.values()))) == 30
    unresolved = read_json(
        command(kind, tmp_path, np.ones((6, 4), dtype=np.float32), codebook_size=[2], num_levels=1, collisions=["none"])
    )
    assert len(unresolved) == 6


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize(
    "flags, message",
    [
        ({"codebook_size": [121]}, "--codebook_size 121: more codes than the 120 items of .*toy.emb-x-td.npy"),
        ({"codebook_size": [4, 4], "num_levels": 3}, "--num_levels 3, but --codebook_size names 2"),
        ({"iterations": 0}, "--iterations 0: expected 1 or more"),
        ({"collisions": ["best"]}, "--collisions best: expected one"),
        ({"device": "cuda:99"}, "--device cuda:99: cannot be used"),
    ],
)
def test_wrong_flags_stop(tmp_path, kind, flags, message):
    with pytest.raises(InputError, match=message):
        command(kind, tmp_path, mixture(), **flags)
    assert not list(tmp_path.glob("*.index.*"))


def test_wrong_embeddings_and_names_stop(tmp_path):
    array = mixture()
    array[17, 2] = np.nan
    with pytest.raises(InputError, match=r"toy.emb-x-td.npy, row 17: a value is not finite"):
        command("faiss", tmp_path, array)
    with pytest.raises(InputError, match="119 item ids for the 120 rows"):
        command("balanced", tmp_path, mixture(), [str(i) for i in range(119)])
    with pytest.raises(InputError, match="--output_file .*: expected a name such as NAME.index.json"):
        flags = {"output_file": str(tmp_path / "index"), "codebook_size": [4]}
        make_rqkmeans_faiss(RQKMeansFaissFlags(data_path=save(tmp_path, mixture()), **flags))


def plus(folder, array, **flags):
    codebooks = folder / "faiss.index.codebooks.npz"
    if not codebooks.exists():
        command("faiss", folder, array)
    flags = {"epochs": 30, "eval_step": 10, "warmup_epochs": 2, "lr": 1e-3, "layers": [8], "device": "cpu", **flags}
    flags |= {"data_path": save(folder, array), "ckpt_dir": str(folder / "plus")}
    train_rqkmeans_plus(RQKMeansPlusFlags(pretrained_codebook_path=str(codebooks), **flags))
    return folder / "plus"


def test_plus_starts_as_the_kmeans_run():
    x = torch.from_numpy(mixture())
    books = [torch.randn(size, 6) for size in (4, 3)]
    model = RQKMeansPlus(6, [4, 3], layers=[8, 5])
    model.start_from(books)
    torch.testing.assert_close(model.encoder(x), x, rtol=0, atol=0)
    kmeans = RQKMeans(books)
    codes = model.get_indices(x)
    assert torch.equal(codes, kmeans.rq(x, use_sk=False)[2])
    torch.testing.assert_close(model(x)[0], books[0][codes[:, 0]] + books[1][codes[:, 1]])
    assert {name for name in model.state_dict() if "4.weight" in name} == {
        "encoder.mlp.mlp_layers.4.weight",
        "decoder.mlp.mlp_layers.4.weight",
    }
    with pytest.raises(ValueError):
        model.start_from(books[:1])


def test_plus_learns_saves_and_gives_an_index(tmp_path):
    array = mixture()
    folder = plus(tmp_path, array)
    kmeans = load_frozen_model(tmp_path / "faiss.index.codebooks.npz")
    model = load_frozen_model(folder / BEST_LOSS)
    assert isinstance(model, RQKMeansPlus) and isinstance(kmeans, RQKMeans)
    before = compute_reconstruction_error(kmeans, array, quantise(kmeans, array, 50), 50)
    assert compute_reconstruction_error(model, array, quantise(model, array, 50), 50) < before
    flags = {"ckpt_path": str(folder / BEST_LOSS), "data_path": str(tmp_path / "toy.emb-x-td.npy"), "device": "cpu"}
    generate_indices_plus(IndexPlusFlags(**flags, output_file=str(tmp_path / "plus.index.json")))
    generate_indices(IndexFlags(**flags, output_file=str(tmp_path / "same.index.json")))
    assert (tmp_path / "plus.index.json").read_bytes() == (tmp_path / "same.index.json").read_bytes()
    assert len(set(map(tuple, read_json(tmp_path / "plus.index.json").values()))) == 120
    assert (tmp_path / "plus.index.quality.json").is_file() and (tmp_path / "plus.index.quality.png").is_file()
    flags["ckpt_path"] = str(tmp_path / "faiss.index.codebooks.npz")
    with pytest.raises(InputError, match="not a checkpoint of RQKMeansPlus; use rq.generate_indices"):
        generate_indices_plus(IndexPlusFlags(**flags, output_file=str(tmp_path / "none.index.json")))


def test_plus_refuses_codebooks_that_do_not_fit(tmp_path):
    command("faiss", tmp_path, mixture())
    with pytest.raises(InputError, match="codes of width 6, but the embeddings of .* have 5 columns"):
        plus(tmp_path, mixture(dim=5))
    with pytest.raises(InputError, match="--num_emb_list 7,5: .*faiss.index.codebooks.npz has 7,5,4 codes per level"):
        plus(tmp_path, mixture(), num_emb_list=[7, 5])
    with pytest.raises(InputError, match="--e_dim 8: the codes of .* have width 6"):
        plus(tmp_path, mixture(), e_dim=8)
    plus(tmp_path, mixture(), num_emb_list=[7, 5, 4], e_dim=6, epochs=2)
    path = tmp_path / "faiss.index.codebooks.npz"
    for content, message in (
        ({"codebook_0": np.zeros((2, 3)), "codebook_2": np.zeros((2, 3))}, "codebook_1 cannot be read"),
        ({"codebook_0": np.zeros((2, 3)), "codebook_1": np.zeros((2, 4))}, "codebook_1: expected finite numbers"),
        ({"codebook_0": np.full((2, 3), np.inf)}, "codebook_0: expected finite numbers"),
        ({"codebook_0": np.array([{}, 1], dtype=object)}, "codebook_0 cannot be read"),
        ({"other": np.zeros(3)}, "not a checkpoint"),
    ):
        np.savez(path, **content)
        with pytest.raises(InputError, match=message):
            load_codebooks(path)
    with pytest.raises(InputError, match="--pretrained_codebook_path: .*none.npz: no such file"):
        load_codebooks(tmp_path / "none.npz", "pretrained_codebook_path")


def test_published_checkpoints_load(tmp_path):
    torch.manual_seed(0)
    model = RQVAE(6, [4, 3], e_dim=5, layers=[9, 7], bn=True, kmeans_init=True)
    model.train()(torch.from_numpy(mixture()))
    names = {"encoder.mlp_layers.1.weight", "decoder.mlp_layers.9.bias", "rq.vq_layers.1.embedding.weight"}
    assert names <= set(model.state_dict())
    published = {"args": argparse.Namespace(lr=1e-3, layers=[9, 7]), "epoch": 3, "state_dict": model.state_dict()}
    torch.save({**published, "best_loss": 0.1, "best_collision_rate": 0.2, "optimizer": {}}, tmp_path / "p.pth")
    loaded = load_frozen_model(tmp_path / "p.pth")
    x = torch.from_numpy(mixture())
    assert torch.equal(loaded.get_indices(x), model.eval().get_indices(x))
    torch.testing.assert_close(loaded(x)[0], model(x)[0])
    torch.save({**published, "state_dict": {"other": torch.zeros(2)}}, tmp_path / "p.pth")
    with pytest.raises(InputError, match="p.pth: not a checkpoint of this trainer"):
        load_frozen_model(tmp_path / "p.pth")


def test_rqvae_with_one_item_and_equal_items(tmp_path):
    for array in (mixture(1), np.ones((20, 4), dtype=np.float32)):
        flags = {"num_emb_list": [4, 3], "layers": [8], "e_dim": 4, "epochs": 4, "eval_step": 2, "device": "cpu"}
        path = save(tmp_path, array)
        train_rqvae(RQVAEFlags(data_path=path, ckpt_dir=str(tmp_path / "ck"), revive_every=1, **flags))
        assert load_checkpoint(tmp_path / "ck" / BEST_LOSS)["epoch"] > 0
        output = tmp_path / "vae.index.json"
        checkpoint = str(tmp_path / "ck" / BEST_LOSS)
        generate_indices(IndexFlags(ckpt_path=checkpoint, data_path=path, output_file=str(output)))
        assert len(set(map(tuple, read_json(output).values()))) == len(array)
