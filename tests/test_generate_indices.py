"""Collision handling against plain twins, the no-shared-SID guarantee as a property, and the command."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minionerec.common.embeddings import save_embeddings, side_file_path
from minionerec.common.files import InputError, read_json
from rq.generate_indices import generate_indices
from rq.index.collisions import (
    STEPS,
    add_extra_level,
    compute_collision_rate,
    find_colliding_rows,
    make_sid_tokens,
    move_to_free_codes,
    resolve_collisions,
    spread_by_sinkhorn,
)
from rq.models.rqvae import RQVAE
from rq.settings import IndexFlags, RepairFlags


@st.composite
def tables(draw):
    """(codes [n, levels], distances [n, K]): few codes, so that buckets and prefixes fill up; ties in the distances."""
    levels, size, n = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 40))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    codes = random.integers(size, size=(n, levels))
    distances = torch.tensor(random.integers(6, size=(n, size)) / 5.0)
    return codes, distances


def lookup(distances):
    return lambda rows: distances[torch.from_numpy(rows)]


@settings(deadline=None, max_examples=60)
@given(tables())
def test_collision_figures_equal_dictionary_counts(table):
    codes, _ = table
    counts = Counter(map(tuple, codes.tolist()))
    assert compute_collision_rate(codes) == 1 - len(counts) / len(codes)
    assert find_colliding_rows(codes).tolist() == [i for i, row in enumerate(codes.tolist()) if counts[tuple(row)] > 1]


@settings(deadline=None, max_examples=150)
@given(tables(), st.integers(0, 3))
def test_no_two_items_share_a_sid_after_deduplication(table, rounds):
    codes, distances = table
    original = codes.copy()
    repaired, done = spread_by_sinkhorn(codes, lookup(distances), 0.01, 10, rounds)
    moved_codes, moved = move_to_free_codes(repaired, lookup(distances))
    extra = add_extra_level(moved_codes)
    sids = [tuple(tokens) for tokens in make_sid_tokens(moved_codes, extra)]
    assert len(set(sids)) == len(sids)
    beginnings = {sid[:length] for sid in sids for length in range(1, len(sid))}
    assert not beginnings & set(sids)
    assert np.array_equal(codes, original) and done <= rounds
    assert np.array_equal(moved_codes[:, :-1], codes[:, :-1])
    assert 0 <= moved_codes.min() and moved_codes[:, -1].max() < distances.shape[1]
    changed = np.flatnonzero((moved_codes != repaired).any(1))
    assert np.array_equal(changed, moved) and set(moved) <= set(find_colliding_rows(repaired))
    # An extra token is the last resort: only where the prefix has no free code left.
    for row in np.flatnonzero(extra >= 0):
        same = (moved_codes[:, :-1] == moved_codes[row, :-1]).all(1)
        assert len(set(moved_codes[same, -1])) == distances.shape[1]
    again = move_to_free_codes(repaired, lookup(distances))
    assert np.array_equal(again[0], moved_codes)


@settings(deadline=None, max_examples=60)
@given(tables())
def test_items_on_their_own_are_left_alone(table):
    codes, distances = table
    alone = np.setdiff1d(np.arange(len(codes)), find_colliding_rows(codes))
    moved_codes, _ = move_to_free_codes(codes, lookup(distances))
    assert np.array_equal(moved_codes[alone], codes[alone]) and (add_extra_level(codes)[alone] == -1).all()


def test_relocation_keeps_the_nearest_and_takes_the_nearest_free_code():
    codes = np.array([[0, 1], [0, 1], [0, 1], [0, 2], [3, 1]])
    distances = torch.tensor(
        [
            [9.0, 0.5, 1.0, 0.6],
            [9.0, 0.1, 1.0, 5.0],
            [2.0, 0.9, 1.0, 3.0],
            [0.0, 9.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0],
        ]
    )
    moved_codes, moved = move_to_free_codes(codes, lookup(distances))
    assert moved_codes.tolist() == [[0, 3], [0, 1], [0, 0], [0, 2], [3, 1]] and moved.tolist() == [0, 2]


def test_full_prefix_falls_back_to_an_extra_token_for_every_member():
    codes = np.array([[0, 0]] * 4 + [[1, 0]])
    moved_codes, _ = move_to_free_codes(codes, lookup(torch.zeros(5, 2)))
    extra = add_extra_level(moved_codes)
    tokens = make_sid_tokens(moved_codes, extra)
    assert sorted(len(row) for row in tokens) == [2, 2, 3, 3, 3]
    assert tokens[4] == ["<a_1>", "<b_0>"]
    assert sorted(row[2] for row in tokens if len(row) == 3) == ["<c_0>", "<c_1>", "<c_2>"]


def test_sinkhorn_repair_tells_apart_what_it_can_and_stops_when_stuck():
    random = np.random.default_rng(0)
    distances = torch.tensor(random.random((12, 16)))
    codes = np.zeros((12, 3), dtype=np.int64)
    repaired, _ = spread_by_sinkhorn(codes, lookup(distances), 0.003, 100, 20)
    assert compute_collision_rate(repaired) < 0.2
    same = torch.ones(5, 16) * torch.arange(16)
    stuck, rounds = spread_by_sinkhorn(codes[:5], lookup(same), 0.003, 50, 20)
    assert compute_collision_rate(stuck) == 0.8 and rounds <= 2
    assert spread_by_sinkhorn(np.arange(5)[:, None], lookup(same), 0.003, 50, 20)[1] == 0


@settings(deadline=None, max_examples=80)
@given(tables(), st.sampled_from(STEPS))
def test_every_choice_keeps_prefixes_and_reports_what_it_did(table, steps):
    codes, distances = table
    flags = RepairFlags(collisions=steps, sk_iters=10, repair_rounds=2)
    resolved, extra, counts = resolve_collisions(codes, lookup(distances), flags)
    assert np.array_equal(resolved[:, :-1], codes[:, :-1])
    alone = np.setdiff1d(np.arange(len(codes)), find_colliding_rows(codes))
    if steps == ["none"]:
        assert np.array_equal(resolved, codes) and extra is None
    if steps == ["extra_token"]:
        assert np.array_equal(resolved, codes) and set(np.flatnonzero(extra >= 0)) == set(find_colliding_rows(codes))
    if steps == ["nearest_free"]:
        assert np.array_equal(resolved[alone], codes[alone])
    sids = Counter(map(tuple, make_sid_tokens(resolved, extra)))
    assert counts["collision_rate_before"] == pytest.approx(compute_collision_rate(codes), abs=1e-6)
    assert counts["collision_rate_after"] == pytest.approx(1 - len(sids) / len(codes), abs=1e-6)
    assert counts["items_sharing_a_sid"] == sum(n for n in sids.values() if n > 1)
    if steps[-1] in ("nearest_free", "extra_token"):
        assert max(sids.values()) == 1


def test_tokens():
    assert make_sid_tokens(np.array([[12, 7, 200]])) == [["<a_12>", "<b_7>", "<c_200>"]]
    mixed = make_sid_tokens(np.array([[1, 2], [3, 4]]), np.array([-1, 5]))
    assert mixed == [["<a_1>", "<b_2>"], ["<a_3>", "<b_4>", "<c_5>"]]
    with pytest.raises(ValueError, match="26|a to z"):
        make_sid_tokens(np.zeros((1, 27), dtype=int))


def make(folder, n=50, dim=6, ids=None, copies=1):
    random = np.random.default_rng(0)
    array = np.repeat(random.standard_normal((n // copies, dim)), copies, axis=0).astype(np.float32)
    data = folder / "toy.emb-x-td.npy"
    save_embeddings(data, array, ids or [str(i) for i in range(len(array))], "x", ["title"])
    torch.manual_seed(0)
    model = RQVAE(dim, [4, 3, 8], e_dim=4, layers=[8], kmeans_init=True)
    model.train()(torch.from_numpy(array))
    torch.save({"config": model.config, "state_dict": model.state_dict()}, folder / "model.pth")
    flags = {
        "ckpt_path": str(folder / "model.pth"),
        "data_path": str(data),
        "output_file": str(folder / "toy.index.json"),
        "device": "cpu",
    }
    return flags, model, array


def test_command_without_repair_gives_the_models_own_codes(tmp_path):
    flags, model, array = make(tmp_path)
    generate_indices(IndexFlags(**flags, collisions=["none"], batch_size=7))
    codes = model.eval().get_indices(torch.from_numpy(array), use_sk=False).numpy()
    index = read_json(flags["output_file"])
    assert list(index) == [str(i) for i in range(50)]
    assert list(index.values()) == make_sid_tokens(codes)
    results = json.loads((tmp_path / "toy.index.stage.json").read_text())["results"]
    assert results["collision_rate_after"] == pytest.approx(compute_collision_rate(codes), abs=1e-6)


@pytest.mark.parametrize("copies", [1, 10])
def test_command_gives_every_item_its_own_sid(tmp_path, capsys, copies):
    flags, _, _ = make(tmp_path, copies=copies)
    generate_indices(IndexFlags(**flags))
    index = read_json(flags["output_file"])
    assert len({tuple(tokens) for tokens in index.values()}) == len(index) == 50
    assert "collision_rate_after         0.0" in capsys.readouterr().out
    first = (tmp_path / "toy.index.json").read_bytes()
    generate_indices(IndexFlags(**flags))
    assert "already done" in capsys.readouterr().out
    generate_indices(IndexFlags(**flags, force=True))
    assert (tmp_path / "toy.index.json").read_bytes() == first


def test_rows_in_another_order_are_matched_by_id(tmp_path):
    ids = [str(i) for i in range(50)]
    flags, _, array = make(tmp_path, ids=ids)
    generate_indices(IndexFlags(**flags, collisions=["none"]))
    straight = read_json(flags["output_file"])
    order = np.random.default_rng(1).permutation(50)
    save_embeddings(flags["data_path"], array[order], [ids[i] for i in order], "x", ["title"])
    generate_indices(IndexFlags(**flags, collisions=["none"]))
    shuffled = read_json(flags["output_file"])
    assert shuffled == straight and list(shuffled) == ids


def test_wrong_inputs_stop(tmp_path):
    flags, _, array = make(tmp_path)
    with pytest.raises(InputError, match="--sk_epsilon"):
        generate_indices(IndexFlags(**flags, sk_epsilon=0.0))
    for steps in (["best"], ["none", "sinkhorn"], ["nearest_free", "sinkhorn"]):
        with pytest.raises(InputError, match=f"--collisions {','.join(steps)}: expected one"):
            generate_indices(IndexFlags(**flags, collisions=steps))
    with pytest.raises(InputError, match="none.pth"):
        generate_indices(IndexFlags(**{**flags, "ckpt_path": str(tmp_path / "none.pth")}))
    save_embeddings(flags["data_path"], array[:, :3], [str(i) for i in range(50)], "x", ["title"])
    with pytest.raises(InputError, match="3 columns, but .* was trained on 6"):
        generate_indices(IndexFlags(**flags))
    side_file_path(flags["data_path"]).unlink()
    with pytest.raises(InputError, match="no such file"):
        generate_indices(IndexFlags(**flags))


def test_the_index_stands_beside_the_embeddings_unless_named(tmp_path):
    flags, _, _ = make(tmp_path)
    generate_indices(IndexFlags(**{**flags, "output_file": None}))
    assert len(read_json(tmp_path / "toy.index.json")) == 50
    with pytest.raises(InputError, match="--append_to: needs --output_file"):
        generate_indices(IndexFlags(**{**flags, "output_file": None}, append_to=str(tmp_path / "toy.index.json")))
