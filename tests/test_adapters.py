"""Training SID rows only, or with LoRA: gradients against full models, memory, resuming, and plain folders at the
end.
"""

import copy
import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_dataset, random_prompts, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from evaluate import evaluate
from minionerec.common.files import InputError, read_json
from minionerec.common.records import read_index
from minionerec.common.settings import AdapterFlags
from minionerec.evaluation.settings import EvaluateFlags
from minionerec.language.adapters import (
    add_lora,
    check_adapter_checkpoint,
    count_trainable_parameters,
    merge_adapters,
    train_token_rows,
)
from minionerec.language.models import add_dropout, load_model, train_tokenizer
from minionerec.language.sid_tokens import add_sid_tokens
from minionerec.search.attention_check import check_tree_attention
from minionerec.search.prefix_tree import batch_trees, compute_tree_log_probs
from minionerec.training.checkpoints import find_last_checkpoint
from minionerec.training.settings import SFTFlags
from minionerec.training.sft_trainer import TreeTrainer
from sft import sft

ROWS = [30, 31, 33, 34, 39]
MODELS = [("llama", False), ("qwen2", True), ("qwen3", True), ("qwen3", False)]


def lora_flags(**flags):
    return AdapterFlags(lora=True, **{f"lora_{name}": value for name, value in flags.items()})


WRAPPERS = {"rows": train_token_rows, "lora": lambda model, rows, **flags: add_lora(model, rows, lora_flags(**flags))}


def shaken(model, seed=0):
    """`model` with its trainable weights moved a little, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def by_name(wrapped):
    """Trainable parameters by (name of the layer in the plain model, "rows", "A" or "B")."""
    found = {}
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.")
            for mark, kind in (("trainable_tokens_delta", "rows"), ("lora_A", "A"), ("lora_B", "B")):
                if f".{mark}." in name:
                    found[name.split(f".{mark}")[0].removesuffix(".token_adapter"), kind] = parameter
    assert len(found) == sum(parameter.requires_grad for parameter in wrapped.parameters())
    return found


# ---------------------------------------------------------------------------------------------- loss, gradients, export
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind, tied", MODELS)
@pytest.mark.parametrize("method", WRAPPERS)
def test_tree_loss_and_gradients_are_those_of_a_full_model(method, kind, tied, checkpointing):
    """The twin is an ordinary model with the same weights, all of which have gradients, and sees one row at a time."""
    rng = random.Random(5)
    base = tiny_model(kind, 40, tie_word_embeddings=tied, initializer_range=0.1)
    wrapped = shaken(WRAPPERS[method](copy.deepcopy(base), ROWS))
    twin = merge_adapters(copy.deepcopy(wrapped)).requires_grad_(True)
    check_tree_attention(wrapped)
    if checkpointing:
        wrapped.gradient_checkpointing_enable()
    wrapped.train()
    groups = [
        [(prompt[: rng.randint(1, len(prompt))], random_prompts(rng, 1, 40, 3)[0]) for _ in range(5)]
        for prompt in random_prompts(rng, 3, 40)
    ]
    total = -compute_tree_log_probs(wrapped, batch_trees(groups, 0)).sum()
    total.backward()

    expected = 0
    for prompt, target in (row for group in groups for row in group):
        log_probs = twin(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        expected -= sum(log_probs[len(prompt) - 1 + place, token] for place, token in enumerate(target))
    expected.backward()
    # Sums over 15 rows: relative to the largest number of their kind.
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    full = {name: module.weight.grad for name, module in twin.named_modules() if hasattr(module, "weight")}
    parameters = by_name(wrapped)
    layers = {"model.embed_tokens"} if tied else {"model.embed_tokens", "lm_head"}
    assert {name for name, part in parameters if part == "rows"} == layers
    for (name, part), parameter in parameters.items():
        if part == "rows":
            gradient = full[name][ROWS]
        else:  # dW = dL/dW, W = W0 + s B A: dA = s B' dW, dB = s dW A'
            gradient = 2 * (
                parameters[name, "B"].T @ full[name] if part == "A" else full[name] @ parameters[name, "A"].T
            )
        assert gradient.abs().max() > 1e-3
        assert (parameter.grad - gradient).abs().max() < 1e-5 * max(1, gradient.abs().max()), (name, part)
    assert all(parameter.grad is None for parameter in wrapped.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize("kind, tied", MODELS)
@pytest.mark.parametrize("method", WRAPPERS)
def test_the_plain_model_is_the_wrapped_one(method, kind, tied, tmp_path):
    base = tiny_model(kind, 40, tie_word_embeddings=tied, initializer_range=0.1)
    before = copy.deepcopy(base.state_dict())
    wrapped = shaken(WRAPPERS[method](base, ROWS)).eval()
    ids = torch.tensor([[3, *ROWS, 7, 39, 2]])
    logits = wrapped(ids).logits.detach()
    plain = merge_adapters(wrapped)
    assert type(plain).__name__.startswith(kind.capitalize()) and merge_adapters(plain) is plain
    plain.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*adapter*"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (loaded(ids).logits - logits).abs().max() < 1e-5
    others = [row for row in range(40) if row not in ROWS]
    for name, after in loaded.state_dict().items():
        if "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(after[others], before[name][others])
            assert ((after[ROWS] - before[name][ROWS]).abs().amax(dim=1) > 1e-3).all()
        else:
            learns = method == "lora" and "_proj.weight" in name
            assert torch.equal(after, before[name]) != learns, name


def test_lora_targets_and_sizes():
    model = tiny_model("llama", 40)
    wrapped = add_lora(
        copy.deepcopy(model), ROWS, lora_flags(rank=3, alpha=6, targets=["q_proj", "mlp.down_proj"], dropout=0.5)
    )
    shapes = {key: tuple(parameter.shape) for key, parameter in by_name(wrapped).items()}
    assert shapes == {("model.embed_tokens", "rows"): (5, 32), ("lm_head", "rows"): (5, 32)} | {
        (f"model.layers.{layer}.{name}", part): shape
        for layer in (0, 1)
        for name, part, shape in (
            ("self_attn.q_proj", "A", (3, 32)),
            ("self_attn.q_proj", "B", (32, 3)),
            ("mlp.down_proj", "A", (3, 64)),
            ("mlp.down_proj", "B", (32, 3)),
        )
    }
    everywhere = {name for name, part in by_name(add_lora(copy.deepcopy(model), ROWS, lora_flags())) if part == "A"}
    assert everywhere == {name for name, part in model.named_modules() if name.endswith("_proj")}
    ids = torch.tensor([[3, 31, 7]])
    shaken(wrapped).train()
    assert not torch.equal(wrapped(ids).logits, wrapped(ids).logits)  # dropout
    with pytest.raises(InputError, match="no linear layer 'lm_head'; it has down_proj, gate_proj, k_proj"):
        add_lora(model, ROWS, lora_flags(targets=["q_proj", "lm_head"]))


def test_an_output_layer_with_a_bias_is_refused():
    """The library's layer for token rows leaves the bias out."""
    model = tiny_model("llama", 40)
    model.lm_head = torch.nn.Linear(32, 40, bias=True)
    for wrap in WRAPPERS.values():
        with pytest.raises(InputError, match="output layer of llama has a bias"):
            wrap(model, ROWS)


