"""Prompts that rollout and first update share, labels scored part by part, and the clock of a step."""

import random
import time
from dataclasses import replace

import pytest
import torch
from test_grpo import assert_same, gradients, make_trainer, slow_loss, step_loss, with_hits_and_misses
from tiny import random_catalogue, random_prompts, tiny_model

from minionerec.search import label_scores
from minionerec.search.beam_search import beam_search, sample
from minionerec.search.label_scores import score_labels
from minionerec.search.prefix_tree import batch_trees, compute_label_logits
from minionerec.search.shared_prompts import SharedPrompts
from minionerec.search.trie import SidTrie
from minionerec.training.groups import GroupBatch
from minionerec.training.reference import store_linear_weights
from minionerec.training.step_clock import StepClock


def count_tokens(model):
    """Tokens of the forward passes of a model from now on."""
    sizes = []
    model.register_forward_pre_hook(lambda _, args, named: sizes.append(named["input_ids"].numel()), with_kwargs=True)
    return sizes


@pytest.mark.parametrize("beams", [True, False])
@pytest.mark.parametrize("extra", [dict(), dict(add_gt=True), dict(dynamic_sampling=True), dict(renormalize=True)])
def test_shared_and_separate_prompts_give_the_same_step(tmp_path, beams, extra):
    found = []
    for share in (True, False):
        trainer, examples = make_trainer(
            tmp_path, beam_search=beams, share_prompts=share, prompts=7, tree_tokens=40, **extra
        )
        assert (trainer.share_prompts(examples, 1) is not None) == share
        loss = step_loss(trainer, examples)
        found.append((loss.item(), gradients(trainer, loss), trainer._step_batches[0]["groups"]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert found[0][2].tree.input_ids.equal(found[1][2].tree.input_ids)  # the same completions
    torch.testing.assert_close(found[0][2].old, found[1][2].old, atol=1e-5, rtol=1e-5)
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], gradient, atol=1e-5, rtol=1e-4)


def test_equal_prompts_and_prompts_that_begin_with_others(tmp_path, monkeypatch):
    """A completion may also go on as another prompt does."""
    trainer, examples = make_trainer(tmp_path)
    first = trainer.completion_tokens[trainer.rollout(examples)[0][0]]
    examples[1] = replace(examples[1], prompt_ids=list(examples[0].prompt_ids))
    examples[2] = replace(examples[2], prompt_ids=[*examples[0].prompt_ids, *first[:2]])
    examples, groups = with_hits_and_misses(trainer, examples, monkeypatch)
    assert_same(trainer, step_loss(trainer, examples), slow_loss(trainer, examples, groups))


def test_the_first_update_feeds_completions_alone_and_the_second_all(tmp_path):
    trainer, examples = make_trainer(tmp_path, num_iterations=2)
    sizes = count_tokens(trainer.model)
    trainer._step_batches = trainer._make_step(examples, 1)
    rolled, batch = len(sizes), trainer._step_batches[0]
    trainer.compute_loss(trainer.model, batch)
    assert len(sizes) == rolled + 1 and sizes[-1] < batch["groups"].tree.input_ids.numel() - sizes[0] / 2
    trainer.compute_loss(trainer.model, batch)
    assert sizes[-1] == batch["groups"].tree.input_ids.numel()


@pytest.mark.parametrize(
    "config",
    [dict(beta=0.0), dict(mask_all_zero=True), dict(gradient_checkpointing=True), dict(share_prompts=False)],
)
def test_what_cannot_share_its_prompts(tmp_path, config):
    trainer, examples = make_trainer(tmp_path, **config)
    assert trainer.share_prompts(examples, 1) is None


