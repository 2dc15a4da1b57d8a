"""One GRPO step: rollout, reference, forward and backward as prefix trees, against the textbook step.

The textbook step rolls out with HF `generate` and G beams, repeats every prompt G times, and runs policy and reference
over these rows, one group a pass, with logits at the positions of the completions only. Both use the same weights,
prompts and rewards in this process; rollouts, log-probabilities, loss and gradient are compared before anything is
reported. The last line is JSON with `ratio` = textbook seconds / tree seconds (medians), and `processor_ratio`, the
same of the processor's time, which other programs disturb less.

    python -m benchmarks.bench_grpo --data_root DIR --category Industrial_and_Scientific   data in the published format
    python -m benchmarks.bench_grpo                                                        rows made up here
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.settings import PublishedDataFlags, RandomModelFlags, RepeatFlags
from minionerec.common.cli import flag, parse_flags, run_command


@dataclass
class GRPOBenchFlags(PublishedDataFlags, RandomModelFlags, RepeatFlags):
    """Benchmark."""

    num_generations: int = flag(16, "completions of a prompt, at least 2")
    batch_size: int = flag(8, "prompts of the step")
    prompts_per_pass: int = flag(8, "prompts of a forward pass of the tree way")
    tree_tokens: int = flag(384, "tokens of its trees, about")
    beta: float = flag(1e-3, "weight of the KL term")
    prompts: str = flag("worded", "prompt set")
    tasks: list[str] | None = flag(
        None, "tasks as in rl.py", default_text="next_sid, title_history2sid and title2sid, as far as the prompts go"
    )


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(GRPOBenchFlags)

import copy
import json
import random
import statistics
import tempfile
import time
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.arithmetic import measure_peak_gflops
from benchmarks.problems import build_sid_model, make_up_data, read_peak_memory_mb, read_published_data
from benchmarks.textbook import search_textbook
from data import RL_TASKS, TaskInputs, build_mixture, choose_tasks
from minionerec.common.files import InputError
from minionerec.common.processes import say
from minionerec.language.catalogue_trie import CatalogueTrie, build_catalogue_trie
from minionerec.language.examples import Example
from minionerec.language.prompts import Encoder, load_prompts
from minionerec.search.shared_prompts import SharedPrompts
from minionerec.training.grpo_loss import compute_advantages
from minionerec.training.rewards import NamedReward, ranking
from minionerec_trainer import GroupTrainer, RLConfig


class PhaseClock:
    """Seconds by phase, and the processor's seconds of all, in which others that use the machine are left out.

    Attributes:
        seconds: by phase.
        processor: seconds of all threads of this process, up to the last lap.
    """

    def __init__(self):
        self.seconds = {"rollout": 0.0, "reference": 0.0, "train": 0.0}
        self.processor, self._started = 0.0, time.process_time()
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to a phase."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last, self.processor = now, time.process_time() - self._started

    def move(self, source: str, phase: str, seconds: float) -> None:
        """Count seconds of one phase for another."""
        self.seconds[source] -= seconds
        self.seconds[phase] += seconds

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())


@dataclass
class GRPOProblem:
    """What both steps start from.

    Attributes:
        model, reference: policy and reference, on one device.
        catalogue_trie: the catalogue.
        examples: the prompts of the step.
        reward: its only term.
        encoder: tokenizer and prompts.
    """

    model: PreTrainedModel
    reference: PreTrainedModel
    catalogue_trie: CatalogueTrie
    examples: list[Example]
    reward: NamedReward
    encoder: Encoder


@dataclass
class StepResult:
    """What one step gives; its gradients are left in the model.

    Attributes:
        loss: of the step.
        groups: sequence numbers of every prompt's completions.
        log_probs: of all completions under the policy, ascending.
        clock: its seconds.
    """

    loss: float
    groups: list[list[int]]
    log_probs: list[float]
    clock: PhaseClock


def run_tree_step(trainer: GroupTrainer, examples: list[Example], passes: int) -> StepResult:
    """A step of this project in so many forward passes. `reference` is what the trainer's clock gives it."""
    clock, loss_sum, log_probs = PhaseClock(), 0.0, []
    groups: list[list[int]] = []
    roll_out = trainer.rollout

    def keep_groups(examples: list[Example], shared: SharedPrompts | None) -> list[list[int]]:
        groups.extend(roll_out(examples, shared))
        return groups

    size = len(examples) // passes
    parts = [examples[start : start + size] for start in range(0, len(examples), size)]
    with patch.object(trainer, "rollout", keep_groups):
        batches, _ = trainer.get_batch_samples(iter(parts), passes, trainer.args.device)
    clock.lap("rollout")
    trainer.clock.read()
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        loss_sum += loss.item()
        clock.lap("train")
        clock.move("train", "reference", trainer.clock.read().get("reference", 0.0))
        group_batch = batch["groups"]
        log_probs += [values.sum().item() for values in group_batch.old.split(group_batch.lengths.tolist())]
    return StepResult(loss_sum, groups, sorted(log_probs), clock)


