"""Every benchmark at toy size: it runs to its end, and its last line is JSON with the promised keys."""

import json
import shutil
from dataclasses import replace

import pytest
from tiny import make_dataset, write_config

from benchmarks import (
    bench_balanced_kmeans,
    bench_batch,
    bench_data,
    bench_decode,
    bench_evaluation,
    bench_grpo,
    bench_sft,
    bench_stream,
    bench_trie,
)
from benchmarks.arithmetic import count_forward_flops
from minionerec.common.cli import parse_flags
from minionerec.common.files import InputError
from minionerec.evaluation import predict
from minionerec.evaluation.settings import RecommendFlags
from recommend import recommend

DECODE_KEYS = {
    "ratio",
    "tokens",
    "padding",
    "formula_tokens",
    "tokens_off",
    "textbook_tokens",
    "cpu_ratio",
    "arithmetic_share",
    "phases_s",
    "bf16_overlap",
}
TOY_DECODE = {"shape": "qwen3-small", "vocab_size": 400, "num_beams": 4, "batch_size": 3, "repeats": 1}
TOY_GRPO = {
    "shape": "qwen3-small",
    "vocab_size": 400,
    "num_generations": 4,
    "batch_size": 4,
    "prompts_per_pass": 2,
}


def published_format(paths: dict, root) -> str:
    """`root`, with the files of `paths` in the folders of the published format."""
    for name, target in (
        ("train_file", "train/toy.csv"),
        ("test_data_path", "test/toy.csv"),
        ("sid_index_path", "index/toy.index.json"),
        ("item_meta_path", "index/toy.item.json"),
    ):
        (root / target).parent.mkdir(exist_ok=True)
        shutil.copy(paths[name], root / target)
    return str(root)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return published_format(make_dataset(root / "flat", deep=False), root)


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def check_decode(report: dict) -> None:
    assert DECODE_KEYS <= report.keys() and report["agree"]
    assert set(report["phases_s"]) == {"prefill", "steps", "forced_tail", "logits", "trie_and_selection"}
    assert report["textbook_tokens"] > report["tokens"] == sum(report["tokens_by_phase"].values())
    assert set(report["bf16_overlap"]) == {"top_4"} and 0 <= report["bf16_overlap"]["top_4"] <= 1


def decode(**flags) -> None:
    bench_decode.bench(bench_decode.DecodeBenchFlags(**{**TOY_DECODE, **flags}))


def test_decode_random_prompts(capsys):
    decode(prompt_length=12, items=300, codes=8)
    report = last_line(capsys)
    check_decode(report)
    # 3 prompts of 12 tokens; every beam feeds its three SID tokens. The textbook feeds 4 copies of every prompt.
    assert report["tokens"] == report["formula_tokens"] == 3 * (12 + 4 * 3) and report["tokens_off"] == 0
    assert report["padding"] == 0 and report["textbook_tokens"] == 3 * 4 * (12 + 3)
    # 45 states have logits; a beam sees its prompt and 1, 2, 3 tokens of its own.
    config = bench_decode.build_random_model("qwen3-small", 400 + 3 * 8, 0).config
    pairs = 3 * 12 * 13 // 2 + 3 * 4 * (3 * 12 + 1 + 2 + 3)
    expected = count_forward_flops(config, report["tokens"], pairs, 3 + 3 * 4 * 3)
    assert report["gflop"] == round(expected / 1e9, 1) and 0 < report["arithmetic_share"]


def test_decode_published_data(data_root, capsys):
    decode(data_root=data_root, category="toy")
    report = last_line(capsys)
    check_decode(report)
    assert abs(report["tokens_off"]) <= 0.05


def test_decode_longer_prompts(data_root, capsys):
    decode(data_root=data_root, category="toy", task="title_history2sid", bf16=False)
    longer = last_line(capsys)
    assert longer["agree"] and longer["task"] == "title_history2sid" and longer["bf16_overlap"] is None
    decode(data_root=data_root, category="toy", bf16=False)
    assert longer["prompt_lengths"] > last_line(capsys)["prompt_lengths"]


