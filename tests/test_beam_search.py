"""Constrained beam search and sampling against HF `generate`, the greedy path and exhaustive enumeration."""

import random
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tiny import END, random_catalogue, random_prompts, rank_by_textbook, tiny_model

from benchmarks.textbook import PrefixDictionary
from minionerec.search import output_head, prefill, tree_scorer
from minionerec.search.attention_check import find_obstacle
from minionerec.search.beam_search import beam_search, sample, stable_topk
from minionerec.search.kept_head import KeptHead
from minionerec.search.prefill import PrefilledPrompts, group_by_length
from minionerec.search.scorer import Engine, Scorer
from minionerec.search.tree_scorer import choose_batch_size
from minionerec.search.trie import SidTrie


def as_lists(trie, result):
    sequences = trie.sequences()
    return [
        [(sequences[number], score) for number, score in zip(numbers, scores, strict=True) if number >= 0]
        for numbers, scores in zip(result.sequence.tolist(), result.score.tolist(), strict=True)
    ]


def assert_equal_to_hf(model, sequences, prompts, num_beams, length_penalty=0.0):
    trie = SidTrie(sequences)
    mine = as_lists(trie, beam_search(model, trie, prompts, num_beams, length_penalty=length_penalty))
    textbook = rank_by_textbook(model, sequences, prompts, num_beams, length_penalty)
    for ours, theirs in zip(mine, textbook, strict=True):
        assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
        assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], abs=1e-4)
    return mine


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("seed", range(8))
def test_equals_hf_generate(kind, seed):
    """Random catalogues of depth 2-5, mixed depths, shared prefixes, prompts of different length, length penalties."""
    rng = random.Random(f"{kind}{seed}")
    vocab_size = rng.choice([40, 150])
    sequences = random_catalogue(
        rng, rng.choice([1, 3, 60, 700]), rng.randint(2, 5), rng.choice([2, 6, 30]), vocab_size, mixed=seed % 2 == 0
    )
    assert_equal_to_hf(
        tiny_model(kind, vocab_size, seed),
        sequences,
        random_prompts(rng, rng.randint(1, 5), vocab_size),
        rng.choice([2, 5, 16, 50]),
        rng.choice([0.0, 0.0, 1.0, -0.5]),
    )


@pytest.mark.parametrize("seed", range(12))
def test_equals_hf_for_sub_tries_renormalised_scores_and_shared_beginnings(seed):
    """Seen items and categories per prompt, mixed depths; prompts that begin alike, of very different lengths."""
    rng = random.Random(seed)
    model = tiny_model(rng.choice(["llama", "qwen2", "qwen3"]), 60, seed)
    sequences = random_catalogue(
        rng, rng.choice([8, 60, 500]), rng.randint(2, 5), rng.choice([3, 30]), 60, seed % 2 == 0
    )
    trie, rows, beams = SidTrie(sequences), rng.choice([1, 2, 5]), rng.choice([3, 20, 50])
    head = random_prompts(rng, 1, 60, 40)[0] * (seed % 3)
    prompts = [head + rest for rest in random_prompts(rng, rows, 60, rng.choice([2, 80]))]
    numbers, most = range(trie.num_sequences), trie.num_sequences // 2
    excluded = [rng.sample(numbers, rng.randint(0, most)) for _ in range(rows)]
    included = [rng.sample(numbers, rng.randint(most + 1, len(numbers))) for _ in range(rows)]
    included[0] = None
    excluded, included = ((excluded, None), (None, included), (excluded, included))[seed % 3]
    renormalize, penalty = seed % 4 > 1, rng.choice([0.0, 1.0])
    result = beam_search(
        model,
        trie,
        prompts,
        beams,
        length_penalty=penalty,
        renormalize=renormalize,
        excluded=excluded,
        included=included,
    )
    for row, mine in enumerate(as_lists(trie, result)):
        legal = set(numbers) if included is None or included[row] is None else set(included[row])
        legal -= set(excluded[row]) if excluded else set()
        allowed = [trie.sequences()[number] for number in sorted(legal)]
        (theirs,) = rank_by_textbook(model, allowed, [prompts[row]], beams, penalty, renormalize=renormalize)
        assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in theirs]
        assert [score for _, score in mine] == pytest.approx([score for _, score in theirs], abs=1e-4)
        if beams >= len(legal):
            assert len(mine) == len(legal)


