"""Log-probabilities and entropies of labels, without a float32 copy of the logits of the whole vocabulary.

Logits stay in the dtype that the model computes in. They are read in parts, each of which is float32 for as long as its
normaliser and its entropy are taken; the backward pass does the same, so that beside the logits and their gradient
nothing of that size is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

# Logits that are float32 at a time: on a CPU what fits its cache, elsewhere enough to fill the device.
PART = {"cpu": 2**18}
PART_ELSEWHERE = 2**25


def score_labels(
    logits: torch.Tensor,
    label_row: torch.Tensor,
    tokens: torch.Tensor,
    legal: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of label tokens, and entropies of the distributions that they are drawn from.

    Args:
        logits: [U, vocab] in any float dtype.
        label_row: [K] int64, the row of logits that each label is read from; several may share one.
        tokens: [K] int64, the label tokens.
        legal: [K, F] token ids that are legal at each label, the label's own among them, filled up with -1; None for
            the whole vocabulary.
        temperature: divides the logits.

    Returns:
        (log-probabilities [K] float32, differentiable; entropies [K] float32 in nats, without gradient).
    """
    if legal is None:
        log_probs, entropy = _VocabularyScores.apply(logits, label_row, tokens, temperature)
        return log_probs, entropy[label_row]
    rows = logits[label_row.unsqueeze(1), legal.clamp(min=0)].float().masked_fill(legal < 0, float("-inf"))
    rows = rows / temperature
    chosen = logits[label_row, tokens].float() / temperature
    log_probs = rows.detach().log_softmax(dim=-1)
    entropy = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(dim=-1)
    return chosen - torch.logsumexp(rows, dim=-1), entropy


def _list_parts(logits: torch.Tensor) -> Iterator[slice]:
    rows, vocabulary = logits.shape
    size = max(1, PART.get(logits.device.type, PART_ELSEWHERE) // vocabulary)
    for start in range(0, rows, size):
        yield slice(start, start + size)


def _scale(part: torch.Tensor, temperature: float) -> torch.Tensor:
    return part.float() if temperature == 1.0 else part.float() / temperature


class _VocabularyScores(torch.autograd.Function):
    """(log-probabilities [K], entropies [U]) over the whole vocabulary.

    d log p(token) / d logits = (one-hot(token) - softmax) / temperature; labels of one row share its softmax.
    """

    @staticmethod
    def forward(ctx, logits, label_row, tokens, temperature):
        normaliser = torch.empty(len(logits), device=logits.device)
        entropy = torch.empty_like(normaliser)
        for part in _list_parts(logits):
            values = _scale(logits[part], temperature)
            highest = values.amax(dim=-1, keepdim=True)
            values = values - highest
            weight = values.exp()
            total = weight.sum(dim=-1)
            normaliser[part] = highest.squeeze(-1) + total.log()
            values.clamp_(min=torch.finfo(values.dtype).min)  # 0 * -inf is not 0
            entropy[part] = total.log() - torch.linalg.vecdot(weight, values) / total
        chosen = _scale(logits[label_row, tokens], temperature)
        ctx.save_for_backward(logits, label_row, tokens, normaliser)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return chosen - normaliser[label_row], entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, by_label, _):
        logits, label_row, tokens, normaliser = ctx.saved_tensors
        by_label = by_label / ctx.temperature
        by_row = torch.zeros_like(normaliser).index_add_(0, label_row, by_label)
        gradient = torch.empty_like(logits)
        for part in _list_parts(logits):
            weight = (_scale(logits[part], ctx.temperature) - normaliser[part, None]).exp_()
            gradient[part] = weight.mul_(-by_row[part, None])
        gradient.index_put_((label_row, tokens), by_label.to(gradient.dtype), accumulate=True)
        return gradient, None, None, None