def test_decode_with_a_checkpoint(trained, tmp_path, capsys):
    decode(data_root=published_format(trained.paths, tmp_path), category="toy", model=trained.checkpoint)
    report = last_line(capsys)
    check_decode(report)
    assert report["model"] == trained.checkpoint and report["shape"] is None


def test_decode_says_what_is_wrong(data_root, capsys):
    with pytest.raises(SystemExit):
        parse_flags(bench_decode.DecodeBenchFlags, ["--task", "title2sid"])
    assert "--task title2sid: expected one of next_sid, title_history2sid" in capsys.readouterr().err
    with pytest.raises(InputError, match="--model: needs --data_root"):
        decode(model="somewhere")
    with pytest.raises(InputError, match=r"--data_root .*expected test/other\*\.csv"):
        decode(data_root=data_root, category="other")
    with pytest.raises(InputError, match="--batch_size 5000: .* has only"):
        decode(data_root=data_root, category="toy", batch_size=5000)


def test_lists_that_differ_do_not_agree():
    ours = [[((1, 9), -1.0), ((2, 9), -2.0), ((3, 9), -3.0)]]
    assert bench_decode.agree(ours, [[((1, 9), -1.0), ((2, 9), -2.0), ((4, 9), -3.0)]])  # a tie at the end of the list
    assert not bench_decode.agree(ours, [[((1, 9), -1.0), ((5, 9), -2.0), ((3, 9), -3.0)]])
    assert not bench_decode.agree(ours, [[((1, 9), -1.0), ((3, 9), -2.0), ((2, 9), -3.0)]])
    assert not bench_decode.agree(ours, [ours[0][:2]])


def test_sft(data_root, tmp_path, capsys):
    flags = {"data_root": data_root, "category": "toy", "base_model": write_config(tmp_path), "rows": 20}
    bench_sft.bench(bench_sft.SFTBenchFlags(**flags))
    report = last_line(capsys)
    assert {"ratio", "token_ratio", "packed_token_ratio", "time_ratio", "packed_time_ratio"} <= report.keys()
    assert report["loss_difference"] < 1e-4 and report["gradient_difference"] < 1e-4
    assert report["tree_tokens"] < report["packed_tokens"] < report["padded_tokens"]
    assert all(0 < share < 1 for share in report["share_of_bound"].values())
    with pytest.raises(InputError, match="--pack_tokens 8: the longest row has"):
        bench_sft.bench(bench_sft.SFTBenchFlags(**flags, pack_tokens=8))


def test_trie(capsys):
    sizes = {"items": [200, 400], "levels": 3, "codes": 10, "num_beams": 5, "users": 2, "repeats": 1}
    bench_trie.bench(bench_trie.TrieBenchFlags(**sizes))
    report = last_line(capsys)
    assert {"ratio", "sizes", "step_ratio"} <= report.keys()
    assert [size["items"] for size in report["sizes"]] == [200, 400]
    with pytest.raises(InputError, match="--items 400: too many for 2 codes on 3 levels"):
        bench_trie.bench(bench_trie.TrieBenchFlags(**{**sizes, "codes": 2}))


def test_balanced_kmeans(capsys):
    sizes = {"sizes": [60], "large_sizes": [80], "kinds": ["mixture"], "clusters": 4, "dim": 3, "repeats": 1}
    bench_balanced_kmeans.bench(bench_balanced_kmeans.BalancedKMeansBenchFlags(**sizes))
    report = last_line(capsys)
    assert {"ratio", "compared", "large"} <= report.keys()
    assert all(0 < row["share_of_bound"] < 1 for row in report["compared"])


def test_data(tmp_path, capfd):
    bench_data.bench(bench_data.DataBenchFlags(reviews=1000, work_dir=str(tmp_path)))
    assert {"ratio", "time_ratio", "memory_ratio"} <= last_line(capfd).keys()


