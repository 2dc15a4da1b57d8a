"""The baseline of docs/examples as a plugin: ranked and measured by baselines.py, and fused with a model."""

from collections import Counter
from pathlib import Path

import pytest
from tiny import make_dataset

from baselines import baselines
from evaluate import evaluate
from minionerec.common.files import InputError, read_json
from minionerec.common.records import read_rows
from minionerec.evaluation.settings import EvaluateFlags
from minionerec.recommenders.registry import BASELINES
from minionerec.recommenders.settings import BaselinesFlags

PLUGIN = str(Path(__file__).parent.parent / "docs" / "examples" / "baseline.py")


@pytest.fixture(autouse=True)
def clean_registry():
    before = dict(BASELINES)
    yield
    BASELINES.clear()
    BASELINES.update(before)


def score_together(train, history):
    """{item: score} by loops: how often it was a target after a history item, which counts less the older it is."""
    scores = Counter()
    for age, item in enumerate(reversed(history)):
        for row in train:
            scores[row.item_id] += 0.7**age * (item in row.history_ids)
    return {item: score for item, score in scores.items() if score}


def pick_flags(paths):
    return {name: paths[name] for name in ("train_file", "test_data_path", "info_file")}


def test_baselines_rank_it(tmp_path, capsys):
    paths, output = make_dataset(tmp_path), tmp_path / "out"
    names = ["popularity", "together"]
    baselines(BaselinesFlags(**pick_flags(paths), output_dir=str(output), names=names, plugin=[PLUGIN], K=10))
    train, test = read_rows(paths["train_file"]), read_rows(paths["test_data_path"])
    for prediction, row in zip(read_json(output / "together.json"), test, strict=True):
        scores = score_together(train, row.history_ids)
        total = sum(scores.values())
        ranked = prediction["predict_items"]
        assert len(ranked) == len(set(ranked)) == 10
        expected = [scores.get(item, 0) / total for item in ranked]
        assert prediction["score"] == pytest.approx(expected, abs=2e-6)
        assert prediction["score"] == sorted(prediction["score"], reverse=True)
        assert prediction["score"][0] == pytest.approx(max(scores.values()) / total, abs=2e-6)
    hits = [row["item_id"] in row["predict_items"] for row in read_json(output / "together.json")]
    metrics = read_json(output / "together.metrics.json")
    assert metrics["item"]["HR@10"] == pytest.approx(sum(hits) / len(hits), abs=1e-6)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:4]] == names


def test_a_changed_plugin_is_run_again(tmp_path):
    paths = make_dataset(tmp_path)
    plugin = tmp_path / "plugin.py"
    plugin.write_text(Path(PLUGIN).read_text())
    flags = BaselinesFlags(
        **pick_flags(paths), output_dir=str(tmp_path / "out"), names=["together"], plugin=[str(plugin)]
    )
    file = tmp_path / "out" / "together.json"
    written = []
    for text in ("", "", "\n# changed"):
        plugin.write_text(plugin.read_text() + text) if text else None
        BASELINES.pop("together", None)
        baselines(flags)
        written.append(file.stat().st_mtime_ns)
    assert written[0] == written[1] != written[2]


def test_a_model_is_fused_with_it(trained, tmp_path):
    flags = EvaluateFlags(
        base_model=trained.checkpoint,
        **pick_flags(trained.paths),
        result_json_data=str(tmp_path / "test.json"),
        num_beams=12,
        K=10,
        plugin=[PLUGIN],
        fuse="together",
        fuse_weight=[1e9],
    )
    evaluate(flags)
    train, test = read_rows(trained.paths["train_file"]), read_rows(trained.paths["test_data_path"])
    for prediction, row in zip(read_json(tmp_path / "test.fused.json"), test, strict=True):
        scores = score_together(train, row.history_ids)
        best = sorted(scores.values(), reverse=True)[:10]
        found = [scores.get(item, 0) for item in prediction["predict_items"][: len(best)]]
        assert found == pytest.approx(best)
    assert read_json(tmp_path / "test.fused.metrics.json")["fuse"] == "together"


def test_without_the_plugin_the_name_is_unknown(tmp_path):
    paths = make_dataset(tmp_path)
    with pytest.raises(InputError, match="--names together: expected some of popularity"):
        baselines(BaselinesFlags(**pick_flags(paths), output_dir=str(tmp_path / "out"), names=["together"]))