def roll_out_textbook(problem: GRPOProblem, count: int) -> list[list[int]]:
    """Sequence numbers of `count` completions per prompt, the target among them, all prompts in one `generate`."""
    catalogue_trie, examples = problem.catalogue_trie, problem.examples
    sequences = catalogue_trie.trie.sequences()
    number_of = {tuple(sequence): number for number, sequence in enumerate(sequences)}
    prompts = [example.prompt_ids for example in examples]
    rankings = search_textbook(problem.model, sequences, prompts, count, problem.encoder.end[-1])
    groups = [[number_of[tokens] for tokens, _ in completions] for completions in rankings]
    for group, example in zip(groups, examples, strict=True):
        if (target := catalogue_trie.number_of[example.sid]) not in group:
            group[-1] = target
    return groups


def compute_row_log_probs(
    model: PreTrainedModel, inputs: torch.Tensor, visible: torch.Tensor, width: int
) -> torch.Tensor:
    """Log-probabilities [G, width] of the last `width` tokens of every row of inputs [G, length]."""
    logits = model(input_ids=inputs, attention_mask=visible, logits_to_keep=width + 1).logits[:, :-1]
    return logits.float().log_softmax(-1).gather(-1, inputs[:, -width:].unsqueeze(-1)).squeeze(-1)


def run_textbook_step(problem: GRPOProblem, count: int, beta: float) -> StepResult:
    """The same step with every completion a row of its own, one group a pass."""
    clock, loss_sum, log_probs = PhaseClock(), 0.0, []
    groups = roll_out_textbook(problem, count)
    clock.lap("rollout")
    device, end = problem.model.device, problem.encoder.end[-1]
    sids, sequences = problem.catalogue_trie.sids, problem.catalogue_trie.trie.sequences()
    for group, example in zip(groups, problem.examples, strict=True):
        advantages = compute_advantages(problem.reward([sids[number] for number in group], example)).to(device)
        completions = [sequences[number] for number in group]
        width, start = max(map(len, completions)), len(example.prompt_ids)
        inputs = torch.full((count, start + width), end)
        valid = torch.zeros(count, width, device=device)
        for row, completion in enumerate(completions):
            inputs[row, : start + len(completion)] = torch.tensor([*example.prompt_ids, *completion])
            valid[row, : len(completion)] = 1
        inputs = inputs.to(device)
        visible = torch.cat((torch.ones(count, start, device=device), valid), dim=1)
        with torch.no_grad():
            reference = compute_row_log_probs(problem.reference, inputs, visible, width)
        clock.lap("reference")
        policy = compute_row_log_probs(problem.model, inputs, visible, width)
        ratio = torch.exp(policy - policy.detach())
        divergence = torch.exp(reference - policy) - (reference - policy) - 1
        loss = (-ratio * advantages.unsqueeze(1) + beta * divergence) * valid
        loss = (loss.sum(dim=1) / valid.sum(dim=1)).sum() / (count * len(problem.examples))
        loss.backward()
        loss_sum += loss.item()
        log_probs += (policy * valid).sum(dim=1).tolist()
        clock.lap("train")
    return StepResult(loss_sum, groups, sorted(log_probs), clock)


