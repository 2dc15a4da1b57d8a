"""--optim and --load_in_4bit: what runs here, what is refused in one line, and, with bitsandbytes, whole runs.

What needs bitsandbytes, which also runs on a CPU, is skipped where it is not installed: `pip install --no-deps
"bitsandbytes>=0.49,<0.51"` is all that these tests want of requirements-gpu.txt.
"""

import copy
import random
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import make_dataset, random_prompts, tiny_model
from transformers import AutoModelForCausalLM
from transformers.training_args import OptimizerNames

from evaluate import evaluate
from minionerec.common.files import InputError, read_json
from minionerec.common.settings import AdapterFlags
from minionerec.evaluation.settings import EvaluateFlags
from minionerec.language import quantization
from minionerec.language.adapters import add_lora, check_adapter_flags, merge_adapters
from minionerec.language.models import load_model, train_tokenizer
from minionerec.search.prefix_tree import batch_trees, compute_tree_log_probs
from minionerec.training.checkpoints import find_last_checkpoint
from minionerec.training.optimizers import check_engine_savers, check_optimizer
from minionerec.training.settings import RLFlags, SFTFlags
from minionerec.training.sft_trainer import TreeTrainer
from rl import rl
from sft import sft

HAS_BITSANDBYTES = find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
# Of bitsandbytes: that a CPU has no pages, and no kernel from the hub.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROWS = [30, 31, 33, 34, 39]
QLORA = {"lora": True, "lora_rank": 4, "load_in_4bit": True}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("toy"), items=20, users=10, deep=True)


