"""The published command lines of the SID side and of the conversion, as their .sh files and README write them.

Each is parsed by the command's flags: every flag is used, or answered by one line that says why it has no effect.
"""

import numpy as np
import pytest

from data_process.settings import AmazonFlags, ConvertFlags
from minionerec.common.cli import parse_flags
from minionerec.common.embeddings import save_embeddings
from minionerec.common.files import InputError, read_json
from rq.rqkmeans_constrained import make_rqkmeans_constrained
from rq.rqkmeans_faiss import make_rqkmeans_faiss
from rq.settings import (
    EmbedFlags,
    IndexPlusFlags,
    RQKMeansConstrainedFlags,
    RQKMeansFaissFlags,
    RQKMeansPlusFlags,
    RQVAEFlags,
)
from rq.text2emb.amazon_text2emb import resolve_embed_flags

EMBEDDINGS = "../data/Amazon18/Industrial_and_Scientific/Industrial_and_Scientific.emb-qwen-td.npy"
DATASET = "Industrial_and_Scientific"

# Command, its published arguments, flags that get another value than their default, flags that have no effect.
PUBLISHED = {
    "rqvae.sh": (
        RQVAEFlags,
        f"--data_path {EMBEDDINGS} --ckpt_dir ./output/{DATASET} --lr 1e-3 --epochs 10000 --batch_size 20480",
        {"data_path": EMBEDDINGS, "ckpt_dir": f"./output/{DATASET}"},
        [],
    ),
    "rqvae.py": (
        RQVAEFlags,
        f"--data_path {EMBEDDINGS} --ckpt_dir out --lr 1e-3 --epochs 5000 --batch_size 2048 --num_workers 4 "
        "--eval_step 50 --learner AdamW --lr_scheduler_type constant --warmup_epochs 50 --weight_decay 0.0 "
        "--dropout_prob 0.0 --bn False --loss_type mse --kmeans_init True --kmeans_iters 100 "
        "--sk_epsilons 0.0 0.0 0.003 --sk_iters 50 --device cuda:0 --num_emb_list 256 256 256 --e_dim 32 "
        "--quant_loss_weight 1.0 --beta 0.25 --layers 2048 1024 512 256 128 64 --save_limit 5",
        {
            "data_path": EMBEDDINGS,
            "ckpt_dir": "out",
            "epochs": 5000,
            "batch_size": 2048,
            "weight_decay": 0.0,
            "sk_epsilons": [0.0, 0.0, 0.003],
            "device": "cuda:0",
            "save_limit": 5,
        },
        ["num_workers"],
    ),
    "rqkmeans_faiss.py": (RQKMeansFaissFlags, f"--dataset {DATASET}", {"dataset": DATASET}, []),
    "rqkmeans_faiss.py, all flags": (
        RQKMeansFaissFlags,
        f"--dataset {DATASET} --data_path {EMBEDDINGS} --num_levels 3 --codebook_size 256 --uniform --iters 30 "
        "--batch_size 8192 --output_root ../data",
        {
            "dataset": DATASET,
            "data_path": EMBEDDINGS,
            "num_levels": 3,
            "codebook_size": [256],
            "uniform": True,
            "output_root": "../data",
        },
        ["iters", "batch_size"],
    ),
    "rqkmeans_constrained.sh": (
        RQKMeansConstrainedFlags,
        f"--dataset {DATASET} --root ../data/Amazon18/{DATASET} --k 256 --l 3 --max_iter 100 --seed 42 --verbose",
        {"dataset": DATASET, "root": f"../data/Amazon18/{DATASET}", "codebook_size": [256], "num_levels": 3},
        ["verbose"],
    ),
    "rqkmeans_plus.sh": (
        RQKMeansPlusFlags,
        f"--data_path {EMBEDDINGS} --pretrained_codebook_path {DATASET}.codebooks_constrained.npz --ckpt_dir out "
        "--num_emb_list 256 256 256 --e_dim 2560 --lr 1e-4 --epochs 10000 --batch_size 2048",
        {
            "data_path": EMBEDDINGS,
            "pretrained_codebook_path": f"{DATASET}.codebooks_constrained.npz",
            "ckpt_dir": "out",
            "num_emb_list": [256, 256, 256],
            "e_dim": 2560,
            "epochs": 10_000,
        },
        [],
    ),
    "rqkmeans_plus.py": (
        RQKMeansPlusFlags,
        "--data_path x.npy --pretrained_codebook_path x.npz --ckpt_dir out --num_workers 4 --quant_loss_weight 1.0 "
        "--beta 0.25 --device cuda:0 --eval_step 50 --save_limit 5 --learner AdamW --weight_decay 0.0 "
        "--lr_scheduler_type constant --warmup_epochs 50 --dropout_prob 0.0 --bn False --loss_type mse "
        "--sk_epsilons 0.0 0.0 0.0 --sk_iters 50 --kmeans_init False --kmeans_iters 100",
        {
            "data_path": "x.npy",
            "pretrained_codebook_path": "x.npz",
            "ckpt_dir": "out",
            "device": "cuda:0",
            "sk_epsilons": [0.0, 0.0, 0.0],
        },
        ["num_workers", "kmeans_init", "kmeans_iters"],
    ),
    "generate_indices_plus.sh": (
        IndexPlusFlags,
        f"--data_path {EMBEDDINGS} --ckpt_path best_collision_model.pth --num_emb_list 256 256 256 --device cuda:0",
        {"data_path": EMBEDDINGS, "ckpt_path": "best_collision_model.pth", "device": "cuda:0"},
        ["num_emb_list"],
    ),
    "generate_indices_plus.py": (
        IndexPlusFlags,
        "--data_path x.npy --ckpt_path x.pth --e_dim 2560 --layers 2048 1024 512 --batch_size 2048 --num_workers 4",
        {"data_path": "x.npy", "ckpt_path": "x.pth", "batch_size": 2048},
        ["e_dim", "layers", "num_workers"],
    ),
    "amazon_text2emb.sh": (
        EmbedFlags,
        f"--dataset {DATASET} --root ../../data/Amazon18/{DATASET} --plm_checkpoint your_emb_model_path",
        {
            "dataset": DATASET,
            "root": f"../../data/Amazon18/{DATASET}",
            "plm_checkpoint": "your_emb_model_path",
        },
        [],
    ),
    "amazon_text2emb.py": (
        EmbedFlags,
        "--dataset Beauty --root data --plm_name qwen --plm_checkpoint model --max_sent_len 2048 --word_drop_ratio -1",
        {"dataset": "Beauty", "root": "data", "plm_name": "qwen", "plm_checkpoint": "model"},
        [],
    ),
    "amazon18_data_process.sh": (
        AmazonFlags,
        f"--dataset {DATASET} --user_k 5 --item_k 5 --st_year 1996 --st_month 10 --ed_year 2018 --ed_month 10 "
        "--output_path ./Amazon18",
        {
            "dataset": DATASET,
            "st_year": 1996,
            "st_month": 10,
            "ed_year": 2018,
            "ed_month": 10,
            "output_path": "./Amazon18",
        },
        [],
    ),
    "amazon18_data_process.py": (
        AmazonFlags,
        "--dataset Arts --metadata_file meta.json --reviews_file reviews.json --output_path ./data",
        {
            "dataset": "Arts",
            "metadata_file": "meta.json",
            "reviews_file": "reviews.json",
            "output_path": "./data",
        },
        [],
    ),
    "convert_dataset.sh": (
        ConvertFlags,
        f"--dataset_name {DATASET} --data_dir data/Amazon18/{DATASET} --output_dir data/Amazon18 --category {DATASET} "
        "--seed 42",
        {
            "dataset_name": DATASET,
            "data_dir": f"data/Amazon18/{DATASET}",
            "output_dir": "data/Amazon18",
            "category": DATASET,
        },
        [],
    ),
    "convert_dataset.py": (
        ConvertFlags,
        "--dataset_name x --data_dir a --output_dir b --max_valid_samples 10 --max_test_samples 20 --seed 1 "
        "--keep_longest_only",
        {
            "dataset_name": "x",
            "data_dir": "a",
            "output_dir": "b",
            "max_valid_samples": 10,
            "max_test_samples": 20,
            "seed": 1,
            "keep_longest_only": True,
        },
        [],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_command_lines_are_accepted(capsys, name):
    flags_class, arguments, changed, without_effect = PUBLISHED[name]
    flags = parse_flags(flags_class, arguments.split())
    printed = capsys.readouterr()
    answers = [line.partition(": has no effect here: ") for line in printed.out.splitlines()]
    assert [answer[0].removeprefix("--") for answer in answers] == without_effect
    assert printed.err == "" and all(reason for _, _, reason in answers)
    expected = flags_class(**changed)
    differing = {flag for flag, value in vars(flags).items() if value != getattr(expected, flag)}
    assert differing <= set(without_effect)


def test_a_published_checkpoint_of_the_encoder_needs_no_name():
    flags = EmbedFlags(dataset="x", root="data", plm_checkpoint="model")
    assert resolve_embed_flags(flags).plm_name == "qwen"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Embeddings of 40 items where the published k-means scripts look for those of a dataset `toy`."""
    array = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    for folder in ("root", "data/Amazon/index"):
        path = tmp_path / folder / "toy.emb-qwen-td.npy"
        path.parent.mkdir(parents=True)
        save_embeddings(path, array, [str(item) for item in range(40)], "x", ["title"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_constrained_kmeans_finds_a_dataset(toy):
    arguments = "--dataset toy --root root --k 4 --l 2 --max_iter 5 --verbose --device cpu"
    make_rqkmeans_constrained(parse_flags(RQKMeansConstrainedFlags, arguments.split()))
    index = read_json(toy / "root" / "toy.index.json")
    assert len(index) == 40 and {token[1] for sid in index.values() for token in sid} <= {"a", "b", "c"}


def test_faiss_kmeans_finds_a_dataset(toy):
    arguments = "--dataset toy --codebook_size 4 --num_levels 2 --uniform --output_root out --device cpu"
    make_rqkmeans_faiss(parse_flags(RQKMeansFaissFlags, arguments.split()))
    assert len(read_json(toy / "out" / "toy" / "toy.faiss-rq.index.json")) == 40


def test_an_index_stands_beside_its_embeddings(toy):
    arguments = "--data_path root/toy.emb-qwen-td.npy --codebook_size 4 --num_levels 2 --device cpu"
    make_rqkmeans_faiss(parse_flags(RQKMeansFaissFlags, arguments.split()))
    assert len(read_json(toy / "root" / "toy.index.json")) == 40


@pytest.mark.parametrize(
    "flags_class, arguments, message",
    [
        (RQKMeansConstrainedFlags, "--engine magic", "--engine magic: expected one of balanced, min_cost_flow"),
        (RQKMeansFaissFlags, "--collisions best", "--collisions best: expected one of none, sinkhorn"),
        (RQVAEFlags, "--ckpt_dir x", "missing flag: --data_path"),
    ],
)
def test_wrong_command_lines_end_with_one_line(capsys, flags_class, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        parse_flags(flags_class, arguments.split())
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and len(error.splitlines()) == 1


def test_kmeans_without_embeddings_ends_with_one_line():
    with pytest.raises(InputError, match="^missing flag: --data_path, or --dataset for the layout"):
        make_rqkmeans_faiss(RQKMeansFaissFlags())
