"""Workers prepare the batches that the training process would: the same ones, epoch by epoch, and none left to it."""

import pickle
import random

import pytest
import torch
from tiny import list_plan, make_dataset, random_examples, write_config
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from minionerec.common.files import InputError
from minionerec.language import mixture as mixture_module
from minionerec.training import setup, sft_trainer
from minionerec.training.settings import RLFlags, SFTFlags
from minionerec.training.setup import build_arguments
from minionerec.training.sft_trainer import TreeBatches, take_only
from rl import rl
from sft import sft


def read_weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "final_checkpoint", dtype=torch.float32).state_dict()


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("packing", ["tree", "none"])
def test_batches_of_workers(packing):
    batches = TreeBatches([random_examples(random.Random(0), 60, 9)], 20, 4, 0, seed=1, packing=packing, tree_tokens=90)
    # Where processes are not forked, workers get a pickled copy.
    copied, collate = pickle.loads(pickle.dumps((batches, take_only)))
    assert list_plan(copied) == list_plan(batches) and collate is take_only
    loader = DataLoader(batches, collate_fn=take_only, num_workers=2)
    seen = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        seen.append([])
        for number, prepared in enumerate(loader):
            for name, value in batches[number].items():
                assert prepared[name] is value is None or torch.equal(prepared[name], value)
            seen[-1].append(prepared["input_ids"])
        assert len(seen[-1]) == len(batches)
    assert any(not torch.equal(*pair) for pair in zip(*seen, strict=True) if pair[0].shape == pair[1].shape)


def test_sft_with_workers(tmp_path, monkeypatch):
    paths = make_dataset(tmp_path / "data", items=20, users=10)
    built, build = [], sft_trainer.batch_trees

    def count_here(*arguments):  # a worker counts in its own memory
        built.append(0)
        return build(*arguments)

    monkeypatch.setattr(sft_trainer, "batch_trees", count_here)
    weights = []
    for workers in (0, 2):
        built.clear()
        sft(
            SFTFlags(
                **{key: paths[key] for key in ("train_file", "eval_file", "sid_index_path", "item_meta_path")},
                base_model=write_config(tmp_path),
                output_dir=str(tmp_path / str(workers)),
                train_from_scratch=True,
                tasks=["next_sid:0.5"],  # other rows in every epoch
                batch_size=16,
                micro_batch_size=8,
                num_epochs=2,
                dropout=0.1,
                learning_rate=1e-2,
                dataloader_num_workers=workers,
            )
        )
        assert bool(built) == (not workers)
        weights.append(read_weights(tmp_path / str(workers)))
    assert_same_weights(*weights)


def test_rl_with_workers(trained, tmp_path, monkeypatch):
    read, get_item = [], mixture_module.TaskMixture.__getitem__

    def count_here(self, index):
        read.append(index)
        return get_item(self, index)

    weights, reads = [], []
    monkeypatch.setattr(mixture_module.TaskMixture, "__getitem__", count_here)
    for workers in (0, 2):
        read.clear()
        rl(
            RLFlags(
                model_path=trained.checkpoint,
                **{key: trained.paths[key] for key in ("train_file", "eval_file", "info_file")},
                output_dir=str(tmp_path / str(workers)),
                tasks=["next_sid:0.2"],
                num_generations=4,
                train_batch_size=32,
                gradient_accumulation_steps=1,
                reward_type=["ranking"],
                num_train_epochs=2,
                add_gt=True,
                learning_rate=1e-3,
                test_during_training=False,
                dataloader_num_workers=workers,
            )
        )
        reads.append(len(read))
        weights.append(read_weights(tmp_path / str(workers)))
    assert_same_weights(*weights)
    # Prompts are also read one by one before training; those of the steps are left to the workers.
    assert reads[1] < reads[0]


def test_fewer_than_no_workers(trained, tmp_path):
    files = {key: trained.paths[key] for key in ("train_file", "eval_file")}
    common = dict(output_dir=str(tmp_path / "out"), dataloader_num_workers=-1)
    items = {key: trained.paths[key] for key in ("sid_index_path", "item_meta_path")}
    for command, flags in (
        (sft, SFTFlags(base_model=trained.checkpoint, **files, **items, **common)),
        (rl, RLFlags(model_path=trained.checkpoint, **files, info_file=trained.paths["info_file"], **common)),
    ):
        with pytest.raises(InputError, match="--dataloader_num_workers -1: expected 0 or more"):
            command(flags)


@pytest.mark.parametrize("cuda", [False, True])
def test_memory_is_pinned_where_there_is_a_gpu(tmp_path, monkeypatch, cuda):
    for name in ("is_available", "is_bf16_supported"):
        monkeypatch.setattr(torch.cuda, name, lambda: cuda)
    monkeypatch.setattr(setup, "computes_on_cpu", lambda: not cuda)
    given = {}
    build_arguments(
        lambda **arguments: given.update(arguments),
        RLFlags(
            **dict.fromkeys(("train_file", "eval_file"), "x"), info_file="x", model_path="x", output_dir=str(tmp_path)
        ),
        10,
        [],
    )
    assert given["dataloader_pin_memory"] == given["accelerator_config"]["non_blocking"] == cuda