@pytest.mark.parametrize("method", WRAPPERS)
def test_dropout_reaches_every_place_of_a_wrapped_model(method):
    outputs = {}
    wrapped = WRAPPERS[method](tiny_model("llama", 40), ROWS)
    add_dropout(wrapped, 0.5)
    ids = torch.tensor([[3, *ROWS, 7, 8]])
    layers = wrapped.get_decoder().layers
    watched = [wrapped.get_input_embeddings(), layers[1].self_attn.o_proj, layers[0].mlp]
    for place, module in enumerate(watched):
        module.register_forward_hook(lambda module, _, output, place=place: outputs.update({place: output}))
    wrapped.train()(ids)
    assert [0.3 < (outputs[place] == 0).float().mean() < 0.7 for place in range(3)] == [True] * 3
    wrapped.eval()(ids)
    assert all((outputs[place] != 0).all() for place in range(3))


# ----------------------------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("toy"), items=20, users=10, deep=True)


@pytest.fixture(scope="module")
def bases(toy, tmp_path_factory):
    """Folders as hub models have them: weights and a tokenizer of words, without any SID token."""
    folders = {}
    for kind, tied in (("llama", False), ("qwen2", True)):
        folders[kind] = str(tmp_path_factory.mktemp(kind))
        tokenizer = train_tokenizer([item["title"] for item in read_json(toy["item_meta_path"]).values()] * 3, 400)
        tiny_model(kind, len(tokenizer), initializer_range=0.1, tie_word_embeddings=tied).save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders


METHODS = {"rows": {"freeze_LLM": True}, "lora": {"lora": True, "lora_rank": 4}}
RUNS = pytest.mark.parametrize("kind, method", [(kind, method) for kind in ("llama", "qwen2") for method in METHODS])


def train(paths, base, output, **changes):
    flags = {key: paths[key] for key in ("train_file", "eval_file", "sid_index_path", "item_meta_path")} | {
        "base_model": base,
        "output_dir": str(output),
        "prompts": "compact",
        "batch_size": 16,
        "micro_batch_size": 16,
        "num_epochs": 2,
        "learning_rate": 1e-2,
    }
    sft(SFTFlags(**{**flags, **changes}))
    return Path(output)


