"""The GRPO formulas: advantages in numbers, clipped losses and weights against twins that write them out."""

import math

import pytest
import torch

from minionerec.training.grpo_loss import (
    CLIP,
    LOSSES,
    average_per_completion,
    compute_advantages,
    compute_label_weights,
    compute_policy_loss,
    estimate_kl,
)


def test_group_advantages():
    assert compute_advantages([1, 0, 0, 0]).tolist() == pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3])
    half = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert compute_advantages([0.5, -0.5]).tolist() == pytest.approx([half, -half])
    values = compute_advantages([0.3, -0.1, 0.9, 0.2, 0.2])
    assert values.sum().item() == pytest.approx(0, abs=1e-6) and values.std().item() == pytest.approx(1, abs=1e-3)
    assert compute_advantages([1, 0, 0, 0], scale=False).tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])


@pytest.mark.parametrize("rewards", [[0.0] * 4, [1.0] * 4, [0.1] * 16, [0.7]])
@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_say_nothing(rewards, scale):
    """Exactly zero: a mean that is off by one rounding would be blown up by the division."""
    assert compute_advantages(rewards, scale=scale).tolist() == [0] * len(rewards)


def test_label_weights_in_numbers():
    lengths = torch.tensor([1, 3])
    assert compute_label_weights(lengths, "grpo", 2, 4, 5).tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])
    assert compute_label_weights(lengths, "gspo", 2, 4, 5).tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])
    assert compute_label_weights(lengths, "dapo", 2, 4, 5).tolist() == pytest.approx([1 / 4] * 4)
    assert compute_label_weights(lengths, "dr_grpo", 2, 4, 5).tolist() == pytest.approx([1 / 10] * 4)
    assert set(LOSSES) == set(CLIP)


def test_sequence_mean():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0])
    assert average_per_completion(values, torch.tensor([1, 3, 1])).tolist() == [1, 3, 3, 3, 10]


@pytest.mark.parametrize("epsilon, epsilon_high", [(0.2, 0.2), (0.2, 0.28), (0.01, 0.5)])
def test_clipped_loss_and_gradient(epsilon, epsilon_high):
    """The twin goes label by label and differentiates by hand: no gradient where the clip takes effect."""
    generator = torch.Generator().manual_seed(0)
    log_probs = (-3 * torch.rand(60, generator=generator, dtype=torch.float64)).requires_grad_()
    old = log_probs.detach() + 0.3 * torch.randn(60, generator=generator, dtype=torch.float64)
    advantages = torch.randn(60, generator=generator, dtype=torch.float64)
    loss, clipped = compute_policy_loss(log_probs, old, advantages, epsilon, epsilon_high)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    effects = set()
    for place in range(60):
        ratio = math.exp(log_probs[place].item() - old[place].item())
        a = advantages[place].item()
        beyond = ratio > 1 + epsilon_high if a > 0 else ratio < 1 - epsilon
        effects.add((beyond, a > 0))
        bound = 1 + epsilon_high if a > 0 else 1 - epsilon
        assert loss[place].item() == pytest.approx(-a * (bound if beyond else ratio))
        assert gradient[place].item() == pytest.approx(0.0 if beyond else -a * ratio)
        assert clipped[place].item() == beyond
    assert len(effects) == 4


def test_on_policy_the_ratio_is_one_and_its_gradient_the_policy_gradient():
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([2.0, -1.0])
    loss, clipped = compute_policy_loss(log_probs, log_probs.detach(), advantages, 0.2, 0.2)
    assert loss.tolist() == [-2, 1] and not clipped.any()
    loss.sum().backward()
    assert log_probs.grad.tolist() == [-2, 1]


def test_whole_completions_share_a_ratio():
    log_probs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    old = torch.tensor([-1.2, -2.2, -0.5])
    advantages = torch.tensor([1.0, 1.0, -1.0])
    loss, clipped = compute_policy_loss(log_probs, old, advantages, 0.5, 0.5, torch.tensor([2, 1]))
    assert loss.tolist() == pytest.approx([-math.exp(0.2), -math.exp(0.2), 1.0]) and not clipped.any()
    loss.sum().backward()
    # Both labels of the first completion have the ratio of their mean difference: half of each one's gradient, twice.
    assert log_probs.grad.tolist() == pytest.approx([-math.exp(0.2), -math.exp(0.2), 1.0])


def test_kl_estimate():
    generator = torch.Generator().manual_seed(0)
    log_probs = (-3 * torch.rand(40, generator=generator, dtype=torch.float64)).requires_grad_()
    reference = -3 * torch.rand(40, generator=generator, dtype=torch.float64)
    divergence = estimate_kl(log_probs, reference)
    policy, base = log_probs.detach().exp(), reference.exp()
    torch.testing.assert_close(divergence.detach(), base / policy - torch.log(base / policy) - 1)
    assert (divergence > 0).all() and estimate_kl(log_probs, log_probs).abs().max() == 0
    (gradient,) = torch.autograd.grad(divergence.sum(), log_probs)
    torch.testing.assert_close(gradient, 1 - base / policy)
