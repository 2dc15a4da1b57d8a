"""The published command lines of evaluation and SASRec are accepted, flag by flag."""

from evaluate import resolve_evaluate_flags
from minionerec.common.cli import parse_flags
from minionerec.evaluation.settings import EvaluateFlags
from minionerec.recommenders.settings import SASRecFlags
from sasrec import resolve_sasrec_flags

EVALUATE = """--base_model path_to_model --info_file info.txt --category Industrial_and_Scientific
--test_data_path 0.csv --result_json_data temp/0.json --batch_size 8 --num_beams 50 --max_new_tokens 256
--temperature 1.0 --guidance_scale 1.0 --length_penalty 0.0"""
# What the published functions take beside what their scripts give.
EVALUATE_OTHERS = "--train_file= --K 0 --seed 42"
SASREC = """--epoch 500 --data Goodreads_5 --batch_size 1024 --hidden_factor 32 --num_filters 16 --filter_sizes [2,3,4]
--r_click 0.2 --r_buy 1.0 --lr 0.001 --save_flag 1 --cuda 1 --l2_decay 1e-5 --alpha 0 --beta 1.0 --model SASRec
--dropout_rate 0.3 --descri= --early_stop 20 --eval_num 1 --seed 1 --result_json_path ./result_temp/temp.json
--sample_num 65536 --debug False --loss_type bce"""
# The published script finds its files by the name of the data.
SASREC_FILES = """--train_file train.csv --valid_file valid.csv --test_data_path test.csv --info_file info.txt
--output_dir output"""
SASREC_WITHOUT_EFFECT = [
    *("data", "num_filters", "filter_sizes", "r_click", "r_buy", "save_flag", "cuda", "alpha", "beta", "descri"),
    *("eval_num", "result_json_path", "sample_num", "debug", "loss_type"),
]


def flags_without_effect(capsys):
    """The flags that are answered by a line that says why they do nothing, in the order of the lines."""
    lines = capsys.readouterr().out.splitlines()
    assert all(": has no effect here: " in line for line in lines)
    return [line.split(":")[0].removeprefix("--") for line in lines]


def test_evaluate(capsys):
    for more in ("", EVALUATE_OTHERS):
        flags = resolve_evaluate_flags(parse_flags(EvaluateFlags, [*EVALUATE.split(), *more.split()], about=""))
        assert (flags.K, flags.num_beams, flags.batch_size, flags.train_file) == (50, 50, 8, None)
        assert flags.category == "Industrial_and_Scientific"
        assert flags_without_effect(capsys) == ["max_new_tokens", "temperature", "guidance_scale"]


def test_sasrec(capsys):
    arguments = [*SASREC.split(), *SASREC_FILES.split()]
    flags = resolve_sasrec_flags(parse_flags(SASRecFlags, arguments, about=""))
    assert (flags.model, flags.num_layers, flags.num_epochs, flags.patience) == ("sasrec", 2, 500, 20)
    assert (flags.learning_rate, flags.weight_decay, flags.hidden_size, flags.dropout) == (1e-3, 1e-5, 32, 0.3)
    assert flags_without_effect(capsys) == SASREC_WITHOUT_EFFECT
    flags = resolve_sasrec_flags(parse_flags(SASRecFlags, [*SASREC_FILES.split(), "--model", "GRU"], about=""))
    assert (flags.model, flags.num_layers, flags.weight_decay) == ("gru4rec", 1, 0.0)
