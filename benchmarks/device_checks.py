"""Small twin checks that run on any device, precision and attention: the tree's results against the slow, obvious way.

Each check returns the differences that it found and stops at one above its limit. The twin is computed in float32,
row by row; what a lower precision may differ by stands in LIMITS.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from transformers import PreTrainedModel

from benchmarks import bench_decode, bench_grpo
from benchmarks.problems import build_random_model, build_sid_model, make_up_data
from benchmarks.textbook import Ranking, search_textbook
from data import EvalSidDataset
from minionerec.common.files import InputError
from minionerec.language.catalogue_trie import build_catalogue_trie
from minionerec.language.prompts import Encoder, load_prompts
from minionerec.search.beam_search import beam_search, sample
from minionerec.search.prefix_tree import batch_trees, compute_tree_log_probs
from minionerec.search.trie import SidTrie
from minionerec.training.rewards import PLAIN_REWARDS, NamedReward

SHAPE, VOCABULARY, END = "qwen3-tiny", 400, 1
NUM_BEAMS = 20
# The most that a score in nats, a loss in nats a token and a gradient relative to its norm may be off.
LIMITS = {
    torch.float32: {"score": 1e-3, "loss": 1e-4, "gradient": 1e-3},
    torch.bfloat16: {"score": 0.2, "loss": 0.02, "gradient": 0.1},
}


class CheckFailed(InputError):
    """A result that is not the one it should be."""


def hold_to_limits(figures: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """The figures, rounded, if each is within its limit.

    Raises:
        CheckFailed: one that is not, or is no number.
    """
    for name, value in figures.items():
        limit = LIMITS[dtype].get(name.partition("_")[0])
        if limit is not None and not value <= limit:
            raise CheckFailed(f"{name} {value:.2g} is above {limit:g}")
    return {name: float(f"{value:.3g}") for name, value in figures.items()}


def draw_sequences(rng: random.Random, count: int) -> list[list[int]]:
    """Distinct sequences of one to four tokens of 30 codes, each closed by END."""
    chosen = {tuple(rng.randint(2, 31) for _ in range(rng.randint(1, 4))) + (END,) for _ in range(count)}
    return [list(sequence) for sequence in sorted(chosen)]


def draw_prompts(rng: random.Random, count: int, longest: int = 60) -> list[list[int]]:
    """Token-id lists of 3 to `longest` tokens."""
    return [[rng.randint(2, VOCABULARY - 1) for _ in range(rng.randint(3, longest))] for _ in range(count)]


def score_row(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Log-probability of `tokens` after `prompt`, by an ordinary forward pass over this one row."""
    row = torch.tensor([[*prompt, *tokens]], device=model.device)
    with torch.no_grad():
        log_probs = model(input_ids=row).logits[0].float().log_softmax(-1)
    return sum(log_probs[len(prompt) - 1 + place, token].item() for place, token in enumerate(tokens))


def check_search(device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, float]:
    """Beam search in `dtype` against `generate` and against rows, both in float32.

    float32 must give the same lists; in lower precision the share of `generate`'s items is only reported, but every
    list must hold distinct items, best first, with the scores that rows give.
    """
    rng = random.Random(seed)
    sequences, prompts = draw_sequences(rng, 300), draw_prompts(rng, 6)
    exact = build_random_model(SHAPE, VOCABULARY, seed, device)
    trie = SidTrie(sequences, device)
    found = beam_search(copy.deepcopy(exact).to(dtype), trie, prompts, NUM_BEAMS)
    rankings: list[Ranking] = [
        [(tuple(sequences[number]), score) for number, score in zip(*pair, strict=True) if number >= 0]
        for pair in zip(found.sequence.tolist(), found.score.tolist(), strict=True)
    ]
    expected = search_textbook(exact, sequences, prompts, NUM_BEAMS, END)
    if dtype == torch.float32 and not bench_decode.agree(rankings, expected):
        raise CheckFailed("the tree search and generate give different lists")
    for ranking in rankings:
        scores = [score for _, score in ranking]
        if len({tokens for tokens, _ in ranking}) != NUM_BEAMS or scores != sorted(scores, reverse=True):
            raise CheckFailed("a list holds an item twice, or is not in the order of its scores")
    off = max(
        abs(score - score_row(exact, prompt, tokens))
        for prompt, ranking in zip(prompts, rankings, strict=True)
        for tokens, score in ranking
    )
    common = [
        len({tokens for tokens, _ in ours} & {tokens for tokens, _ in theirs}) / NUM_BEAMS
        for ours, theirs in zip(rankings, expected, strict=True)
    ]
    return hold_to_limits({"score_off": off, "overlap": sum(common) / len(common)}, dtype)


