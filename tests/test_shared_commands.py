"""RQ-VAE, SASRec, GRU4Rec and text embeddings over two processes against one; commands that one process does.

Dropout is 0 where weights are compared: with it every process draws masks of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ROOT, SECONDS, find_last_line, launch, long_form, note_cell
from safetensors.torch import load_file
from tiny import make_dataset

from minionerec.common.embeddings import load_embeddings, save_embeddings
from minionerec.common.files import read_json
from minionerec.recommenders.settings import SASRecFlags
from rq.rqvae import train_rqvae
from rq.settings import EmbedFlags, RQVAEFlags
from rq.text2emb.amazon_text2emb import embed_items
from sasrec import sasrec


def as_text(value):
    return ",".join(map(str, value)) if isinstance(value, list) else value


def compare(first, second):
    """The largest difference of two state dictionaries.

    The biases of attention keys are left out: they move no output, so that their gradients are rounding errors, which
    AdamW brings to the size of any other step.
    """
    assert first.keys() == second.keys()
    differences = {name: (first[name] - second[name]).abs() for name in first}
    for name, difference in differences.items():
        if name.endswith("in_proj_bias"):  # of queries, keys, values
            difference.chunk(3)[1].zero_()
    return max(difference.max().item() for difference in differences.values())


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """Flags of rq.rqvae, every part of a batch that processes must see together in use: 4 batches, the last of 3."""
    folder = tmp_path_factory.mktemp("rqvae")
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((9, 12)) * 2
    array = (centres[rng.integers(9, size=63)] + rng.standard_normal((63, 12)) * 0.3).astype(np.float32)
    path = folder / "toy.emb-x-td.npy"
    save_embeddings(path, array, [str(item) for item in range(63)], "x", ["title"])
    flags = {"data_path": str(path), "num_emb_list": [8, 8], "e_dim": 6, "layers": [16], "epochs": 4, "batch_size": 20}
    flags |= {"eval_step": 1, "warmup_epochs": 0, "lr": 2e-4, "sk_epsilons": [0.0, 0.05], "revive_every": 2}
    train_rqvae(RQVAEFlags(**flags, ckpt_dir=str(folder / "one")))
    return folder / "one", flags


def read_final(folder):
    return torch.load(Path(folder) / "final_model.pth", weights_only=True)["state_dict"]


@pytest.mark.parametrize("engine", ["torchrun", pytest.param("ddp", marks=long_form)])
def test_rqvae_gives_the_codes_of_one_process_also_after_a_kill(autoencoder, tmp_path, engine):
    """Killed in its third epoch; goes on with two processes, and with one. The last batch is unequal parts."""
    one, flags = autoencoder
    run = tmp_path / "run"
    texts = {name: as_text(value) for name, value in flags.items()} | {"ckpt_dir": run}
    dying = {"DIE_ON_RANK": "1", "DIE_AT_STEP": "10", "DIE_HOW": "kill"}
    killed = launch(engine, texts, script="rq.rqvae", **dying)
    assert killed.returncode != 0 and (run / "checkpoint_00000002.pth").exists(), killed.stderr[-2000:]
    assert not (run / "final_model.pth").exists()
    shutil.copytree(run, tmp_path / "killed")

    done = launch(engine, texts, script="rq.rqvae")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("[rqvae] done") == done.stdout.count("from epoch 2") == 1
    difference = compare(read_final(one), read_final(run))
    assert difference < 1e-5
    note_cell(engine, "rq.rqvae", difference, done)
    records = [read_json(folder / "rqvae.stage.json")["results"] for folder in (one, run)]
    assert records[0]["best_collision_rate"] == records[1]["best_collision_rate"]

    shutil.rmtree(run)
    shutil.copytree(tmp_path / "killed", run)
    train_rqvae(RQVAEFlags(**flags, ckpt_dir=str(run)))
    assert compare(read_final(one), read_final(run)) < 1e-5


@pytest.mark.parametrize(
    "engine, model",
    [
        ("ddp", "sasrec"),
        pytest.param("torchrun", "sasrec", marks=long_form),
        pytest.param("ddp", "gru4rec", marks=long_form),
        pytest.param("torchrun", "gru4rec", marks=long_form),
    ],
)
def test_networks_give_the_weights_and_lists_of_one_process_also_after_a_kill(tmp_path, engine, model):
    paths = make_dataset(tmp_path / "data")
    flags = {name: paths[name] for name in ("train_file", "test_data_path", "info_file")}
    flags |= {"valid_file": paths["eval_file"], "model": model, "num_epochs": 3, "hidden_size": 16, "dropout": 0.0}
    flags |= {"K": 20, "batch_size": 40, "learning_rate": 3e-4, "folds": 2}
    one, run = tmp_path / "one", tmp_path / "run"
    sasrec(SASRecFlags(**flags, output_dir=str(one)))
    epochs = read_json(one / "epochs.json")
    texts = flags | {"output_dir": run}
    killed = launch(engine, texts, script="sasrec.py", DIE_ON_RANK="1", DIE_AT_STEP="3", DIE_HOW="kill")
    assert killed.returncode != 0 and not (run / "model").exists()
    done = launch(engine, texts, script="sasrec.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"[{model}] done") == 1 and not (run / "checkpoint.pth").exists()
    networks = [Path(name) / "model.safetensors" for name in ("model", "folds/0/model", "folds/1/model")]
    difference = max(compare(*(load_file(folder / name) for folder in (one, run))) for name in networks)
    assert difference < 1e-5
    assert read_json(run / "folds/parts.json") == read_json(one / "folds/parts.json")
    note_cell(engine, f"sasrec.py --model {model}", difference, done)
    for ours, other in zip(read_json(run / "epochs.json"), epochs, strict=True):
        assert ours == pytest.approx(other, abs=1e-5)
    lists = [[row["predict_items"] for row in read_json(folder / "test.json")] for folder in (one, run)]
    assert lists[0] == lists[1]


def make_encoder(folder):
    """A tiny encoder, and the flags that embed 23 items by it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["red", "blue", "saw", "drill", "old", "new", "small"]
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1} | {w: i + 2 for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=9, max_position_embeddings=64, **sizes)).eval().save_pretrained(folder)
    items = {
        str(item): {"title": " ".join(words[: item % 7 + 1]), "description": words[item % 3]} for item in range(23)
    }
    return items


