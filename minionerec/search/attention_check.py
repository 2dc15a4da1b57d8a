"""Which attention a model has: the model is asked, and no list of names is kept.

A search may replace it by its own where that gives the same; training needs one that follows prefix trees.
"""

from __future__ import annotations

import random
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import linear
from transformers import PretrainedConfig, PreTrainedModel

from minionerec.search.modes import evaluation_mode, use_attention, without_autocast
from minionerec.search.output_head import OutputHead
from minionerec.search.prefill import ATTENTION, SHORTEST_HEAD, PrefilledPrompts, UnknownAttentionError
from minionerec.search.prefix_tree import batch_trees, compute_label_logits

# Largest difference of logits, in their standard deviations. Lower precisions round; what that may hide, such as a cap
# or a bias of positions, a layer says itself.
TOLERANCE = 1e-3
TOLERANCE_IN_LOWER_PRECISION = 0.3

# {kind of layer: what its config calls the tokens that it sees}
WINDOW_SIZES = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}

# (why not, or None; the smallest window of a layer, or None) of models asked before.
_answers: WeakKeyDictionary[torch.nn.Module, tuple[str | None, int | None]] = WeakKeyDictionary()


def find_obstacle(model: PreTrainedModel, longest: int) -> str | None:
    """Why a search must leave a model its own attention.

    A model is asked once for each object: a few tokens are computed both ways.

    Args:
        model: any decoder-only model.
        longest: tokens of the longest sequence, its end included.

    Returns:
        The reason; None where the attention of `PrefilledPrompts` gives what the model's own gives.
    """
    if model not in _answers:
        _answers[model] = _ask(model)
    reason, window = _answers[model]
    if reason is None and window is not None and longest > window:
        return f"its attention sees {window} tokens, and sequences are longer"
    return reason


def _ask(model: PreTrainedModel) -> tuple[str | None, int | None]:
    output_head = OutputHead(model)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    rng = random.Random(0)
    head, *rests = ([rng.randrange(vocabulary) for _ in range(length)] for length in (SHORTEST_HEAD + 1, 2, 5, 3, 3))
    prompts, behind = [head + rest for rest in rests[:2]], rests[2:]
    expected = []
    with evaluation_mode(model), without_autocast(model):
        for prompt, chain in zip(prompts, behind, strict=True):
            row = torch.tensor([prompt + chain], device=model.device)
            expected.append(model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 :])
    try:
        with evaluation_mode(model), without_autocast(model), use_attention(model, ATTENTION):
            states, window = _compute(model, output_head, prompts, behind)
    except UnknownAttentionError as error:
        return str(error), None
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, IndexError) as error:  # shapes or arguments that no model had so far
        return f"its layers do not run with another attention ({error})".splitlines()[0], None
    head = model.get_output_embeddings()
    logits = linear(states, head.weight, head.bias) if output_head.is_plain else states
    if not _are_equal(model, logits, torch.stack(expected)):
        return "its attention is of its own kind", None
    return None, window