def check_sampling(device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, float]:
    """Draws are items of the catalogue, their scores those of rows, and first tokens as frequent as they should be."""
    rng = random.Random(seed)
    sequences, prompt = draw_sequences(rng, 300), draw_prompts(rng, 1)[0]
    exact = build_random_model(SHAPE, VOCABULARY, seed, device)
    generator = torch.Generator(device).manual_seed(seed)
    trie = SidTrie(sequences, device)
    drawn = sample(copy.deepcopy(exact).to(dtype), trie, [prompt], 1000, generator=generator)
    numbers, scores = drawn.sequence[0].tolist(), drawn.score[0].tolist()
    if min(numbers) < 0:
        raise CheckFailed("a draw is no item of the catalogue")
    score_of = dict(zip(numbers, scores, strict=True))
    off = max(abs(score_of[number] - score_row(exact, prompt, sequences[number])) for number in sorted(score_of)[::7])
    first = sorted({sequence[0] for sequence in sequences})
    with torch.no_grad():
        logits = exact(input_ids=torch.tensor([prompt], device=device)).logits[0, -1].float()
    expected = logits[torch.tensor(first, device=device)].softmax(-1).tolist()
    counts = dict.fromkeys(first, 0)
    for number in numbers:
        counts[sequences[number][0]] += 1
    distance = sum(abs(counts[token] / len(numbers) - share) for token, share in zip(first, expected, strict=True)) / 2
    if distance > 0.12:  # 30 shares of 1,000 draws are about 0.06 off
        raise CheckFailed(f"the shares of first tokens are {distance:.2f} off")
    return hold_to_limits({"score_off": off, "shares_off": distance}, dtype)


def draw_groups(rng: random.Random, users: int = 3, rows: int = 6) -> list[list[tuple[list[int], list[int]]]]:
    """Nested prompts of up to 180 tokens per user, targets of one to four tokens: trees of several mask blocks."""
    groups = []
    for _ in range(users):
        history = [rng.randint(2, VOCABULARY - 1) for _ in range(180)]
        ends = [rng.randint(5, len(history)) for _ in range(rows)]
        groups.append([(history[:end], [rng.randint(2, 31) for _ in range(rng.randint(0, 3))] + [END]) for end in ends])
    return groups


@contextmanager
def autocast_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Inside, models with float32 weights compute in `dtype`, as they do in training."""
    lower = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    # Compiling flex_attention for a CPU takes a minute.
    plain = torch.compiler.set_stance("force_eager") if device.type == "cpu" else nullcontext()
    with lower, plain:
        yield


def measure_gradient_distance(ours: PreTrainedModel, theirs: PreTrainedModel) -> float:
    """Distance of two models' gradients, divided by the norm of the second."""
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    norm = sum(float(b.grad.double().square().sum()) for _, b in pairs) ** 0.5
    return sum(float((a.grad - b.grad).double().square().sum()) for a, b in pairs) ** 0.5 / norm