def test_a_step_of_several_batches_keeps_no_activations_of_its_rollout(tmp_path):
    trainer, examples = make_trainer(tmp_path)
    assert trainer.share_prompts(examples, 2) is None and trainer.share_prompts(examples, 1) is not None


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_searches_of_shared_prompts_equal_those_of_token_ids(kind):
    rng = random.Random(3)
    trie = SidTrie(sorted(random_catalogue(rng, 40, 4, 6, 30, mixed=True)))
    model, prompts = tiny_model(kind, 30, 1), random_prompts(rng, 6, 30)
    shared = SharedPrompts(model, prompts, 30, 0, 10)
    for numbers in ([4, 0, 5], [2], list(range(6))):
        chosen = [prompts[number] for number in numbers]
        for search in (
            lambda asked: beam_search(model, trie, asked, 8),
            lambda asked: sample(model, trie, asked, 8, 1.3, torch.Generator().manual_seed(5)),
        ):
            ours, theirs = search(shared.prefill(numbers)), search(chosen)
            assert ours.sequence.equal(theirs.sequence)
            torch.testing.assert_close(ours.score, theirs.score, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------------- scores
@pytest.mark.parametrize("part", [1, 45, 2**20])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("legal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_and_gradients_equal_a_log_softmax_per_label(monkeypatch, part, temperature, legal, dtype):
    monkeypatch.setitem(label_scores.PART, "cpu", part)
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(7, 20, generator=generator)).to(dtype).requires_grad_()
    rows = torch.tensor([0, 0, 3, 6, 2, 2, 2, 5, 1])
    tokens = torch.randint(20, (9,), generator=generator)
    table = torch.stack([(token + torch.randperm(19, generator=generator)[:5] + 1) % 20 for token in tokens])
    table[:, 0], table[4, 3:], table[5, 1:] = tokens, -1, -1
    table = table if legal else None
    weight = torch.randn(9, generator=generator)
    log_probs, entropy = score_labels(logits, rows, tokens, table, temperature)
    (gradient,) = torch.autograd.grad((log_probs * weight).sum(), logits)

    plain = logits.detach().double().requires_grad_()
    expected, entropies = [], []
    for label, row in enumerate(rows.tolist()):
        listed = list(range(20)) if table is None else sorted({*table[label].tolist()} - {-1})
        scores = (plain[row, listed] / temperature).log_softmax(-1)
        expected.append(scores[listed.index(tokens[label])])
        entropies.append(-(scores.exp() * scores).sum())
    torch.testing.assert_close(log_probs.double(), torch.stack(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), torch.stack(entropies), atol=1e-5, rtol=1e-5)
    assert not entropy.requires_grad and gradient.dtype == dtype
    (twin,) = torch.autograd.grad((torch.stack(expected) * weight).sum(), plain)
    error = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(gradient.double(), twin, atol=error, rtol=error)


def test_logits_of_minus_infinity_leave_no_nan():
    logits = torch.tensor([[0.0, 1.0, float("-inf")]], requires_grad=True)
    log_probs, entropy = score_labels(logits, torch.tensor([0]), torch.tensor([1]))
    log_probs.sum().backward()
    twin = torch.tensor([0.0, 1.0]).log_softmax(-1)
    assert log_probs.item() == pytest.approx(twin[1].item())
    assert entropy.item() == pytest.approx(-(twin.exp() * twin).sum().item())
    assert torch.isfinite(logits.grad).all()


# ------------------------------------------------------------------------------------------------- reference and clock
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_reference_in_half_the_memory_gives_the_same_bits_under_autocast(kind):
    model = tiny_model(kind, 40, 2).requires_grad_(False)
    tree = batch_trees([[([5, 6, 7], [8, 9]), ([5, 6, 7], [10, 9])], [([11, 12], [13])]], 0)
    before = sum(parameter.nbytes for parameter in model.parameters())

    def score():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return score_labels(compute_label_logits(model, tree), tree.label_row, tree.label_token)[0]

    first = score()
    store_linear_weights(model, torch.bfloat16)
    assert score().equal(first)
    assert sum(parameter.nbytes for parameter in model.parameters()) < 0.8 * before
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_time_inside_a_phase_counts_for_the_inner_one_alone():
    clock = StepClock(torch.device("cpu"))
    started = time.perf_counter()
    with clock.time("train"):
        time.sleep(0.02)
        with clock.time("reference"):
            time.sleep(0.03)
        time.sleep(0.02)
    whole, seconds = time.perf_counter() - started, clock.read()
    assert seconds["train"] >= 0.04 and seconds["reference"] >= 0.03 and sum(seconds.values()) <= whole
    assert clock.read() == {}


def test_metrics_stay_tensors_until_they_are_logged(tmp_path):
    trainer, examples = make_trainer(tmp_path)
    step_loss(trainer, examples)
    assert all(isinstance(trainer._sums[name][0], torch.Tensor) for name in ("kl", "entropy", "clip_share"))
    assert isinstance(trainer._step_batches[0]["groups"], GroupBatch)
    expected = trainer._sums["kl"][0].item()
    trainer._logged_step = 0
    logs = {"loss": 0.0}
    trainer.log(logs)
    assert logs["kl"] == pytest.approx(expected, abs=1e-6) and not trainer._sums
