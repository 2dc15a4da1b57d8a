"""GRPO: loss and gradients against a row-by-row twin, rollouts, whole runs for every reward, wrong input."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import END, random_catalogue, random_prompts, tiny_model
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

import ranking
from data import Example
from fileio import InputError, read_json
from LogitProcessor import SidTrie
from minionerec_trainer import GroupTrainer
from model_io import load_model
from prompts import load_prompts
from rewards import REWARDS
from rl import rl
from sft import sft


# ---------------------------------------------------------------------------------------------------------- the trainer
def make_trainer(tmp_path, beta=0.5, reward="ranking", generations=6, prompts=5, seed=0, **options):
    """(trainer, examples) over a random catalogue of mixed depths; the reference is another random model."""
    rng = random.Random(seed)
    sequences = sorted(random_catalogue(rng, 40, 4, 6, 30, mixed=True))
    trie = SidTrie(sequences)
    names = ["".join(f"<{token}>" for token in tokens[:-1]) for tokens in sequences]
    model = tiny_model("qwen3", 30, seed)
    reference = tiny_model("qwen3", 30, seed + 1)
    examples = [
        Example("", prompt, sequences[target], "", "", names[target], target)
        for prompt, target in zip(random_prompts(rng, prompts, 30), rng.choices(range(len(sequences)), k=prompts))
    ]
    trainer = GroupTrainer(
        model=model,
        reference=reference.requires_grad_(False) if beta else None,
        train_dataset=examples,
        trie=trie,
        sid_of_sequence=names,
        reward=REWARDS[reward],
        pad_token_id=0,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=generations * prompts,
            num_generations=generations,
            beta=beta,
            per_device_eval_batch_size=generations,
            gradient_checkpointing=False,
            bf16=False,
            report_to="none",
            max_steps=1,
        ),
        **options,
    )
    return trainer, examples


def slow_loss(trainer, examples, groups, beta, skip_silent=False):
    """Every completion as a row of its own, by an ordinary forward; formulas written out, mean over all completions."""
    total, count = 0.0, sum(map(len, groups))
    for example, group in zip(examples, groups):
        rewards = trainer.reward([trainer.sid_of_sequence[number] for number in group], example.sid)
        mean = sum(rewards) / len(rewards)
        spread = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
        silent = max(rewards) - min(rewards) < 1e-12
        if silent and skip_silent:
            continue
        for number, reward in zip(group, rewards):
            advantage = 0.0 if silent else (reward - mean) / (spread + 1e-4)
            completion = trainer.trie.sequences()[number]
            row = torch.tensor([example.prompt_ids + completion])
            first = len(example.prompt_ids) - 1
            policy = trainer.model(row).logits[0].log_softmax(-1)
            if beta:
                with torch.no_grad():
                    base = trainer.reference(row).logits[0].log_softmax(-1)
            for place, token in enumerate(completion):
                log_prob = policy[first + place, token]
                loss = -(log_prob - log_prob.detach()).exp() * advantage
                if beta:
                    difference = base[first + place, token] - log_prob
                    loss = loss + beta * (difference.exp() - difference - 1)
                total = total + loss / len(completion) / count
    return total


def gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}


def assert_close(first, second):
    scale = max(gradient.abs().max() for gradient in second.values())
    assert scale > 1e-3
    for name in second:
        assert (first[name] - second[name]).abs().max() < 1e-5 * max(scale, 1), name


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("reward", ["rule", "ranking", "ranking_only"])
@pytest.mark.parametrize("mask", [False, True])
def test_loss_and_gradients_equal_separate_rows(tmp_path, beta, reward, mask):
    trainer, examples = make_trainer(tmp_path, beta, reward, mask_all_zero=mask)
    groups = trainer.rollout(examples)  # a beam search: the same every time
    # One prompt's target is among its completions, another's is not, so that both kinds of group take part.
    missing = next(number for number in range(len(trainer.sid_of_sequence)) if number not in groups[0])
    targets = [missing] + [group[2] for group in groups[1:]]
    examples = [replace(example, sid=trainer.sid_of_sequence[target]) for example, target in zip(examples, targets)]
    assert trainer.rollout(examples) == groups
    ours = trainer.compute_loss(trainer.model, examples)
    theirs = slow_loss(trainer, examples, groups, beta, skip_silent=mask)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert_close(gradients(trainer, ours), gradients(trainer, theirs))


def test_sampled_rollouts_are_trained_on_as_drawn(tmp_path, monkeypatch):
    trainer, examples = make_trainer(tmp_path, beam_rollouts=False)
    groups = trainer.rollout(examples)
    assert any(len(set(group)) < len(group) for group in groups)  # independent draws repeat themselves
    examples = [replace(example, sid=trainer.sid_of_sequence[group[0]]) for example, group in zip(examples, groups)]
    monkeypatch.setattr(trainer, "rollout", lambda _: groups)
    ours = trainer.compute_loss(trainer.model, examples)
    theirs = slow_loss(trainer, examples, groups, 0.5)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert_close(gradients(trainer, ours), gradients(trainer, theirs))


@pytest.mark.parametrize("beams", [True, False])
def test_completions_are_items_and_end_with_the_end_token(tmp_path, beams):
    trainer, examples = make_trainer(tmp_path, beam_rollouts=beams)
    for group in trainer.rollout(examples):
        assert len(group) == 6 and (len(set(group)) == 6 or not beams)
        for number in group:
            tokens = trainer.completion_tokens[number]
            assert tokens[-1] == END and END not in tokens[:-1]
            assert trainer.sid_of_sequence[number] == "".join(f"<{token}>" for token in tokens[:-1])


@pytest.mark.parametrize("beams", [True, False])
def test_add_gt_puts_the_target_in_the_last_place_of_groups_that_lack_it(tmp_path, beams):
    plain, examples = make_trainer(tmp_path, beam_rollouts=beams, prompts=8)
    helped, _ = make_trainer(tmp_path, beam_rollouts=beams, prompts=8, add_gt=True)
    torch.manual_seed(0)
    before = plain.rollout(examples)
    torch.manual_seed(0)
    after = helped.rollout(examples)
    lacking = 0
    for example, old, new in zip(examples, before, after):
        target = helped.sequence_of_sid[example.sid]
        if target in old:
            assert new == old
        else:
            lacking += 1
            assert new == old[:-1] + [target]
    assert lacking


def test_silent_groups_leave_the_gradients_at_zero_when_masked(tmp_path):
    """Without the mask their KL term still pulls towards the reference."""
    silent = lambda completions, target: [0.3] * len(completions)
    for mask in (True, False):
        trainer, examples = make_trainer(tmp_path, mask_all_zero=mask)
        trainer.reward = silent
        found = gradients(trainer, trainer.compute_loss(trainer.model, examples))
        assert any(bool(gradient.any()) for gradient in found.values()) != mask


def test_rollouts_leave_no_gradient_and_no_mode_behind(tmp_path):
    trainer, examples = make_trainer(tmp_path)
    trainer.model.train()
    trainer.rollout(examples)
    assert trainer.model.training and all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_catalogue_smaller_than_a_group(tmp_path):
    trainer, examples = make_trainer(tmp_path, generations=50, prompts=2)
    groups = trainer.rollout(examples)
    assert {len(group) for group in groups} == {len(trainer.sid_of_sequence)}
    ours = trainer.compute_loss(trainer.model, examples)
    assert ours.item() == pytest.approx(slow_loss(trainer, examples, groups, 0.5).item(), abs=1e-5)


# ----------------------------------------------------------------------------------------------------------- whole runs
def run(trained, output, **changes):
    paths = trained.paths
    flags = dict(
        model_path=trained.checkpoint,
        **{key: paths[key] for key in ("train_file", "eval_file", "info_file")},
        output_dir=str(output),
        num_generations=4,
        train_batch_size=16,
        max_steps=3,
        learning_rate=1e-3,
        warmup_ratio=0.0,
        test_beam=10,
        eval_batch_size=80,
        test_during_training=False,
    )
    rl(**{**flags, **changes})
    return output


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("beams", [True, False])
@pytest.mark.parametrize("reward", sorted(REWARDS))
def test_a_few_steps_with_every_reward(trained, tmp_path, reward, beams):
    output = run(trained, tmp_path / "rl", reward_type=reward, beam_search=beams, temperature=1.5, add_gt=True)
    final = output / "final_checkpoint"
    assert difference(weights(final), weights(trained.checkpoint)) > 1e-5
    assert load_prompts(final / "prompts.yaml") == load_prompts("compact")
    _, tokenizer = load_model(str(final), "model_path")
    assert tokenizer.get_vocab() == load_model(trained.checkpoint, "model_path")[1].get_vocab()
    assert read_json(output / "rl.stage.json")["results"]["steps"] == 3


def test_a_second_call_does_nothing(trained, tmp_path):
    output = run(trained, tmp_path / "rl")
    written = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    run(trained, output)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == written
    run(trained, output, learning_rate=2e-3)
    assert (output / "rl.stage.json").stat().st_mtime_ns != written[output / "rl.stage.json"]


@pytest.mark.parametrize(
    "course, best",
    [
        ([0.5, 0.1, 0.2, 0.3], 0),
        ([0.5, 0.1, 0.7, 0.6], 2),
        ([0.1, 0.2, 0.3, 0.4], 3),
    ],
)
def test_validation_keeps_the_best_weights_the_start_included(trained, tmp_path, monkeypatch, course, best):
    """HR@10 at the start and after each of three steps is prescribed; the weights kept are those of the best."""
    values, measured = iter(course), []
    rank_sids = ranking.rank_sids

    def noting_the_weights(model, *args, **kwargs):
        measured.append({name: value.clone() for name, value in model.state_dict().items()})
        return rank_sids(model, *args, **kwargs)

    monkeypatch.setattr(ranking, "rank_sids", noting_the_weights)
    monkeypatch.setattr(ranking, "hit_ratio", lambda ranks, k: next(values))
    output = run(trained, tmp_path / "rl", test_during_training=True, eval_step=1, add_gt=True)
    assert len(measured) == 4 and all(difference(first, second) > 0 for first, second in zip(measured, measured[1:]))
    assert difference(weights(output / "final_checkpoint"), measured[best]) == 0
    results = read_json(output / "rl.stage.json")["results"]
    assert results["validation HR@10 at start"] == course[0] and results["validation HR@10 best"] == max(course[1:])


def test_a_run_shorter_than_the_validation_interval(trained, tmp_path):
    output = run(trained, tmp_path / "rl", test_during_training=True, eval_step=1000, max_steps=2)
    assert (output / "final_checkpoint").is_dir()


def test_masked_silent_groups_change_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(REWARDS, "rule", lambda completions, target: [1.0] * len(completions))
    output = run(trained, tmp_path / "rl", reward_type="rule", mask_all_zero=True, beta=0.5)
    assert difference(weights(output / "final_checkpoint"), weights(trained.checkpoint)) == 0


def test_gradient_accumulation_is_one_larger_batch(trained, tmp_path):
    """Four prompts at once or twice two: the same gradient, so the same weights after one step."""
    found = [
        weights(
            run(
                trained,
                tmp_path / str(size),
                train_batch_size=4 * size,
                gradient_accumulation_steps=4 // size,
                max_steps=1,
                max_grad_norm=1e-3,
                learning_rate=1e-4,
                add_gt=True,
            )
            / "final_checkpoint"
        )
        for size in (4, 2)
    ]
    assert difference(found[0], weights(trained.checkpoint)) > 1e-5
    assert difference(found[0], found[1]) < 1e-6


def test_a_killed_run_goes_on(trained, tmp_path, monkeypatch):
    """Without validation, so that the last weights are kept; what the later steps draw comes from a restored state."""
    flags = dict(max_steps=3, eval_step=1, add_gt=True, beam_search=False)
    expected = weights(run(trained, tmp_path / "whole", **flags) / "final_checkpoint")
    assert difference(expected, weights(trained.checkpoint)) > 1e-5
    save = GroupTrainer._save_checkpoint

    def save_and_die(self, *arguments):
        save(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GroupTrainer, "_save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run(trained, tmp_path / "killed", **flags)
    steps, step = [], GroupTrainer.training_step
    counted = lambda self, *args, **kw: steps.append(0) or step(self, *args, **kw)
    monkeypatch.setattr(GroupTrainer, "training_step", counted)
    resumed = run(trained, tmp_path / "killed", **flags)
    assert difference(weights(resumed / "final_checkpoint"), expected) < 1e-6
    assert len(steps) == 2


def test_all_tasks_of_a_worded_model(trained, tmp_path, capsys):
    paths = trained.paths
    sft(
        str(trained.folder / "tiny.json"),
        paths["train_file"],
        paths["eval_file"],
        str(tmp_path / "sft"),
        paths["sid_index_path"],
        paths["item_meta_path"],
        train_from_scratch=True,
        prompts="worded",
        sample=16,
        eval_sample=4,
        batch_size=32,
        num_epochs=1,
    )
    run(trained, tmp_path / "rl", model_path=str(tmp_path / "sft" / "final_checkpoint"), sample_train=8, max_steps=2)
    assert "[rl] 46 prompts" in capsys.readouterr().out  # 8 histories of SIDs, 8 of titles, 30 items by their title
    assert load_prompts(tmp_path / "rl" / "final_checkpoint" / "prompts.yaml") == load_prompts("worded")


# ---------------------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(reward_type="rank"), "--reward_type rank: expected one of rule, ranking, ranking_only"),
        (dict(num_generations=1), "--num_generations 1: a group needs at least 2"),
        (dict(train_batch_size=18), "--train_batch_size 18: must be a multiple of num_generations 4"),
        (dict(train_batch_size=0), "--train_batch_size 0: must be a multiple"),
        (dict(eval_batch_size=9), "--eval_batch_size 9: must hold at least test_beam 10"),
        (dict(temperature=0.0), "--temperature 0.0: must be positive"),
        (dict(tasks=["sid2title"]), "--tasks: unknown task 'sid2title'"),
        (dict(tasks=["title2sid"]), "has no task 'title2sid'"),
        (dict(train_file="nowhere.csv"), "nowhere.csv: no such file"),
    ],
)
def test_wrong_settings(trained, tmp_path, changes, said):
    with pytest.raises(InputError) as error:
        run(trained, tmp_path / "rl", **changes)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["train_file", "eval_file"])
def test_a_target_outside_the_catalogue(trained, tmp_path, flag):
    lines = Path(trained.paths["train_file"]).read_text().splitlines()
    (tmp_path / "first.csv").write_text("\n".join(lines[:2]) + "\n")
    (tmp_path / "both.csv").write_text("\n".join(lines[:3]) + "\n")
    sid = lines[2].rsplit(",", 1)[1]
    info = Path(trained.paths["info_file"]).read_text().splitlines()
    (tmp_path / "info.txt").write_text("\n".join(line for line in info if not line.startswith(f"{sid}\t")))
    files = dict.fromkeys(("train_file", "eval_file"), str(tmp_path / "first.csv")) | {flag: str(tmp_path / "both.csv")}
    with pytest.raises(InputError, match=rf"both.csv, row 2: SID {sid} is not in .*info.txt"):
        run(trained, tmp_path / "rl", info_file=str(tmp_path / "info.txt"), **files)


def test_a_model_without_the_sid_tokens(trained, tmp_path):
    info = tmp_path / "info.txt"
    info.write_text(Path(trained.paths["info_file"]).read_text() + "<e_1><f_2>\tNew\t99\n")
    with pytest.raises(InputError, match="does not know the SID token <e_1>"):
        run(trained, tmp_path / "rl", info_file=str(info))


def test_a_duplicate_sid_in_the_catalogue(trained, tmp_path):
    info = tmp_path / "info.txt"
    text = Path(trained.paths["info_file"]).read_text()
    info.write_text(text + text.splitlines()[0].rsplit("\t", 1)[0] + "\t99\n")
    with pytest.raises(InputError, match=r"info.txt, line 31: SID .* line 1 already"):
        run(trained, tmp_path / "rl", info_file=str(info))