def test_lists_for_another_number_of_prompts():
    trie = SidTrie([[5, END], [6, END]])
    with pytest.raises(ValueError, match="2 prompts, but 1 lists"):
        beam_search(tiny_model("llama", 20), trie, [[3], [4]], 2, excluded=[[0]])


def note_tokens(model) -> list[list[int]]:
    """The token ids of every forward pass of a search from now on, row after row."""
    fed = []
    assert find_obstacle(model, 0) is None  # asked now, the model is not asked again
    model.register_forward_pre_hook(
        lambda _module, _arguments, named: fed.append(named["input_ids"].flatten().tolist()), with_kwargs=True
    )
    return fed


@pytest.mark.parametrize("head", [0, 30])
def test_prompts_are_computed_in_one_row_without_padding(monkeypatch, head):
    """Long and short prompts, their common beginning once; attention in groups of like length or all together."""
    rng = random.Random(head)
    model, sequences = tiny_model("qwen3", 60), random_catalogue(rng, 200, 4, 12, 60, True)
    common = [rng.randint(2, 59) for _ in range(head)]
    rests = [[rng.randint(2, 59) for _ in range(rng.choice([1, 9, 60, 150]))] for _ in range(10)]
    prompts, trie = [common + rest for rest in rests], SidTrie(sequences)
    together = assert_equal_to_hf(model, sequences, prompts, 10)
    fed = note_tokens(model)
    beam_search(model, trie, prompts, 10)
    assert fed[0] == common + [token for rest in rests for token in rest]
    monkeypatch.setattr(prefill, "LEAST_PADDING", {"cpu": 10**9})
    alone = as_lists(trie, beam_search(model, trie, prompts, 10))
    assert [[tokens for tokens, _ in row] for row in together] == [[tokens for tokens, _ in row] for row in alone]


@pytest.mark.parametrize("seed", range(6))
def test_a_kept_head_changes_nothing(seed):
    """Batches whose prompts begin alike, for longer or shorter, or not at all; single prompts among them."""
    rng = random.Random(seed)
    model, kept = tiny_model(rng.choice(["llama", "qwen2", "qwen3"]), 60, seed), KeptHead()
    trie = SidTrie(random_catalogue(rng, 100, rng.randint(2, 4), 9, 60, seed % 2 == 0))
    head, fed = [rng.randint(2, 59) for _ in range(40)], note_tokens(model)
    for length in (20, 40, 40, 25, 0, 5, 40):
        prompts = [head[:length] + rest for rest in random_prompts(rng, rng.choice([1, 4]), 60)]
        fresh = beam_search(model, trie, prompts, 8)
        fed.clear()
        again = beam_search(model, trie, prompts, 8, kept=kept)
        assert torch.equal(fresh.sequence, again.sequence)
        torch.testing.assert_close(fresh.score, again.score, atol=1e-5, rtol=0)
        before = len(fed[0])
        fed.clear()
        beam_search(model, trie, prompts, 8, kept=kept)
        # What was kept is not computed again.
        assert len(fed[0]) <= before


