"""Where new SID rows start: against plain loops, and that like items get like rows."""

import random

import numpy as np
import pytest
import torch
from tiny import tiny_model

from minionerec.language.models import train_tokenizer
from minionerec.language.sid_tokens import (
    add_sid_tokens,
    average_embeddings,
    compute_code_directions,
    compute_tfidf_vectors,
)

TOOLS = ["steel bolt metric thread", "steel nut metric thread", "brass bolt thread", "steel bolt long"]
LAB = ["glass beaker laboratory", "glass flask laboratory", "plastic beaker laboratory", "laboratory flask stopper"]


def cosine(first, second):
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_code_directions_by_loops():
    rng = np.random.default_rng(0)
    sids = [(f"<a_{n % 3}>", f"<b_{n % 5}>") + ((f"<c_{n % 2}>",) if n % 4 else ()) for n in range(20)]
    vectors = rng.standard_normal((20, 6)) + 3
    found = compute_code_directions(sids, vectors)
    raw = {}
    for level in range(3):
        tokens = sorted({sid[level] for sid in sids if len(sid) > level})
        means = [
            np.mean([v for sid, v in zip(sids, vectors, strict=True) if sid[level : level + 1] == (t,)], axis=0)
            for t in tokens
        ]
        raw |= {token: mean - np.mean(means, axis=0) for token, mean in zip(tokens, means, strict=True)}
    scale = np.std(list(raw.values()))
    assert found.keys() == raw.keys()
    for token, vector in raw.items():
        np.testing.assert_allclose(found[token], vector / scale)


def test_nothing_to_say_is_no_direction():
    assert compute_code_directions([("<a_0>",), ("<a_1>",)], np.ones((2, 4))) == {}
    assert not compute_tfidf_vectors(["alpha", "beta", "gamma"], 8, 0).any()
    assert not compute_tfidf_vectors(["alpha beta"], 8, 0).any()


@pytest.mark.parametrize("width", [4, 64, 300])
def test_like_texts_get_like_vectors(width):
    vectors = compute_tfidf_vectors(TOOLS + LAB, width, seed=1)
    assert vectors.shape == (8, width) and np.array_equal(vectors, compute_tfidf_vectors(TOOLS + LAB, width, seed=1))
    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[4]) + 0.2
    assert cosine(vectors[4], vectors[5]) > cosine(vectors[5], vectors[1]) + 0.2


def test_embedding_vectors_by_loops():
    tokenizer = train_tokenizer(TOOLS + LAB, 300)
    model = tiny_model("llama", len(tokenizer))
    rows = model.get_input_embeddings().weight.detach().numpy()
    texts = [*TOOLS, "", *LAB]
    found = average_embeddings(texts, model, tokenizer)
    ids = [set(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    for own, vector in zip(ids, found, strict=True):
        weights = {token: np.log(len(texts) / sum(token in other for other in ids) + 1) for token in own}
        total = sum((rows[token] * weight for token, weight in weights.items()), np.zeros(rows.shape[1]))
        np.testing.assert_allclose(vector, total / max(sum(weights.values()), 1e-9), atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_follow_the_directions(tied):
    rng = random.Random(0)
    tokens = [f"<a_{n}>" for n in range(40)]
    generator = np.random.default_rng(0)
    directions = {token: generator.standard_normal(32) for token in rng.sample(tokens, 40)}
    tokenizer = train_tokenizer(TOOLS + LAB, 300)
    model = tiny_model("llama", len(tokenizer), tie_word_embeddings=tied)
    known = len(tokenizer)
    assert add_sid_tokens(model, tokenizer, tokens, seed=3, spread=0.5, directions=directions) == 40
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        old = layer.weight[:known].detach()
        for token in tokens:
            row = layer.weight[tokenizer.convert_tokens_to_ids(token)].detach()
            off = (row - old.mean(dim=0)) / old.std(dim=0)
            assert np.corrcoef(off.numpy(), directions[token])[0, 1] > 0.85
            assert off.norm() == pytest.approx(0.5 * np.linalg.norm(directions[token]), rel=0.35)
    assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight) == tied