def check_training(device: torch.device, dtype: torch.dtype, attention: str, seed: int = 0) -> dict[str, float]:
    """Mean loss and gradients of trees, in `dtype` with `attention`, against one forward pass per row in float32.

    flex_attention has no backward pass on a CPU; there the loss alone is compared.
    """
    groups = draw_groups(random.Random(seed))
    exact = build_random_model(SHAPE, VOCABULARY, seed, device)
    model = copy.deepcopy(exact)
    model.set_attn_implementation(attention)
    batch = batch_trees([groups[0] + groups[1], groups[2]], 0).to(device)
    forward_only = attention == "flex_attention" and device.type == "cpu"
    with torch.no_grad() if forward_only else nullcontext(), autocast_in(dtype, device):
        loss = -compute_tree_log_probs(model, batch).mean()
    expected, labels = torch.zeros((), device=device), len(batch.label_token)
    for prompt, target in (row for rows in groups for row in rows):
        row = torch.tensor([[*prompt, *target]], device=device)
        log_probs = exact(input_ids=row[:, :-1]).logits[0, len(prompt) - 1 :].float().log_softmax(-1)
        expected = expected - log_probs.gather(-1, row[0, len(prompt) :, None]).sum() / labels
    figures = {"loss_off": abs(loss.item() - expected.item())}
    if not forward_only:
        loss.backward()
        expected.backward()
        figures["gradient_off"] = measure_gradient_distance(model, exact)
    return hold_to_limits(figures, dtype)


def build_step(flags: bench_grpo.GRPOBenchFlags, device: torch.device) -> bench_grpo.GRPOProblem:
    """A step of next_sid prompts over a small catalogue, whose reference is not the policy."""
    rng = random.Random(flags.seed)
    rows, catalogue = make_up_data(rng, users=20, items=60)
    model, tokenizer = build_sid_model(flags.shape, flags.vocab_size, catalogue, flags.seed)
    model, encoder = model.to(device), Encoder(tokenizer, load_prompts("compact"))
    reference = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.01)
    return bench_grpo.GRPOProblem(
        model,
        reference,
        build_catalogue_trie(catalogue, encoder, device),
        EvalSidDataset(rng.sample(rows, flags.batch_size), encoder).examples,
        NamedReward("ranking", 1.0, lambda completions, example: PLAIN_REWARDS["ranking"](completions, example.sid)),
        encoder,
    )


def check_grpo(device: torch.device, dtype: torch.dtype, attention: str, seed: int = 0) -> dict[str, float]:
    """Loss, gradients and log-probabilities of one GRPO step against the textbook step, every completion a row.

    In float32 the rollouts are compared too; in lower precision both steps learn from the same ones.
    """
    flags = bench_grpo.GRPOBenchFlags(
        shape=SHAPE, vocab_size=600, num_generations=4, batch_size=4, prompts_per_pass=2, beta=0.1, seed=seed
    )
    problem = build_step(flags, device)
    theirs = bench_grpo.run_textbook_step(problem, flags.num_generations, flags.beta)
    twin = copy.deepcopy(problem.model)
    for ours, before in zip(twin.parameters(), problem.model.parameters(), strict=True):
        ours.grad = before.grad.clone()
    problem.model.zero_grad()
    for model in (problem.model, problem.reference):
        model.set_attn_implementation(attention)
    with tempfile.TemporaryDirectory() as folder, autocast_in(dtype, device):
        trainer = bench_grpo.build_trainer(problem, flags, folder)
        if dtype != torch.float32:
            trainer.args.share_prompts = False  # there is no rollout whose prompts could serve the update
            trainer.rollout = lambda *_: theirs.groups
        ours = bench_grpo.run_tree_step(trainer, problem.examples, passes=2)
    if [sorted(group) for group in ours.groups] != [sorted(group) for group in theirs.groups]:
        raise CheckFailed("the two steps roll out different items")
    scores = max(abs(a - b) for a, b in zip(ours.log_probs, theirs.log_probs, strict=True))
    figures = {"score_off": scores, "loss_off": abs(ours.loss - theirs.loss)}
    return hold_to_limits(figures | {"gradient_off": measure_gradient_distance(problem.model, twin)}, dtype)