def test_a_kept_head_saves_its_tokens_until_the_weights_change():
    rng = random.Random(3)
    model, kept = tiny_model("llama", 60), KeptHead()
    trie = SidTrie(random_catalogue(rng, 100, 3, 9, 60, False))
    head = [rng.randint(10, 59) for _ in range(30)]
    prompts, fed = [[*head, last, 3] for last in (4, 5, 6)], note_tokens(model)
    rests = [4, 3, 5, 3, 6, 3]

    def search(batch):
        fed.clear()
        result = beam_search(model, trie, batch, 8, kept=kept)
        assert torch.equal(result.sequence, beam_search(model, trie, batch, 8).sequence)
        return fed[0]

    assert search(prompts) == head + rests
    assert search(prompts) == rests
    assert search(prompts[:1]) == [4, 3]  # a single prompt that begins with it
    assert search([[7, 8, 9]]) == [7, 8, 9]
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    model(input_ids=torch.tensor([prompts[0]]), labels=torch.tensor([prompts[0]])).loss.backward()
    optimizer.step()
    assert search(prompts) == head + rests
    assert search(prompts) == rests
    kept.clear()
    assert search(prompts) == head + rests


def test_a_head_that_is_more_than_a_product_is_read_from_its_model(monkeypatch):
    """The models' own logits instead of blocks of them: the same lists, scores within rounding."""
    rng = random.Random(4)
    model = tiny_model("qwen2", 60)
    trie, prompts = SidTrie(random_catalogue(rng, 100, 4, 9, 60, True)), random_prompts(rng, 4, 60)
    monkeypatch.setattr(output_head, "BLOCK", {"cpu": 64})
    blocks = beam_search(model, trie, prompts, 12)
    monkeypatch.setattr(output_head, "has_plain_head", lambda _model: False)
    whole = beam_search(model, trie, prompts, 12)
    assert torch.equal(blocks.sequence, whole.sequence)
    torch.testing.assert_close(blocks.score, whole.score, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("block", "vocabulary"), [(64, 2500), (2**19, 2500), (10**5, 1024)])
def test_the_vocabulary_is_summed_up_in_blocks(monkeypatch, block, vocabulary):
    rng = random.Random(block)
    monkeypatch.setattr(output_head, "BLOCK", {"cpu": block})
    model, trie = tiny_model("llama", vocabulary), SidTrie(random_catalogue(rng, 100, 3, 30, vocabulary, True))
    states = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1)) * 30
    child, _ = trie.children(torch.zeros(3, 5, dtype=torch.long), trie.fanout[0])
    expected = model.lm_head(states).log_softmax(-1).gather(-1, trie.tokens(child, 1))
    with torch.no_grad():
        scores = output_head.OutputHead(model).score(states, trie, child, 1)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-6)


def test_the_device_is_asked_only_where_a_level_is_mixed(monkeypatch):
    """Where the trie alone decides when the forced tail begins, one flag is read at the end; else one a level."""
    rng, reads = random.Random(6), []
    model, prompts = tiny_model("llama", 60), random_prompts(rng, 3, 60)
    assert find_obstacle(model, 30) is None  # asked now, the model is not asked again
    even = SidTrie([[a, b, c, END] for a in (2, 3, 4) for b in (5, 6, 7) for c in (8, 9)])
    mixed = SidTrie(random_catalogue(rng, 100, 4, 12, 60, True))
    for name in ("__bool__", "__int__", "item", "tolist"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda value, name=name, method=method: reads.append(name) or method(value)
        )
    for search in (beam_search, sample):
        search(model, even, prompts, 8)
        assert reads == ["__bool__"]
        reads.clear()
        search(model, mixed, prompts, 8)
        assert 1 < len(reads) <= mixed.depth
        reads.clear()


def test_rows_are_grouped_by_length():
    assert group_by_length([5], 1) == [[0]]
    assert group_by_length([30, 90, 31, 60, 88], 10) == [[1, 4], [3], [2, 0]]
    assert group_by_length([30, 90, 31, 60, 88], 1000) == [[1, 4, 3, 2, 0]]
    lengths = [random.Random(1).randint(1, 500) for _ in range(300)]
    groups = group_by_length(lengths, 64)
    assert sorted(row for group in groups for row in group) == list(range(300)) and all(groups)