def _are_equal(model: PreTrainedModel, logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two computations of a model agree within rounding. Broken weights say nothing about its attention."""
    logits, expected = logits.float(), expected.float()
    if bool(expected.isnan().any()):
        return True
    precisions = {parameter.dtype for parameter in model.parameters()}
    tolerance = TOLERANCE if precisions == {torch.float32} else TOLERANCE_IN_LOWER_PRECISION
    return bool((logits - expected).abs().amax() <= tolerance * expected.std())


def _compute(
    model: PreTrainedModel, output_head: OutputHead, prompts: list[list[int]], behind: list[list[int]]
) -> tuple[torch.Tensor, int | None]:
    """What the head keeps after the last token of each prompt and after each token behind it [n, 1 + L, ...]; and the
    smallest window of a layer.

    Beside each prefix runs another one, and prefixes change places, so that a token which sees too much is noticed.
    """
    prefilled = PrefilledPrompts(model, prompts, output_head)
    if len(prefilled._keys) != model.config.get_text_config().num_hidden_layers:
        raise UnknownAttentionError("not all of its layers take another attention")
    chains = torch.tensor(behind, device=model.device)
    beside = chains.flip(1)
    first = torch.stack((beside[:, :1], chains[:, :1]), dim=1)
    after_first = prefilled.extend(first, torch.zeros_like(first[..., 0]), 0)[:, 1]
    rest = torch.stack((chains[:, 1:], beside[:, 1:]), dim=1)
    parent = torch.tensor([[1, 0]], device=model.device).expand(len(prompts), -1)
    after_rest = prefilled.extend(rest, parent, 1)[:, 0]
    return torch.cat((prefilled.states, after_first, after_rest), dim=1), prefilled.window


def check_tree_attention(model: PreTrainedModel, longest: int | None = None) -> None:
    """Stop if the model's attention cannot follow a prefix tree.

    Args:
        model: is asked by its config.
        longest: tokens of the longest sequence; None where it is not known. A window that holds it hides nothing: the
            mask of a tree is then right for layers with that window too.

    Raises:
        ValueError: layers with a shorter window or with linear attention, or an attention kernel without 4-D masks.
    """
    config, attention = model.config.get_text_config(), model.config._attn_implementation
    windows = find_windows(config)
    window = min((size for size in windows.values() if size is not None), default=None)
    unknown = ", ".join(sorted(kind for kind, size in windows.items() if size is None))
    if unknown:
        raise ValueError(
            f"{config.model_type}: its layers use {unknown}; prefix trees need full attention in every layer"
        )
    if window is not None and (longest is None or window < longest or attention == "flex_attention"):
        kernel = " with flex_attention" if attention == "flex_attention" else ""
        limit = f"; sequences of at most {window} tokens are exact: lower --cutoff_len" if not kernel else "; use sdpa"
        raise ValueError(
            f"{config.model_type}: its layers use {', '.join(windows)} of {window} tokens, and prefix trees need full "
            f"attention in every layer{kernel}{limit}"
        )
    if window is not None and getattr(config, "attn_logit_softcapping", None) and attention == "sdpa":
        raise ValueError(f"{config.model_type}: it caps its attention scores, which sdpa does not do")
    if attention not in ("sdpa", "eager", "flex_attention"):
        raise ValueError(f"attention {attention!r} takes no 4-D mask: load the model with sdpa")
    if attention == "flex_attention" and getattr(config, "attention_dropout", 0):
        raise ValueError(f"attention_dropout {config.attention_dropout}: flex_attention has no dropout; use sdpa")


def find_windows(config: PretrainedConfig) -> dict[str, int | None]:
    """{kind of layers without full attention: the tokens that they see}, None where those are not a window."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if not getattr(config, "layer_types", None) and getattr(config, "use_sliding_window", True):
        kinds |= {"sliding_attention"} if getattr(config, "sliding_window", None) else set()
    sizes = {name: getattr(config, key, None) for name, key in WINDOW_SIZES.items()}
    return {kind: sizes.get(kind) for kind in sorted(kinds)}


def check_trees(model: PreTrainedModel, longest: int | None = None) -> None:
    """Stop if a model cannot be trained on prefix trees: a small one is computed, and its rows one by one.

    Args:
        model: on its device. longest: tokens of the longest sequence, see `check_tree_attention`.

    Raises:
        ValueError: saying so.
    """
    check_tree_attention(model, longest)
    if model.config._attn_implementation == "flex_attention":  # its kernel would be compiled for this alone
        return
    if model.device.type == "meta":  # a plan's model has no numbers
        return
    vocabulary = model.get_output_embeddings().weight.shape[0]
    rng = random.Random(0)
    first, *rests = ([rng.randrange(vocabulary) for _ in range(length)] for length in (6, 3, 4, 2, 3))
    rows = [(first + rest, [rng.randrange(vocabulary) for _ in range(3)]) for rest in rests]
    with evaluation_mode(model):
        expected = []
        for prompt, target in rows:
            row = torch.tensor([prompt + target], device=model.device)
            logits = model(input_ids=row, use_cache=False).logits[0]
            expected.append(logits[len(prompt) - 1 : -1])
        try:
            batch = batch_trees([rows], 0).to(model.device)
            logits = compute_label_logits(model, batch)[batch.label_row]
        except (ValueError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{model.config.model_type}: its attention takes no prefix trees ({error})".splitlines()[0]
            ) from None
    if not _are_equal(model, logits, torch.cat(expected)):
        raise ValueError(f"{model.config.model_type}: its attention does not follow prefix trees")
