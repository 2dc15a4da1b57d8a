"""Prefix trees: every prefix once, and logits, losses and gradients of the separate rows."""

import copy
import random

import pytest
import torch
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from minionerec.search.attention_check import check_tree_attention, check_trees
from minionerec.search.prefix_tree import (
    batch_trees,
    build_prefix_tree,
    build_tree_mask,
    compute_tree_log_probs,
)


def random_rows(rng, vocab_size):
    """Rows of one group: nested prefixes, repeated rows, unrelated rows."""
    base = [rng.randint(2, vocab_size - 1) for _ in range(rng.randint(3, 20))]
    rows = []
    for _ in range(rng.randint(1, 7)):
        cut = rng.randint(1, len(base) - 1)
        rows.append(
            (
                base[:cut],
                base[cut : cut + rng.randint(1, 3)] if rng.random() < 0.5 else [rng.randint(2, vocab_size - 1)],
            )
        )
    rows.append(([rng.randint(2, vocab_size - 1) for _ in range(4)], [3, 4]))
    return rows + rows[:1]


@pytest.mark.parametrize("seed", range(20))
def test_tree_holds_every_prefix_once_in_depth_first_order(seed):
    rng = random.Random(seed)
    sequences = [prompt + target for prompt, target in random_rows(rng, 6)]
    tree = build_prefix_tree(sequences)
    prefixes = {tuple(sequence[: i + 1]) for sequence in sequences for i in range(len(sequence))}
    assert len(tree.tokens) == len(prefixes)
    prefix_of = {}
    for row, sequence in enumerate(sequences):
        for depth in range(len(sequence)):
            prefix_of.setdefault(tree.node[row, depth], tuple(sequence[: depth + 1]))
            assert prefix_of[tree.node[row, depth]] == tuple(sequence[: depth + 1])
        assert (tree.node[row, len(sequence) :] == -1).all()
    assert set(prefix_of.values()) == prefixes
    mask = build_tree_mask(torch.from_numpy(tree.end)[None])[0, 0]
    for query in range(len(tree.tokens)):
        assert tree.tokens[query] == prefix_of[query][-1] and tree.depth[query] == len(prefix_of[query]) - 1
        seen = {prefix_of[key] for key in mask[query].nonzero().flatten().tolist()}
        assert seen == {prefix_of[query][: i + 1] for i in range(len(prefix_of[query]))}


def separate_log_probs(model, groups):
    """The slow twin: one forward per row."""
    values = []
    for rows in groups:
        for prompt, target in rows:
            log_probs = model(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
            values += [log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(target)]
    return torch.stack(values)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_losses_and_gradients_equal_separate_rows(kind, checkpointing, attention):
    rng = random.Random(f"{kind}{checkpointing}")
    groups = [random_rows(rng, 50) for _ in range(3)]
    tree_model = tiny_model(kind, 50, tie_word_embeddings=kind != "llama")
    row_model = copy.deepcopy(tree_model)
    tree_model.set_attn_implementation(attention)
    if checkpointing:
        tree_model.gradient_checkpointing_enable()
        tree_model.train()
    ours = compute_tree_log_probs(tree_model, batch_trees(groups, 0))
    theirs = separate_log_probs(row_model, groups)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weights = torch.rand(len(ours), generator=torch.Generator().manual_seed(0))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    for (name, first), second in zip(tree_model.named_parameters(), row_model.parameters(), strict=True):
        scale = second.grad.abs().max().clamp(min=1e-8)
        assert (first.grad - second.grad).abs().max() / scale < 1e-5, name


def test_only_label_nodes_reach_the_output_layer():
    model = tiny_model("llama", 50)
    batch = batch_trees([[([5, 6, 7, 8, 9], [10])], [([5, 6], [11, 12])]], 0)
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape))
    compute_tree_log_probs(model, batch)
    handle.remove()
    assert sizes == [(3, 50)]
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 2, 50)  # the hook is gone


def test_empty_rows_and_wrong_attention_are_errors():
    with pytest.raises(ValueError, match="at least one token"):
        batch_trees([[([], [3])]], 0)
    with pytest.raises(ValueError, match="sliding_attention"):
        check_tree_attention(tiny_model("qwen2", 20, use_sliding_window=True, sliding_window=4, max_window_layers=0))


PLAIN = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
PLAIN |= dict(vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2)
WINDOWED = {
    "mistral": {},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "phi3": {},
    "starcoder2": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1, "head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "attn_logit_softcapping": None},
    "olmo3": {},
    "cohere2": {},
    "llama4_text": {"head_dim": 16, "num_local_experts": 2},
}


@pytest.mark.parametrize("kind", WINDOWED)
@pytest.mark.parametrize("window", [4, 22])
def test_windows_are_exact_where_they_hold_the_sequences_and_refused_where_not(kind, window):
    """Sequences of 22 tokens against separate rows, in trees that are longer than either window."""
    size = {"attention_chunk_size" if kind == "llama4_text" else "sliding_window": window}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **PLAIN | WINDOWED[kind] | size)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    rng = random.Random(0)
    groups = []
    for _ in range(2):
        first, *rests = ([rng.randrange(3, 100) for _ in range(length)] for length in (14, *[5] * 5))
        groups.append([(first + rest, [rng.randrange(3, 100) for _ in range(3)]) for rest in rests])
    with torch.no_grad():
        ours = compute_tree_log_probs(model, batch_trees(groups, 0))
    difference = (ours - separate_log_probs(model, groups)).abs().max()
    if window < 22:
        assert difference > 1e-3
        with pytest.raises(ValueError, match=f"of {window} tokens, and prefix trees need full attention"):
            check_trees(model, 22)
    else:
        assert difference < 1e-5
        check_trees(model, 22)


def test_windows_are_refused_where_the_kernel_cannot_follow_or_scores_are_capped():
    model = tiny_model("qwen2", 20, use_sliding_window=True, sliding_window=40, max_window_layers=0)
    check_tree_attention(model, 40)
    model.config.attn_logit_softcapping = 50.0
    with pytest.raises(ValueError, match="caps its attention scores"):
        check_tree_attention(model, 40)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="with flex_attention; use sdpa"):
        check_tree_attention(model, 40)