def test_stream(tmp_path, capfd):
    sizes = {"rows": 200, "plain_rows": [200], "items": 50, "steps": 2, "work_dir": str(tmp_path)}
    bench_stream.bench(bench_stream.StreamBenchFlags(**sizes, base_model=write_config(tmp_path)))
    report = last_line(capfd)
    assert report["agree"] and {"rows_per_s", "first_step_s", "peak_mb", "plain_peak_mb"} <= report["sizes"][0].keys()
    with pytest.raises(InputError, match="--rows 100: expected 64 or more, and no size of --plain_rows above it"):
        bench_stream.bench(bench_stream.StreamBenchFlags(**{**sizes, "rows": 100}))


def test_evaluation(tmp_path, monkeypatch):
    """Both ways in this process, which spares the start of four others."""
    flags = bench_evaluation.EvaluationBenchFlags(
        rows=300, plain_rows=[300], items=60, K=20, base_model=write_config(tmp_path)
    )
    bench_stream.generate_split(tmp_path / "300", flags.rows, flags.items, flags.seed)
    monkeypatch.setattr(predict, "rank_sids", predict.rank_sids)  # put back afterwards
    bench_evaluation.make_checkpoint(tmp_path / "300", flags)
    bench_evaluation.evaluate_streamed(tmp_path / "300", flags)
    bench_evaluation.evaluate_plain(tmp_path / "300", flags)
    bench_evaluation.check_same_files(tmp_path / "300")
    (tmp_path / "300" / "plain" / "test.json").write_text("[]")
    with pytest.raises(InputError, match="the two ways write another test.json"):
        bench_evaluation.check_same_files(tmp_path / "300")
    with pytest.raises(InputError, match="--rows 100: expected no size of --plain_rows above it"):
        bench_evaluation.bench(replace(flags, rows=100))


def grpo(**flags) -> None:
    bench_grpo.bench(bench_grpo.GRPOBenchFlags(**{**TOY_GRPO, **flags}))


def test_grpo(data_root, capsys):
    grpo(data_root=data_root, category="toy")
    report = last_line(capsys)
    assert {"ratio", "phase_ratios", "phases_s", "peak_mb_more"} <= report.keys() and report["agree"]
    assert max(report["loss_difference"], report["log_prob_difference"], report["gradient_difference"]) < 1e-3
    assert all(seconds > 0 for phases in report["phases_s"].values() for seconds in phases.values())
    grpo(vocab_size=600, batch_size=2, prompts_per_pass=1)  # rows made up
    assert last_line(capsys)["data"] == "made up"
    with pytest.raises(InputError, match="--batch_size a multiple of --prompts_per_pass"):
        grpo(batch_size=5)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_batch(trained, tmp_path, monkeypatch, capsys, kind):
    """The command in this process, which spares the start of another."""

    def run_here(flags, users, output):
        names = {"base_model": flags.model, "top": flags.K, "num_beams": flags.num_beams, "exclude_seen": True}
        recommend(RecommendFlags(**names, input=str(users), output=str(output)))
        return 2.0

    monkeypatch.setattr(bench_batch, "run_recommend", run_here)
    sizes = {"users": 40, "K": 3, "num_beams": 10, "longest_history": 4, "kind": kind}
    bench_batch.bench(bench_batch.BatchBenchFlags(model=trained.checkpoint, **sizes, work_dir=str(tmp_path)))
    report = last_line(capsys)
    assert report["users_per_s"] == 20 and report["rows_per_s"] == 60 and report["peak_mb"] >= 0
    assert not list(tmp_path.iterdir())


def test_batch_finds_a_user_without_a_list(tmp_path):
    path = tmp_path / "lists.jsonl"
    lines = [{"user_id": f"U{number}", "recommendations": [{"item_id": number + 5}]} for number in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert bench_batch.check_lists(path, iter([[1], [2], [3]]), 1) == 3
    for histories, said in (([[1], [2], [3], [4]], "for U3, found 0 for None"), ([[5], [2], [3]], "for U0, found 1")):
        with pytest.raises(InputError, match=said):
            bench_batch.check_lists(path, iter(histories), 1)
