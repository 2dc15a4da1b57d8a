"""Every benchmark at toy size: it runs to its end, and its last line is JSON with the promised keys."""

import json
import shutil

import pytest
from tiny import make_dataset, write_config

from benchmarks import bench_balanced_kmeans, bench_data, bench_decode, bench_grpo, bench_sft, bench_trie
from minionerec.common.files import InputError

DECODE_KEYS = {
    "ratio",
    "tokens",
    "padding",
    "formula_tokens",
    "tokens_off",
    "textbook_tokens",
    "phases_s",
    "bf16_overlap",
}
TOY_DECODE = {"shape": "qwen3-small", "vocab_size": 400, "num_beams": 4, "batch_size": 3, "repeats": 1}


def published_format(paths: dict, root):
    """`root` with the files of `paths` in the folders of the published format."""
    for name, target in (
        ("train_file", "train/toy.csv"),
        ("test_data_path", "test/toy.csv"),
        ("sid_index_path", "index/toy.index.json"),
        ("item_meta_path", "index/toy.item.json"),
    ):
        (root / target).parent.mkdir(exist_ok=True)
        shutil.copy(paths[name], root / target)
    return root


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return published_format(make_dataset(root / "flat", deep=False), root)


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def check_decode(found: dict) -> None:
    assert DECODE_KEYS <= found.keys() and found["agree"]
    assert set(found["phases_s"]) == {"prefill", "steps", "forced_tail", "trie_and_selection"}
    assert found["textbook_tokens"] > found["tokens"] == sum(found["tokens_by_phase"].values())
    assert set(found["bf16_overlap"]) == {"top_4"} and 0 <= found["bf16_overlap"]["top_4"] <= 1


def test_decode_random_prompts(capsys):
    bench_decode.bench(**TOY_DECODE, prompt_length=12, items=300, codes=8)
    found = last_line(capsys)
    check_decode(found)
    # 3 prompts of 12 tokens; every beam feeds its three SID tokens. The textbook feeds 4 copies of every prompt.
    assert found["tokens"] == found["formula_tokens"] == 3 * (12 + 4 * 3) and found["tokens_off"] == 0
    assert found["padding"] == 0 and found["textbook_tokens"] == 3 * 4 * (12 + 3)


def test_decode_published_data(data_root, capsys):
    bench_decode.bench(str(data_root), "toy", **TOY_DECODE)
    found = last_line(capsys)
    check_decode(found)
    assert abs(found["tokens_off"]) <= 0.05


def test_decode_longer_prompts(data_root, capsys):
    bench_decode.bench(str(data_root), "toy", task="title_history2sid", bf16=False, **TOY_DECODE)
    longer = last_line(capsys)
    assert longer["agree"] and longer["task"] == "title_history2sid" and longer["bf16_overlap"] is None
    bench_decode.bench(str(data_root), "toy", bf16=False, **TOY_DECODE)
    assert longer["prompt_lengths"] > last_line(capsys)["prompt_lengths"]


def test_decode_with_a_checkpoint(trained, tmp_path, capsys):
    bench_decode.bench(str(published_format(trained.paths, tmp_path)), "toy", model=trained.checkpoint, **TOY_DECODE)
    found = last_line(capsys)
    check_decode(found)
    assert found["model"] == trained.checkpoint and found["shape"] is None


def test_decode_says_what_is_wrong(data_root):
    with pytest.raises(InputError, match="--task title2sid: expected one of next_sid, title_history2sid"):
        bench_decode.bench(str(data_root), "toy", task="title2sid", **TOY_DECODE)
    with pytest.raises(InputError, match="--model: needs --data_root"):
        bench_decode.bench(model="somewhere", **TOY_DECODE)
    with pytest.raises(InputError, match=r"--data_root .*expected test/other\*\.csv"):
        bench_decode.bench(str(data_root), "other", **TOY_DECODE)
    with pytest.raises(InputError, match="--batch_size 5000: .* has only"):
        bench_decode.bench(str(data_root), "toy", **{**TOY_DECODE, "batch_size": 5000})


def test_lists_that_differ_do_not_agree():
    ours = [[((1, 9), -1.0), ((2, 9), -2.0), ((3, 9), -3.0)]]
    assert bench_decode.agree(ours, [[((1, 9), -1.0), ((2, 9), -2.0), ((4, 9), -3.0)]])  # a tie at the end of the list
    assert not bench_decode.agree(ours, [[((1, 9), -1.0), ((5, 9), -2.0), ((3, 9), -3.0)]])
    assert not bench_decode.agree(ours, [[((1, 9), -1.0), ((3, 9), -2.0), ((2, 9), -3.0)]])
    assert not bench_decode.agree(ours, [ours[0][:2]])


def test_sft(data_root, tmp_path, capsys):
    bench_sft.bench(str(data_root), "toy", write_config(tmp_path), rows=20)
    assert {"token_ratio", "time_ratio", "loss_difference", "gradient_difference"} <= last_line(capsys).keys()


def test_trie(capsys):
    bench_trie.bench([200, 400], levels=3, codes=10, num_beams=5, users=2, repeats=1)
    found = last_line(capsys)
    assert {"sizes", "step_ratio"} <= found.keys() and [size["items"] for size in found["sizes"]] == [200, 400]


def test_balanced_kmeans(capsys):
    bench_balanced_kmeans.bench([60], [80], ["mixture"], clusters=4, dim=3, repeats=1)
    assert {"compared", "large"} <= last_line(capsys).keys()


def test_data(tmp_path, capfd):
    bench_data.bench(1000, work_dir=str(tmp_path))
    assert {"time_ratio", "memory_ratio"} <= last_line(capfd).keys()


def test_grpo(data_root, capsys):
    toy = {"shape": "qwen3-small", "vocab_size": 400, "num_generations": 4, "batch_size": 4, "prompts_per_pass": 2}
    bench_grpo.bench(str(data_root), "toy", **toy)
    found = last_line(capsys)
    assert {"ratio", "phase_ratios", "phases_s", "peak_mb_more"} <= found.keys() and found["agree"]
    assert max(found["loss_difference"], found["log_prob_difference"], found["gradient_difference"]) < 1e-3
    bench_grpo.bench(**{**toy, "vocab_size": 600, "batch_size": 2, "prompts_per_pass": 1})  # rows made up
    assert last_line(capsys)["data"] == "made up"
    with pytest.raises(InputError, match="--batch_size a multiple of --prompts_per_pass"):
        bench_grpo.bench(**{**toy, "batch_size": 5})
