"""Packing of training rows: every way to put rows into batches gives the loss and the gradients of separate rows."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_examples, tiny_model

from minionerec.search.prefix_tree import TreeBatch, compute_tree_log_probs, fill_bins
from minionerec.training.sft_trainer import TreeBatches


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 30))
def test_bins_hold_every_group_once_and_are_filled_alike(sizes, count):
    bins = fill_bins(sizes, count)
    assert len(bins) == count and sorted(group for part in bins for group in part) == list(range(len(sizes)))
    loads = [sum(sizes[group] for group in part) for part in bins]
    # The last group put into a bin went to the emptiest one.
    assert max(loads) - min(loads) <= max(sizes)
    assert len(sizes) < count or all(bins)


def gradients(model, batches):
    """(loss per label token, gradient of every parameter) over all micro-batches."""
    model = copy.deepcopy(model)
    total, labels = 0.0, 0.0
    for index in range(len(batches)):
        batch = TreeBatch(**batches[index])
        loss = -(compute_tree_log_probs(model, batch) * batch.label_weight).sum()
        loss.backward()
        total, labels = total + loss.item(), labels + batch.label_weight.sum().item()
    return total / labels, {name: parameter.grad / labels for name, parameter in model.named_parameters()}


def separate_gradients(model, examples):
    """The slow twin of `gradients`: one ordinary forward pass per row."""
    model = copy.deepcopy(model)
    total, labels = 0.0, 0
    for example in examples:
        log_probs = model(torch.tensor([example.prompt_ids + example.target_ids])).logits[0].log_softmax(-1)
        before = enumerate(example.target_ids, len(example.prompt_ids) - 1)  # the position that predicts each token
        total = total - sum(log_probs[position, token] for position, token in before)
        labels += len(example.target_ids)
    (total / labels).backward()
    return total.item() / labels, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_packing_gives_the_loss_and_gradients_of_separate_rows(kind, checkpointing):
    examples = random_examples(random.Random(kind), 40, 7)
    model = tiny_model(kind, 40)
    expected_loss, expected = separate_gradients(model, examples)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    for packing, tree_tokens, micro_batches in (
        ("tree", 1, 1),
        ("tree", 40, 3),
        ("tree", 4000, 2),
        ("none", 1, 1),
        ("none", 1, 5),
    ):
        batches = TreeBatches([examples[:11], examples[11:]], 40, micro_batches, 0, 5, packing, tree_tokens)
        assert len(batches) == micro_batches
        if packing == "tree" and tree_tokens == 4000:
            assert all(len(batches[index]["input_ids"]) == 1 for index in range(micro_batches))
        loss, packed = gradients(model, batches)
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        for name, gradient in packed.items():
            assert (gradient - expected[name]).abs().max() < 1e-5, (packing, tree_tokens, name)


def test_rows_of_a_user_share_a_tree_over_all_datasets():
    examples = random_examples(random.Random(0), 30, 5)
    apart = TreeBatches([examples], 30, 1, 0, None, tree_tokens=1)
    twice = TreeBatches([examples, examples], 60, 1, 0, None, tree_tokens=1)
    # The same rows again add labels, but not one token.
    assert torch.equal(torch.sort(apart[0]["input_ids"].flatten())[0], torch.sort(twice[0]["input_ids"].flatten())[0])
    assert len(twice[0]["label_weight"]) == 2 * len(apart[0]["label_weight"])
    assert TreeBatches([examples], 30, 1, 0, None, "none")[0]["end"] is None
