"""One GRPO step: rollout, reference, forward and backward as prefix trees, against the textbook step.

The textbook step rolls out with HF `generate` and G beams, repeats every prompt G times, and runs policy and reference over
these rows, one group a pass, with logits at the completion's places only. Both use the same weights, prompts and rewards
in this process; rollouts, log-probabilities, loss and gradient are compared before anything is reported. The last line is
JSON with `ratio` = textbook seconds / tree seconds (medians).

    python -m benchmarks.bench_grpo --data_root DIR --category Industrial_and_Scientific   data in the published format
    python -m benchmarks.bench_grpo                                                        rows made up here
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import LogitsProcessorList, PreTrainedModel

from benchmarks.bench_decode import SHAPES, PrefixDictionary, random_model
from benchmarks.bench_sft import made_up, peak_mb, published
from data import RL_TASKS, TaskInputs, build_mixture, choose_tasks
from LogitProcessor import pad_left
from minionerec.common.cli import run
from minionerec.common.files import InputError
from minionerec.common.processes import say
from minionerec.common.records import SID_TOKEN
from minionerec.common.texts import list_texts
from minionerec.language.catalogue_trie import build_catalogue_trie
from minionerec.language.examples import Example
from minionerec.language.models import train_tokenizer
from minionerec.language.prompts import Encoder, load_prompts
from minionerec.language.sid_tokens import add_sid_tokens
from minionerec.search.trie import SidTrie
from minionerec.training.grpo_loss import compute_advantages
from minionerec.training.rewards import REWARDS, NamedReward
from minionerec_trainer import GroupTrainer, RLConfig


class Clock:
    """Seconds by phase."""

    def __init__(self):
        self.seconds = {"rollout": 0.0, "reference": 0.0, "train": 0.0}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to a phase."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def tree_step(trainer: GroupTrainer, examples: Sequence[Example], passes: int) -> tuple[float, list, list, Clock]:
    """(loss, groups, log-probabilities per completion, clock) of a step of this project; gradients stay in the model."""
    clock, total = Clock(), 0.0
    groups: list[list[int]] = []
    rollout = trainer.rollout
    trainer.rollout = lambda examples: groups.extend(rollout(examples)) or groups
    batches = trainer._make_step(examples, passes)
    trainer.rollout = rollout
    clock.lap("rollout")
    log_probs: dict[tuple, list[float]] = {}
    for batch in batches:
        trainer._reference_seconds = 0.0
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        total += loss.item()
        clock.lap("train")
        clock.seconds["reference"] += trainer._reference_seconds
        clock.seconds["train"] -= trainer._reference_seconds
        made = batch["groups"]
        tokens = made.tree.label_token.split(made.lengths.tolist())
        values = made.old.split(made.lengths.tolist())
        for label, value in zip(tokens, values):
            log_probs.setdefault(tuple(label.tolist()), []).append(value.sum().item())
    return total, groups, sorted(sum(log_probs.values(), [])), clock


def textbook_step(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    sequences: list[list[int]],
    examples: Sequence[Example],
    reward: NamedReward,
    sids: list[str],
    count: int,
    beta: float,
    end: int,
) -> tuple[float, list, list, Clock]:
    """As `tree_step`, with every completion a row of its own."""
    clock, total, log_probs = Clock(), 0.0, []
    # Phase 1: rollouts, all prompts in one `generate`.
    ids, mask = pad_left([example.prompt_ids for example in examples], end)
    device = model.device
    with torch.no_grad():
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            num_beams=count,
            num_return_sequences=count,
            do_sample=False,
            max_new_tokens=max(map(len, sequences)),
            length_penalty=0.0,
            eos_token_id=end,
            pad_token_id=end,
            logits_processor=LogitsProcessorList([PrefixDictionary(sequences, ids.shape[1])]),
        )
    number = {tuple(sequence): place for place, sequence in enumerate(sequences)}
    rows = out[:, ids.shape[1] :].view(len(examples), count, -1).tolist()
    groups = [[number[tuple(row[: row.index(end) + 1])] for row in group] for group in rows]
    for group, example in zip(groups, examples):
        if (target := sids.index(example.sid)) not in group:
            group[-1] = target
    clock.lap("rollout")

    # Phase 2: policy and reference, G rows a pass.
    for group, example in zip(groups, examples):
        advantages = compute_advantages(reward([sids[place] for place in group], example)).to(device)
        completions = [sequences[place] for place in group]
        width = max(map(len, completions))
        inputs = torch.full((count, len(example.prompt_ids) + width), end)
        valid = torch.zeros(count, width, device=device)
        for row, completion in enumerate(completions):
            inputs[row, : len(example.prompt_ids) + len(completion)] = torch.tensor([*example.prompt_ids, *completion])
            valid[row, : len(completion)] = 1
        inputs = inputs.to(device)
        seen = torch.cat((torch.ones(count, len(example.prompt_ids), device=device), valid), dim=1)
        labels = inputs[:, -width:]

        def token_log_probs(policy: PreTrainedModel) -> torch.Tensor:
            logits = policy(input_ids=inputs, attention_mask=seen, logits_to_keep=width + 1).logits[:, :-1]
            return logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

        with torch.no_grad():
            base = token_log_probs(reference)
        clock.lap("reference")
        own = token_log_probs(model)
        ratio = torch.exp(own - own.detach())
        divergence = torch.exp(base - own) - (base - own) - 1
        loss = (-ratio * advantages.unsqueeze(1) + beta * divergence) * valid
        loss = (loss.sum(dim=1) / valid.sum(dim=1)).sum() / (count * len(examples))
        loss.backward()
        total += loss.item()
        log_probs += (own * valid).sum(dim=1).tolist()
        clock.lap("train")
    return total, groups, sorted(log_probs), clock


def bench(
    data_root: str | None = None,
    category: str | None = None,
    prompts: str = "worded",
    tasks: list[str] | None = None,
    shape: str = "llama-135m",
    num_generations: int = 16,
    batch_size: int = 8,
    prompts_per_pass: int = 8,
    tree_tokens: int = 512,
    vocab_size: int = 49152,
    beta: float = 1e-3,
    repeats: int = 1,
    seed: int = 0,
) -> None:
    """Run both steps `repeats` times in turn and compare.

    Args:
        data_root: a folder in the published format: prompts are drawn from the tasks over its train rows and items.
            category: what its files' names begin with.
        tasks: as in rl.py; default next_sid, title_history2sid and title2sid, the tasks of a worded model.
        shape: llama-135m or qwen3-small, with random weights. vocab_size: text vocabulary the SID tokens are added to.
        batch_size: prompts of the step; prompts_per_pass: of a forward pass of the tree way; tree_tokens: of its trees.
    """
    if shape not in SHAPES:
        raise InputError(f"--shape {shape}: expected one of {', '.join(SHAPES)}")
    if num_generations < 2 or repeats < 1 or prompts_per_pass < 1 or batch_size % prompts_per_pass:
        raise InputError("--num_generations must be at least 2, and --batch_size a multiple of --prompts_per_pass")
    rows, catalogue = published(data_root, category) if data_root else made_up(random.Random(seed))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    tokenizer = train_tokenizer(list_texts(catalogue.titles, []), vocab_size)
    sid_tokens = {token for sid in catalogue.sids for token in SID_TOKEN.findall(sid)}
    model = random_model(shape, vocab_size + len(sid_tokens), seed)
    add_sid_tokens(model, tokenizer, sid_tokens, seed, 1.0)
    model = model.to(device)
    encoder = Encoder(tokenizer, load_prompts(prompts))
    mixture = build_mixture(
        choose_tasks(tasks, encoder.prompts, RL_TASKS), TaskInputs(rows, catalogue), encoder, 512, RL_TASKS
    )
    examples = [mixture[place] for place in random.Random(seed).sample(range(len(mixture)), batch_size)]
    trie, sids = build_catalogue_trie(catalogue, encoder, device)
    reference = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():  # as after some steps; equal models would have a KL term of zero
        for parameter in reference.parameters():
            parameter.mul_(1.002)
    reward = NamedReward("ranking", 1.0, lambda completions, example: REWARDS["ranking"](completions, example.sid))

    with tempfile.TemporaryDirectory() as folder:
        trainer = GroupTrainer(
            model=model,
            reference=reference,
            train_dataset=examples,
            trie=trie,
            sid_of_sequence=sids,
            rewards=[reward],
            pad_token_id=encoder.pad_token_id,
            args=RLConfig(
                output_dir=folder,
                per_device_train_batch_size=num_generations * batch_size,
                num_generations=num_generations,
                beta=beta,
                add_gt=True,  # random weights find no targets, and without them there is nothing to learn
                loss_type="grpo",
                epsilon_high=0.2,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=device.type == "cpu",
                report_to="none",
                max_steps=1,
                tree_tokens=tree_tokens,
            ),
        )
        report = compare(trainer, model, reference, trie, examples, reward, sids, encoder, prompts_per_pass, repeats)
    lengths = [len(example.prompt_ids) for example in examples]
    print(
        json.dumps(
            {
                "benchmark": "grpo",
                "data": category or data_root or "made up",
                "shape": shape,
                "parameters": model.num_parameters(),
                "num_generations": num_generations,
                "prompts": batch_size,
                "prompt_lengths": [min(lengths), round(statistics.mean(lengths), 1), max(lengths)],
                "device": str(device),
                "threads": torch.get_num_threads(),
                **report,
            }
        )
    )


def compare(
    trainer: GroupTrainer,
    model: PreTrainedModel,
    reference: PreTrainedModel,
    trie: SidTrie,
    examples: list[Example],
    reward: NamedReward,
    sids: list[str],
    encoder: Encoder,
    prompts_per_pass: int,
    repeats: int,
) -> dict:
    """Both steps in turn, `repeats` times: seconds by phase, differences and the ratio.

    Raises:
        InputError: the two disagree.
    """
    count, passes = trainer.args.num_generations, len(examples) // prompts_per_pass
    sequences = trie.sequences()
    clocks: dict[str, list[Clock]] = {"tree": [], "textbook": []}
    memory = {}
    for _ in tqdm(range(repeats)):
        before = peak_mb()
        model.zero_grad()
        loss, groups, log_probs, clock = tree_step(trainer, examples, passes)
        ours = [parameter.grad.clone() for parameter in model.parameters()]
        clocks["tree"].append(clock)
        memory.setdefault("tree", peak_mb() - before)
        before = peak_mb()
        model.zero_grad()
        found = textbook_step(
            model, reference, sequences, examples, reward, sids, count, trainer.args.beta, encoder.end[-1]
        )
        clocks["textbook"].append(found[3])
        memory.setdefault("textbook", peak_mb() - before)
        theirs = [parameter.grad for parameter in model.parameters()]
        norm = sum(float(gradient.double().square().sum()) for gradient in theirs) ** 0.5
        apart = sum(float((a - b).double().square().sum()) for a, b in zip(ours, theirs)) ** 0.5 / norm
        differences = {
            "loss_difference": abs(loss - found[0]),
            "log_prob_difference": max(abs(a - b) for a, b in zip(log_probs, found[2], strict=True)),
            "gradient_difference": apart,
        }
        if [set(group) for group in groups] != [set(group) for group in found[1]]:
            raise InputError("the two steps roll out different items: no figure is reported")
        if max(differences.values()) > 1e-3:
            raise InputError(f"the two steps disagree ({differences}): no figure is reported")
    median = {name: statistics.median(clock.total for clock in found) for name, found in clocks.items()}
    phases = {
        name: {phase: round(statistics.median(c.seconds[phase] for c in found), 3) for phase in found[0].seconds}
        for name, found in clocks.items()
    }
    say(f"{'way':<10}{'median s':>10}{'rollout':>10}{'reference':>10}{'train':>10}")
    for name in clocks:
        say(f"{name:<10}{median[name]:>10.2f}" + "".join(f"{phases[name][p]:>10.2f}" for p in phases[name]))
    return {
        "agree": True,
        **differences,
        "tree_s": round(median["tree"], 3),
        "textbook_s": round(median["textbook"], 3),
        "ratio": round(median["textbook"] / median["tree"], 1),
        "phase_ratios": {p: round(phases["textbook"][p] / max(phases["tree"][p], 1e-3), 1) for p in phases["tree"]},
        "phases_s": phases,
        "peak_mb_more": memory,
    }


if __name__ == "__main__":
    run(bench)
