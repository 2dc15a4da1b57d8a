"""New items for an existing index: properties over random codebooks, and the command."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minionerec.common.embeddings import load_embeddings, save_embeddings
from minionerec.common.files import InputError, read_json, write_json
from rq.generate_indices import generate_indices
from rq.index.append import append_items, parse_sids
from rq.index.codebook import measure_last_level, quantise, save_codebooks
from rq.index.collisions import make_sid_tokens, resolve_collisions
from rq.models.rqkmeans import RQKMeans
from rq.settings import IndexFlags, RepairFlags

STEPS = ("nearest_free", "extra_token")


def random_model(random, sizes, dim=3):
    return RQKMeans([torch.tensor(random.standard_normal((size, dim)), dtype=torch.float32) for size in sizes]).eval()


def first_index(model, array, step):
    codes = quantise(model, array, 7)
    codes, extra, _ = resolve_collisions(codes, measure_last_level(model, array, codes), RepairFlags(collisions=[step]))
    return dict(enumerate(map(tuple, make_sid_tokens(codes, extra))))


@st.composite
def catalogues(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    old, new = draw(st.integers(1, 25)), draw(st.integers(1, 25))
    # Few distinct points, so that items meet on a path.
    points = random.standard_normal((draw(st.integers(1, 12)), 3)).astype(np.float32)
    return random_model(random, sizes), points[random.integers(len(points), size=old + new)], old


@settings(deadline=None, max_examples=200)
@given(catalogues(), st.sampled_from(STEPS), st.sampled_from(STEPS))
def test_no_sid_is_given_twice_nor_begins_another(catalogue, before, step):
    model, array, old = catalogue
    sizes = model.config["num_emb_list"]
    index = first_index(model, array[:old], before)
    parsed = parse_sids(index, sizes, "index")
    nearest = quantise(model, array[old:], 100)
    free = int(np.prod(sizes)) - len({path for path, _ in parsed.values()})
    try:
        codes, extra, moved = append_items(model, array[old:], nearest, parsed, step)
    except InputError as error:
        # Every path is taken, and more items than that are new.
        assert len(array) - old > free and "no more new items" in str(error)
        return
    added = [tuple(tokens) for tokens in make_sid_tokens(codes, extra)]
    together = [*index.values(), *added]
    assert len(set(together)) == len(together)
    beginnings = {sid[:length] for sid in together for length in range(1, len(sid))}
    assert not beginnings & set(together)
    assert moved == int((codes != nearest).any(1).sum())
    if step == "nearest_free":
        assert (extra == -1).all()
    taken = {path for path, _ in parsed.values()}
    # Who lands alone on a free path stays there.
    for row, path in enumerate(map(tuple, nearest.tolist())):
        if path not in taken and Counter(map(tuple, nearest.tolist()))[path] == 1:
            assert tuple(codes[row]) == path and extra[row] == -1


def test_a_newcomer_moves_to_the_nearest_free_code_and_to_the_sibling_prefix_when_full():
    books = [torch.tensor([[0.0], [10.0], [30.0]]), torch.tensor([[0.0], [1.0], [3.0]])]
    model = RQKMeans(books).eval()
    taken = {0: ((0, 0), -1), 1: ((0, 2), -1)}
    array = np.array([[0.1], [0.2], [0.3]], dtype=np.float32)
    codes, extra, moved = append_items(model, array, quantise(model, array, 9), taken, "nearest_free")
    # 0.1 is nearest to its code and is served first: 1.0 below the same prefix; then the prefix is full.
    assert codes.tolist() == [[0, 1], [1, 0], [1, 1]] and moved == 3 and extra.tolist() == [-1, -1, -1]
    # A bucket that gives extra tokens already takes the newcomer; its numbers go on.
    codes, extra, moved = append_items(
        model, array, quantise(model, array, 9), {0: ((0, 0), 0), 1: ((0, 0), 1)}, "extra_token"
    )
    assert codes.tolist() == [[0, 0]] * 3 and sorted(extra.tolist()) == [2, 3, 4] and moved == 0


def make(folder, n=40, dim=4):
    random = np.random.default_rng(3)
    model = random_model(random, [4, 4, 4], dim)
    save_codebooks(folder / "c.npz", [layer.embedding.weight.detach() for layer in model.rq.vq_layers])
    array = random.standard_normal((n, dim)).astype(np.float32)
    save_embeddings(folder / "old.npy", array[:25], [str(i) for i in range(25)], "x", ["title"])
    save_embeddings(folder / "new.npy", array[25:], [str(i) for i in range(25, n)], "x", ["title"])
    save_embeddings(folder / "all.npy", array, [str(i) for i in range(n)], "x", ["title"])
    flags = {"ckpt_path": str(folder / "c.npz"), "device": "cpu"}
    old = str(folder / "old.index.json")
    generate_indices(IndexFlags(**flags, data_path=str(folder / "old.npy"), output_file=old))
    return flags, old, read_json(old)


@pytest.mark.parametrize("name", ["new", "all"])
@pytest.mark.parametrize("step", STEPS)
def test_command_appends_and_leaves_old_sids_alone(tmp_path, name, step):
    flags, old, before = make(tmp_path)
    out = tmp_path / "more.index.json"
    flags |= {"data_path": str(tmp_path / f"{name}.npy"), "output_file": str(out), "append_to": old}
    generate_indices(IndexFlags(**flags, collisions=[step]))
    after = read_json(out)
    assert list(after) == [str(i) for i in range(40)]
    assert {item: after[item] for item in before} == before and read_json(old) == before
    assert len(set(map(tuple, after.values()))) == 40
    report = read_json(tmp_path / "more.index.quality.json")
    assert report["items"] == (40 if name == "all" else 15) and report["collision_rate"] == 0
    results = read_json(tmp_path / "more.index.stage.json")["results"]
    assert results["items_before"] == 25 and results["items_added"] == 15


def test_command_refuses_what_cannot_be_appended(tmp_path):
    flags, old, before = make(tmp_path)
    flags |= {"output_file": str(tmp_path / "more.index.json"), "append_to": old}
    new = {**flags, "data_path": str(tmp_path / "new.npy")}
    with pytest.raises(InputError, match="all 25 items of the embeddings are in it already"):
        generate_indices(IndexFlags(**{**flags, "data_path": str(tmp_path / "old.npy")}))
    for steps in (["none"], ["sinkhorn"], ["sinkhorn", "nearest_free"]):
        with pytest.raises(InputError, match="--collisions nearest_free, extra_token or own_token, for no SID"):
            generate_indices(IndexFlags(**new, collisions=steps))
    for wrong in (
        ["<a_1>", "<b_1>"],
        ["<a_1>", "<b_4>", "<c_1>"],
        ["<a_1>", "<c_1>", "<b_1>"],
        ["<x>", "<b_1>", "<c_0>"],
    ):
        write_json(old, {**before, "7": wrong})
        with pytest.raises(InputError, match=r"old.index.json, item 7: the SID .* is not of the codebook's 3 levels"):
            generate_indices(IndexFlags(**new))
    write_json(old, {str(100 + i): [f"<a_{i // 16}>", f"<b_{i // 4 % 4}>", f"<c_{i % 4}>"] for i in range(60)})
    with pytest.raises(InputError, match="all 64 code paths are taken: no more new items can be added"):
        generate_indices(IndexFlags(**new))


def test_own_tokens_go_on_where_the_old_ones_end():
    random = np.random.default_rng(5)
    model, array = random_model(random, [4]), random.standard_normal((12, 3)).astype(np.float32)
    index = first_index(model, array[:8], "own_token")
    assert sorted(int(sid[1][3:-1]) for sid in index.values()) == list(range(8))
    nearest = quantise(model, array[8:], 100)
    codes, extra, moved = append_items(model, array[8:], nearest, parse_sids(index, [4], "index"), "own_token")
    assert codes.tolist() == nearest.tolist() and extra.tolist() == [8, 9, 10, 11] and moved == 0


def test_embeddings_of_another_fit_are_refused(tmp_path):
    """The old items among them would get other codes: here those of a rotated space."""
    flags, old, _ = make(tmp_path)
    array, ids = load_embeddings(tmp_path / "all.npy")
    rotation, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))
    save_embeddings(tmp_path / "other.npy", (array @ -rotation).astype(np.float32), ids, "x", ["title"])
    flags |= {"data_path": str(tmp_path / "other.npy"), "output_file": str(tmp_path / "more.index.json")}
    with pytest.raises(InputError, match="of its items keep their first code .*: embeddings of another fit or encoder"):
        generate_indices(IndexFlags(**flags, append_to=old))
    assert not (tmp_path / "more.index.json").exists()
