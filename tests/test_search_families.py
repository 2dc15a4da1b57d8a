"""Searches of many families of models: by the search's own attention where it is the model's, else by the model's."""

import random
import re

import pytest
import torch
import transformers
from tiny import END, random_catalogue, random_prompts, rank_by_textbook, tiny_model
from transformers import AutoModelForCausalLM

from minionerec.search import prefill
from minionerec.search.attention_check import check_trees, find_obstacle
from minionerec.search.beam_search import beam_search, sample
from minionerec.search.output_head import has_plain_head
from minionerec.search.tree_scorer import choose_batch_size
from minionerec.search.trie import SidTrie

VOCABULARY = 60
LONGEST = 29  # tokens of a prompt and a sequence
SPECIAL = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": 0}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
OLD = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}

# (config class, its settings, whether logits are a product and nothing else)
OWN = {
    "llama": ("LlamaConfig", GATED, True),
    "qwen3": ("Qwen3Config", GATED, True),
    "mistral, a window longer than all": ("MistralConfig", {**GATED, "sliding_window": LONGEST}, True),
    "gemma3, full attention": ("Gemma3TextConfig", {**GATED, "layer_types": ["full_attention"] * 2}, True),
    "gpt2": ("GPT2Config", OLD, True),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}, True),
    "gpt_neox": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 64}, True),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**GATED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        True,
    ),
    "deepseek_v3, values wider than keys": (
        "DeepseekV3Config",
        {
            **SIZES,
            "intermediate_size": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 12,
            "moe_intermediate_size": 16,
        },
        True,
    ),
    "cohere, a factor behind the head": ("CohereConfig", {**GATED, "logit_scale": 0.5}, False),
    "granite, a divisor behind the head": ("GraniteConfig", {**GATED, "logits_scaling": 4.0}, False),
}
# (config class, its settings, what stands in the way)
THEIRS = {
    "qwen2, windows": (
        "Qwen2Config",
        {**GATED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        "sees 4 tokens",
    ),
    "mistral, a window too short by one": (
        "MistralConfig",
        {**GATED, "sliding_window": LONGEST - 1},
        "sees 28 tokens, and sequences are longer",
    ),
    "gemma2, capped scores": ("Gemma2Config", {**GATED, "sliding_window": 6}, "softcap"),
    "gemma3, windows": ("Gemma3TextConfig", {**GATED, "sliding_window": 6}, "sees 6 tokens"),
    "bloom, biases": ("BloomConfig", {**OLD, "hidden_size": 32}, "not all of its layers"),
    "falcon, biases": ("FalconConfig", {**SIZES, "alibi": True}, "not all of its layers"),
    "gpt_neo, windows of its own": (
        "GPTNeoConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "window_size": 5,
            "attention_types": [[["global", "local"], 1]],
        },
        "not all of its layers",
    ),
    "gpt_oss, sinks": (
        "GptOssConfig",
        {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
        "s_aux",
    ),
    "stablelm, keeps arguments": ("StableLmConfig", GATED, "do not hand the prompts on"),
    "mamba, no attention": (
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "not all of its layers",
    ),
}


def build(name: str, settings: dict):
    torch.manual_seed(1)
    spread = {"init_std" if name == "OPTConfig" else "initializer_range": 0.3}
    config = getattr(transformers, name)(**{**SPECIAL, **spread, **settings})
    return AutoModelForCausalLM.from_config(config).eval()


def assert_equal_to_hf(model, seed):
    """Depths that differ, a prompt of one token and one of the longest, more beams than a small prompt's choices."""
    rng = random.Random(seed)
    sequences = random_catalogue(rng, 60, 3, 9, VOCABULARY, True)
    prompts = [*random_prompts(rng, 2, VOCABULARY), [7]]
    trie = SidTrie(sequences)
    prompts.append([rng.randrange(2, VOCABULARY) for _ in range(LONGEST - trie.depth)])
    texts = trie.sequences()
    for penalty in (0.0, 1.0):
        found = beam_search(model, trie, prompts, 8, length_penalty=penalty)
        expected = rank_by_textbook(model, sequences, prompts, 8, penalty)
        for numbers, scores, ranking in zip(found.sequence.tolist(), found.score.tolist(), expected, strict=True):
            assert [texts[number] for number in numbers] == [tokens for tokens, _ in ranking]
            assert scores == pytest.approx([score for _, score in ranking], abs=1e-4)
    return trie, prompts


@pytest.mark.parametrize("family", OWN)
def test_the_attention_of_the_search_is_theirs(family):
    name, settings, plain = OWN[family]
    model = build(name, settings)
    attention = model.config._attn_implementation
    if "sliding_window" not in settings:
        check_trees(model)
        check_trees(build(name, settings).bfloat16())
    assert find_obstacle(model, LONGEST) is None and has_plain_head(model) is plain
    assert_equal_to_hf(model, family)
    assert model.config._attn_implementation == attention
    assert find_obstacle(build(name, settings).bfloat16(), LONGEST) is None


@pytest.mark.parametrize("family", THEIRS)
def test_their_own_attention_is_used(family, capsys):
    name, settings, reason = THEIRS[family]
    model = build(name, settings)
    assert reason in find_obstacle(model, LONGEST)
    trie, prompts = assert_equal_to_hf(model, family)
    assert choose_batch_size(model, trie, LONGEST, 8) >= 1
    assert len(re.findall(r"every beam is a row", capsys.readouterr().out)) <= 1  # said once a run
    assert reason in find_obstacle(build(name, settings).bfloat16(), LONGEST)
    if family.startswith(("bloom", "qwen2")):
        # Draws and probabilities over the legal tokens as well.
        assert (sample(model, trie, prompts, 4).sequence >= 0).all()
        scores = beam_search(model, trie, prompts, trie.num_sequences, renormalize=True).score
        torch.testing.assert_close(scores.exp().sum(dim=1), torch.ones(len(prompts)))


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("bloom, biases", "takes no prefix trees"),
        ("falcon, biases", "takes no prefix trees"),
        ("gpt_neo, windows of its own", "does not follow prefix trees"),
        ("gemma2, capped scores", "sliding_attention"),
        ("mamba, no attention", "linear_attention"),
    ],
)
def test_models_that_cannot_be_trained_on_trees_are_refused(family, said):
    name, settings, _ = THEIRS[family]
    with pytest.raises(ValueError, match=said):
        check_trees(build(name, settings))


