"""Probabilities over legal tokens: the loss beside a slow twin, and searches that follow it."""

import random

import numpy as np
import pytest
import torch
from tiny import tiny_model

from minionerec.evaluation.fusion import score_sids
from minionerec.search.beam_search import beam_search
from minionerec.search.legal_softmax import CONFIG_NAME, LegalTokens, compute_legal_log_probs
from minionerec.search.prefix_tree import SoftLabels, batch_trees
from minionerec.search.trie import SidTrie

END = 1


def random_sequences(rng, depths):
    """Sequences of different depths, none the beginning of another; several prefixes share tokens."""
    found = set()
    for _ in range(40):
        depth = rng.choice(depths)
        found.add((*(10 * level + rng.randrange(2, 6) for level in range(depth)), END))
    kept = [
        seq for seq in sorted(found) if not any(other[: len(seq) - 1] == seq[:-1] and other != seq for other in found)
    ]
    return [list(sequence) for sequence in kept]


def score_slowly(model, sequences, prompt, target, level, token):
    """log p(token) after a prompt and the first `level` tokens of a target, over what may follow there."""
    prefix = target[:level]
    children = sorted({other[level] for other in sequences if other[:level] == prefix and len(other) > level})
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *prefix]])).logits[0, -1]
    return logits[children].log_softmax(-1)[children.index(token)].item()


@pytest.mark.parametrize("seed", range(6))
def test_log_probabilities_are_those_over_the_children_of_each_prefix(seed):
    rng = random.Random(seed)
    sequences = random_sequences(rng, [1, 2, 3] if seed % 2 else [2])
    model, legal = tiny_model("qwen3", 60), LegalTokens(sequences)
    rows, expected = [], []
    for number in range(12):
        prompt = [50 + rng.randrange(4) for _ in range(rng.randint(1, 5))]
        target = rng.choice(sequences)
        labels = None
        if number % 2:  # all children of the first level, as a teacher would label them
            first = np.array(sorted({sequence[0] for sequence in sequences}))
            labels = SoftLabels(np.zeros(len(first), dtype=np.int64), first, np.full(len(first), 1 / len(first)))
        row = legal.make_row(prompt, target, labels)
        rows.append(row)
        kept = row[2]
        assert len(row[1]) == kept.level.max() + 1
        for level, token in zip(kept.level.tolist(), kept.token.tolist(), strict=True):
            expected.append(score_slowly(model, sequences, prompt, target, level, token))
        if labels is None:
            certain = set(range(len(target))) - set(kept.level.tolist())
            for level in certain:
                assert score_slowly(model, sequences, prompt, target, level, target[level]) == pytest.approx(
                    0, abs=1e-6
                )
    groups = [rows[:5], rows[5:6], rows[6:]]
    batch = batch_trees(groups, 0)
    found = compute_legal_log_probs(model, batch, legal)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    # The gradient is that of separate log-softmaxes: it is 0 for tokens that stand in no group of the batch.
    (found * batch.label_weight).sum().backward()
    outside = sorted(set(range(60)) - {token for row in rows for token in [*row[0], *legal.tokens.tolist()]})
    assert not model.get_input_embeddings().weight.grad[outside].any()


def test_a_catalogue_of_one_item_is_certain():
    legal = LegalTokens([[5, 6, END]])
    prompt, target, labels = legal.make_row([7], [5, 6, END], None)
    batch = batch_trees([[(prompt, target, labels)]], 0)
    assert target == [5] and compute_legal_log_probs(tiny_model("qwen3", 20), batch, legal).tolist() == [0]


def test_a_search_of_a_model_that_was_trained_so_scores_over_legal_tokens():
    sequences = random_sequences(random.Random(3), [1, 2, 3])
    model, trie = tiny_model("qwen3", 60), SidTrie(sequences)
    expected = beam_search(model, trie, [[50, 51], [52]], 5, renormalize=True)
    setattr(model.config, CONFIG_NAME, True)
    found = beam_search(model, trie, [[50, 51], [52]], 5)
    assert found.sequence.tolist() == expected.sequence.tolist() and found.score.equal(expected.score)
    best = trie.sequences()[int(found.sequence[0, 0])]
    (scored,) = score_sids(model, [[50, 51]], [[best]], 0, LegalTokens(sequences))
    assert scored == pytest.approx([float(found.score[0, 0])], abs=1e-4)
    steps = [score_slowly(model, sequences, [50, 51], best, level, token) for level, token in enumerate(best)]
    assert float(found.score[0, 0]) == pytest.approx(sum(steps), abs=1e-4)
