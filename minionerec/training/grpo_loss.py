"""What GRPO and its relatives compute from log-probabilities: advantages, clipped ratios, KL estimate, weights.

Everything is over labels: the K tokens of all completions of a batch, completion by completion. GRPO: arXiv 2402.03300;
DAPO: arXiv 2503.14476; Dr. GRPO: arXiv 2503.20783; GSPO: arXiv 2507.18071.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minionerec.common.files import InputError

LOSSES = ("grpo", "dapo", "dr_grpo", "gspo")


# (epsilon, epsilon_high) of the papers: how far a ratio may leave 1 before it is clipped, downwards and upwards.
CLIP = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "dr_grpo": (0.2, 0.2), "gspo": (3e-4, 4e-4)}


def compute_advantages(rewards: Sequence[float], eps: float = 1e-4, scale: bool = True) -> torch.Tensor:
    """(r - mean) / (std + eps) within a group, or r - mean without `scale` (Dr. GRPO).

    All zeros where the rewards are equal or alone.
    """
    values = torch.tensor(rewards, dtype=torch.float32)
    if len(values) < 2 or bool((values == values[0]).all()):
        return torch.zeros_like(values)
    centred = values - values.mean()
    return centred / (values.std() + eps) if scale else centred


def compute_label_weights(
    lengths: torch.Tensor, loss: str, completions: int, tokens: int, longest: int
) -> torch.Tensor:
    """What each label counts in the mean over a step, [K] float32, from the token counts of the completions [C].

    Args:
        completions, tokens: of the whole step, over all processes and groups, silent ones included.
        longest: tokens of the longest completion there can be.

    grpo, gspo: the mean over completions of their mean over tokens. dapo: the mean over tokens. dr_grpo: the mean over
    completions of their sum over `longest`, so that a token counts alike in short and long completions.
    """
    if loss == "dapo":
        each = torch.full_like(lengths, 1 / tokens, dtype=torch.float32)
    elif loss == "dr_grpo":
        each = torch.full_like(lengths, 1 / (completions * longest), dtype=torch.float32)
    else:
        each = 1 / (lengths.float() * completions)
    return each.repeat_interleave(lengths)


def average_per_completion(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The mean over each completion's labels, at each of its labels: [K] from [K] and token counts [C]."""
    # With the size given, a GPU's lengths need not be read.
    completions = torch.arange(len(lengths), device=values.device)
    owner = torch.repeat_interleave(completions, lengths, output_size=len(values))
    sums = torch.zeros(len(lengths), device=values.device, dtype=values.dtype).index_add(0, owner, values)
    return (sums / lengths)[owner]


def compute_policy_loss(
    log_probs: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    epsilon: float,
    epsilon_high: float,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [K], whether the clip took effect [K] bool) of the labels.

    loss = -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A), ratio = exp(log_probs - old). When the
    rollout comes from the same weights, old = log_probs without gradient: the ratio is 1 and only its gradient matters.

    Args:
        log_probs, old, advantages: [K]. lengths [C]: ratios of whole completions (GSPO): exp of the mean difference.
    """
    difference = log_probs - old
    if lengths is not None:
        difference = average_per_completion(difference, lengths)
    ratio = torch.exp(difference)
    bounded = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    return -torch.minimum(ratio * advantages, bounded * advantages), bounded * advantages < ratio * advantages


def estimate_kl(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """k3 = exp(reference - log_probs) - (reference - log_probs) - 1 per label: never negative, 0 where they agree.

    Over the full vocabulary it also holds back the mass that the policy gives to tokens no search may take; over legal
    tokens (renormalised log-probabilities) it compares the two as recommenders only, and forced tokens count 0.
    """
    difference = reference - log_probs
    return torch.exp(difference) - difference - 1


def choose_loss(dapo: bool, gspo: bool, dr_grpo: bool | None) -> str:
    """The name in `grpo_loss.LOSSES` that the flags ask for; dr_grpo if none of them is given.

    Raises:
        InputError: more than one of them.
    """
    named = [name for name, flag in (("dapo", dapo), ("gspo", gspo), ("dr_grpo", dr_grpo)) if flag]
    if len(named) > 1:
        raise InputError(f"--{named[0]} and --{named[1]}: choose one")
    return named[0] if named else "dr_grpo" if dr_grpo is None else "grpo"
