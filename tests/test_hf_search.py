"""The textbook search against the tree search, and what it must not read."""

import random

import pytest
import torch
from tiny import CONFIGS, END, random_catalogue, random_prompts, tiny_model

from LogitProcessor import hf_beam_search, pad_left
from minionerec.search.beam_search import beam_search
from minionerec.search.trie import SidTrie

BAD_HABITS = {  # what a checkpoint's generation_config.json may hold
    "do_sample": True,
    "temperature": 0.2,
    "top_k": 2,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [3, 4, 5],
    "bad_words_ids": [[6]],
    "min_new_tokens": 4,
    "max_length": 7,
    "num_beams": 3,
}


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_tree_search(kind, seed):
    """Any depths, prompts of different length, short lists, length penalties."""
    rng = random.Random(f"hf{kind}{seed}")
    vocab_size = rng.choice([40, 150])
    sequences = random_catalogue(
        rng, rng.choice([1, 3, 60, 700]), rng.randint(1, 5), rng.choice([2, 6, 30]), vocab_size, mixed=seed % 2 == 0
    )
    model, trie = tiny_model(kind, vocab_size, seed), SidTrie(sequences)
    model.generation_config.update(**BAD_HABITS)
    prompts, num_beams = random_prompts(rng, rng.randint(1, 5), vocab_size), rng.choice([2, 5, 16, 50])
    length_penalty = rng.choice([0.0, 0.0, 1.0, -0.5, 6.0])
    textbook = hf_beam_search(model, trie, prompts, num_beams, END, length_penalty)
    expected = beam_search(model, trie, prompts, num_beams, length_penalty=length_penalty)
    assert torch.equal(textbook.sequence, expected.sequence)
    torch.testing.assert_close(textbook.score, expected.score, atol=1e-4, rtol=0)


def test_the_model_is_left_as_it_was(monkeypatch):
    model = tiny_model("qwen3", 40, attention_dropout=0.5).train()
    model.generation_config.update(**BAD_HABITS)
    config, before = model.generation_config, model.generation_config.to_dict()
    trie = SidTrie(random_catalogue(random.Random(1), 40, 3, 8, 40, False))
    first, second = (hf_beam_search(model, trie, [[3, 4], [5]], 8, END) for _ in range(2))
    assert torch.equal(first.score, second.score)  # no dropout inside
    assert model.training and model.generation_config is config and config.to_dict() == before
    monkeypatch.setattr(SidTrie, "mask", None)
    with pytest.raises(TypeError):
        hf_beam_search(model, trie, [[3]], 2, END)
    assert model.training and model.generation_config is config


def test_left_padding():
    ids, mask = pad_left([[5], [6, 7, 8]], 1)
    assert ids.tolist() == [[1, 1, 5], [6, 7, 8]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_wrong_inputs_are_named():
    model, trie = tiny_model("llama", 20), SidTrie([[5, END], [6, END]])
    with pytest.raises(ValueError, match="num_beams must be 2 or more for generate, got 1"):
        hf_beam_search(model, trie, [[3]], 1, END)
    with pytest.raises(ValueError, match="at least one token"):
        hf_beam_search(model, trie, [[3], []], 2, END)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        hf_beam_search(model, trie, [[3]], 2, END)
