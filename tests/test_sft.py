"""SFT: how rows fall into steps, gradients against a slow twin, whole runs, resuming, worded prompts, wrong input."""

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import list_plan, make_dataset, random_examples, tiny_model, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import sft as sft_module
from data import EvalSidDataset
from evaluate import evaluate
from minionerec.common.embeddings import save_embeddings
from minionerec.common.files import InputError, read_json
from minionerec.common.records import read_index, read_rows
from minionerec.evaluation.settings import EvaluateFlags
from minionerec.language.models import build_model_from_config, load_model, train_tokenizer
from minionerec.language.prompts import Encoder, load_prompts
from minionerec.language.sid_tokens import (
    add_sid_tokens,
    average_embeddings,
    compute_code_directions,
    compute_tfidf_vectors,
)
from minionerec.training.checkpoints import find_last_checkpoint
from minionerec.training.settings import SFTFlags
from minionerec.training.sft_trainer import TreeBatches, TreeTrainer
from sft import sft


@pytest.mark.parametrize("softmax", ["vocabulary", "legal"])
def test_bf16_on_a_cpu_learns_alike(toy, tmp_path, softmax, capsys):
    """Losses agree within what bfloat16 rounds; weights stay float32."""
    losses = {}
    for bf16 in (False, True):
        settings = dict(bf16=bf16, softmax=softmax, num_epochs=1, best_by="HR@10")
        output = train(toy, tmp_path / str(bf16), **settings)
        # Under autocast too the search for the validation takes the attention that shares prompts.
        assert "[search]" not in capsys.readouterr().out
        state = read_json(Path(find_last_checkpoint(output)) / "trainer_state.json")
        losses[bf16] = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry][-1]
        assert load_model(str(output / "final_checkpoint"), "base_model")[0].dtype == torch.float32
    assert losses[True] != losses[False] and losses[True] == pytest.approx(losses[False], rel=0.02)


