"""Tables of hand-computed numbers for rewards, and slow twins for the GRPO formulas."""

import math

import pytest
import torch

from minionerec_trainer import group_advantages, grpo_token_loss
from rewards import REWARDS, ranking, ranking_only, rule

# -------------------------------------------------------------------------------------------------------------- rewards
W = [1, 1 / math.log2(3), 1 / 2, 1 / math.log2(5)]  # 1 / log2(rank + 1)


@pytest.mark.parametrize(
    "completions, target, hits, penalties",
    [
        (["a", "b", "c"], "a", [1, 0, 0], [0, -W[1] / sum(W[:3]), -W[2] / sum(W[:3])]),
        (["a", "b", "c"], "b", [0, 1, 0], [-W[0] / sum(W[:3]), 0, -W[2] / sum(W[:3])]),
        (["a", "b", "c", "d"], "d", [0, 0, 0, 1], [-W[0] / sum(W), -W[1] / sum(W), -W[2] / sum(W), 0]),
        (["a", "b", "c"], "e", [0, 0, 0], [0, 0, 0]),
        (["a", "a", "b"], "a", [1, 1, 0], [0, 0, -W[2] / sum(W[:3])]),  # sampled groups repeat themselves
        (["a", "b"], "ab", [0, 0], [0, 0]),  # equal, not contained
    ],
)
def test_rewards(completions, target, hits, penalties):
    assert rule(completions, target) == hits
    assert ranking_only(completions, target) == pytest.approx(penalties)
    assert ranking(completions, target) == pytest.approx([hit + penalty for hit, penalty in zip(hits, penalties)])


def test_rank_penalty_in_numbers():
    assert ranking(["a", "b", "c"], "b") == pytest.approx([-0.46928, 1, -0.23464], abs=1e-5)


def test_the_registry_names_them():
    assert REWARDS["rule"] is rule and REWARDS["ranking"] is ranking and REWARDS["ranking_only"] is ranking_only


# ----------------------------------------------------------------------------------------------------------------- GRPO
def test_group_advantages():
    assert group_advantages([1, 0, 0, 0]).tolist() == pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3])
    half = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert group_advantages([0.5, -0.5]).tolist() == pytest.approx([half, -half])
    values = group_advantages([0.3, -0.1, 0.9, 0.2, 0.2])
    assert values.sum().item() == pytest.approx(0, abs=1e-6) and values.std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("rewards", [[0.0] * 4, [1.0] * 4, [0.1] * 16, [0.7]])
def test_equal_rewards_say_nothing(rewards):
    """Exactly zero: a mean that is off by one rounding would be blown up by the division."""
    assert group_advantages(rewards).tolist() == [0] * len(rewards)


def test_token_loss_value_and_gradient():
    """The twin writes the ratio to a frozen old policy and the k3 estimator out, and differentiates by hand."""
    generator = torch.Generator().manual_seed(0)
    log_probs = (-3 * torch.rand(40, generator=generator, dtype=torch.float64)).requires_grad_()
    reference = -3 * torch.rand(40, generator=generator, dtype=torch.float64)
    advantages = torch.randn(40, generator=generator, dtype=torch.float64)
    for beta in (0.0, 0.04, 1.0):
        loss, divergence = grpo_token_loss(log_probs, reference, advantages, beta)
        policy, base = log_probs.detach().exp(), reference.exp()
        kl = base / policy - torch.log(base / policy) - 1
        torch.testing.assert_close(loss.detach(), -advantages + beta * kl)
        torch.testing.assert_close(divergence, kl)
        assert (divergence >= 0).all() and not divergence.requires_grad
        (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
        torch.testing.assert_close(gradient, -advantages + beta * (1 - base / policy))

        twin = log_probs.detach().clone().requires_grad_()
        ratio = twin.exp() / policy
        difference = reference - twin
        (-(ratio * advantages) + beta * (difference.exp() - difference - 1)).sum().backward()
        torch.testing.assert_close(gradient, twin.grad)


def test_without_reference_there_is_no_divergence():
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, divergence = grpo_token_loss(log_probs, None, torch.tensor([2.0, -1.0]), 5.0)
    assert loss.tolist() == [-2, 1] and divergence.tolist() == [0, 0]
    loss.sum().backward()
    assert log_probs.grad.tolist() == [-2, 1]