@pytest.mark.parametrize("engine", ["torchrun", pytest.param("ddp", marks=long_form)])
def test_embeddings_are_those_of_one_process(tmp_path, engine):
    items = make_encoder(tmp_path / "encoder")
    flags = {"dataset": "toy", "plm_name": "tiny", "plm_checkpoint": str(tmp_path / "encoder"), "batch_size": 4}
    arrays = {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "toy.item.json").write_text(json.dumps(items))
    embed_items(EmbedFlags(**flags, root=str(tmp_path / "one")))
    done = launch(engine, flags | {"root": tmp_path / "two"}, script="rq.text2emb.amazon_text2emb")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("[text2emb] done") == 1
    arrays, ids = zip(
        *(load_embeddings(tmp_path / name / "toy.emb-tiny-td.npy") for name in ("one", "two")), strict=True
    )
    assert np.array_equal(*arrays) and ids[0] == ids[1] and len(np.unique(arrays[0], axis=0)) > 10
    note_cell(engine, "rq.text2emb", "identical", done)


@long_form
@pytest.mark.parametrize("command", ["rq.rqvae", "sasrec.py", "rq.text2emb.amazon_text2emb"])
def test_an_error_on_one_rank_ends_all_with_its_line_last(autoencoder, tmp_path, command):
    if command == "rq.rqvae":
        flags = {name: as_text(value) for name, value in autoencoder[1].items()} | {"ckpt_dir": tmp_path}
    elif command == "sasrec.py":
        paths = make_dataset(tmp_path / "data")
        flags = {name: paths[name] for name in ("train_file", "test_data_path", "info_file")}
        flags |= {"valid_file": paths["eval_file"], "output_dir": tmp_path}
    else:
        (tmp_path / "toy.item.json").write_text(json.dumps(make_encoder(tmp_path / "encoder")))
        flags = {"dataset": "toy", "root": tmp_path, "plm_checkpoint": tmp_path / "encoder", "batch_size": 4}
    done = launch("torchrun", flags, script=command, DIE_ON_RANK="1", DIE_AT_STEP="1", DIE_HOW="error")
    assert done.returncode != 0 and "error on rank 1: rank 1 stops here" in find_last_line(done.stderr), done.stderr
    assert "error: " not in done.stderr.replace("rank 1: ", "")


def run_rank(rank, *command, **environment):
    """A command as a launcher would start it, without one."""
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_PORT": "1", **environment}
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=SECONDS,
        check=False,
    )


def test_a_command_that_is_not_shared_is_done_by_one_process(tmp_path):
    """It waits for no other process, though its stage asks how many there are."""
    paths = make_dataset(tmp_path / "data")
    flags = [f"--{name}={paths[name]}" for name in ("train_file", "test_data_path", "info_file")]
    flags.append(f"--output_dir={tmp_path / 'out'}")
    other = run_rank(1, "baselines.py", *flags)
    assert (other.returncode, other.stdout, other.stderr) == (0, "", "") and not (tmp_path / "out").exists()
    main = run_rank(0, "baselines.py", *flags)
    assert main.returncode == 0, main.stderr
    assert main.stdout.startswith("[launch] this command is the work of one process; the other 1 ended\n")
    assert (tmp_path / "out" / "popularity.metrics.json").is_file()


def test_a_wrong_flag_is_printed_by_one_process_and_left_to_the_launcher_by_all(tmp_path):
    for rank, printed in ((0, "error: unknown flag --epoch"), (1, "")):
        file = tmp_path / f"{rank}.json"
        done = run_rank(rank, "rl.py", "--epoch", "3", TORCHELASTIC_ERROR_FILE=str(file))
        assert done.returncode == 2 and done.stderr.startswith(printed) and bool(done.stderr) == bool(printed)
        assert read_json(file)["message"]["message"].startswith("error: unknown flag --epoch")


@long_form
def test_one_process_answers_a_question(trained):
    flags = {"base_model": trained.checkpoint, "info_file": trained.paths["info_file"], "titles": "number 5,"}
    done = launch("torchrun", flags, script="recommend.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("after: ") == 1
