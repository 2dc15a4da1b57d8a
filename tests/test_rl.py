"""rl.py from the command's side: whole runs for every reward, loss and option, resuming, what is kept, wrong input."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from minionerec.common.embeddings import save_embeddings
from minionerec.common.files import InputError, read_json
from minionerec.common.records import read_rows
from minionerec.evaluation import ranking
from minionerec.language.models import load_model
from minionerec.language.prompts import load_prompts
from minionerec.training.rewards import PLAIN_REWARDS, REWARDS, Reward
from minionerec.training.settings import RLFlags, SFTFlags
from minionerec_trainer import GroupTrainer
from rl import rl
from sft import sft


# ----------------------------------------------------------------------------------------------------------- whole runs
def run(trained, output, **changes):
    paths = trained.paths
    flags = dict(
        model_path=trained.checkpoint,
        **{key: paths[key] for key in ("train_file", "eval_file", "info_file")},
        output_dir=str(output),
        num_generations=4,
        train_batch_size=16,
        gradient_accumulation_steps=1,
        reward_type=["ranking"],
        beta=1e-3,
        dr_grpo=False,
        max_steps=3,
        learning_rate=1e-3,
        warmup_ratio=0.0,
        test_beam=10,
        eval_batch_size=80,
        test_during_training=False,
    )
    rl(RLFlags(**{**flags, **changes}))
    return output


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("beams", [True, False])
@pytest.mark.parametrize("reward", sorted(PLAIN_REWARDS))
def test_a_few_steps_with_every_reward(trained, tmp_path, reward, beams):
    output = run(trained, tmp_path / "rl", reward_type=[reward], beam_search=beams, temperature=1.5, add_gt=True)
    final = output / "final_checkpoint"
    assert difference(weights(final), weights(trained.checkpoint)) > 1e-5
    assert load_prompts(final / "prompts.yaml") == load_prompts("compact")
    _, tokenizer = load_model(str(final), "model_path")
    assert tokenizer.get_vocab() == load_model(trained.checkpoint, "model_path")[1].get_vocab()
    assert read_json(output / "rl.stage.json")["results"]["steps"] == 3


@pytest.mark.parametrize("validating", [False, True])
def test_a_policy_that_diverges_stops_the_run_and_nothing_is_exported(trained, tmp_path, validating):
    changes = {"learning_rate": 1e38, "warmup_ratio": 0.0, "test_during_training": validating, "eval_step": 1}
    with pytest.raises(InputError, match=r"diverged at step \d: .* try a tenth of it.*nothing is exported") as error:
        run(trained, tmp_path / "rl", **changes)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "rl" / "final_checkpoint").exists() and not list((tmp_path / "rl").glob("checkpoint-*"))


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
@pytest.mark.parametrize("best_by", ["HR@10", "NDCG@10", "sum"])
def test_validation_keeps_the_best_weights_the_start_included(trained, tmp_path, monkeypatch, course, best, best_by):
    """A figure at the start and after each of three steps is prescribed; the weights kept are those of the best."""
    values, measured = iter(course), []
    rank_sids = ranking.rank_sids

    def noting_the_weights(model, *args, **kwargs):
        measured.append({name: value.clone() for name, value in model.state_dict().items()})
        return rank_sids(model, *args, **kwargs)

    monkeypatch.setattr(ranking, "rank_sids", noting_the_weights)
    monkeypatch.setattr(ranking, "hit_ratio", lambda ranks, k: 0.0 if best_by == "NDCG@10" else next(values))
    monkeypatch.setattr(ranking, "ndcg", lambda ranks, k: next(values) if best_by == "NDCG@10" else 0.0)
    output = run(trained, tmp_path / "rl", test_during_training=True, eval_step=1, add_gt=True, best_by=best_by)
    assert len(measured) == 4 and all(difference(first, second) > 0 for first, second in pairwise(measured))
    assert difference(weights(output / "final_checkpoint"), measured[best]) == 0
    results = read_json(output / "rl.stage.json")["results"]
    assert results[f"validation {best_by} at start"] == pytest.approx(course[0], abs=1e-4)
    assert results[f"validation {best_by} best"] == pytest.approx(max(course[1:]), abs=1e-4)


def test_a_run_shorter_than_the_validation_interval(trained, tmp_path):
    output = run(trained, tmp_path / "rl", test_during_training=True, eval_step=1000, max_steps=2)
    assert (output / "final_checkpoint").is_dir()


def test_masked_silent_groups_change_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(REWARDS, "rule", Reward(lambda inputs: lambda completions, example: [1.0] * len(completions)))
    output = run(trained, tmp_path / "rl", reward_type=["rule"], mask_all_zero=True, beta=0.5)
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


@pytest.mark.parametrize(
    "options",
    [
        dict(dapo=True),
        dict(gspo=True, num_iterations=2, max_steps=4),
        dict(dr_grpo=True, num_iterations=3),
        dict(reward_type=None, dr_grpo=None, beta=1.0, gradient_accumulation_steps=None),  # the defaults
        dict(renormalize=True, dynamic_sampling=True),
        dict(beam_search=False, temperature=1.5, dynamic_sampling=True),
        dict(sync_ref_model=True, ref_model_sync_steps=1, beta=0.1),
        dict(beta=0.0, dropout=0.2, weight_decay=0.1),
        dict(gradient_checkpointing=True),
    ],
    ids=lambda options: "-".join(options),
)
def test_a_few_steps_with_every_option(trained, tmp_path, options):
    output = run(trained, tmp_path / "rl", add_gt=True, **options)
    assert difference(weights(output / "final_checkpoint"), weights(trained.checkpoint)) > 1e-5
    assert read_json(output / "rl.stage.json")["results"]["steps"] == options.get("max_steps", 3)


def test_lora_leaves_the_base_alone_and_is_written_as_a_plain_model(trained, tmp_path):
    output = run(trained, tmp_path / "rl", add_gt=True, lora=True, lora_rank=2, lora_targets=["q_proj"])
    before, after = weights(trained.checkpoint), weights(output / "final_checkpoint")
    assert before.keys() == after.keys()
    changed = {name for name in before if (before[name] - after[name]).abs().max() > 1e-6}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "embed_tokens", "lm_head"} & {
        name.split(".")[-2] for name in before
    }
    load_model(str(output / "final_checkpoint"), "model_path")


def test_several_updates_use_one_rollout(trained, tmp_path, monkeypatch):
    made, make_step = [], GroupTrainer._make_step
    monkeypatch.setattr(
        GroupTrainer, "_make_step", lambda self, *a: made.append(self.state.global_step) or make_step(self, *a)
    )
    run(trained, tmp_path / "rl", add_gt=True, num_iterations=2, max_steps=6)
    assert made == [0, 2, 4]


def test_rewards_from_files(trained, tmp_path):
    """Two embeddings that say the opposite of each other pull the policy apart."""
    found = []
    array = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    save_embeddings(tmp_path / "x.npy", array, [str(item) for item in range(30)], "made", ["title"])
    (tmp_path / "own.py").write_text(
        "def first(completions, example):\n    return [float(c.startswith('<a_1>')) for c in completions]\n"
    )
    for name, terms in (("a", ["semantic", "module"]), ("b", ["semantic:-1", "module"])):
        flags = dict(ada_path=str(tmp_path / "x.npy"), reward_module=f"{tmp_path / 'own.py'}:first")
        found.append(weights(run(trained, tmp_path / name, reward_type=terms, **flags) / "final_checkpoint"))
    assert difference(*found) > 1e-4


def test_what_is_logged(trained, tmp_path, capsys):
    output = run(
        trained,
        tmp_path / "rl",
        reward_type=["rule", "prefix:0.5"],
        add_gt=True,
        test_during_training=True,
        eval_step=3,
        tensorboard=True,
    )
    state = read_json(next(output.glob("checkpoint-*")) / "trainer_state.json")
    logged = state["log_history"][0]
    names = {
        "reward",
        "reward_rule",
        "reward_prefix",
        "reward_std",
        "zero_advantage_share",
        "kl",
        "entropy",
        "diversity",
    }
    names |= {"rollout_hit_rate", "completion_length", "clip_share", "grad_norm"}
    names |= {"seconds_rollout", "seconds_reference", "seconds_train"}
    assert names <= logged.keys() and all(map(np.isfinite, (logged[name] for name in names)))
    assert logged["reward"] == pytest.approx(logged["reward_rule"] + 0.5 * logged["reward_prefix"], abs=1e-5)
    assert logged["reward_rule"] == 0.25 and logged["rollout_hit_rate"] == 1 and logged["diversity"] == 1
    assert 4 <= logged["completion_length"] <= 5 and logged["seconds_train"] > 0
    printed = capsys.readouterr()
    assert "zero" in printed.err + printed.out and "validation: HR@10" in printed.err + printed.out
    assert list((output / "runs").rglob("events.out.tfevents*"))


def killed_and_resumed(trained, tmp_path, monkeypatch, **flags):
    """(weights of a whole run, weights of one that was killed at its first checkpoint and run again, steps of the
    latter).
    """
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

    def counted(self, *args, **kw):
        return steps.append(0) or step(self, *args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(GroupTrainer, "training_step", counted)
        resumed = run(trained, tmp_path / "killed", **flags)
    return expected, weights(resumed / "final_checkpoint"), len(steps)


@pytest.mark.parametrize(
    "options",
    [
        dict(beam_search=False),
        dict(sync_ref_model=True, ref_model_sync_steps=1, beta=1.0),
        dict(lora=True, lora_rank=2),
        dict(sample_train=8, beam_search=False),  # the checkpoint stands in the second epoch
    ],
    ids=lambda options: "-".join(options),
)
def test_a_killed_run_goes_on(trained, tmp_path, monkeypatch, options):
    """Without validation, so that the last weights are kept; draws are a function of the step."""
    flags = dict(max_steps=5, eval_step=3, add_gt=True) | options
    expected, found, steps = killed_and_resumed(trained, tmp_path, monkeypatch, **flags)
    assert difference(found, expected) < 1e-6 and steps == 2


def test_a_killed_run_with_several_updates_a_rollout_goes_on(trained, tmp_path, monkeypatch):
    """Its checkpoints stand between rollouts: step 3 is put off to 4."""
    flags = dict(max_steps=6, eval_step=3, add_gt=True, num_iterations=2, beam_search=False)
    expected, found, steps = killed_and_resumed(trained, tmp_path, monkeypatch, **flags)
    assert difference(found, expected) < 1e-6 and steps == 2


def test_all_tasks_of_a_worded_model(trained, tmp_path, capsys):
    paths = trained.paths
    sft(
        SFTFlags(
            base_model=str(trained.folder / "tiny.json"),
            **{name: paths[name] for name in ("train_file", "eval_file", "sid_index_path", "item_meta_path")},
            output_dir=str(tmp_path / "sft"),
            train_from_scratch=True,
            prompts="worded",
            sample=16,
            eval_sample=4,
            batch_size=32,
            num_epochs=1,
        )
    )
    run(trained, tmp_path / "rl", model_path=str(tmp_path / "sft" / "final_checkpoint"), sample_train=8, max_steps=2)
    assert " 46 prompts, " in capsys.readouterr().out  # 8 histories of SIDs, 8 of titles, 30 items by their title
    assert load_prompts(tmp_path / "rl" / "final_checkpoint" / "prompts.yaml") == load_prompts("worded")


# ---------------------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(reward_type=["rank"]), "--reward_type rank: expected one of rule, ranking, ranking_only"),
        (dict(reward_type=["sasrec"]), "--reward_type sasrec: needs --cf_path"),
        (dict(dapo=True, gspo=True), "--dapo and --gspo: choose one"),
        (dict(num_iterations=0), "--num_iterations, --gradient_accumulation_steps: must be at least 1"),
        (dict(sync_ref_model=True, beta=0.0), "--sync_ref_model True: needs a reference of its own"),
        (dict(sync_ref_model=True, lora=True), "--sync_ref_model True: needs a reference of its own"),
        (dict(ref_model_path="x", beta=0.0), "--ref_model_path: has no effect with --beta 0"),
        (dict(lora_rank=3), "--lora_rank: has an effect with --lora True only"),
        (dict(early_stopping_patience=2), "--early_stopping_patience: needs --test_during_training True"),
        (dict(num_generations=1), "--num_generations 1: a group needs at least 2"),
        (dict(train_batch_size=18), "--train_batch_size 18: must be a multiple of num_generations 4"),
        (dict(train_batch_size=0), "--train_batch_size 0: must be a multiple"),
        (dict(eval_batch_size=9), "--eval_batch_size 9: must hold at least test_beam 10"),
        (dict(temperature=0.0), "--temperature 0.0: must be positive"),
        (dict(tasks=["sid2title"]), "--tasks sid2title: expected one of next_sid"),
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
    item = read_rows(tmp_path / "both.csv")[1].item_id
    info = Path(trained.paths["info_file"]).read_text().splitlines()
    (tmp_path / "info.txt").write_text("\n".join(line for line in info if not line.startswith(f"{sid}\t")))
    files = dict.fromkeys(("train_file", "eval_file"), str(tmp_path / "first.csv")) | {flag: str(tmp_path / "both.csv")}
    with pytest.raises(InputError, match=rf"both.csv, row 2: item {item} is not in .*info.txt"):
        run(trained, tmp_path / "rl", info_file=str(tmp_path / "info.txt"), **files)


def test_a_reference_of_another_vocabulary(trained, tmp_path):
    other = tmp_path / "other"
    model, tokenizer = load_model(trained.checkpoint, "model_path")
    model.save_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(InputError, match="--ref_model_path .*other: its vocabulary is not that of"):
        run(trained, tmp_path / "rl", ref_model_path=str(other))
    model, tokenizer = load_model(trained.checkpoint, "model_path")
    tokenizer.save_pretrained(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(other)
    flags = dict(beta=0.5, add_gt=True)
    found = [
        run(trained, tmp_path / name, **flags, **more)
        for name, more in (("own", {}), ("given", {"ref_model_path": str(other)}))
    ]
    assert difference(*(weights(output / "final_checkpoint") for output in found)) > 1e-5


@pytest.mark.parametrize(
    "body, said",
    [
        ("[float('nan')] * len(completions)", "reward module: nan for"),
        ("[1.0]", "reward module: 1 numbers for 4 completions"),
    ],
)
def test_a_broken_reward_stops_before_the_first_step(trained, tmp_path, monkeypatch, body, said):
    (tmp_path / "own.py").write_text(f"def own(completions, example):\n    return {body}\n")
    monkeypatch.setattr(GroupTrainer, "__init__", lambda *a, **k: pytest.fail("too late"))
    with pytest.raises(InputError, match=said):
        run(trained, tmp_path / "rl", reward_type=["module"], reward_module=f"{tmp_path / 'own.py'}:own")


def test_a_history_item_outside_the_catalogue(trained, tmp_path):
    """Rewards that look at items need to know them all; the default ones do."""
    rows = read_rows(trained.paths["train_file"])
    old = rows[0].history_ids[0]
    text = Path(trained.paths["train_file"]).read_text().replace(f"[{old}]", "[99]", 1)
    (tmp_path / "train.csv").write_text(text)
    flags = dict(train_file=str(tmp_path / "train.csv"))
    run(trained, tmp_path / "plain", **flags)
    with pytest.raises(InputError, match=r"train.csv, row 1: item 99 is not in .*info.txt"):
        run(trained, tmp_path / "rl", reward_type=None, **flags)


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


def test_a_broken_preference_file_stops_before_a_model_is_loaded(trained, tmp_path, monkeypatch):
    (tmp_path / "p.json").write_text("3")
    prompts = tmp_path / "mine.yaml"
    prompts.write_text("mine:\n  preference2sid:\n    prompt: '{preference}: '\n    target: '{sid}'\n")
    monkeypatch.setattr("minionerec.training.rl_setup.load_model", lambda *_: pytest.fail("a model was loaded"))
    flags = dict(tasks=["preference2sid"], prompts=str(prompts), preference_file=str(tmp_path / "p.json"))
    with pytest.raises(InputError, match="p.json: expected one object"):
        run(trained, tmp_path / "rl", **flags)
