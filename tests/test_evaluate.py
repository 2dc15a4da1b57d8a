"""Evaluation end to end: files and their contract, numbers recomputed naively, legal lists, wrong input."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tiny import make_dataset, write_config

import evaluate as command
from evaluate import evaluate
from minionerec.common.files import InputError, read_json
from minionerec.common.records import read_info, read_rows
from minionerec.evaluation import predict
from minionerec.evaluation.plot import draw_metrics
from minionerec.evaluation.settings import EvaluateFlags
from minionerec.language.models import load_model
from minionerec.language.prompts import Encoder, load_checkpoint_prompts
from minionerec.training.settings import SFTFlags
from sft import sft


def run(trained, output, **changes):
    """(predictions, metrics) of an evaluation on the test split; changes may name other paths."""
    paths = trained.paths
    flags = dict(
        base_model=trained.checkpoint,
        **{key: paths[key] for key in ("train_file", "info_file", "test_data_path")},
        result_json_data=str(output / "test.json"),
        num_beams=20,
        K=10,
    )
    evaluate(EvaluateFlags(**{**flags, **changes}))
    return read_json(output / "test.json"), read_json(output / "test.metrics.json")


@pytest.fixture(autouse=True)
def quick_picture(monkeypatch):
    """Drawing takes a second; one test draws."""
    monkeypatch.setattr(command, "draw_metrics", lambda columns, path, title: Path(path).write_text(", ".join(columns)))


def assert_same(found, expected, tolerance=1e-5):
    """Two results of `run`: everything is equal, scores up to the tolerance."""
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], abs=tolerance)
        assert {**ours, "score": []} == {**theirs, "score": []}
    assert found[1] == expected[1]


@pytest.fixture
def searched(monkeypatch):
    """Numbers of rows of the searches so far, one a batch; `searched.limit` batches are done, the next one fails."""

    class Batches(list):
        limit = None

    batches, rank_sids = Batches(), predict.rank_sids

    def counting(model, catalogue_trie, examples, *args, **kwargs):
        if len(batches) == batches.limit:
            raise RuntimeError("out of memory")
        batches.append(len(examples))
        return rank_sids(model, catalogue_trie, examples, *args, **kwargs)

    monkeypatch.setattr(predict, "rank_sids", counting)
    return batches


def naive_metrics(predictions, train, catalogue, k):
    """(SID HR, SID NDCG, item HR, item NDCG) at k; items of one SID stand by train count, then id."""
    counts = {item: sum(row.item_id == item for row in train) for item in catalogue.item_ids}
    totals = [0.0] * 4
    for row in predictions:
        items = []
        for sid in row["predict"]:
            owners = [item for item, own in zip(catalogue.item_ids, catalogue.sids, strict=True) if own == sid]
            items += sorted(owners, key=lambda item: (-counts[item], item))
        for place, (target, ranked) in enumerate(((row["output"], row["predict"]), (row["item_id"], items))):
            if target in ranked[:k]:
                totals[2 * place] += 1
                totals[2 * place + 1] += 1 / math.log2(ranked.index(target) + 2)
    return [total / len(predictions) for total in totals]


def assert_metrics(predictions, metrics, paths, shared=False):
    train, catalogue = read_rows(paths["train_file"]), read_info(paths["info_file"], shared)
    for k in (1, 3, 5, 10):
        expected = naive_metrics(predictions, train, catalogue, k)
        found = [metrics[level][f"{name}@{k}"] for level in ("sid", "item") for name in ("HR", "NDCG")]
        assert found == pytest.approx(expected, abs=1e-6)


def test_end_to_end(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "draw_metrics", draw_metrics)
    predictions, metrics = run(trained, tmp_path)
    printed = capsys.readouterr()
    rows = read_rows(trained.paths["test_data_path"])
    catalogue = read_info(trained.paths["info_file"])
    contract = [(p["user_id"], p["item_id"], p["output"]) for p in predictions]
    assert contract == [(r.user_id, r.item_id, r.sid) for r in rows]
    assert [p["input"] for p in predictions] == ["".join(r.history_sids) for r in rows]
    for prediction in predictions:
        assert len(prediction["predict"]) == len(set(prediction["predict"])) == 10
        assert set(prediction["predict"]) <= set(catalogue.sids)
        assert prediction["score"] == sorted(prediction["score"], reverse=True) and len(prediction["score"]) == 10
        assert set(prediction) == {"user_id", "item_id", "input", "output", "predict", "score"}
    assert metrics["illegal"] == metrics["duplicates"] == metrics["short_lists"] == metrics["items_sharing_a_sid"] == 0
    assert metrics["rows"] == len(rows)
    assert_metrics(predictions, metrics, trained.paths)
    assert metrics["sid"] == metrics["item"]
    assert metrics["item"]["HR@10"] > 10 / len(catalogue.sids)  # it learnt something
    assert f"{metrics['item']['HR@10']:.4f}" in printed.out
    assert "row" not in printed.err  # no bar where there is no terminal, and no line for short work

    names = ("test.json", "test.metrics.json", "test.png", "test.stage.json", "test.settings.yaml")
    files = [tmp_path / name for name in names]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert files[2].read_bytes().startswith(b"\x89PNG")
    written = [path.stat().st_mtime_ns for path in files]
    run(trained, tmp_path)
    assert [path.stat().st_mtime_ns for path in files] == written
    run(trained, tmp_path, num_beams=19)
    assert files[0].stat().st_mtime_ns != written[0]


def test_the_list_is_the_exact_ranking(trained, tmp_path):
    """With as many beams as items: the catalogue by the log-probability of prompt + SID + end, by ordinary forwards."""
    predictions, _ = run(trained, tmp_path, num_beams=30, K=30, sample=2)
    model, tokenizer = load_model(trained.checkpoint, "base_model")
    encoder = Encoder(tokenizer, load_checkpoint_prompts(trained.checkpoint))
    sids = read_info(trained.paths["info_file"]).sids
    assert len(predictions) == 2 and {sid.count("<") for sid in sids} == {3, 4}  # trap 8: nothing is cut
    for prediction in predictions:
        (prompt,) = encoder.prompt_ids([prediction["input"]])
        scores = {}
        for sid, target in zip(sids, encoder.target_ids("next_sid", sids), strict=True):
            with torch.no_grad():
                log_probs = model.eval()(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
            scores[sid] = sum(log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(target))
        assert prediction["predict"] == sorted(sids, key=lambda sid: -scores[sid])


def test_the_batch_size_does_not_matter(trained, tmp_path):
    assert_same(*(run(trained, tmp_path / str(size), batch_size=size) for size in (1, 16)))


def test_hf_generate_gives_the_same(trained, tmp_path):
    """And neither engine reads the checkpoint's own generation_config (trap 5)."""
    changed = tmp_path / "checkpoint"
    shutil.copytree(trained.checkpoint, changed)
    own = {"do_sample": True, "temperature": 0.2, "top_k": 2, "repetition_penalty": 5.0, "suppress_tokens": [300, 301]}
    (changed / "generation_config.json").write_text(json.dumps(own))
    changes = {"num_beams": 8, "K": 8, "length_penalty": 0.5, "batch_size": 7}  # 30 items: beams are lost on the way
    expected = run(trained, tmp_path / "tree", **changes)
    for engine in ("hf", "tree"):
        found = run(trained, tmp_path / engine, **changes, engine=engine, base_model=str(changed), force=True)
        assert_same(found, expected, 1e-4)