def measure_differences(
    ours: StepResult, theirs: StepResult, our_gradients: list[torch.Tensor], their_gradients: list[torch.Tensor]
) -> dict[str, float]:
    """How far the two steps are apart.

    Raises:
        InputError: they disagree.
    """
    norm = sum(float(gradient.double().square().sum()) for gradient in their_gradients) ** 0.5
    pairs = zip(our_gradients, their_gradients, strict=True)
    distance = sum(float((a - b).double().square().sum()) for a, b in pairs) ** 0.5
    log_probs = zip(ours.log_probs, theirs.log_probs, strict=True)
    differences = {
        "loss_difference": abs(ours.loss - theirs.loss),
        "log_prob_difference": max(abs(a - b) for a, b in log_probs),
        "gradient_difference": distance / norm,
    }
    if [set(group) for group in ours.groups] != [set(group) for group in theirs.groups]:
        raise InputError("the two steps roll out different items: no figure is reported")
    if max(differences.values()) > 1e-3:
        raise InputError(f"the two steps disagree ({differences}): no figure is reported")
    return differences


def measure_arithmetic(trainer: GroupTrainer, examples: list[Example], passes: int) -> dict[str, float]:
    """What the products of matrices of a tree step, attention included, would take at this process's measured peak.

    Returns:
        10^9 floating-point operations of the step, the peak's in a second, and the seconds that makes.
    """
    trainer.model.zero_grad()
    # The fused attention of a CPU is none of the operations that the counter knows.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run_tree_step(trainer, examples, passes)
    count, peak = counter.get_total_flops() / 1e9, measure_peak_gflops(device=trainer.args.device)
    return {"tree_gflop": round(count, 1), "peak_gflop_per_s": round(peak, 1), "arithmetic_s": round(count / peak, 2)}


def compare_steps(problem: GRPOProblem, trainer: GroupTrainer, passes: int, repeats: int) -> dict[str, Any]:
    """Both steps in turn, `repeats` times: seconds by phase, differences and the ratio.

    Raises:
        InputError: the two disagree.
    """
    model, args = problem.model, trainer.args
    clocks: dict[str, list[PhaseClock]] = {"tree": [], "textbook": []}
    memory = {}
    for _ in tqdm(range(repeats)):
        before = read_peak_memory_mb()
        model.zero_grad()
        ours = run_tree_step(trainer, problem.examples, passes)
        our_gradients = [parameter.grad.clone() for parameter in model.parameters()]
        clocks["tree"].append(ours.clock)
        memory.setdefault("tree", read_peak_memory_mb() - before)
        before = read_peak_memory_mb()
        model.zero_grad()
        theirs = run_textbook_step(problem, args.num_generations, args.beta)
        clocks["textbook"].append(theirs.clock)
        memory.setdefault("textbook", read_peak_memory_mb() - before)
        their_gradients = [parameter.grad for parameter in model.parameters()]
        differences = measure_differences(ours, theirs, our_gradients, their_gradients)
    median = {name: statistics.median(clock.total for clock in runs) for name, runs in clocks.items()}
    processor = {name: statistics.median(clock.processor for clock in runs) for name, runs in clocks.items()}
    phases = {
        name: {phase: round(statistics.median(run.seconds[phase] for run in runs), 3) for phase in runs[0].seconds}
        for name, runs in clocks.items()
    }
    say(f"{'way':<10}{'median s':>10}{'rollout':>10}{'reference':>10}{'train':>10}")
    for name in clocks:
        say(f"{name:<10}{median[name]:>10.2f}" + "".join(f"{seconds:>10.2f}" for seconds in phases[name].values()))
    return {
        "agree": True,
        **differences,
        "tree_s": round(median["tree"], 3),
        "textbook_s": round(median["textbook"], 3),
        "ratio": round(median["textbook"] / median["tree"], 1),
        "processor_s": {name: round(seconds, 2) for name, seconds in processor.items()},
        "processor_ratio": round(processor["textbook"] / processor["tree"], 1),
        "phase_ratios": {
            phase: round(phases["textbook"][phase] / max(seconds, 1e-3), 1) for phase, seconds in phases["tree"].items()
        },
        "phases_s": phases,
        "peak_mb_more": memory,
    }


