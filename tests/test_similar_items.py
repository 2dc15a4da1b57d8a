"""Items like a history: against plain loops; the task made of them: its draws, its prompts, what it leaves out."""

import random
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from scipy import sparse
from test_tasks import encoder, random_inputs

from data import TASKS, SidSFTDataset, SimilarSidDataset
from minionerec.common.texts import join_item_texts
from minionerec.common.tfidf import compute_tfidf
from minionerec.recommenders.content import find_similar_items


def naive(table, history):
    """{item: probability} by loops over a dense table."""
    query = sum(table[item] * 0.7**age for age, item in enumerate(reversed(history)))
    if not query.any():
        return {}
    query = query / np.linalg.norm(query)
    cosine = {item: float(query @ row) for item, row in enumerate(table) if item not in history}
    weight = {item: np.exp(value / 0.05) for item, value in cosine.items() if value > 0}
    best = sorted(weight, key=lambda item: -weight[item])[:50]
    return {item: weight[item] / sum(weight[i] for i in best) for item in best}


@pytest.mark.parametrize("items", [3, 40, 90])
def test_similar_items_by_loops(items):
    rng = np.random.default_rng(items)
    table = rng.random((items, 12)) * (rng.random((items, 12)) < 0.3)
    table[0] = 0
    table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)
    chooser = random.Random(items)
    histories = [chooser.choices(range(items), k=chooser.randint(1, 6)) for _ in range(600)] + [[0]]
    similar, probabilities = find_similar_items(sparse.csr_matrix(table, dtype=np.float32), histories)
    assert similar.shape == probabilities.shape == (601, min(50, items)) and not probabilities[-1].any()
    for history, numbers, likely in zip(histories, similar.tolist(), probabilities.tolist(), strict=True):
        assert {i: p for i, p in zip(numbers, likely, strict=True) if p > 1e-6} == pytest.approx(
            {i: p for i, p in naive(table, history).items() if p > 1e-6}, abs=1e-4
        )
        assert likely == sorted(likely, reverse=True)


def test_texts_without_common_words_are_like_nothing():
    table = compute_tfidf(["alpha", "beta", "gamma"])
    assert table.shape == (3, 0)
    similar, probabilities = find_similar_items(table, [[0], [1, 2]])
    assert similar.shape == (2, 3) and not probabilities.any()


def test_texts_are_title_and_the_beginning_of_the_description():
    assert join_item_texts(["a", "b"], ["", "x" * 1000]) == ["a ", "b " + "x" * 400]


WORDS = "steel brass bolt nut glass flask thread long short metric".split()


def wordy_inputs(seed):
    """Items whose descriptions are made of few words, so that each is like many others."""
    inputs, rng = random_inputs(seed), random.Random(seed)
    return replace(inputs, descriptions={item: " ".join(rng.choices(WORDS, k=9)) for item in inputs.descriptions})


def build(inputs, **changes):
    return TASKS["similar_sid"].build(replace(inputs, **changes), encoder("worded"))


def test_the_prompts_are_those_of_next_sid_and_targets_are_drawn_as_said():
    inputs, coder = wordy_inputs(4), encoder("worded")
    dataset, plain = build(inputs), SidSFTDataset(inputs.rows, coder)
    prompts = {(row.user_id, row.history_ids): example.prompt for row, example in zip(inputs.rows, plain, strict=True)}
    assert len(dataset) == 2 * len(dataset.rows) and len(dataset.rows) + dataset.left_out.total() == len(inputs.rows)
    texts = join_item_texts(inputs.catalogue.titles, [inputs.descriptions[item] for item in inputs.catalogue.item_ids])
    table = compute_tfidf(texts).toarray()
    counts = [Counter() for _ in dataset.rows]
    for epoch in range(150):
        dataset.set_epoch(epoch)
        for place, example in enumerate(dataset):
            row = dataset.rows[place % len(dataset.rows)]
            assert example.prompt == prompts[row.user_id, row.history_ids] and example.group == row.user_id
            assert example.target == example.sid == inputs.catalogue.sids[example.item_id]
            assert example.target_ids == coder.target_ids("similar_sid", [example.target])[0]
            counts[place % len(dataset.rows)][example.item_id] += 1
    for row, counted in zip(dataset.rows, counts, strict=True):
        expected = naive(table, row.history_ids)
        assert set(counted) <= set(expected)
        for item, p in expected.items():
            assert counted[item] / 300 == pytest.approx(p, abs=4.5 * (p * (1 - p) / 300) ** 0.5 + 1e-3)


def test_draws_are_a_function_of_seed_and_epoch_and_not_of_the_target():
    inputs = wordy_inputs(5)
    first, second = build(inputs), build(inputs)
    first.set_epoch(3)
    assert [e.item_id for e in first] != [e.item_id for e in second]
    second.set_epoch(3)
    assert list(first) == list(second)
    strangers = [replace(row, sid="<a_39><b_0>", item_id=39, title="else") for row in inputs.rows]
    other = build(inputs, rows=strangers)
    other.set_epoch(3)
    assert [(e.prompt, e.item_id) for e in other] == [(e.prompt, e.item_id) for e in first]
    third = build(inputs, seed=1)
    third.set_epoch(3)
    assert [e.item_id for e in third] != [e.item_id for e in first]


def test_cut_histories_are_those_of_next_sid():
    inputs = wordy_inputs(6)
    rows = [replace(row, user_id="U0") for row in inputs.rows] * 2
    words = compute_tfidf([inputs.descriptions[item] for item in inputs.catalogue.item_ids])
    find_similar = partial(find_similar_items, words)
    dataset = SimilarSidDataset(rows, encoder("compact"), inputs.catalogue, find_similar, cut_histories=True)
    plain = SidSFTDataset(dataset.rows, encoder("compact"), cut_histories=True)
    for epoch in (0, 1, 2):
        dataset.set_epoch(epoch)
        plain.set_epoch(epoch)
        assert [e.prompt_ids for e in dataset] == [e.prompt_ids for e in plain] * 2
        assert [e.group for e in dataset] == [e.group for e in plain] * 2