def test_a_large_batch_equals_single_prompts():
    rng = random.Random(8)
    model, sequences = tiny_model("llama", 150), random_catalogue(rng, 700, 3, 30, 150, True)
    trie, prompts = SidTrie(sequences), random_prompts(rng, 500, 150, 60)
    together = as_lists(trie, beam_search(model, trie, prompts, 12))
    for row in rng.sample(range(500), 25):
        (alone,) = as_lists(trie, beam_search(model, trie, [prompts[row]], 12))
        assert [tokens for tokens, _ in together[row]] == [tokens for tokens, _ in alone]


def test_equals_hf_on_a_large_catalogue():
    rng = random.Random(9)
    sequences = random_catalogue(rng, 5000, 3, 200, 260, mixed=False)
    assert_equal_to_hf(tiny_model("qwen3", 260), sequences, random_prompts(rng, 3, 260, 60), 50)


@pytest.mark.parametrize("num_beams", [20, 100, 500])
def test_equals_hf_with_many_beams(num_beams):
    """More beams than the catalogue has items, and fewer; with one beam HF is greedy, which has a test of its own."""
    rng = random.Random(num_beams)
    sequences = random_catalogue(rng, 300, 4, 12, 60, mixed=True) + random_catalogue(rng, 400, 4, 40, 60, mixed=False)
    sequences = [list(sequence) for sequence in sorted(set(map(tuple, sequences)))]
    rankings = assert_equal_to_hf(tiny_model("qwen3", 60), sequences, random_prompts(rng, 2, 60), num_beams)
    assert [len(row) for row in rankings] == [num_beams] * 2


def test_equals_hf_for_prompts_of_very_different_lengths():
    rng = random.Random(10)
    sequences = random_catalogue(rng, 120, 3, 12, 60, mixed=True)
    prompts = [[rng.randint(2, 59) for _ in range(length)] for length in (1, 400, 2, 33, 180)]
    assert_equal_to_hf(tiny_model("llama", 60), sequences, prompts, 20)
    # Whatever else the batch holds.
    assert_equal_to_hf(tiny_model("llama", 60), sequences, prompts[:1], 20)


def test_bf16_keeps_most_of_the_lists(record_testsuite_property):
    """Equal lists are not to be had from rounded weights; how much stays is written into the test report."""
    rng = random.Random(14)
    model = tiny_model("qwen3", 150)
    sequences = random_catalogue(rng, 500, 3, 30, 150, mixed=True)
    trie, prompts = SidTrie(sequences), random_prompts(rng, 40, 150)
    exact = beam_search(model, trie, prompts, 50).sequence.tolist()
    ranked = beam_search(model.to(torch.bfloat16), trie, prompts, 50)
    assert ranked.score.dtype == torch.float32 and torch.isfinite(ranked.score).all()
    for k in (10, 50):
        pairs = zip(exact, ranked.sequence.tolist(), strict=True)
        shares = [len(set(ours[:k]) & set(theirs[:k])) / k for ours, theirs in pairs]
        record_testsuite_property(f"bf16_overlap_top_{k}", sum(shares) / len(shares))
        assert sum(shares) / len(shares) > 0.9


def test_eager_attention_gives_the_same():
    """The search brings its own attention, whatever the model had, and restores it."""
    rng = random.Random(2)
    sequences, prompts = random_catalogue(rng, 80, 3, 8, 40, True), random_prompts(rng, 4, 40)
    model = tiny_model("llama", 40)
    trie = SidTrie(sequences)
    expected = beam_search(model, trie, prompts, 10)
    model.set_attn_implementation("eager")
    eager = beam_search(model, trie, prompts, 10)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(eager.sequence, expected.sequence)
    torch.testing.assert_close(eager.score, expected.score, atol=1e-4, rtol=0)


def test_one_item_and_more_beams_than_items():
    model = tiny_model("llama", 20)
    trie = SidTrie([[5, 6, END]])
    ranked = beam_search(model, trie, [[3], [4, 5, 6]], 50)
    assert ranked.sequence[:, 0].tolist() == [0, 0] and (ranked.sequence[:, 1:] == -1).all()
    assert torch.isfinite(ranked.score[:, 0]).all() and torch.isinf(ranked.score[:, 1:]).all()