def build_problem(flags: GRPOBenchFlags) -> GRPOProblem:
    """Random weights, and prompts drawn from the tasks over published or made-up rows."""
    rng = random.Random(flags.seed)
    rows, catalogue = read_published_data(flags.data_root, flags.category) if flags.data_root else make_up_data(rng)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model, tokenizer = build_sid_model(flags.shape, flags.vocab_size, catalogue, flags.seed)
    model = model.to(device)
    encoder = Encoder(tokenizer, load_prompts(flags.prompts))
    weights = choose_tasks(flags.tasks, encoder.prompts, RL_TASKS)
    mixture = build_mixture(weights, TaskInputs(rows, catalogue), encoder, RL_TASKS)
    chosen = random.Random(flags.seed).sample(range(len(mixture)), flags.batch_size)
    reference = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():  # as after some steps; equal models would have a KL term of zero
        for parameter in reference.parameters():
            parameter.mul_(1.002)
    return GRPOProblem(
        model,
        reference,
        build_catalogue_trie(catalogue, encoder, device),
        [mixture[number] for number in chosen],
        NamedReward("ranking", 1.0, lambda completions, example: ranking(completions, example.sid)),
        encoder,
    )


def build_trainer(problem: GRPOProblem, flags: GRPOBenchFlags, folder: str) -> GroupTrainer:
    """This project's trainer for the problem; it writes nothing into its folder."""
    args = RLConfig(
        output_dir=folder,
        per_device_train_batch_size=flags.num_generations * flags.batch_size,
        num_generations=flags.num_generations,
        beta=flags.beta,
        add_gt=True,  # random weights find no targets, and without them there is nothing to learn
        loss_type="grpo",
        epsilon_high=0.2,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=problem.model.device.type == "cpu",
        report_to="none",
        max_steps=1,
        tree_tokens=flags.tree_tokens,
    )
    return GroupTrainer(
        problem.model,
        problem.reference,
        args,
        problem.examples,
        catalogue_trie=problem.catalogue_trie,
        rewards=[problem.reward],
        pad_token_id=problem.encoder.pad_token_id,
    )


def bench(flags: GRPOBenchFlags) -> None:
    """Run both steps in turn and compare.

    Raises:
        InputError: flags that do not fit together, data that is missing, or steps that disagree.
    """
    if (
        flags.num_generations < 2
        or flags.repeats < 1
        or flags.prompts_per_pass < 1
        or flags.batch_size % flags.prompts_per_pass
    ):
        raise InputError("--num_generations must be at least 2, and --batch_size a multiple of --prompts_per_pass")
    problem = build_problem(flags)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(problem, flags, folder)
        passes = flags.batch_size // flags.prompts_per_pass
        figures = compare_steps(problem, trainer, passes, flags.repeats)
        figures |= measure_arithmetic(trainer, problem.examples, passes)
    figures["share_of_peak"] = round(figures["arithmetic_s"] / figures["tree_s"], 2)
    lengths = [len(example.prompt_ids) for example in problem.examples]
    report = {
        "benchmark": "grpo",
        "data": flags.category or flags.data_root or "made up",
        "shape": flags.shape,
        "parameters": problem.model.num_parameters(),
        "num_generations": flags.num_generations,
        "prompts": flags.batch_size,
        "prompt_lengths": [min(lengths), round(statistics.mean(lengths), 1), max(lengths)],
        "device": str(problem.model.device),
        "threads": torch.get_num_threads(),
        **figures,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(bench, FLAGS)