@pytest.fixture(scope="module")
def base(toy, tmp_path_factory):
    """A folder as hub models have it; its matrices are large enough for 8-bit states."""
    folder = str(tmp_path_factory.mktemp("base"))
    tokenizer = train_tokenizer([item["title"] for item in read_json(toy["item_meta_path"]).values()] * 3, 400)
    model = tiny_model("qwen3", len(tokenizer), hidden_size=64, intermediate_size=128, initializer_range=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(paths, base, output, **changes):
    flags = {key: paths[key] for key in ("train_file", "eval_file", "sid_index_path", "item_meta_path")} | {
        "base_model": base,
        "output_dir": str(output),
        "prompts": "compact",
        "batch_size": 16,
        "micro_batch_size": 8,
        "num_epochs": 2,
        "learning_rate": 1e-2,
    }
    sft(SFTFlags(**{**flags, **changes}))
    return Path(output)


def weights(output):
    return AutoModelForCausalLM.from_pretrained(output / "final_checkpoint", dtype=torch.float32).state_dict()


def difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def optimizer_state(output):
    """What the last checkpoint holds of every parameter; bitsandbytes puts a part of it into a dictionary within."""
    path = Path(find_last_checkpoint(output)) / "optimizer.pt"
    states = torch.load(path, weights_only=True)["state"].values()
    return [
        state | {name: value for part in state.values() if isinstance(part, dict) for name, value in part.items()}
        for state in states
    ]


# -------------------------------------------------------------------------------------------------------- every machine
@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_every_name_runs_here_or_says_why_not(name, capsys):
    try:
        check_optimizer(name)
    except InputError as error:
        assert str(error).startswith(f"--optim {name}: ") and "\n" not in str(error)
        assert name not in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
    else:
        assert not name.startswith(("galore", "apollo", "lomo", "adalomo", "schedule_free"))
        assert ("no pages on a CPU" in capsys.readouterr().out) == name.startswith("paged")


def test_wrong_optimizers():
    with pytest.raises(InputError, match="--optim adamw_8bits: transformers has none of this name; it has adamw_8bit"):
        check_optimizer("adamw_8bits")
    with pytest.raises(InputError, match="--optim lomo: it updates weights within the backward pass"):
        check_optimizer("lomo")
    if not HAS_BITSANDBYTES:
        with pytest.raises(InputError, match="--optim adamw_8bit: cannot run here .*bitsandbytes"):
            check_optimizer("adamw_8bit")


def test_adafactor_trains_with_factored_states(toy, base, tmp_path):
    output = train(toy, base, tmp_path / "sft", optim="adafactor")
    states = optimizer_state(output)
    assert any("exp_avg_sq_row" in state for state in states)
    assert difference(weights(output), weights(train(toy, base, tmp_path / "adamw"))) > 1e-3


def test_an_optimizer_that_cannot_run_stops_both_commands(toy, base, tmp_path):
    with pytest.raises(InputError, match="--optim lomo"):
        train(toy, base, tmp_path / "sft", optim="lomo")
    files = {key: toy[key] for key in ("train_file", "eval_file", "info_file")}
    with pytest.raises(InputError, match="--optim lomo"):
        rl(RLFlags(model_path=base, **files, output_dir=str(tmp_path / "rl"), optim="lomo"))
    assert not list(tmp_path.glob("*/final_checkpoint"))


def test_four_bits_need_lora_and_bitsandbytes(monkeypatch):
    with pytest.raises(InputError, match="--load_in_4bit: has an effect with --lora True only"):
        check_adapter_flags(AdapterFlags(load_in_4bit=True))
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--load_in_4bit True: needs bitsandbytes, which is not installed"):
        check_adapter_flags(AdapterFlags(lora=True, load_in_4bit=True))


def test_engines_that_shard_take_no_saver():
    model = tiny_model("llama", 40)
    for engine in ("one process", "DDP"):
        check_engine_savers(engine, OptimizerNames.ADAMW_8BIT, model)
    for engine in ("FSDP2", "ZeRO-2", "ZeRO-3"):
        check_engine_savers(engine, OptimizerNames.ADAMW_TORCH_FUSED, model)
        with pytest.raises(InputError, match=f"--optim adamw_8bit: not under {engine}, which takes adamw_torch or"):
            check_engine_savers(engine, OptimizerNames.ADAMW_8BIT, model)
    model.is_loaded_in_4bit = True
    check_engine_savers("DDP", OptimizerNames.ADAMW_TORCH, model)
    with pytest.raises(InputError, match="--load_in_4bit True: not under ZeRO-2"):
        check_engine_savers("ZeRO-2", OptimizerNames.ADAMW_TORCH, model)


# ----------------------------------------------------------------------------------------------- with bitsandbytes only
@needs_bitsandbytes
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_lion_8bit"])
def test_states_of_8_bits(toy, base, tmp_path, optim):
    """The run learns about what 32-bit states learn, and its checkpoint holds 8-bit ones."""
    flags = {"optim": optim, "learning_rate": 1e-3 if "lion" in optim else 1e-2, "num_epochs": 3}
    output = train(toy, base, tmp_path / "sft", **flags)
    kinds = {state["state1"].dtype for state in optimizer_state(output)}
    assert kinds == {torch.uint8, torch.float32}  # those of norms and embeddings keep 32 bits
    history = read_json(Path(find_last_checkpoint(output)) / "trainer_state.json")["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    if "adamw" in optim:
        plain = train(toy, base, tmp_path / "plain", num_epochs=3)
        history = read_json(Path(find_last_checkpoint(plain)) / "trainer_state.json")["log_history"]
        expected = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        assert losses == pytest.approx(expected, rel=0.05) and losses != expected


@needs_bitsandbytes
@pytest.mark.parametrize("method", [{"optim": "adamw_8bit"}, QLORA, {**QLORA, "optim": "paged_adamw_8bit"}])
def test_a_killed_run_goes_on_where_it_was(toy, base, tmp_path, monkeypatch, method):
    flags = {"num_epochs": 3, "early_stopping_patience": 9, **method}
    expected = weights(train(toy, base, tmp_path / "whole", **flags))
    save = TreeTrainer._save_checkpoint

    def save_and_die(self, *arguments):
        save(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TreeTrainer, "_save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(toy, base, tmp_path / "killed", **flags)
    assert difference(weights(train(toy, base, tmp_path / "killed", **flags)), expected) < 1e-6


@needs_bitsandbytes
@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
def test_loss_and_gradients_over_4_bits_are_those_of_the_merged_model(base, tmp_path, targets):
    """After a pass in evaluation mode, in which bitsandbytes by itself would repack the weights of some CPUs."""
    rng = random.Random(5)
    model, _ = load_model(base, "base_model", in_4bit=True)
    wrapped = add_lora(model, ROWS, AdapterFlags(lora=True, lora_rank=4, lora_targets=targets))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    ids = torch.tensor([[3, *ROWS, 7, 39, 2]])
    with torch.no_grad():
        logits = wrapped.eval()(ids).logits
    wrapped.train()
    groups = [[(prompt, random_prompts(rng, 1, 40, 3)[0]) for _ in range(3)] for prompt in random_prompts(rng, 3, 40)]
    batch = batch_trees(groups, 0)
    loss = -compute_tree_log_probs(wrapped, batch).sum()
    loss.backward()
    rows, lora = {}, {}
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            kind = lora if ".lora_" in name else rows
            kind[name.removeprefix("base_model.model.")] = parameter
    scale = 32 / 4

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns where it quantises what it merged
        plain = merge_adapters(copy.deepcopy(wrapped))
    assert all(type(part) is not torch.nn.Linear or part.weight.dtype == torch.float32 for part in plain.modules())
    assert not any("4bit" in type(part).__name__ for part in plain.modules())
    plain.save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text()
    twin = AutoModelForCausalLM.from_pretrained(tmp_path).requires_grad_(True)
    assert (twin.eval()(ids).logits - logits).abs().max() < 1e-4
    expected = -compute_tree_log_probs(twin.train(), batch).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    full = {name: module.weight.grad for name, module in twin.named_modules() if hasattr(module, "weight")}
    checked = 0
    for name, parameter in lora.items():
        layer, _, part = name.partition(".lora_")
        other = lora[f"{layer}.lora_{'B' if part[0] == 'A' else 'A'}{part[1:]}"]
        gradient = scale * (other.T @ full[layer] if part[0] == "A" else full[layer] @ other.T)
        assert (parameter.grad - gradient).abs().max() < 1e-4 * max(1, gradient.abs().max()), name
        checked += 1
    assert checked == (4 if targets else 14) * 2 and rows
    for name, parameter in rows.items():
        gradient = full[name.split(".token_adapter")[0]][ROWS]
        assert (parameter.grad - gradient).abs().max() < 1e-4 * max(1, gradient.abs().max()), name


@needs_bitsandbytes
def test_from_a_base_in_4_bits_to_folders_that_evaluation_reads(toy, base, tmp_path):
    """SFT, then RL over 4 bits again; both end in plain folders, and the base's layers moved by no more than 4 bits."""
    flags = {"gradient_checkpointing": True, "best_by": "HR@10", "num_epochs": 4}
    output = train(toy, base, tmp_path / "sft", **QLORA, **flags)
    final = output / "final_checkpoint"
    assert not list(final.glob("*adapter*")) and "quantization" not in (final / "config.json").read_text()
    files = {key: toy[key] for key in ("train_file", "eval_file", "info_file")}
    rl(
        RLFlags(
            model_path=str(final),
            **files,
            output_dir=str(tmp_path / "rl"),
            num_generations=4,
            train_batch_size=16,
            gradient_accumulation_steps=1,
            reward_type=["ranking"],
            max_steps=2,
            learning_rate=1e-3,
            test_during_training=False,
            optim="paged_adamw_8bit",
            **QLORA,
        )
    )
    for name in ("sft", "rl"):
        files = {key: toy[key] for key in ("train_file", "info_file", "test_data_path")}
        result = tmp_path / f"{name}.json"
        evaluate(
            EvaluateFlags(
                base_model=str(tmp_path / name / "final_checkpoint"),
                **files,
                result_json_data=str(result),
                num_beams=10,
            )
        )
        assert read_json(tmp_path / f"{name}.metrics.json")["illegal"] == 0
    assert difference(weights(tmp_path / "rl"), weights(output)) > 1e-4
