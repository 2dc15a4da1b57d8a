"""What a training run computes: its examples, tokens and steps, counted from its data, and the arithmetic they take."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from minionerec.common.records import Row
from minionerec.common.row_table import select_rows
from minionerec.language.catalogue_trie import CatalogueTrie
from minionerec.language.examples import RowDataset
from minionerec.language.mixture import TaskMixture
from minionerec.language.prompts import Encoder
from minionerec.search.prefix_tree import batch_trees, pack_trees
from minionerec.search.trie import SidTrie
from minionerec.training.groups import StepSampler
from minionerec.training.plan_memory import BatchShape, ModelShape, SearchShape
from minionerec.training.rl_config import RLConfig
from minionerec.training.rl_setup import plan_steps
from minionerec.training.settings import RLFlags, SFTFlags
from minionerec.training.setup import check_divisible
from minionerec.training.sft_setup import batch_training

SAMPLED_ROWS = 20_000  # of a larger train split, whole users, are tokenised
SAMPLED_BATCHES = 128  # micro-batches whose trees are built


@dataclass(frozen=True)
class Work:
    """What a run computes. Counts are of an epoch, over all processes.

    Attributes:
        examples: prompts with their targets.
        steps, epochs: optimizer steps of the run, and how often it sees its examples, at most.
        accumulation: micro-batches of a step on one process.
        largest: the micro-batch with most nodes.
        tokens, pairs, label_nodes: nodes of all trees with their padding, (query, key) pairs, nodes with labels.
        row_tokens: what separate rows would have, without any padding.
        searches: {phase: its shape}; how many prompts go at once is left to the memory, see `SearchShape.prompts`.
        rolled_out: prompts that are rolled out.
        prompt_tokens: their mean length.
        notes: what was sampled or assumed.
    """

    examples: int
    steps: int
    epochs: float
    accumulation: int
    largest: BatchShape
    tokens: int
    pairs: int
    label_nodes: int
    row_tokens: int
    searches: dict[str, SearchShape] = field(default_factory=dict)
    rolled_out: int = 0
    prompt_tokens: float = 0.0
    notes: tuple[str, ...] = ()


def draw_whole_users(rows: Sequence[Row], count: int, seed: int) -> Sequence[Row]:
    """All rows of random users, about `count` of them, in their order; all rows where there are no more.

    Whole users, because the rows of one user share the prefixes that trees compute once.
    """
    if len(rows) <= count:
        return rows
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        numbers[row.user_id].append(number)
    users = sorted(numbers)
    random.Random(seed).shuffle(users)
    chosen: list[int] = []
    while users and len(chosen) < count:
        chosen += numbers[users.pop()]
    return select_rows(rows, np.array(sorted(chosen)))


def sample_mixture(
    rows: Sequence[Row], build: Callable[[Sequence[Row]], TaskMixture], seed: int, least: int
) -> tuple[TaskMixture, float]:
    """(the examples of a run, or of a sample of its users with as much less of the tasks about items, their share).

    Args:
        rows: of the train split.
        build: makes the examples of rows.
        seed: of the drawing.
        least: rows that a sample must have.
    """
    drawn = draw_whole_users(rows, max(SAMPLED_ROWS, least), seed)
    mixture, share = build(drawn), len(drawn) / len(rows)
    if share < 1:
        datasets = zip(mixture.weights.items(), mixture.datasets, strict=True)
        weights = {task: weight * (1 if isinstance(data, RowDataset) else share) for (task, weight), data in datasets}
        mixture = TaskMixture(weights, mixture.datasets, seed)
    return mixture, share


def _space_out(count: int) -> list[int]:
    """Up to SAMPLED_BATCHES of `count` numbers, evenly spaced."""
    return sorted({round(part * (count - 1) / max(1, SAMPLED_BATCHES - 1)) for part in range(SAMPLED_BATCHES)})


def _describe(batch: dict[str, torch.Tensor | None]) -> BatchShape:
    rows, length = batch["input_ids"].shape
    return BatchShape(rows, length, len(batch["node"]), batch["end"] is not None)


def _sum_up(shapes: Sequence[BatchShape], count: float) -> dict[str, int]:
    """Tokens, pairs and label nodes of `count` micro-batches like `shapes`."""
    scale = count / len(shapes)
    return {
        name: round(sum(getattr(shape, name) for shape in shapes) * scale)
        for name in ("tokens", "pairs", "label_nodes")
    }


def _note_sample(share: float, looked_at: int, batches: int) -> tuple[str, ...]:
    notes = (
        [f"rows: a sample of {100 * share:.1f} % of the train split, whole users, extrapolated"] if share < 1 else []
    )
    if looked_at < batches:
        notes.append(f"trees: built for {looked_at:,} of {batches:,} micro-batches, extrapolated")
    return tuple(notes)


def count_sft_work(flags: SFTFlags, mixture: TaskMixture, share: float, encoder: Encoder, processes: int) -> Work:
    """The work of sft.py, from its own micro-batches of the first epoch.

    Args:
        flags: of the run.
        mixture: its examples, or a sample of them.
        share: of the examples that are in the mixture.
        encoder: of its tokenizer.
        processes: how many share the run.

    Raises:
        InputError: rows too few for --batch_size, or batches that do not divide evenly.
    """
    accumulation = check_divisible(flags.batch_size, flags.micro_batch_size, processes)
    batches = batch_training(flags, mixture, encoder, processes)
    chosen = _space_out(len(batches))
    shapes = [_describe(batches[number]) for number in chosen]
    examples = round(len(mixture) / share)
    steps = batches.steps if share == 1 else max(1, round(examples / flags.batch_size))
    rows = batches.examples.read_tokens(range(batches.rows))
    return Work(
        examples=examples,
        steps=steps * flags.num_epochs,
        epochs=flags.num_epochs,
        accumulation=accumulation,
        largest=max(shapes, key=lambda shape: shape.tokens * (1 + shape.length)),
        row_tokens=round(sum(len(prompt) + len(target) - 1 for prompt, target, _ in rows) / share),
        notes=_note_sample(share, len(chosen), len(batches)),
        **_sum_up(shapes, steps * accumulation * processes),
    )


def _list_rl_batches(
    flags: RLFlags, mixture: TaskMixture, trie: SidTrie, chosen: Sequence[Sequence[int]]
) -> Iterator[BatchShape]:
    """The trees of prompt groups, with random completions: they share less than beams do, so the trees are larger."""
    generator, sequences = random.Random(flags.seed), trie.sequences()
    tree_tokens = RLConfig.__dataclass_fields__["tree_tokens"].default
    for numbers in chosen:
        groups = [
            [
                (mixture[number].prompt_ids, completion)
                for completion in generator.sample(sequences, min(flags.num_generations, len(sequences)))
            ]
            for number in numbers
        ]
        packed = pack_trees(groups, tree_tokens)
        yield _describe(vars(batch_trees([[row for group in part for row in groups[group]] for part in packed], 0)))


def find_forced_tokens(trie: SidTrie) -> int:
    """Tokens that a search feeds in one pass once every beam has a single way left; 1 where that never saves a pass."""
    nodes = torch.zeros(1, dtype=torch.long, device=trie.forced.device)
    for width in trie.fanout:
        child, legal = trie.children(nodes, width)
        nodes = child[legal]
        forced = trie.forced[nodes]
        if len(nodes) and bool((forced >= 0).all()):
            return max(1, int(forced.max()))
    return 1


def count_rl_work(
    flags: RLFlags, mixture: TaskMixture, share: float, catalogue_trie: CatalogueTrie, processes: int
) -> Work:
    """The work of rl.py, from the groups of its first epoch; arguments as in `count_sft_work`, flags resolved."""
    trie, group = catalogue_trie.trie, flags.num_generations
    prompts = flags.train_batch_size // group
    examples = round(len(mixture) / share)
    schedule = plan_steps(flags, examples, processes)
    order = list(StepSampler(len(mixture), schedule.prompts, 1, flags.seed, lambda: 0))
    batches = [order[start : start + prompts] for start in range(0, len(order), prompts)]
    chosen = [batches[number] for number in _space_out(len(batches))]
    shapes = list(_list_rl_batches(flags, mixture, trie, chosen))
    lengths = mixture.count_prompt_tokens().tolist()
    mean, completion = sum(lengths) / len(lengths), sum(map(len, trie.sequences())) / trie.num_sequences
    beams = group * 3 // 2 if flags.dynamic_sampling else group
    forced = find_forced_tokens(trie) if flags.beam_search else 1
    searches = {
        "rollouts": SearchShape(prompts * flags.gradient_accumulation_steps, max(lengths), beams, trie.depth, forced)
    }
    if flags.test_during_training:
        forced = find_forced_tokens(trie)
        searches["validation"] = SearchShape(1, max(lengths), flags.test_beam, trie.depth, forced)
    steps_an_epoch = -(-examples // schedule.prompts)
    updates = steps_an_epoch * flags.num_iterations
    return Work(
        examples=examples,
        steps=schedule.steps,
        epochs=schedule.steps / updates,
        accumulation=flags.gradient_accumulation_steps,
        largest=max(shapes, key=lambda shape: shape.tokens * (1 + shape.length)),
        row_tokens=round(examples * group * (mean + completion - 1)) * flags.num_iterations,
        searches=searches,
        rolled_out=steps_an_epoch * schedule.prompts,
        prompt_tokens=mean,
        notes=(*_note_sample(share, len(chosen), len(batches)), "completions: drawn at random from the catalogue"),
        **_sum_up(shapes, updates * schedule.prompts / prompts),
    )


def count_forward_operations(shape: ModelShape, tokens: float, pairs: float, label_nodes: float) -> float:
    """Floating-point operations of the matrix products of forward passes, two for every multiplication.

    Args:
        shape: of the model.
        tokens, pairs, label_nodes: nodes, (query, key) pairs that are computed, and rows of logits.
    """
    attention = 4 * shape.layers * shape.heads * shape.head_width * pairs
    return 2 * tokens * shape.decoder_weights + attention + 2 * label_nodes * shape.row_weights


def count_operations(shape: ModelShape, work: Work, checkpointing: bool, reference: bool) -> dict[str, float]:
    """{part: floating-point operations of a whole run, over all processes}; validation is not counted.

    A backward pass takes two products for each one of the forward pass, or one where the weight is frozen.
    """
    forward = count_forward_operations(shape, work.tokens, work.pairs, work.label_nodes)
    passes = (3 if shape.trains == "all" else 2) + checkpointing
    operations = {"training": passes * forward}
    if reference:
        operations["reference model"] = forward
    search = work.searches.get("rollouts")
    if search:
        fed = search.beams * max(1, search.depth - 1)
        seen = work.prompt_tokens**2 + fed * (work.prompt_tokens + fed)
        each = count_forward_operations(shape, work.prompt_tokens + fed, seen, 1 + fed)
        operations["rollouts"] = work.rolled_out * each
    return {part: count * work.epochs for part, count in operations.items()}


def with_prompts(work: Work, phase: str, prompts: int) -> Work:
    """`work` with so many prompts of a search at once."""
    return replace(work, searches={**work.searches, phase: replace(work.searches[phase], prompts=prompts)})