def illegal(checkpoint, paths, folder, **changes):
    """How many of the SIDs that evaluation lists are none of the catalogue's."""
    files = {key: paths[key] for key in ("train_file", "info_file", "test_data_path")}
    result = str(folder / "test.json")
    evaluate(EvaluateFlags(base_model=str(checkpoint), **files, result_json_data=result, num_beams=10, K=10, **changes))
    return read_json(folder / "test.metrics.json")["illegal"]


def start_model(base, paths):
    """(the model a run starts from, rows of its SID tokens)."""
    set_seed(42)  # some tokenizers bring a token of their own that a tiny base has no row for
    model, tokenizer = load_model(base, "base_model")
    tokens = sorted({token for sid in read_index(paths["sid_index_path"]).values() for token in sid})
    add_sid_tokens(model, tokenizer, tokens, seed=42)
    return model, sorted(tokenizer.convert_tokens_to_ids(tokens))


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "final_checkpoint", dtype=torch.float32).state_dict()


def difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@RUNS
def test_from_a_base_to_a_folder_that_evaluation_reads(toy, bases, tmp_path, kind, method):
    output = train(toy, bases[kind], tmp_path / "sft", **METHODS[method])
    final = output / "final_checkpoint"
    assert not list(final.glob("*adapter*"))
    start, rows = start_model(bases[kind], toy)
    before, after = start.state_dict(), weights(output)
    others = [row for row in range(len(start.get_input_embeddings().weight)) if row not in rows]
    assert len(rows) + len(others) == len(after["model.embed_tokens.weight"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][others], before[name][others])
        assert (after[name][rows] != before[name][rows]).any(dim=1).sum() > 10
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    linear = {name for name in after if name.endswith("_proj.weight")} if method == "lora" else set()
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"} | linear
    assert torch.equal(after["model.embed_tokens.weight"], after["lm_head.weight"]) == (kind == "qwen2")

    # What a checkpoint and the optimizer hold is the trained part and nothing else.
    wrapped = WRAPPERS[method](start, rows, **({"rank": 4} if method == "lora" else {}))
    trainable = count_trainable_parameters(wrapped)
    assert read_json(output / "sft.stage.json")["results"]["trainable"] == trainable
    if method == "rows":
        assert trainable == len(rows) * 32 * (2 if kind == "llama" else 1)
    checkpoint = Path(find_last_checkpoint(output))
    saved = load_file(checkpoint / "adapter_model.safetensors")
    copies = 2 if (kind, method) == ("qwen2", "rows") else 1  # the library writes tied rows under both names
    assert sum(value.numel() for value in saved.values()) == copies * trainable
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()
    assert sum(part["exp_avg"].numel() for part in state) == trainable
    assert sum(value.numel() for part in state for value in part.values()) == 2 * trainable + len(state)

    assert illegal(final, toy, tmp_path) == 0


