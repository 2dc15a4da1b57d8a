"""flex_attention sees what sdpa sees. Its backward pass needs a CUDA device: on a CPU only the forward is run."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from tiny import make_dataset, random_catalogue, random_examples, random_prompts, tiny_model, write_config
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from data import EvalSidDataset
from minionerec.common.cli import parse_flags
from minionerec.common.files import InputError
from minionerec.language.adapters import train_token_rows
from minionerec.language.prompts import load_checkpoint_prompts
from minionerec.search import prefix_tree
from minionerec.search.attention_check import check_tree_attention
from minionerec.search.beam_search import beam_search
from minionerec.search.prefix_tree import (
    TreeBatch,
    build_attention_mask,
    build_block_mask,
    build_tree_mask,
    compute_tree_log_probs,
)
from minionerec.search.trie import SidTrie
from minionerec.training.rl_setup import build_policy, read_rl_data
from minionerec.training.rollouts import roll_out
from minionerec.training.settings import RLFlags, SFTFlags
from minionerec.training.sft_trainer import TreeBatches
from rl import rl
from sft import sft

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="flex_attention has a backward pass on CUDA only")


def random_batch(seed, packing="tree"):
    """Trees of different sizes side by side, so that some end in padding nodes."""
    examples = random_examples(random.Random(seed), 60, 9)
    return TreeBatch(**TreeBatches([examples], 60, 1, 0, 5, packing, tree_tokens=90)[0])


def with_flex(model):
    model = copy.deepcopy(model)
    model.set_attn_implementation("flex_attention")
    return model


def random_ends(rng, length):
    """`end` of a random tree of so many nodes: each node goes below a random one of its predecessor's ancestors."""
    path, end = [], [length] * length
    for node in range(length):
        # Mostly chains, as prompts are, so that blocks of which every pair is visible occur.
        kept = len(path) if rng.random() < 0.97 else rng.randint(0, len(path))
        for closed in path[kept:]:
            end[closed] = node
        path = [*path[:kept], node]
    return end


def assert_same_pairs(end):
    """Pair by pair the dense mask's, and block by block what the library makes of that."""
    visible = build_tree_mask(end)
    n, _, length, _ = visible.shape
    ours = build_block_mask(end)
    assert torch.equal(create_mask(ours.mask_mod, n, 1, length, length, device="cpu"), visible)
    library = create_block_mask(
        lambda row, _head, query, key: visible[row, 0, query, key], n, None, length, length, device="cpu"
    )
    assert torch.equal(ours.to_dense(), library.to_dense())
    for count, numbers in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        assert torch.equal(getattr(ours, count), getattr(library, count))
        used = torch.arange(getattr(ours, numbers).shape[-1]) < getattr(ours, count).unsqueeze(-1)
        assert torch.equal(getattr(ours, numbers)[used], getattr(library, numbers)[used])
        transposed = numbers.replace("kv", "q")
        assert torch.equal(getattr(ours, count.replace("kv", "q")), getattr(library, count.replace("kv", "q")))
        used = torch.arange(getattr(ours, transposed).shape[-1]) < getattr(ours, count.replace("kv", "q")).unsqueeze(-1)
        assert torch.equal(getattr(ours, transposed)[used], getattr(library, transposed)[used])
    return ours


@pytest.mark.parametrize("seed", range(4))
def test_the_block_mask_is_the_mask_of_the_trees(seed):
    batch = random_batch(seed)
    assert len(batch.input_ids) > 1 and (batch.input_ids == 0).any()
    assert_same_pairs(batch.end)
    # As one says it pair by pair: key <= query < end[key].
    visible, index = build_tree_mask(batch.end), torch.arange(batch.end.shape[1])
    for query in index.tolist():
        assert torch.equal(visible[:, 0, query], (index <= query) & (query < batch.end))


