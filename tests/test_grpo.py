"""The GRPO trainer: loss and gradients against a row-by-row twin, rollouts, what a step is made of, what it refuses."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from tiny import END, random_catalogue, random_prompts, tiny_model

from minionerec.common.files import InputError
from minionerec.common.settings import AdapterFlags
from minionerec.language.adapters import add_lora
from minionerec.language.catalogue_trie import CatalogueTrie
from minionerec.language.examples import Example
from minionerec.search.trie import SidTrie
from minionerec.training.groups import StepSampler
from minionerec.training.grpo_loss import CLIP, LOSSES
from minionerec.training.rewards import PLAIN_REWARDS, NamedReward
from minionerec_trainer import GroupTrainer, RLConfig


def term(name, weight=1.0):
    return NamedReward(name, weight, lambda completions, example: PLAIN_REWARDS[name](completions, example.sid))


def make_trainer(tmp_path, kind="qwen3", lora=False, reward=None, generations=6, prompts=5, seed=0, **config):
    """(trainer, examples) over a random catalogue of mixed depths; the reference is another random model."""
    rng = random.Random(seed)
    sequences = sorted(random_catalogue(rng, 40, 4, 6, 30, mixed=True))
    trie = SidTrie(sequences)
    names = ["".join(f"<{token}>" for token in tokens[:-1]) for tokens in sequences]
    model = tiny_model(kind, 30, seed)
    reference = tiny_model(kind, 30, seed + 1).requires_grad_(False)
    if lora:
        model, reference = add_lora(model, list(range(2, 20)), AdapterFlags(lora=True, lora_rank=4)), None
        with torch.no_grad():  # B starts at zero, and the policy would be its own base
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) / 10)
    examples = [
        Example("", prompt, sequences[target], "", "", names[target], target)
        for prompt, target in zip(
            random_prompts(rng, prompts, 30), rng.choices(range(len(sequences)), k=prompts), strict=True
        )
    ]
    loss = config.get("loss_type", "grpo")
    settings = dict(
        beta=0.5,
        loss_type=loss,
        epsilon=CLIP[loss][0],
        epsilon_high=CLIP[loss][1],
        gradient_checkpointing=False,
        max_steps=1,
    )
    settings |= config
    trainer = GroupTrainer(
        model=model,
        reference=reference if settings["beta"] else None,
        train_dataset=examples,
        catalogue_trie=CatalogueTrie(trie, names),
        rewards=[term(reward or "ranking")],
        pad_token_id=0,
        args=RLConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=generations * prompts,
            num_generations=generations,
            bf16=False,
            report_to="none",
            use_cpu=True,
            **settings,
        ),
    )
    return trainer, examples


def with_hits_and_misses(trainer, examples, monkeypatch):
    """The examples with targets chosen so that one group lacks its target and the others have it; the groups, fixed."""
    groups = trainer.rollout(examples)
    missing = next(number for number in range(len(trainer.catalogue_trie.sids)) if number not in groups[0])
    targets = [missing] + [group[2] for group in groups[1:]]
    monkeypatch.setattr(trainer, "rollout", lambda *_: groups)
    return [
        replace(example, sid=trainer.catalogue_trie.sids[t]) for example, t in zip(examples, targets, strict=True)
    ], groups


def token_log_probs(trainer, model, example, completion, legal=False):
    """[tokens] by an ordinary forward of one row; legal: a softmax over what a dictionary of prefixes allows."""
    row = torch.tensor([example.prompt_ids + completion])
    first = len(example.prompt_ids) - 1
    logits = model(row).logits[0][first : first + len(completion)].float() / trainer.temperature
    if legal:
        for place in range(len(completion)):
            allowed = sorted({s[place] for s in trainer.completion_tokens if s[:place] == completion[:place]})
            mask = torch.full_like(logits[place], float("-inf"))
            mask[allowed] = 0
            logits = torch.cat((logits[:place], (logits[place] + mask).unsqueeze(0), logits[place + 1 :]))
    return logits.log_softmax(-1)[torch.arange(len(completion)), completion]


def slow_loss(trainer, examples, groups, old_model=None, legal=False):
    """Every completion as a row of its own, and the papers' formulas written out, one completion at a time."""
    args = trainer.args
    beta, count = args.beta, sum(map(len, groups))
    tokens = sum(len(trainer.completion_tokens[number]) for group in groups for number in group)
    longest = max(map(len, trainer.completion_tokens))
    reference = trainer.reference
    total = torch.zeros(())
    for example, group in zip(examples, groups, strict=True):
        rewards = trainer.rewards[0]([trainer.catalogue_trie.sids[number] for number in group], example)
        mean = sum(rewards) / len(rewards)
        spread = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
        silent = max(rewards) - min(rewards) < 1e-12
        if silent and args.mask_all_zero:
            continue
        for number, reward in zip(group, rewards, strict=True):
            advantage = 0.0 if silent else reward - mean
            if args.loss_type != "dr_grpo":
                advantage /= spread + 1e-4
            completion = trainer.completion_tokens[number]
            policy = token_log_probs(trainer, trainer.model, example, completion, legal)
            with torch.no_grad():
                old = token_log_probs(trainer, old_model or trainer.model, example, completion, legal)
                if beta and reference is not None:
                    base = token_log_probs(trainer, reference, example, completion, legal)
                elif beta:
                    with trainer.model.disable_adapter():
                        base = token_log_probs(trainer, trainer.model, example, completion, legal)
            ratio = (policy - old).exp()
            if args.loss_type == "gspo":
                ratio = (policy - old).mean().exp().expand(len(completion))
            bounded = ratio.clamp(1 - args.epsilon, 1 + args.epsilon_high)
            losses = [-min(r * advantage, c * advantage) for r, c in zip(ratio, bounded, strict=True)]
            if beta:
                losses = [
                    loss + beta * ((b - p).exp() - (b - p) - 1) for loss, b, p in zip(losses, base, policy, strict=True)
                ]
            share = {"dapo": tokens, "dr_grpo": count * longest}.get(args.loss_type, len(completion) * count)
            total = total + sum(losses) / share
    return total


def gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def step_loss(trainer, examples, batches=1):
    """The loss of a step, whose batches stay in `trainer._step_batches`."""
    trainer._step_batches = trainer._make_step(examples, batches)
    return sum(trainer.compute_loss(trainer.model, batch) for batch in trainer._step_batches)


def assert_same(trainer, ours, theirs):
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    first, second = gradients(trainer, ours), gradients(trainer, theirs)
    scale = max(gradient.abs().max() for gradient in second.values())
    assert scale > 1e-3 and first.keys() == second.keys()
    for name in second:
        assert (first[name] - second[name]).abs().max() < 1e-5 * max(scale, 1), name


# ---------------------------------------------------------------------------------------------------- against the twin
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("reward", sorted(PLAIN_REWARDS))
@pytest.mark.parametrize("mask", [False, True])
def test_loss_and_gradients_equal_separate_rows(tmp_path, monkeypatch, beta, reward, mask):
    trainer, examples = make_trainer(tmp_path, beta=beta, reward=reward, mask_all_zero=mask)
    examples, groups = with_hits_and_misses(trainer, examples, monkeypatch)
    assert_same(trainer, step_loss(trainer, examples), slow_loss(trainer, examples, groups))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_models_adapters_and_gradient_checkpointing(tmp_path, monkeypatch, kind, lora, checkpointing):
    trainer, examples = make_trainer(tmp_path, kind, lora)
    examples, groups = with_hits_and_misses(trainer, examples, monkeypatch)
    theirs = slow_loss(trainer, examples, groups)
    if checkpointing:
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer.model.train()
    assert_same(trainer, step_loss(trainer, examples, 2), theirs)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_every_loss_on_rollouts_of_older_weights(tmp_path, monkeypatch, loss_type, renormalize):
    """The first update has ratio 1; for the second the weights have moved, far enough that some ratios are clipped."""
    trainer, examples = make_trainer(tmp_path, loss_type=loss_type, renormalize=renormalize, num_iterations=2)
    examples, groups = with_hits_and_misses(trainer, examples, monkeypatch)
    assert_same(trainer, step_loss(trainer, examples), slow_loss(trainer, examples, groups, legal=renormalize))
    old = copy.deepcopy(trainer.model)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    trainer._sums.clear()
    ours = trainer.compute_loss(trainer.model, trainer._step_batches[0])
    share, count = trainer._sums["clip_share"]
    assert count == 1 and 0 < share < 1
    assert_same(trainer, ours, slow_loss(trainer, examples, groups, old, legal=renormalize))