def test_one_beam_is_the_greedy_path():
    rng = random.Random(5)
    model = tiny_model("qwen3", 40)
    sequences, prompts = random_catalogue(rng, 100, 4, 10, 40, False), random_prompts(rng, 6, 40)
    trie = SidTrie(sequences)
    allowed = PrefixDictionary(sequences, 0).allowed
    for prompt, ranking in zip(prompts, as_lists(trie, beam_search(model, trie, prompts, 1)), strict=True):
        path = []
        while tuple(path) in allowed:
            logits = model(torch.tensor([prompt + path])).logits[0, -1]
            path.append(max(sorted(allowed[tuple(path)]), key=lambda token: logits[token].item()))
        assert [tokens for tokens, _ in ranking] == [path]


def test_exhaustive_beams_rank_the_whole_catalogue():
    """With as many beams as items the list is the catalogue ordered by the exact sequence log-probability."""
    rng = random.Random(11)
    model = tiny_model("qwen2", 40)
    sequences, prompts = random_catalogue(rng, 50, 3, 8, 40, True), random_prompts(rng, 3, 40)
    trie = SidTrie(sequences)
    for prompt, ranking in zip(prompts, as_lists(trie, beam_search(model, trie, prompts, 60)), strict=True):
        exact = []
        for sequence in sequences:
            log_probs = model(torch.tensor([prompt + sequence])).logits[0].log_softmax(-1)
            exact.append(
                (sequence, sum(log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(sequence)))
            )
        exact.sort(key=lambda pair: -pair[1])
        assert [tokens for tokens, _ in ranking] == [tokens for tokens, _ in exact]
        assert [score for _, score in ranking] == pytest.approx([score for _, score in exact], abs=1e-4)


def test_legal_without_duplicates_and_full_lists():
    """A thousand random constraint sets: every list is legal, without repeats, and full where the beams can fill it."""
    rng = random.Random(6)
    model = tiny_model("llama", 60)
    for case in range(1000):
        sequences = random_catalogue(
            rng, rng.choice([1, 5, 50, 300]), rng.randint(1, 4), rng.choice([2, 9, 50]), 60, case % 3 == 0
        )
        trie, beams = SidTrie(sequences), rng.choice([1, 4, 20])
        numbers = range(trie.num_sequences)
        # Nothing left out, seen items, a category, both.
        included = [rng.sample(numbers, rng.randint(1, len(numbers))), None] if case % 4 > 1 else None
        allowed = [set(included[0]), set(numbers)] if included else [set(numbers)] * 2
        excluded = [rng.sample(sorted(legal), rng.randrange(len(legal))) for legal in allowed] if case % 2 else None
        allowed = [legal - set(seen) for legal, seen in zip(allowed, excluded or [[], []], strict=True)]
        options = {"renormalize": case % 5 == 0, "excluded": excluded, "included": included}
        result = beam_search(model, trie, random_prompts(rng, 2, 60), beams, **options)
        for legal, ranked in zip(allowed, result.sequence.tolist(), strict=True):
            ranked = [number for number in ranked if number >= 0]
            assert ranked and set(ranked) <= legal and len(set(ranked)) == len(ranked)
            # Beams can starve where sequences differ in length; with one length, or a beam for each, they cannot.
            if case % 3 or beams >= len(legal):
                assert len(ranked) == min(beams, len(legal))


class RowEngine(Engine):
    """The slow twin of the tree: every running prefix is a row of its own, computed anew at each level."""

    def __init__(self, model):
        self.model = model

    @contextmanager
    def open_scorer(self, trie, prompts):
        yield RowScorer(self.model, trie, prompts)