@pytest.mark.parametrize("length", [1, 127, 128, 129, 384, 500, 1111])
def test_blocks_of_trees_of_any_length(length):
    rng = random.Random(length)
    ends = [random_ends(rng, length) for _ in range(3)]
    ends += [[length] * length, list(range(1, length + 1))]  # one sequence; nothing but padding
    block_mask = assert_same_pairs(torch.tensor(ends))
    blocks = -(-length // 128)
    assert block_mask.full_kv_num_blocks[3].sum() == sum(range(blocks)) - (length % 128 != 0) * (blocks - 1)
    assert block_mask.kv_num_blocks[4].tolist() == [[1] * blocks] and not block_mask.full_kv_num_blocks[4].any()


def test_policy_and_reference_share_one_block_mask(monkeypatch):
    batch, made = random_batch(1), []
    monkeypatch.setattr(prefix_tree, "build_block_mask", lambda end: made.append(end) or build_block_mask(end))
    flex = with_flex(tiny_model("llama", 40))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        first, second = compute_tree_log_probs(flex, batch), compute_tree_log_probs(copy.deepcopy(flex), batch)
    assert torch.equal(first, second) and len(made) == 1
    assert batch.to("cpu").build_mask(flex) is not batch.build_mask(flex)  # a copy elsewhere makes its own


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("packing", ["tree", "none"])
def test_log_probabilities_equal_those_of_sdpa(kind, packing):
    model, batch = tiny_model(kind, 40), random_batch(1, packing)
    flex = with_flex(model)
    check_tree_attention(flex)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling for a CPU would take a minute
        torch.testing.assert_close(
            compute_tree_log_probs(flex, batch), compute_tree_log_probs(model, batch), atol=1e-5, rtol=1e-5
        )


@on_cuda
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_and_gradients_equal_those_of_sdpa(kind, checkpointing, autocast):
    model = tiny_model(kind, 40, hidden_size=128).cuda().train()  # the kernel takes heads of 16 or more
    flex = with_flex(model)
    if checkpointing:
        flex.gradient_checkpointing_enable()
    for seed in range(3):  # of other lengths each time
        for packing in ("tree", "none"):
            batch, losses = random_batch(seed, packing).to("cuda"), []
            for policy in (model, flex):
                policy.zero_grad()
                with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                    losses.append(-compute_tree_log_probs(policy, batch).mean())
                losses[-1].backward()
            tolerance = 3e-2 if autocast else 1e-5
            torch.testing.assert_close(losses[1], losses[0], atol=tolerance, rtol=tolerance)
            for (name, ours), theirs in zip(flex.named_parameters(), model.parameters(), strict=True):
                scale = theirs.grad.norm().clamp(min=1e-6)
                assert (ours.grad - theirs.grad).norm() / scale < (0.1 if autocast else 1e-4), name


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_search_runs_with_sdpa_and_gives_flex_attention_back(wrapped):
    rng = random.Random(4)
    model = tiny_model("qwen3", 40)
    trie, prompts = SidTrie(random_catalogue(rng, 60, 3, 8, 40, True)), random_prompts(rng, 4, 40)
    flex = with_flex(model)
    flex = train_token_rows(flex, [3, 4]) if wrapped else flex
    ours, theirs = beam_search(flex, trie, prompts, 10), beam_search(model, trie, prompts, 10)
    assert torch.equal(ours.sequence, theirs.sequence)
    torch.testing.assert_close(ours.score, theirs.score, atol=1e-5, rtol=0)
    assert flex.config._attn_implementation == "flex_attention"
    with pytest.raises(ValueError, match="at least one token"):
        beam_search(flex, trie, [[]], 10)
    assert flex.config._attn_implementation == "flex_attention"


def test_what_the_attentions_take(capsys):
    flex = with_flex(tiny_model("llama", 20, attention_dropout=0.1))
    with pytest.raises(ValueError, match="attention_dropout 0.1: flex_attention has no dropout"):
        check_tree_attention(flex)
    required = ["base_model", "train_file", "eval_file", "sid_index_path", "item_meta_path", "output_dir"]
    with pytest.raises(SystemExit) as stopped:
        parse_flags(SFTFlags, [*(f"--{name}=x" for name in required), "--attention", "eager"])
    assert stopped.value.code == 2
    assert "--attention eager: expected one of sdpa, flex_attention" in capsys.readouterr().err
    visible = torch.ones(1, 1, 2, 2, dtype=torch.bool).tril()
    assert build_attention_mask(tiny_model("llama", 20), visible) is visible


def test_without_a_cuda_device_training_stops_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    paths = make_dataset(tmp_path / "data")
    names = ("train_file", "eval_file", "sid_index_path", "item_meta_path")
    flags = SFTFlags(
        base_model=write_config(tmp_path),
        output_dir=str(tmp_path / "out"),
        train_from_scratch=True,
        attention="flex_attention",
        **{name: paths[name] for name in names},
    )
    with pytest.raises(InputError, match="--attention flex_attention: trains on a CUDA device only"):
        sft(flags)
    assert not (tmp_path / "out").exists()


def test_rl_loads_policy_and_reference_with_the_attention_and_needs_cuda(trained, tmp_path, monkeypatch):
    flags = RLFlags(
        model_path=trained.checkpoint,
        **{name: trained.paths[name] for name in ("train_file", "eval_file", "info_file")},
        output_dir=str(tmp_path / "out"),
        attention="flex_attention",
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(InputError, match="--attention flex_attention: trains on a CUDA device only"):
            rl(flags)
    assert not (tmp_path / "out").exists()
    data, prompts = read_rl_data(flags), load_checkpoint_prompts(trained.checkpoint, None, None)
    for given in ({}, {"ref_model_path": trained.checkpoint}):
        policy = build_policy(replace(flags, **given), data, prompts)
        for model in (policy.model, policy.reference):
            assert model.config._attn_implementation == "flex_attention"
    # Rollouts search with sdpa, whatever the attention of the training.
    groups = {}
    for attention in ("sdpa", "flex_attention"):
        policy.model.set_attn_implementation(attention)
        prompt = EvalSidDataset(data.valid_rows[:2], policy.encoder).examples[0].prompt_ids
        how = dict(targets=[0], count=4, batch_size=1, temperature=1.0, seed="1")
        groups[attention] = [
            roll_out(policy.model, policy.catalogue_trie.trie, [prompt], beams=beams, **how) for beams in (True, False)
        ]
    assert groups["sdpa"] == groups["flex_attention"]