def test_sampled_rollouts_are_trained_on_as_drawn_and_at_their_temperature(tmp_path, monkeypatch):
    trainer, examples = make_trainer(tmp_path, beam_search=False, temperature=1.7)
    assert trainer.temperature == 1.7
    groups = trainer.rollout(examples)
    assert any(len(set(group)) < len(group) for group in groups)  # independent draws repeat themselves
    examples = [
        replace(example, sid=trainer.catalogue_trie.sids[group[0]])
        for example, group in zip(examples, groups, strict=True)
    ]
    monkeypatch.setattr(trainer, "rollout", lambda *_: groups)
    assert_same(trainer, step_loss(trainer, examples), slow_loss(trainer, examples, groups))


def test_a_catalogue_smaller_than_a_group(tmp_path):
    trainer, examples = make_trainer(tmp_path, generations=50, prompts=2)
    groups = trainer.rollout(examples)
    assert {len(group) for group in groups} == {len(trainer.catalogue_trie.sids)}
    assert_same(trainer, step_loss(trainer, examples), slow_loss(trainer, examples, groups))


# ------------------------------------------------------------------------------------------------------------- the step
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("batches", [2, 3, 5])
def test_a_step_is_the_same_in_any_number_of_batches(tmp_path, loss_type, batches):
    trainer, examples = make_trainer(tmp_path, loss_type=loss_type, mask_all_zero=True)
    whole = gradients(trainer, step_loss(trainer, examples))
    parts = gradients(trainer, step_loss(trainer, examples, batches))
    assert len(trainer._step_batches) == batches
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3
    for name in whole:
        assert (whole[name] - parts[name]).abs().max() < 1e-6


def test_groups_without_advantage_cost_no_forward_when_masked(tmp_path, monkeypatch):
    """Only the four groups with a target go through the policy, where the fifth has no KL term that pulls too."""
    for mask, beta, groups in ((True, 0.5, 4), (False, 0.5, 5), (False, 0.0, 4)):
        trainer, examples = make_trainer(tmp_path, mask_all_zero=mask, beta=beta, reward="rule")
        examples, _ = with_hits_and_misses(trainer, examples, monkeypatch)
        step_loss(trainer, examples)
        assert sum(len(batch["groups"].lengths) for batch in trainer._step_batches) == 6 * groups
        share, count = trainer._sums["zero_advantage_share"]
        assert share / count == 0.2
    trainer.rewards = [NamedReward("same", 1.0, lambda completions, example: [0.3] * len(completions))]
    trainer.model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass for nothing"))
    step_loss(trainer, examples, 2)


def test_silent_groups_leave_the_gradients_at_zero_when_masked(tmp_path):
    """Without the mask their KL term still pulls towards the reference."""
    for mask in (True, False):
        trainer, examples = make_trainer(tmp_path, mask_all_zero=mask)
        trainer.rewards = [NamedReward("same", 1.0, lambda completions, example: [0.3] * len(completions))]
        found = gradients(trainer, step_loss(trainer, examples))
        assert any(bool(gradient.any()) for gradient in found.values()) != mask


def test_rewards_are_weighted_sums_and_each_is_logged(tmp_path):
    trainer, examples = make_trainer(tmp_path)
    trainer.rewards = [term("rule", 2.0), term("prefix", -0.5)]
    groups = trainer.rollout(examples)
    totals = trainer.reward_groups(examples, groups)
    hits = 0
    for example, group, total in zip(examples, groups, totals, strict=True):
        sids = [trainer.catalogue_trie.sids[number] for number in group]
        hits += sum(PLAIN_REWARDS["rule"](sids, example.sid)) / len(sids)
        parts = zip(PLAIN_REWARDS["rule"](sids, example.sid), PLAIN_REWARDS["prefix"](sids, example.sid), strict=True)
        assert total == pytest.approx([2 * first - 0.5 * second for first, second in parts])
    assert trainer._sums["reward_rule"] == pytest.approx([hits, len(examples)])