class RowScorer(Scorer):
    def __init__(self, model, trie, prompts):
        super().__init__(trie, len(prompts))
        self.model, self.rows = model, [[list(prompt)] for prompt in prompts]

    @torch.no_grad()
    def score_children(self, child, legal, relative=False):
        tokens = self.trie.tokens(child, self.level + 1)
        gains = torch.full(child.shape, float("nan"))
        for row, column in legal.any(dim=-1).nonzero().tolist():
            logits = self.model(torch.tensor([self.rows[row][column]])).logits[0, -1]
            gains[row, column] = logits.log_softmax(-1)[tokens[row, column]]
        return gains.masked_fill(~legal, float("nan"))

    def _append(self, parent):
        tokens = self.trie.tokens(self.nodes, self.level).tolist()
        self.rows = [
            [rows[before] + [token] for before, token in zip(*pair, strict=True)]
            for rows, *pair in zip(self.rows, parent.tolist(), tokens, strict=True)
        ]


@pytest.mark.parametrize("seed", range(8))
def test_any_scorer_gives_the_same_lists_and_draws(seed):
    """A scorer that knows neither rows nor caches, and the walk through forced tokens that a scorer inherits."""
    rng = random.Random(seed)
    model = tiny_model(rng.choice(["llama", "qwen2", "qwen3"]), 60, seed)
    trie = SidTrie(random_catalogue(rng, rng.choice([1, 8, 60]), rng.randint(1, 5), 9, 60, seed % 2 == 0))
    prompts = random_prompts(rng, 3, 60)
    seen = [rng.sample(range(trie.num_sequences), trie.num_sequences // 2) for _ in prompts]
    options = {"length_penalty": float(seed % 3 == 0), "renormalize": seed % 4 > 1, "excluded": seen}
    tree, rows = (beam_search(engine, trie, prompts, 10, **options) for engine in (model, RowEngine(model)))
    assert torch.equal(tree.sequence, rows.sequence)
    torch.testing.assert_close(tree.score, rows.score, atol=1e-4, rtol=0)
    tree, rows = (
        sample(engine, trie, prompts, 10, 1.5, torch.Generator().manual_seed(seed))
        for engine in (model, RowEngine(model))
    )
    assert torch.equal(tree.sequence, rows.sequence)
    torch.testing.assert_close(tree.score, rows.score, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_stable_topk(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-3, 4, (6, 50), generator=generator) / 2
    values[values == -1.5], values[values == 1.5], values[0, :5] = float("-inf"), 1e-40, -0.0
    for k in (1, 7, 50):
        best, indices = stable_topk(values, k)
        order = values.sort(dim=1, descending=True, stable=True)
        assert torch.equal(indices, order.indices[:, :k]) and torch.equal(best, order.values[:, :k])


def test_ties_are_broken_the_same_way_every_time():
    model = tiny_model("llama", 20)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    trie = SidTrie([[a, b, END] for a in range(5, 9) for b in range(10, 14)])
    for precision in (torch.float32, torch.bfloat16):
        ranked = beam_search(model.to(precision), trie, [[3, 4], [5]] * 3, 6)
        assert ranked.sequence.tolist() == [list(range(6))] * 6


def test_generation_config_is_never_read():
    """Temperature, top_k and repetition penalty of a checkpoint must not change the search."""
    rng = random.Random(7)
    model = tiny_model("qwen2", 40)
    trie = SidTrie(random_catalogue(rng, 60, 3, 8, 40, False))
    prompts = random_prompts(rng, 3, 40)
    before = beam_search(model, trie, prompts, 10)
    model.generation_config.update(
        do_sample=True, temperature=0.2, top_k=2, repetition_penalty=5.0, num_beams=3, max_length=7
    )
    after = beam_search(model, trie, prompts, 10)
    assert torch.equal(before.sequence, after.sequence) and torch.equal(before.score, after.score)


def test_training_mode_is_restored_and_dropout_is_off():
    model = tiny_model("qwen3", 40, attention_dropout=0.5).train()
    rng = random.Random(8)
    trie, prompts = SidTrie(random_catalogue(rng, 40, 3, 8, 40, False)), random_prompts(rng, 3, 40)
    first, second = beam_search(model, trie, prompts, 8), beam_search(model, trie, prompts, 8)
    assert model.training and torch.equal(first.score, second.score)


def test_forced_tokens_are_scored_in_one_pass(monkeypatch):
    """Chains of single children cost one forward, however long, and leave the result unchanged."""
    rng = random.Random(12)
    model = tiny_model("llama", 60)
    sequences = [[5 + item, *(rng.randint(20, 50) for _ in range(5)), END] for item in range(12)]
    prompts = random_prompts(rng, 2, 60)
    calls = []
    assert find_obstacle(model, 30) is None  # asked now, the model is not asked again
    extend = PrefilledPrompts.extend
    monkeypatch.setattr(
        PrefilledPrompts, "extend", lambda self, *args: calls.append(args[0].shape) or extend(self, *args)
    )
    assert_equal_to_hf(model, sequences, prompts, 4)
    assert calls == [(2, 4, 6)]


def test_wrong_inputs_are_named():
    model, trie = tiny_model("llama", 20), SidTrie([[5, END], [6, END]])
    with pytest.raises(ValueError, match="at least one token"):
        beam_search(model, trie, [[3], []], 2)
    with pytest.raises(ValueError, match="another tokenizer"):
        beam_search(model, SidTrie([[25, END]]), [[3]], 2)
    with pytest.raises(ValueError, match="temperature"):
        sample(model, trie, [[3]], 2, temperature=0.0)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        beam_search(model, trie, [[3]], 2)
    with pytest.raises(ValueError, match="NaN"):
        sample(model, trie, [[3]], 2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampling_frequencies_match_the_renormalised_distribution(temperature):
    rng = random.Random(13)
    model = tiny_model("qwen3", 30)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
    sequences = random_catalogue(rng, 12, 3, 3, 30, True)
    trie = SidTrie(sequences)
    allowed = PrefixDictionary(sequences, 0).allowed
    prompts, copies, each = [[4, 5, 6], [7]], 100, 60  # many rows of few samples: attention over samples is quadratic
    draws = copies * each
    drawn = sample(model, trie, prompts * copies, each, temperature, torch.Generator().manual_seed(0))
    for row, prompt in enumerate(prompts):
        numbers, scores = drawn.sequence[row::2].flatten().tolist(), drawn.score[row::2].flatten().tolist()
        counts = Counter(numbers)
        for sequence in sequences:
            probability, log_prob = 1.0, 0.0
            for length, token in enumerate(sequence):
                logits = model(torch.tensor([prompt + sequence[:length]])).logits[0, -1]
                choices = sorted(allowed[tuple(sequence[:length])])
                weights = (logits[choices] / temperature).softmax(-1)
                probability *= weights[choices.index(token)].item()
                log_prob += logits.log_softmax(-1)[token].item()
            number = trie.row_sequence[sequences.index(sequence)].item()
            error = (probability * (1 - probability) / draws) ** 0.5
            assert counts[number] / draws == pytest.approx(probability, abs=4.5 * error + 1e-9)
            if counts[number]:
                assert scores[numbers.index(number)] == pytest.approx(log_prob, abs=1e-4)


def test_the_batch_size_follows_the_memory(monkeypatch):
    model, trie = tiny_model("llama", 150), SidTrie(random_catalogue(random.Random(1), 300, 3, 30, 150, False))

    def with_free(megabytes, prompt=100, beams=20):
        monkeypatch.setattr(tree_scorer.psutil, "virtual_memory", lambda: SimpleNamespace(available=megabytes * 2**20))
        return choose_batch_size(model, trie, prompt, beams)

    assert with_free(0) == 1 and with_free(10**6) == 32
    assert 1 < with_free(24) < 32
    assert with_free(24, prompt=400) < with_free(24) and with_free(24, beams=60) < with_free(24)
