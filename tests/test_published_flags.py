"""The published command lines of SFT and RL are accepted, flag by flag."""

import pytest

from minionerec.common.cli import parse_flags
from minionerec.training.settings import RLFlags, SFTFlags

SFT = """--base_model your_model_path --batch_size 1024 --micro_batch_size 16
--train_file train.csv --eval_file valid.csv
--output_dir output_dir/xxx --wandb_project wandb_proj --wandb_run_name wandb_name --category Industrial_and_Scientific
--train_from_scratch False --seed 42 --sid_index_path Industrial.index.json --item_meta_path Industrial.item.json
--freeze_LLM False"""
RL = """--model_path path_to_model --train_batch_size 64 --eval_batch_size 128 --num_train_epochs 2
--gradient_accumulation_steps 2 --train_file train.csv --eval_file valid.csv --info_file info.txt
--category Industrial_and_Scientific --sample_train False --eval_step 0.0999 --reward_type ranking --num_generations 16
--mask_all_zero False --dynamic_sampling False --sync_ref_model True --beam_search True --test_during_training False
--temperature 1.0 --learning_rate 1e-5 --add_gt False --beta 1e-3 --dapo False --output_dir output_dir
--wandb_run_name wandb_name --sid_index_path Industrial.index.json --item_meta_path Industrial.item.json"""
# What the published functions take beside what their scripts give.
SFT_OTHERS = """--sample -1 --num_epochs 10 --learning_rate 3e-4 --cutoff_len 512 --group_by_length True
--resume_from_checkpoint None"""
RL_OTHERS = "--seed 42 --wandb_project proj --test_beam 20 --ada_path None --cf_path None --gspo False"


def test_sft(capsys):
    flags = parse_flags(SFTFlags, SFT.split(), about="")
    assert (flags.batch_size, flags.micro_batch_size, flags.freeze_LLM) == (1024, 16, False)
    assert flags.category == "Industrial_and_Scientific" and capsys.readouterr().out == ""
    flags = parse_flags(SFTFlags, [*SFT.split(), *SFT_OTHERS.split()], about="")
    assert flags.resume_from_checkpoint is None and flags.cutoff_len == 512
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("--group_by_length: has no effect here: ")


@pytest.mark.parametrize("more", ["", RL_OTHERS])
def test_rl(capsys, more):
    flags = parse_flags(RLFlags, [*RL.split(), *more.split()], about="")
    assert flags.sample_train is False and flags.sync_ref_model and flags.beta == 1e-3 and flags.eval_step == 0.0999
    assert flags.reward_type == ["ranking"] and flags.sid_index_path == "Industrial.index.json"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text, value", [("True", True), ("False", False), ("500", 500), ("-1", -1)])
def test_sample_train_is_a_switch_or_a_number(text, value):
    flags = parse_flags(RLFlags, [*RL.split(), "--sample_train", text], about="")
    assert flags.sample_train is value if isinstance(value, bool) else flags.sample_train == value