@pytest.mark.parametrize("size, step, repeats", [(10, 4, 1), (10, 4, 3), (8, 2, 2), (3, 3, 2), (3, 7, 1)])
def test_the_sampler_repeats_steps(size, step, repeats):
    epoch = 0
    sampler = StepSampler(size, step, repeats, 5, lambda: epoch)
    first = list(sampler)
    assert len(first) == len(sampler)
    steps = [first[start : start + step] for start in range(0, len(first), step)]
    assert len(steps) == -(-size // step) * repeats and all(len(rows) == step for rows in steps)
    for start in range(0, len(steps), repeats):
        assert all(rows == steps[start] for rows in steps[start : start + repeats])
    once = [row for rows in steps[::repeats] for row in rows]
    assert sorted(once[:size]) == list(range(size)) and once[size:] == (once[:size] * step)[: len(once) - size]
    assert list(sampler) == first
    epoch = 1
    assert list(sampler) != first


def parts_of(trainer, examples):
    """What the trainer was made from."""
    names = ("model", "reference", "args", "catalogue_trie", "rewards", "pad_token_id")
    return {name: getattr(trainer, name) for name in names} | {"train_dataset": examples}


def test_a_process_drives_one_device(tmp_path):
    trainer, examples = make_trainer(tmp_path)
    trainer.args._n_gpu = 2
    again = GroupTrainer(**parts_of(trainer, examples))
    assert again.args.n_gpu == 1 and not isinstance(again.model, torch.nn.DataParallel)


# ------------------------------------------------------------------------------------------------------------- rollouts
@pytest.mark.parametrize("beams", [True, False])
def test_completions_are_items_and_end_with_the_end_token(tmp_path, beams):
    trainer, examples = make_trainer(tmp_path, beam_search=beams)
    for group in trainer.rollout(examples):
        assert len(group) == 6 and (len(set(group)) == 6 or not beams)
        for number in group:
            tokens = trainer.completion_tokens[number]
            assert tokens[-1] == END and END not in tokens[:-1]
            assert trainer.catalogue_trie.sids[number] == "".join(f"<{token}>" for token in tokens[:-1])


def test_rollouts_leave_no_gradient_and_no_mode_behind(tmp_path):
    trainer, examples = make_trainer(tmp_path)
    trainer.model.train()
    trainer.rollout(examples)
    assert trainer.model.training and all(parameter.grad is None for parameter in trainer.model.parameters())


def test_draws_are_a_function_of_seed_and_step(tmp_path):
    trainer, examples = make_trainer(tmp_path, beam_search=False, generations=12)
    first = trainer.rollout(examples)
    assert trainer.rollout(examples) == first
    trainer.state.global_step = 1
    assert trainer.rollout(examples) != first


# ---------------------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    "config, said",
    [
        (dict(loss_type="ppo", epsilon=0.2, epsilon_high=0.2), "loss_type ppo: expected one of grpo"),
        (dict(beta=0.0, sync_ref_model=True), "--sync_ref_model"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, monkeypatch, config, said):
    monkeypatch.setitem(CLIP, "ppo", (0.2, 0.2))
    with pytest.raises(InputError, match=said):
        make_trainer(tmp_path, **config)


def test_inputs_that_do_not_fit(tmp_path):
    trainer, examples = make_trainer(tmp_path)
    parts = parts_of(trainer, examples)
    GroupTrainer(**parts)
    for changes, said in (
        (dict(reference=tiny_model("qwen3", 31)), "the reference has a vocabulary of 31 tokens, the policy one of 30"),
        (dict(reference=None), "--beta 0.5: the KL term needs a reference"),
        (dict(train_dataset=[*examples, replace(examples[0], sid="<99>")]), "target <99> is not in the trie"),
    ):
        with pytest.raises(InputError, match=said):
            GroupTrainer(**{**parts, **changes})
    trainer.args.per_device_train_batch_size = 31
    with pytest.raises(InputError, match="--train_batch_size 31: must be a multiple of num_generations 6"):
        GroupTrainer(**parts)
