import random

import pytest
import torch
from tiny import END, PrefixDictionary, hf_beam_search, left_pad, random_catalogue, random_prompts, tiny_model
from transformers import LogitsProcessorList

from LogitProcessor import ConstrainedLogitsProcessor, SidTrie


def walk(trie, prefix):
    node = torch.zeros(1, dtype=torch.long)
    for token in prefix:
        node = trie.advance(node, torch.tensor([token]))
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
        mask = trie.mask(node, 64)[0]
        assert set(mask.nonzero().flatten().tolist()) == allowed
        child, legal = trie.children(node, max(trie.fanout))
        assert set(trie.token[child[legal]].tolist()) == allowed
        # The forced count is the length of the only way out, if there is only one.
        ways = [sequence for sequence in sequences if tuple(sequence[: len(prefix)]) == prefix]
        assert trie.forced[node].item() == (len(ways[0]) - len(prefix) if len(ways) == 1 else -1)
        assert walk(trie, (*prefix, 63 if 63 not in allowed else 0)).item() == -1
    for row, sequence in enumerate(duplicated):
        number = trie.row_sequence[row].item()
        assert trie.sequence[walk(trie, sequence)].item() == number
        assert trie.sequence_tokens[number][: trie.sequence_length[number]].tolist() == sequence
    assert trie.advance(torch.tensor([-1, 0]), torch.tensor([5, -3])).tolist() == [-1, -1]


def test_trie_rejects_what_has_no_end():
    with pytest.raises(ValueError, match="end tokens are missing"):
        SidTrie([[5, 6], [5, 6, 7]])
    with pytest.raises(ValueError, match="empty"):
        SidTrie([[5], []])
    with pytest.raises(ValueError, match="at least one"):
        SidTrie([])


def test_processor_is_stateless_and_equals_the_textbook_one():
    """Trap 4: one instance, two generations; trap 6: illegal is -inf."""
    rng = random.Random(3)
    model = tiny_model("llama", 40)
    sequences = random_catalogue(rng, 60, 3, 6, 40, True)
    trie = SidTrie(sequences)
    for _ in range(2):
        prompts = random_prompts(rng, 3, 40)
        length = left_pad(prompts)[0].shape[1]
        processor = ConstrainedLogitsProcessor(trie, length, END)
        first = hf_beam_search(model, sequences, prompts, 6, processor=processor)
        assert first == hf_beam_search(model, sequences, prompts, 6, processor=processor)
        assert first == hf_beam_search(model, sequences, prompts, 6)


def test_processor_with_sampling_is_always_legal():
    rng = random.Random(4)
    model = tiny_model("qwen2", 40)
    sequences = random_catalogue(rng, 30, 3, 5, 40, True)
    ids, mask = left_pad(random_prompts(rng, 4, 40))
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