def test_a_window_is_in_the_way_of_longer_prompts_alone():
    model = build("MistralConfig", {**GATED, "sliding_window": 40})
    assert find_obstacle(model, 40) is None
    assert "sees 40 tokens" in find_obstacle(model, 41)


@pytest.mark.parametrize("wrong", ["scale", "causality", "prefixes"])
def test_another_attention_is_noticed_by_its_numbers(monkeypatch, wrong):
    """A layer that says nothing: in the packed row, or behind the prompts."""
    attend, gather = prefill._attend_causally, prefill.PrefilledPrompts.extend
    if wrong == "scale":
        monkeypatch.setattr(prefill, "_attend_causally", lambda *values: attend(*values[:4], 1.01 * values[4]))
    elif wrong == "causality":
        monkeypatch.setattr(prefill, "_attend_causally", lambda query, *values: attend(query.flip(2), *values).flip(1))
    else:
        monkeypatch.setattr(
            prefill.PrefilledPrompts,
            "extend",
            lambda self, tokens, parent, level: gather(self, tokens, 0 * parent, level),
        )
    assert find_obstacle(tiny_model("llama", VOCABULARY), 10) == "its attention is of its own kind"


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_weights_that_say_nothing_are_no_obstacle(value):
    """All logits are equal, or NaN, which a search names itself."""
    model = tiny_model("llama", VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight.fill_(value)
    check_trees(model)
    assert find_obstacle(model, 10) is None


def test_empty_prompts_are_named_for_rows_too():
    model = build("BloomConfig", {**OLD, "hidden_size": 32})
    trie = SidTrie([[5, END], [6, END]])
    for prompts in ([], [[3], []]):
        with pytest.raises(ValueError, match="every prompt needs at least one token"):
            beam_search(model, trie, prompts, 2)