# ------------------------------------------------------------------------------------------------------------ resuming
def cut_off(trained, output, searched, batches=2, **changes):
    """Let an evaluation in batches of 4 fail after some of them, and tear its last line as a kill would."""
    searched.limit = batches
    with pytest.raises(RuntimeError, match="out of memory"):
        run(trained, output, batch_size=4, **changes)
    # A process that is killed leaves its lock behind, which nobody holds then; this one is still alive.
    written = {"test.stage.json", "test.settings.yaml", "test.partial", "test.lock"}
    assert {path.name for path in output.iterdir()} == written
    with (output / "test.partial" / "rank0.jsonl").open("a") as file:
        file.write('{"rows": [0, 1], "resul')
    searched.limit = None
    searched.clear()


def test_a_cut_off_run_goes_on_where_it_was(trained, tmp_path, searched):
    expected = run(trained, tmp_path / "whole", batch_size=4)
    rows = len(expected[0])
    assert sum(searched) == rows
    searched.clear()
    cut_off(trained, tmp_path / "cut", searched)
    cut_off(trained, tmp_path / "cut", searched, batches=1)  # and once more
    found = run(trained, tmp_path / "cut", batch_size=4)
    assert sum(searched) == rows - 12 and rows > 24
    assert found == expected
    assert not (tmp_path / "cut" / "test.partial").exists()


