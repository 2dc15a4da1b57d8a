"""Groups of completions: what dynamic sampling keeps, targets put in, batches, and which tokens are legal where."""

import random
from collections import Counter

import pytest
import torch
from tiny import random_catalogue, random_prompts, tiny_model

from minionerec.search.beam_search import beam_search
from minionerec.search.trie import SidTrie, pad_sequences
from minionerec.training.rollouts import find_legal_tokens, keep_diverse, roll_out


@pytest.mark.parametrize(
    "drawn, target, kept",
    [
        ([1, 2, 3, 4, 5, 6], 9, [1, 2, 3, 4]),
        ([1, 2, 3, 4, 5, 6], 6, [1, 2, 3, 6]),  # the target is kept from the far end
        ([1, 1, 1, 2, 1, 3], 9, [1, 1, 2, 3]),  # distinct ones first, then the earliest repeats
        ([7, 7, 7, 7, 7, 7], 7, [7, 7, 7, 7]),
        ([5, 5, 1, 1, 2, 2], 2, [5, 5, 1, 2]),
        ([3, 1], 1, [3, 1]),
    ],
)
def test_keep_diverse(drawn, target, kept):
    assert keep_diverse(drawn, target, 4) == kept


def test_keep_diverse_on_random_draws():
    """No other choice of as many draws has more distinct ones while holding the target."""
    rng = random.Random(0)
    for _ in range(300):
        drawn = [rng.randrange(6) for _ in range(rng.randint(1, 9))]
        target, count = rng.randrange(7), rng.randint(1, 9)
        kept = keep_diverse(drawn, target, count)
        assert len(kept) == min(count, len(drawn)) and not Counter(kept) - Counter(drawn)
        assert (target in kept) == (target in drawn)
        assert len(set(kept)) == min(count, len(set(drawn)))
        places = iter(drawn)
        assert all(any(number == other for other in places) for number in kept)  # in the order of drawing


@pytest.fixture(scope="module")
def world():
    rng = random.Random(1)
    sequences = random_catalogue(rng, 40, 4, 6, 30, mixed=True)
    return tiny_model("qwen3", 30), SidTrie(sequences), random_prompts(rng, 7, 30)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_beam_groups_are_the_search_in_any_batches(world, batch_size):
    model, trie, prompts = world
    groups = roll_out(model, trie, prompts, targets=[0] * 7, count=8, batch_size=batch_size)
    for prompt, group in zip(prompts, groups, strict=True):
        assert group == beam_search(model, trie, [prompt], 8).sequence[0].tolist()


@pytest.mark.parametrize("beams", [True, False])
def test_targets_are_put_in_the_last_place_of_groups_that_lack_them(world, beams):
    model, trie, prompts = world
    targets = list(range(7))
    plain = roll_out(model, trie, prompts, targets=targets, count=5, batch_size=4, beams=beams, seed="x")
    helped = roll_out(
        model, trie, prompts, targets=targets, count=5, batch_size=4, beams=beams, add_target=True, seed="x"
    )
    assert any(target not in group for target, group in zip(targets, plain, strict=True))
    for target, before, after in zip(targets, plain, helped, strict=True):
        assert after == (before if target in before else [*before[:-1], target])


@pytest.mark.parametrize("beams", [True, False])
def test_dynamic_sampling_chooses_from_half_as_many_again(world, beams):
    model, trie, prompts = world
    targets = [beam_search(model, trie, [prompt], 9).sequence[0, 7].item() for prompt in prompts]  # of rank 8
    wide = roll_out(model, trie, prompts, targets=targets, count=9, batch_size=4, beams=beams, seed="x")
    chosen = roll_out(model, trie, prompts, targets=targets, count=6, batch_size=4, beams=beams, dynamic=True, seed="x")
    assert chosen == [keep_diverse(group, target, 6) for group, target in zip(wide, targets, strict=True)]
    if beams:
        assert all(target in group for target, group in zip(targets, chosen, strict=True))


def test_legal_tokens_against_a_dictionary_of_prefixes(world):
    _, trie, _ = world
    sequences = trie.sequences()
    matrix = torch.from_numpy(pad_sequences(sequences)[0])
    table = find_legal_tokens(trie, matrix)
    for sequence, row in zip(sequences, table.tolist(), strict=True):
        for place, found in enumerate(row):
            allowed = {s[place] for s in sequences if s[:place] == sequence[:place]} if place < len(sequence) else set()
            assert {token for token in found if token >= 0} == allowed
            assert len([token for token in found if token >= 0]) == len(allowed)
