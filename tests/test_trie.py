"""The trie against dictionaries of prefixes, its sub-tries, its files, and the processor that reads it."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import END, random_catalogue, random_prompts, rank_by_textbook, tiny_model
from transformers import LogitsProcessorList

from benchmarks.textbook import PrefixDictionary
from LogitProcessor import ConstrainedLogitsProcessor, pad_left
from minionerec.common.files import InputError
from minionerec.search.sub_tries import SubTries
from minionerec.search.trie import SidTrie, pad_sequences


def walk(trie, prefix):
    node = torch.zeros(1, dtype=torch.long)
    for level, token in enumerate(prefix):
        node = trie.advance(node, torch.tensor([token]), level)
    return node


@pytest.mark.parametrize("seed", range(8))
def test_trie_equals_prefix_dictionary(seed):
    rng = random.Random(seed)
    sequences = random_catalogue(
        rng, rng.choice([1, 2, 40, 800]), rng.randint(1, 5), rng.choice([2, 6, 30]), 64, seed % 2 == 0
    )
    duplicated = sequences + sequences[: len(sequences) // 2]
    trie = SidTrie(duplicated)
    twin = PrefixDictionary(sequences, 0).allowed
    assert trie.num_sequences == len(sequences)
    for prefix, allowed in twin.items():
        node = walk(trie, prefix)
        level = len(prefix)
        mask = trie.mask(node, 64, level)[0]
        assert set(mask.nonzero().flatten().tolist()) == allowed
        child, legal = trie.children(node, trie.fanout[level])
        assert set(trie.tokens(child[legal], level + 1).tolist()) == allowed
        # The forced count is the length of the only way out, if there is only one.
        ways = [sequence for sequence in sequences if tuple(sequence[:level]) == prefix]
        first, stop = trie.sequence_range(node, level)
        assert sorted(map(tuple, sequences))[first:stop] == sorted(map(tuple, ways))
        assert trie.forced[node].item() == (len(ways[0]) - level if len(ways) == 1 else -1)
        assert walk(trie, (*prefix, 63 if 63 not in allowed else 0)).item() == -1
    for row, sequence in enumerate(duplicated):
        number = trie.row_sequence[row].item()
        assert trie.sequence[walk(trie, sequence)].item() == number
        assert trie.sequences()[number] == sequence and trie.leaf[number] == walk(trie, sequence)
    assert trie.sequences() == sorted(sequences)
    assert trie.advance(torch.tensor([-1, 0, 0]), torch.tensor([5, -3, 99]), 0).tolist() == [-1, -1, -1]
    assert trie.advance(walk(trie, sequences[0]), torch.tensor([5]), len(sequences[0])).item() == -1


def test_trie_rejects_what_has_no_end():
    with pytest.raises(ValueError, match="end tokens are missing"):
        SidTrie([[5, 6], [5, 6, 7]])
    with pytest.raises(ValueError, match="empty"):
        SidTrie([[5], []])
    with pytest.raises(ValueError, match="at least one"):
        SidTrie([])
    with pytest.raises(ValueError, match="padding"):
        SidTrie(np.array([[5, -1, 6]]))
    with pytest.raises(ValueError, match="128 tokens"):
        SidTrie([[5] * 128])


def same_tables(first, second):
    tables = [*SidTrie.TENSORS, "fanout", "depth", "num_nodes", "num_sequences", "max_token", "num_bytes"]
    for name in tables:
        ours, theirs = getattr(first, name), getattr(second, name)
        assert torch.equal(ours, theirs) if torch.is_tensor(ours) else ours == theirs, name
    assert [tokens.tolist() for tokens in first.level_tokens] == [tokens.tolist() for tokens in second.level_tokens]


@pytest.mark.parametrize("seed", range(6))
def test_more_sequences_can_be_added(seed):
    """A trie that grew equals one built at once, and the rows keep their numbers."""
    rng = random.Random(seed)
    sequences = random_catalogue(
        rng, rng.choice([2, 40, 300]), rng.randint(1, 5), rng.choice([2, 30]), 64, seed % 2 == 0
    )
    sequences += rng.choices(sequences, k=3)
    cut = rng.randint(1, len(sequences) - 1)
    grown = SidTrie(sequences[:cut]).add(sequences[cut:])
    same_tables(grown, SidTrie(sequences))


def test_a_grown_trie_is_checked_too():
    with pytest.raises(ValueError, match="end tokens are missing"):
        SidTrie([[5, 6]]).add([[5, 6, 7]])


def test_saved_and_loaded(tmp_path):
    trie = SidTrie(random_catalogue(random.Random(0), 200, 4, 9, 64, True))
    trie.save(tmp_path / "items.trie")
    same_tables(SidTrie.load(tmp_path / "items.trie"), trie)
    (tmp_path / "wrong").write_text("no trie")
    save_file({"code": torch.zeros(1)}, tmp_path / "other")
    for name in ("wrong", "other", "missing"):
        with pytest.raises(InputError, match=f"{name}: not a trie"):
            SidTrie.load(tmp_path / name)


def test_a_matrix_and_wide_vocabularies():
    """Packed sorting over several integers, codes that need more than 16 bits."""
    rng = random.Random(1)
    sequences = [[rng.randrange(50_000) for _ in range(6)] + [50_000] for _ in range(60_000)]
    sequences += [[first[0], first[1], 50_000] for first in sequences[:500]]
    matrix, _ = pad_sequences(sequences)
    trie = SidTrie(matrix)
    assert trie.code.dtype == torch.int32 and trie.sequences() == sorted(map(list, set(map(tuple, sequences))))
    tokens = torch.tensor(sequences[:400])
    nodes = torch.zeros(400, dtype=torch.long)
    for level in range(7):
        nodes = trie.advance(nodes, tokens[:, level], level)
    assert torch.equal(trie.sequence[nodes], trie.row_sequence[:400])


@pytest.mark.parametrize("seed", range(5))
def test_sub_tries(seed):
    """A node is alive for a prompt iff a sequence below it may be found; by going through all of them."""
    rng = random.Random(seed)
    sequences = sorted(random_catalogue(rng, 60, 4, 4, 64, True))
    trie = SidTrie(sequences)
    numbers = range(trie.num_sequences)
    excluded = [rng.sample(numbers, rng.randrange(trie.num_sequences // 2)) for _ in range(6)]
    included = [rng.sample(numbers, rng.randint(trie.num_sequences // 2 + 1, trie.num_sequences)) for _ in range(6)]
    included[2] = None
    for level in range(trie.depth):
        prefixes = sorted({tuple(row[: level + 1]) for row in sequences if len(row) > level})
        nodes = torch.stack([walk(trie, prefix) for prefix in prefixes]).view(1, -1).expand(6, -1)
        for seen, category in ((excluded, None), (None, included), (excluded, included)):
            sub_tries = SubTries(trie, seen, category)
            for prompt in range(6):
                everything = category is None or category[prompt] is None
                allowed = set(numbers) if everything else set(category[prompt])
                allowed -= set(seen[prompt]) if seen else set()
                expected = [any(tuple(sequences[n][: level + 1]) == prefix for n in allowed) for prefix in prefixes]
                assert sub_tries.alive(nodes, level + 1)[prompt].tolist() == expected
    assert SubTries(trie, None, [None] * 2).alive(torch.ones(2, 3, 1, dtype=torch.long), 1).all()


def test_sub_tries_reject_what_cannot_be():
    trie = SidTrie([[5, END], [6, END]])
    with pytest.raises(ValueError, match="prompt 1: no sequence is left"):
        SubTries(trie, [[0], [0, 1]], None)
    with pytest.raises(ValueError, match="prompt 0: no sequence is left"):
        SubTries(trie, [[1]], [[1]])
    with pytest.raises(ValueError, match=r"0\.\.1"):
        SubTries(trie, [[2]], None)
    with pytest.raises(ValueError, match="1 lists of excluded sequences, but 2"):
        SubTries(trie, [[1]], [[1], [0]])


def test_processor_is_stateless_and_equals_the_textbook_one():
    """One instance serves two generations, and what is illegal is -inf."""
    rng = random.Random(3)
    model = tiny_model("llama", 40)
    sequences = random_catalogue(rng, 60, 3, 6, 40, True)
    trie = SidTrie(sequences)
    for _ in range(2):
        prompts = random_prompts(rng, 3, 40)
        processor = ConstrainedLogitsProcessor(trie, max(map(len, prompts)), END)
        first = rank_by_textbook(model, sequences, prompts, 6, processor=processor)
        assert first == rank_by_textbook(model, sequences, prompts, 6, processor=processor)
        assert first == rank_by_textbook(model, sequences, prompts, 6)


def test_processor_with_sampling_is_always_legal():
    rng = random.Random(4)
    model = tiny_model("qwen2", 40)
    sequences = random_catalogue(rng, 30, 3, 5, 40, True)
    ids, mask = pad_left(random_prompts(rng, 4, 40), 0)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        num_return_sequences=8,
        max_new_tokens=4,
        eos_token_id=END,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([ConstrainedLogitsProcessor(SidTrie(sequences), ids.shape[1], END)]),
    )
    legal = {tuple(sequence) for sequence in sequences}
    for row in out[:, ids.shape[1] :].tolist():
        assert tuple(row[: row.index(END) + 1]) in legal


def test_dead_end_is_an_error():
    trie = SidTrie([[5, 6, END]])
    processor = ConstrainedLogitsProcessor(trie, 2, END)
    scores = processor(torch.tensor([[9, 9, 5]]), torch.zeros(1, 10))
    assert scores[0, 6] == 0 and torch.isinf(scores[0]).sum() == 9
    with pytest.raises(ValueError, match="dead end"):
        processor(torch.tensor([[9, 9, 7]]), torch.zeros(1, 10))