def test_a_run_that_only_has_to_write_its_result(trained, tmp_path, searched, monkeypatch):
    def full(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(command, "write_json", full)
        with pytest.raises(OSError, match="disk full"):
            run(trained, tmp_path)
    predictions, _ = run(trained, tmp_path)
    assert sum(searched) == len(predictions)


@pytest.mark.parametrize("change", ["setting", "input", "force"])
def test_another_run_does_not_use_the_rows_of_a_cut_off_one(trained, tmp_path, searched, change):
    shutil.copy(trained.paths["test_data_path"], tmp_path / "test.csv")
    changes = {"test_data_path": str(tmp_path / "test.csv")}
    cut_off(trained, tmp_path / "cut", searched, **changes)
    if change == "setting":
        changes["num_beams"] = 19
    if change == "input":
        text = (tmp_path / "test.csv").read_text()
        (tmp_path / "test.csv").write_text(text.replace("Item number", "Item  umber", 1))  # as many bytes
    if change == "force":
        changes["force"] = True
    predictions, _ = run(trained, tmp_path / "cut", batch_size=4, **changes)
    assert sum(searched) == len(predictions)


def test_a_sample_is_rows_of_the_file_in_its_order(trained, tmp_path):
    predictions, metrics = run(trained, tmp_path, sample=7)
    keys = [(p["user_id"], p["item_id"], p["input"]) for p in predictions]
    rows = [(r.user_id, r.item_id, "".join(r.history_sids)) for r in read_rows(trained.paths["test_data_path"])]
    assert metrics["rows"] == 7 and [row for row in rows if row in keys] == keys
    other, _ = run(trained, tmp_path, sample=7, seed=1)
    assert [p["input"] for p in other] != [p["input"] for p in predictions]


def test_more_recommendations_than_items(trained, tmp_path):
    predictions, metrics = run(trained, tmp_path, num_beams=50, K=50, sample=3)
    assert [len(p["predict"]) for p in predictions] == [30] * 3
    assert metrics["short_lists"] == 0 and metrics["item"]["HR@50"] == 1


def test_items_that_share_a_sid(tmp_path):
    """Only on request; then one of them counts at item level, the most popular first."""
    paths = make_dataset(tmp_path / "data", items=12, users=14, deep=True, shared=True)
    sft(
        SFTFlags(
            base_model=write_config(tmp_path),
            **{name: paths[name] for name in ("train_file", "eval_file", "sid_index_path", "item_meta_path")},
            output_dir=str(tmp_path / "sft"),
            train_from_scratch=True,
            batch_size=16,
            num_epochs=1,
            learning_rate=1e-2,
        )
    )
    flags = dict(
        **{key: paths[key] for key in ("train_file", "info_file")},
        base_model=str(tmp_path / "sft" / "final_checkpoint"),
        test_data_path=paths["eval_file"],
        result_json_data=str(tmp_path / "test.json"),
        num_beams=10,
        K=10,
    )
    with pytest.raises(InputError, match=r"info.txt, line 3: SID .* belongs to the item of line 2 already"):
        evaluate(EvaluateFlags(**flags))
    evaluate(EvaluateFlags(**flags, shared_sids=True))
    predictions, metrics = read_json(tmp_path / "test.json"), read_json(tmp_path / "test.metrics.json")
    assert all(len(set(p["predict"])) == len(p["predict"]) == 10 for p in predictions)  # 12 items, 10 SIDs
    assert metrics["items_sharing_a_sid"] == 4 and metrics["illegal"] == 0
    assert {1, 2, 4, 7} & {p["item_id"] for p in predictions}
    assert_metrics(predictions, metrics, paths, shared=True)
    assert metrics["sid"]["HR@10"] == 1 and metrics["sid"]["NDCG@10"] > metrics["item"]["NDCG@10"]


# ------------------------------------------------------------------------------------------- the published command line
def test_without_a_train_file(trained, tmp_path, capsys):
    """The model folder knows the popularity as well; of one that does not, a line says what is missing."""
    complete = run(trained, tmp_path / "a")
    assert run(trained, tmp_path / "b", train_file=None) == complete
    bare = shutil.copytree(trained.checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("catalogue"))
    capsys.readouterr()
    predictions, metrics = run(trained, tmp_path / "c", train_file=None, base_model=str(bare))
    said = [line for line in capsys.readouterr().out.splitlines() if "no --train_file" in line]
    assert said == [
        "[evaluate] no --train_file: items that share a SID stand by id, metrics are not split by popularity"
    ]
    assert predictions == complete[0]
    assert complete[1]["by"].pop("target_popularity") and metrics == complete[1]


def test_lists_are_as_long_as_there_are_beams(trained, tmp_path):
    """Without --K; and a K of 0, the published default, is no K."""
    for K in (None, 0):
        predictions, metrics = run(trained, tmp_path, K=K, num_beams=7, sample=2)
        assert [len(row["predict"]) for row in predictions] == [7, 7] and "HR@5" in metrics["item"]
    assert read_json(tmp_path / "test.stage.json")["settings"]["K"] == 7


# ---------------------------------------------------------------------------------------------------------- wrong input
def test_longer_lists_than_beams(trained, tmp_path):
    with pytest.raises(InputError, match="--K 21: cannot exceed --num_beams 20"):
        run(trained, tmp_path, K=21)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"engine": "sglang"}, "--engine sglang: expected one of tree, vllm, hf"),
        ({"engine": "vllm", "fuse": "content"}, "--engine vllm: has no --fuse"),
        ({"engine": "hf", "num_beams": 1, "K": 1}, "--engine hf: needs --num_beams of 2 or more"),
        ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
        ({"num_beams": 0}, "--num_beams 0: must be at least 1"),
        ({"K": -1}, "--K -1: must be at least 1"),
    ],
)
def test_flags_that_cannot_be(trained, tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        run(trained, tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_a_history_of_empty_sids(trained, tmp_path):
    lines = Path(trained.paths["test_data_path"]).read_text().splitlines()
    fields = read_rows(trained.paths["test_data_path"])[0]
    lines[1] = f"{fields.user_id},['t'],{fields.title!r},[1],{fields.item_id},[''],{fields.sid}".replace("'quoted'", "")
    (tmp_path / "test.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="test.csv: 1 rows have a history of empty SIDs"):
        run(trained, tmp_path, test_data_path=str(tmp_path / "test.csv"))


def test_a_model_that_does_not_know_a_sid(trained, tmp_path):
    lines = Path(trained.paths["info_file"]).read_text().splitlines()
    (tmp_path / "info.txt").write_text("\n".join(lines + ["<a_99><b_0><c_0>\tNew\t99"]))
    with pytest.raises(InputError, match=r"tokenizer \(.*\) does not know the SID token <a_99>") as error:
        run(trained, tmp_path, info_file=str(tmp_path / "info.txt"))
    assert "\n" not in str(error.value)


def test_a_target_that_is_not_in_the_catalogue(trained, tmp_path):
    row = read_rows(trained.paths["test_data_path"])[0]
    lines = Path(trained.paths["info_file"]).read_text().splitlines()
    (tmp_path / "info.txt").write_text("\n".join(line for line in lines if not line.endswith(f"\t{row.item_id}")))
    with pytest.raises(InputError, match=rf"test.csv, row 1: item {row.item_id} is not in .*info.txt"):
        run(trained, tmp_path, info_file=str(tmp_path / "info.txt"))
    (tmp_path / "info.txt").write_text("\n".join(line.replace(row.sid + "\t", "<x_1>\t") for line in lines))
    said = rf"test.csv, row 1: item {row.item_id} has SID {row.sid}, but .*info.txt says <x_1>"
    with pytest.raises(InputError, match=said):
        run(trained, tmp_path, info_file=str(tmp_path / "info.txt"))


@pytest.mark.parametrize("flag", ["test_data_path", "train_file"])
def test_an_empty_split(trained, tmp_path, flag):
    (tmp_path / "empty.csv").write_text(Path(trained.paths[flag]).read_text().splitlines()[0] + "\n")
    with pytest.raises(InputError, match="empty.csv: no rows below the header line"):
        run(trained, tmp_path, **{flag: str(tmp_path / "empty.csv")})


def test_missing_files_and_folders_without_a_model(trained, tmp_path):
    with pytest.raises(InputError, match="nowhere.csv: no such file"):
        run(trained, tmp_path, test_data_path=str(tmp_path / "nowhere.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="--base_model .*empty: no model folder"):
        run(trained, tmp_path, base_model=str(tmp_path / "empty"))


def test_nothing_is_written_by_a_failed_evaluation(trained, tmp_path):
    (tmp_path / "info.txt").write_text(json.dumps({"not": "an info file"}))
    with pytest.raises(InputError, match="info.txt, line 1: expected sid<TAB>title<TAB>item_id"):
        run(trained, tmp_path, info_file=str(tmp_path / "info.txt"))
    assert not (tmp_path / "test.json").exists() and not (tmp_path / "test.metrics.json").exists()


def test_seen_items_are_left_out_and_others_take_their_place(trained, tmp_path):
    rows = read_rows(trained.paths["test_data_path"])
    items = len(read_info(trained.paths["info_file"]).sids)
    complete, _ = run(trained, tmp_path / "a", num_beams=items, K=items)
    found, metrics = run(trained, tmp_path / "b", num_beams=items, exclude_seen=True)
    assert metrics["seen_in_top_10"] == 0 and metrics["short_lists"] == 0
    for row, ours, whole in zip(rows, found, complete, strict=True):
        assert ours["predict"] == [sid for sid in whole["predict"] if sid not in row.history_sids][:10]
    pairs = zip(rows, complete, strict=True)
    assert any(set(row.history_sids) & set(whole["predict"][:10]) for row, whole in pairs)


def test_the_newest_items_may_be_found_again(trained, tmp_path):
    rows = read_rows(trained.paths["test_data_path"])
    items = len(read_info(trained.paths["info_file"]).sids)
    complete, _ = run(trained, tmp_path / "a", num_beams=items, K=items)
    found, _ = run(trained, tmp_path / "b", num_beams=items, exclude_seen=True, repeat_newest=2)
    for row, ours, whole in zip(rows, found, complete, strict=True):
        older = {sid for sid in row.history_sids if sid not in row.history_sids[-2:]}
        assert ours["predict"] == [sid for sid in whole["predict"] if sid not in older][:10]
    with pytest.raises(InputError, match="--repeat_newest 2: expected 0 or more, with --exclude_seen True"):
        run(trained, tmp_path / "c", repeat_newest=2)


def test_only_items_of_a_file_are_found(trained, tmp_path):
    catalogue = read_info(trained.paths["info_file"])
    chosen = catalogue.item_ids[3:15]
    wanted = tmp_path / "items.txt"
    wanted.write_text("\n".join(map(str, chosen)) + "\n\n")
    items = len(catalogue.sids)
    plain, _ = run(trained, tmp_path / "a", num_beams=items, K=items)
    found, _ = run(trained, tmp_path / "b", num_beams=items, only_items=str(wanted))
    allowed = {catalogue.sid_of[item] for item in chosen}
    for ours, whole in zip(found, plain, strict=True):
        assert ours["predict"] == [sid for sid in whole["predict"] if sid in allowed][:10]
    wanted.write_text("3\nseven\n")
    with pytest.raises(InputError, match="items.txt, line 2: expected the id of an item"):
        run(trained, tmp_path / "c", only_items=str(wanted))
    wanted.write_text("\n")
    with pytest.raises(InputError, match="no item id"):
        run(trained, tmp_path / "c", only_items=str(wanted))


def test_renormalised_scores(trained, tmp_path):
    """With a beam for every item, the probabilities of the whole catalogue add up to one."""
    items = len(read_info(trained.paths["info_file"]).sids)
    found, _ = run(trained, tmp_path, renormalize=True, num_beams=items, K=items)
    for row in found:
        assert sum(map(math.exp, row["score"])) == pytest.approx(1, abs=1e-4)


def test_what_the_hf_engine_cannot_do_and_no_rows(trained, tmp_path):
    for flags in ({"renormalize": True}, {"exclude_seen": True}, {"only_items": "x"}):
        with pytest.raises(InputError, match="--engine hf: has neither"):
            run(trained, tmp_path, engine="hf", **flags)
    with pytest.raises(InputError, match="--sample 0: expected"):
        run(trained, tmp_path, sample=0)