def test_token_rows_start_from_a_file_of_embeddings(toy, tmp_path):
    """With a learning rate of almost nothing, codes whose items are alike there have rows that are alike."""
    paths, _ = toy
    index = read_index(paths["sid_index_path"])
    codes = [index[item][0] for item in sorted(index)]
    groups = sorted(set(codes))
    vectors = np.eye(len(groups))[[groups.index(code) // 2 for code in codes]]  # two codes each have the same vector
    save_embeddings(tmp_path / "x-td.npy", vectors, [str(item) for item in sorted(index)], "x", ["title"])
    output = train(
        toy, tmp_path / "sft", sid_init=str(tmp_path / "x-td.npy"), learning_rate=1e-12, num_epochs=1, softmax="legal"
    )
    model, tokenizer = load_model(str(output / "final_checkpoint"), "base_model")
    assert model.config.legal_softmax
    rows = model.get_input_embeddings().weight.detach()[tokenizer.convert_tokens_to_ids(groups)].numpy()
    rows = rows - rows.mean(axis=0)
    cosine = (rows @ rows.T) / np.linalg.norm(rows, axis=1)[:, None] / np.linalg.norm(rows, axis=1)
    alike = np.array([[first // 2 == second // 2 for second in range(len(groups))] for first in range(len(groups))])
    np.fill_diagonal(alike, False)
    assert cosine[alike].min() > 0.7 and cosine[~alike & ~np.eye(len(groups), dtype=bool)].max() < 0.5


# ---------------------------------------------------------------------------------------------------------- the batches
@pytest.mark.parametrize(
    "rows, batch_size, micro_batches",
    [
        (100, 100, 4),
        (100, 32, 2),
        (7, 64, 3),
        (110, 100, 5),
        (149, 100, 1),
        (150, 100, 100),
        (40, 16, 16),
        (1, 1, 1),
        (45, 8, 3),
    ],
)
def test_every_row_stands_in_one_micro_batch_of_even_steps(rows, batch_size, micro_batches):
    examples = random_examples(random.Random(rows), rows, 9)
    batches = TreeBatches([examples[: rows // 3], examples[rows // 3 :]], batch_size, micro_batches, 0, seed=1)
    orders = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        assert len(batches) == batches.steps * micro_batches
        order = [[example.item_id for _, example in part] for part in list_plan(batches)]
        assert sorted(item for part in order for item in part) == list(range(rows))
        assert min(map(len, order)) > 0
        steps = [sum(map(len, order[at : at + micro_batches])) for at in range(0, len(order), micro_batches)]
        assert max(steps) - min(steps) <= 1 and max(steps) < 2 * batch_size
        labels = sum(batches[index]["label_weight"].sum().item() for index in range(len(batches)))
        assert labels == sum(len(example.target_ids) for example in examples)
        orders.append(order)
    assert batches.steps == 1 or orders[0] != orders[1] != orders[2]
    again = TreeBatches([examples[: rows // 3], examples[rows // 3 :]], batch_size, micro_batches, 0, seed=1)
    again.set_epoch(2)
    assert [[example.item_id for _, example in part] for part in list_plan(again)] == orders[2]


def test_rows_of_a_group_share_a_tree_and_evaluation_keeps_one_order():
    examples = random_examples(random.Random(0), 60, 6)
    assert 1 < len(TreeBatches([examples], 60, 1, 0, seed=1, tree_tokens=1)[0]["input_ids"]) <= 6
    assert len(TreeBatches([examples], 60, 1, 0, seed=1, tree_tokens=10_000)[0]["input_ids"]) == 1
    fixed = TreeBatches([examples], 60, 2, 0, seed=None)
    plan = list_plan(fixed)
    fixed.set_epoch(3)
    assert list_plan(fixed) == plan


def test_too_few_rows_for_the_micro_batches():
    with pytest.raises(ValueError, match="3 rows cannot fill 4 micro-batches"):
        TreeBatches([random_examples(random.Random(0), 3, 2)], 4, 4, 0, seed=1)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_one_step_follows_the_mean_over_all_label_tokens(tmp_path, micro_batches):
    """Gradient descent with rate 1 moves the weights by the gradient. The twin runs one ordinary forward per row."""
    examples = random_examples(random.Random(3), 30, 5)
    model = tiny_model("qwen3", 40)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = TreeTrainer(
        model=model,
        train_dataset=TreeBatches([examples], 30, micro_batches, 0, seed=1),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=micro_batches,
            max_steps=1,
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            logging_steps=1,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
    )
    trainer.train()
    total = 0
    for example in examples:
        row = torch.tensor([example.prompt_ids + example.target_ids])
        log_probs = twin(row).logits[0].log_softmax(-1)
        total -= sum(log_probs[len(example.prompt_ids) - 1 + i, token] for i, token in enumerate(example.target_ids))
    loss = total / sum(len(example.target_ids) for example in examples)
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-4)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (ours - (theirs - theirs.grad)).abs().max() < 1e-5, name


# ----------------------------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return make_dataset(folder, items=20, users=10, deep=True), write_config(folder)


def train(toy, output, **changes):
    """A short run; returns its folder."""
    paths, config = toy
    flags = dict(
        **{key: paths[key] for key in ("train_file", "eval_file", "sid_index_path", "item_meta_path")},
        base_model=config,
        output_dir=str(output),
        train_from_scratch=True,
        batch_size=16,
        micro_batch_size=16,
        num_epochs=2,
        learning_rate=1e-2,
    )
    sft(SFTFlags(**{**flags, **changes}))
    return Path(output)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "final_checkpoint", dtype=torch.float32).state_dict()


def difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def mean_loss(model, tokenizer, paths):
    """Validation loss per target token, row by row."""
    examples = EvalSidDataset(read_rows(paths["eval_file"]), Encoder(tokenizer, load_prompts("compact"))).examples
    total = count = 0
    for example in examples:
        with torch.no_grad():
            log_probs = model(torch.tensor([example.prompt_ids + example.target_ids])).logits[0].log_softmax(-1)
        first = len(example.prompt_ids) - 1
        total -= sum(log_probs[first + i, token].item() for i, token in enumerate(example.target_ids))
        count += len(example.target_ids)
    return total / count


def test_from_scratch_end_to_end(toy, tmp_path):
    paths, config = toy
    output = train(toy, tmp_path / "sft")
    final = output / "final_checkpoint"
    model, tokenizer = load_model(str(final), "base_model")
    index = read_index(paths["sid_index_path"])
    tokens = {token for sid in index.values() for token in sid}
    assert {len(sid) for sid in index.values()} == {3, 4}
    ids = [tokenizer("".join(sid), add_special_tokens=False).input_ids for sid in index.values()]
    assert ids == [tokenizer.convert_tokens_to_ids(list(sid)) for sid in index.values()]
    assert tokens <= tokenizer.get_vocab().keys() and model.config.vocab_size == len(tokenizer)
    assert load_prompts(final / "prompts.yaml") == load_prompts("compact")

    items = read_json(paths["item_meta_path"]).values()
    texts = [item[key] for key in ("title", "description") for item in items]
    start, start_tokenizer = build_model_from_config(config, texts, seed=42)
    directions = compute_code_directions(
        [index[item] for item in sorted(index)],
        compute_tfidf_vectors([" ".join(texts[place : place + 2]) for place in range(0, len(texts), 2)], 32, seed=42),
    )
    add_sid_tokens(start, start_tokenizer, tokens, seed=42, spread=1.0, directions=directions)
    assert start_tokenizer.get_vocab() == tokenizer.get_vocab()
    before, after = mean_loss(start.eval(), tokenizer, paths), mean_loss(model.eval(), tokenizer, paths)
    record = read_json(output / "sft.stage.json")
    assert after < before - 0.5 and record["results"]["eval_loss"] == pytest.approx(after, abs=1e-3)

    written = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    train(toy, output)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == written
    train(toy, output, force=True)
    assert (final / "model.safetensors").stat().st_mtime_ns != written[final / "model.safetensors"]


def test_the_micro_batch_size_does_not_change_the_training(toy, tmp_path):
    found = [
        weights(train(toy, tmp_path / str(size), batch_size=32, micro_batch_size=size, learning_rate=1e-4))
        for size in (32, 8, 1)
    ]
    start = weights(train(toy, tmp_path / "start", batch_size=32, micro_batch_size=32, learning_rate=1e-12))
    assert difference(found[0], start) > 1e-4  # it did train
    assert difference(found[0], found[1]) < 1e-5 and difference(found[0], found[2]) < 1e-5


@pytest.mark.parametrize("best", [0, 1, 2])
def test_best_by_hit_ratio_keeps_that_epoch(toy, tmp_path, monkeypatch, best):
    """HR@10 after each epoch is prescribed; the weights kept are those of the best, whatever the loss says."""
    seen = []

    def prescribed(model, catalogue_trie, examples, num_beams, batch_size):
        assert num_beams == 12 and len(examples) == len(read_rows(toy[0]["eval_file"]))
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"HR@10": 0.5 if len(seen) == best + 1 else 0.1, "NDCG@10": 0.0}

    monkeypatch.setattr(sft_module, "measure_validation", prescribed)
    flags = dict(num_epochs=3, best_by="HR@10", eval_beams=12, early_stopping_patience=9)
    output = train(toy, tmp_path / "run", **flags)
    assert len(seen) == 3 and difference(weights(output), seen[best]) == 0
    assert read_json(output / "sft.stage.json")["results"]["eval_HR@10"] == 0.5


def test_validation_hit_ratio_is_that_of_evaluation(toy, tmp_path):
    output = train(toy, tmp_path / "run", num_epochs=1, best_by="HR@10", eval_beams=20)
    paths = toy[0]
    evaluate(
        EvaluateFlags(
            base_model=str(output / "final_checkpoint"),
            train_file=paths["train_file"],
            info_file=paths["info_file"],
            test_data_path=paths["eval_file"],
            result_json_data=str(tmp_path / "valid.json"),
            num_beams=20,
            K=20,
        )
    )
    measured = read_json(tmp_path / "valid.metrics.json")["sid"]["HR@10"]
    assert read_json(output / "sft.stage.json")["results"]["eval_HR@10"] == pytest.approx(measured, abs=1e-4)


@pytest.mark.parametrize(
    "changes", [{"packing": "none"}, {"tree_tokens": 20}, {"packing": "none", "micro_batch_size": 8}]
)
def test_packing_does_not_change_the_training(toy, tmp_path, changes):
    flags = dict(batch_size=32, micro_batch_size=32, learning_rate=1e-4, prompts="worded")
    expected = weights(train(toy, tmp_path / "tree", **flags))
    assert difference(weights(train(toy, tmp_path / "other", **{**flags, **changes})), expected) < 1e-5


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(toy, tmp_path, monkeypatch):
    """Order of the rows, optimizer, schedule and dropout included."""
    flags = dict(num_epochs=3, dropout=0.2, early_stopping_patience=9)
    expected = weights(train(toy, tmp_path / "whole", **flags))
    save, saved = TreeTrainer._save_checkpoint, []

    def save_and_die(self, *arguments):
        save(self, *arguments)
        saved.append(self.state.global_step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TreeTrainer, "_save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(toy, tmp_path / "killed", **flags)
    assert find_last_checkpoint(tmp_path / "killed").endswith(f"checkpoint-{saved[0]}")
    assert not (tmp_path / "killed" / "final_checkpoint").exists()
    steps = []
    step = TreeTrainer.training_step
    with monkeypatch.context() as patch:

        def counted(self, *args, **kw):
            return steps.append(0) or step(self, *args, **kw)

        patch.setattr(TreeTrainer, "training_step", counted)
        output = train(toy, tmp_path / "killed", **flags)
    assert len(steps) == 2 * saved[0]  # two of three epochs
    assert difference(weights(output), expected) < 1e-6


def test_checkpoints_of_other_settings_are_never_resumed(toy, tmp_path, monkeypatch):
    """A new run that dies before its first step and is started again must not go on from the old run's checkpoints."""
    output = train(toy, tmp_path / "sft", num_epochs=1)
    assert find_last_checkpoint(output)
    expected = weights(train(toy, tmp_path / "fresh", num_epochs=1, learning_rate=1e-3))
    with monkeypatch.context() as patch:
        patch.setattr(
            "minionerec.training.sft_setup.build_model_from_config",
            lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            train(toy, output, num_epochs=1, learning_rate=1e-3)
    train(toy, output, num_epochs=1, learning_rate=1e-3)
    assert difference(weights(output), expected) == 0


# ----------------------------------------------------------------------------------------------------- pretrained bases
def pretrained(folder, kind, paths):
    """A folder as a hub model has it: random weights and a tokenizer of words, without any SID token."""
    texts = [item["title"] for item in read_json(paths["item_meta_path"]).values()] * 3
    tokenizer = train_tokenizer(texts, 400)
    tiny_model(kind, len(tokenizer), initializer_range=0.05, max_position_embeddings=1024).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_worded_prompts_and_alignment_on_a_pretrained_base(toy, tmp_path, kind, capsys):
    paths, _ = toy
    base = pretrained(tmp_path / "base", kind, paths)
    output = train(
        toy,
        tmp_path / "sft",
        base_model=base,
        train_from_scratch=False,
        sample=24,
        eval_sample=8,
        num_epochs=1,
        learning_rate=1e-3,
    )
    # next_sid and title_history2sid on 24 rows each, title2sid and sid2title on 20 items each
    assert "88 training rows" in capsys.readouterr().out
    final = output / "final_checkpoint"
    assert load_prompts(final / "prompts.yaml") == load_prompts("worded")
    model, tokenizer = load_model(str(final), "base_model")
    assert type(model) is type(AutoModelForCausalLM.from_pretrained(base))
    words = "### Item:\nItem number 3"
    assert tokenizer(words).input_ids == AutoTokenizer.from_pretrained(base)(words).input_ids
    assert len(tokenizer("<a_1><b_2><c_0>", add_special_tokens=False).input_ids) == 3


def test_new_rows_of_a_pretrained_base_start_where_they_are_told(toy, tmp_path):
    """With a learning rate of almost nothing, the rows written are those it started from."""
    paths, _ = toy
    base = pretrained(tmp_path / "base", "llama", paths)
    flags = {"base_model": base, "train_from_scratch": False, "sample": 24, "eval_sample": 8, "num_epochs": 1}
    rows = {}
    for sid_init in (None, "noise", "text"):
        output = train(toy, tmp_path / str(sid_init), sid_init=sid_init, learning_rate=1e-12, **flags)
        model, tokenizer = load_model(str(output / "final_checkpoint"), "base_model")
        ids = tokenizer.convert_tokens_to_ids([f"<a_{code}>" for code in range(5)])
        rows[sid_init] = model.get_input_embeddings().weight.detach()[ids]
    index, items = read_index(paths["sid_index_path"]), read_json(paths["item_meta_path"])
    texts = [f"{items[str(item)]['title']} {items[str(item)]['description']}" for item in sorted(index)]
    start, start_tokenizer = load_model(base, "base_model")
    directions = compute_code_directions(
        [index[item] for item in sorted(index)], average_embeddings(texts, start, start_tokenizer)
    )
    old = start.get_input_embeddings().weight.detach()
    assert torch.equal(rows[None], rows["noise"])
    for code in range(5):
        off = {how: ((rows[how][code] - old.mean(dim=0)) / old.std(dim=0)).numpy() for how in ("noise", "text")}
        agree = {how: np.corrcoef(vector, directions[f"<a_{code}>"])[0, 1] for how, vector in off.items()}
        assert agree["text"] > 0.7 > 0.6 > abs(agree["noise"])  # a part of each row stays noise


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padded", [0, 64])
def test_only_the_rows_of_new_tokens_change(tied, padded):
    tokenizer = train_tokenizer(["some words"], 300)
    known = len(tokenizer)
    model = tiny_model("llama", known + padded, tie_word_embeddings=tied)
    before = copy.deepcopy(model.state_dict())
    tokens = ["<a_2>", "<a_10>", "<a_1>", "<b_0>", "<a_1>"]
    assert add_sid_tokens(model, tokenizer, tokens, seed=0) == 4
    assert tokenizer.convert_tokens_to_ids(["<a_1>", "<a_2>", "<a_10>", "<b_0>"]) == list(range(known, known + 4))
    assert len(model.get_input_embeddings().weight) == max(known + padded, known + 4)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    for name, after in model.state_dict().items():
        if "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(after[:known], before[name][:known])
            assert torch.equal(after[known + 4 :], before[name][known + 4 :])
            new, old = after[known : known + 4], before[name][:known]
            assert len(new.unique(dim=0)) == 4
            # Near the mean of the old rows, with a tenth of their spread.
            assert ((new - old.mean(dim=0)) / old.std(dim=0)).abs().max() < 0.5
        else:
            assert torch.equal(after, before[name])
    state = copy.deepcopy(model.state_dict())
    assert add_sid_tokens(model, tokenizer, tokens, seed=1) == 0
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(batch_size=20), "--batch_size 20: must be a multiple of micro_batch_size 16"),
        (dict(batch_size=8), "--batch_size 8: must be a multiple"),
        (dict(train_from_scratch=False), "a config file has no weights; add --train_from_scratch True"),
        (dict(tasks=["next_sid", "next_item"]), "--tasks next_item: expected one of next_sid"),
        (dict(tasks=["title2sid"]), "has no task 'title2sid'"),
        (dict(prompts="nowhere.yaml"), "--prompts: nowhere.yaml: no such file"),
        (dict(train_file="nowhere.csv"), "nowhere.csv: no such file"),
        (dict(base_model="nowhere.json"), "--base_model nowhere.json"),
        (dict(batch_size=2**20, micro_batch_size=1), "--batch_size 1048576: "),
        (dict(cutoff_len=6), "--cutoff_len 6: row"),
        (dict(best_by="accuracy"), "--best_by accuracy: expected one of loss, HR@10"),
        (dict(eval_beams=5), "--eval_beams 5: HR@10 needs 10 beams"),
        (dict(sid_init="luck"), "--sid_init: luck: no such file"),
        (dict(packing="forest"), "--packing forest: expected one of tree, none"),
        (dict(tree_tokens=0), "--tree_tokens 0: must be at least 1"),
    ],
)
def test_wrong_settings(toy, tmp_path, changes, said, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no search for nowhere.json on the hub
    with pytest.raises(InputError) as error:
        train(toy, tmp_path / "sft", **changes)
    assert said in str(error.value) and not (tmp_path / "sft" / "final_checkpoint").exists()


@pytest.fixture
def no_training(monkeypatch):
    """Wrong input must be found before a model is even made."""
    monkeypatch.setattr(
        "minionerec.training.sft_setup.build_model_from_config", lambda *_, **__: pytest.fail("a model was made")
    )


def test_an_index_that_lacks_an_item(toy, tmp_path, no_training):
    paths, _ = toy
    index = read_json(paths["sid_index_path"])
    target = read_rows(paths["train_file"])[0].item_id
    del index[str(target)]
    (tmp_path / "less.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"train.csv, row 1: item {target} is not in .*less.index.json"):
        train(toy, tmp_path / "sft", sid_index_path=str(tmp_path / "less.index.json"))


def test_item_texts_that_lack_an_item(toy, tmp_path, no_training):
    paths, _ = toy
    items = read_json(paths["item_meta_path"])
    del items["7"]
    (tmp_path / "less.item.json").write_text(json.dumps(items))
    with pytest.raises(InputError, match="less.item.json: item 7 of .*toy.index.json is missing"):
        train(toy, tmp_path / "sft", item_meta_path=str(tmp_path / "less.item.json"))


def test_an_empty_validation_split(toy, tmp_path, no_training):
    paths, _ = toy
    (tmp_path / "empty.csv").write_text(Path(paths["eval_file"]).read_text().splitlines()[0] + "\n")
    with pytest.raises(InputError, match="empty.csv: no rows"):
        train(toy, tmp_path / "sft", eval_file=str(tmp_path / "empty.csv"))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda config: config.pop("model_type"), "lacks 'model_type'"),
        (lambda config: config.pop("tokenizer_vocab_size"), "lacks 'tokenizer_vocab_size'"),
        (lambda config: config.update(model_type="no such model"), "no such model"),
        (
            lambda config: config.update(
                layer_types=["sliding_attention"] * 2, sliding_window=4, use_sliding_window=True
            ),
            "full attention",
        ),
    ],
)
def test_wrong_model_configs(toy, tmp_path, change, said):
    config = read_json(toy[1])
    change(config)
    (tmp_path / "wrong.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        train(toy, tmp_path / "sft", base_model=str(tmp_path / "wrong.json"))
    assert "wrong.json" in str(error.value) and said in str(error.value) and "\n" not in str(error.value)