@RUNS
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(toy, bases, tmp_path, monkeypatch, kind, method):
    flags = dict(num_epochs=3, dropout=0.2, early_stopping_patience=9, **METHODS[method])
    if method == "lora":
        flags["lora_dropout"] = 0.1
    expected = weights(train(toy, bases[kind], tmp_path / "whole", **flags))
    save = TreeTrainer._save_checkpoint

    def save_and_die(self, *arguments):
        save(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TreeTrainer, "_save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(toy, bases[kind], tmp_path / "killed", **flags)
    first = int(find_last_checkpoint(tmp_path / "killed").split("-")[-1])
    steps, step = [], TreeTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(
            TreeTrainer, "training_step", lambda self, *args, **kw: steps.append(0) or step(self, *args, **kw)
        )
        output = train(toy, bases[kind], tmp_path / "killed", **flags)
    assert len(steps) == 2 * first  # two of three epochs
    assert difference(weights(output), expected) < 1e-6


@RUNS
def test_the_best_epoch_is_what_is_exported(toy, bases, tmp_path, monkeypatch, kind, method):
    """Losses are made up so that the second of three epochs is the best."""
    measure, seen = TreeTrainer.evaluate, []

    def evaluate_and_keep(self, *args, **kwargs):
        seen.append({name: part.detach().clone() for name, part in by_name(self.model).items()})
        with monkeypatch.context() as patch:
            patch.setattr(
                "minionerec.training.sft_trainer.compute_tree_log_probs",
                lambda model, batch: torch.full_like(batch.label_weight, made_up),
            )
            made_up = (-2.0, -1.0, -3.0)[len(seen) - 1]
            return measure(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TreeTrainer, "evaluate", evaluate_and_keep)
        output = train(toy, bases[kind], tmp_path / "sft", num_epochs=3, **METHODS[method])
    start, rows = start_model(bases[kind], toy)
    wrapped = WRAPPERS[method](start, rows, **({"rank": 4} if method == "lora" else {}))
    found = []
    for kept in seen:
        model = copy.deepcopy(wrapped)
        with torch.no_grad():
            for name, part in by_name(model).items():
                part.copy_(kept[name])
        found.append(difference(merge_adapters(model).state_dict(), weights(output)))
    assert found[1] < 1e-6 and found[0] > 1e-3 and found[2] > 1e-3


def test_a_base_that_has_the_sids_learns_their_rows(toy, bases, tmp_path, capsys):
    first = train(toy, bases["qwen2"], tmp_path / "first", num_epochs=1)
    second = train(toy, str(first / "final_checkpoint"), tmp_path / "second", freeze_LLM=True, num_epochs=1)
    assert " 0 new SID tokens" in capsys.readouterr().out
    _, rows = start_model(bases["qwen2"], toy)
    before, after = weights(first), weights(second)
    changed = (before["model.embed_tokens.weight"] != after["model.embed_tokens.weight"]).any(dim=1)
    assert set(changed.nonzero().flatten().tolist()) <= set(rows) and changed.sum() > 10
    assert all(
        torch.equal(before[name], after[name]) for name in before if "embed" not in name and "lm_head" not in name
    )


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_and_micro_batches_change_nothing(toy, bases, tmp_path, method):
    flags = dict(num_epochs=1, learning_rate=1e-4, **METHODS[method])
    expected = weights(train(toy, bases["llama"], tmp_path / "plain", **flags))
    other = train(toy, bases["llama"], tmp_path / "other", gradient_checkpointing=True, micro_batch_size=4, **flags)
    assert difference(weights(other), expected) < 1e-5


# ---------------------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    "changes, said",
    [
        ({"freeze_LLM": True, "lora": True}, "choose one; --lora True trains the SID rows too"),
        ({"freeze_LLM": True, "train_from_scratch": True}, "--freeze_LLM True: a model trained from scratch has"),
        ({"lora": True, "train_from_scratch": True}, "--lora True: a model trained from scratch has"),
        ({"lora_rank": 8}, "--lora_rank: has an effect with --lora True only"),
        ({"freeze_LLM": True, "lora_targets": ["q_proj"]}, "--lora_targets: has an effect with --lora True only"),
        ({"lora": True, "lora_rank": 0}, "--lora_rank 0: must be at least 1"),
        ({"lora": True, "lora_alpha": 0}, "--lora_alpha 0: must be at least 1"),
        ({"lora": True, "lora_dropout": 1.0}, "--lora_dropout 1.0: must be at least 0 and below 1"),
        ({"lora": True, "lora_targets": ["q_proj", "wq"]}, "no linear layer 'wq'; it has down_proj, gate_proj"),
    ],
)
def test_wrong_settings(toy, bases, tmp_path, changes, said):
    with pytest.raises(InputError) as error:
        train(toy, bases["llama"], tmp_path / "sft", **changes)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "sft" / "final_checkpoint").exists()


def test_a_checkpoint_of_another_kind_is_not_gone_on_from(tmp_path):
    kinds = {"full": None, "rows": "TRAINABLE_TOKENS", "lora": "LORA"}
    for name, kind in kinds.items():
        (tmp_path / name).mkdir()
        if kind:
            (tmp_path / name / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    for name in kinds:
        for run in kinds:
            arguments = (str(tmp_path / name), run == "rows", run == "lora")
            if name == run:
                check_adapter_checkpoint(*arguments)
            else:
                with pytest.raises(InputError, match=f"--resume_from_checkpoint .*{name}: a checkpoint of "):
                    check_adapter_checkpoint(*arguments)
    check_adapter_checkpoint(None, False, True)


# ------------------------------------------------------------------------------------------------------- a real model
@pytest.mark.skipif("MINIONEREC_SMOLLM2" not in os.environ, reason="MINIONEREC_SMOLLM2 names no folder of SmolLM2-135M")
@pytest.mark.parametrize("method", [{}, *METHODS.values()], ids=["full", *METHODS])
def test_smollm2(toy, tmp_path, method):
    """A pretrained model of 135 million weights: a few steps lower the loss of next SIDs, and evaluation reads the
    folder.
    """
    base = os.environ["MINIONEREC_SMOLLM2"]
    flags = {
        "prompts": "worded",
        "sample": 32,
        "eval_sample": 8,
        "micro_batch_size": 4,
        "num_epochs": 2,
        "learning_rate": 1e-3,
    }
    output = train(toy, base, tmp_path / "sft", **flags, **method)
    history = read_json(Path(find_last_checkpoint(output)) / "trainer_state.json")["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    words = "The capital of France is"
    final = str(output / "final_checkpoint")
    assert AutoTokenizer.from_pretrained(final)(words).input_ids == AutoTokenizer.from_pretrained(base)(words).input_ids
    assert illegal(final, toy, tmp_path, sample=10) == 0
