"""The page of plots: what is drawn, for one to six models and for short lists, and the command with its messages."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from minionerec.common.files import InputError, read_json, write_json
from minionerec.common.records import Catalogue
from minionerec.evaluation.metrics import score_predictions
from minionerec.evaluation.plot import draw_metrics
from scripts.plots import PlotsFlags, plot_models

SIDS = [f"<{item}>" for item in range(60)]


def results(seed=0, longest=50, rows=120, counted=True):
    """Metrics of random lists; every seed has the same test rows, and the first of them are those of fewer rows."""
    split, model = random.Random(99), random.Random(seed)
    predictions, histories = [], []
    for _ in range(rows):
        target = split.randrange(60)
        ranked = model.sample(SIDS, longest)
        if model.random() < 0.3:
            ranked = list(dict.fromkeys([*ranked[: model.randrange(5)], SIDS[target], *ranked]))[:longest]
        predictions.append({"output": SIDS[target], "item_id": target, "predict": ranked})
        histories.append(split.sample(SIDS, split.randint(1, 9)))
    counts = {item: item // 2 for item in range(60)} if counted else {}
    catalogue = Catalogue(SIDS, [""] * 60, list(range(60)), counts)
    return score_predictions(predictions, catalogue, longest, histories)


@pytest.fixture
def drawn(monkeypatch):
    """Everything given to bar, plot and errorbar, in the order of the calls."""
    calls = {"bar": [], "plot": [], "errorbar": []}
    for name, seen in calls.items():
        function = getattr(Axes, name)

        def spy(axes, x, y, *args, function=function, seen=seen, **kwargs):
            seen.append((axes, list(np.atleast_1d(x)), list(np.atleast_1d(y)), args))
            return function(axes, x, y, *args, **kwargs)

        monkeypatch.setattr(Axes, name, spy)
    return calls


@pytest.mark.parametrize("models", [1, 2, 6])
def test_the_page_shows_the_figures(tmp_path, drawn, models):
    columns = {f"model {number}": results(number) for number in range(models)}
    draw_metrics(columns, tmp_path / "page.png")
    assert imread(tmp_path / "page.png").shape[:2] == (1200, 1600)
    assert [path.name for path in tmp_path.iterdir()] == ["page.png"]  # nothing temporary is left

    first, cutoffs = drawn["plot"][0][0], [1, 3, 5, 10, 20, 50]
    curves = [(x, y) for axes, x, y, _ in drawn["plot"] if axes is first][:models]
    intervals = [call for call in drawn["errorbar"] if call[0] is first]
    for (x, y), (_, at, value, (ends, *_)), result in zip(curves, intervals, columns.values(), strict=True):
        assert y == [result["item"][f"HR@{k}"] for k in cutoffs]
        assert np.allclose(np.log(x) - np.log(cutoffs), np.log(x[0])) and 0.9 < x[0] < 1.1
        assert at == [x[3]] and value == [y[3]]  # the interval stands on its point
        low, high = result["item_interval_95"]["HR@10"]
        assert [value[0] - ends[0][0], value[0] + ends[1][0]] == pytest.approx([low, high])

    assert len(drawn["bar"]) == 3 * models
    panels = [drawn["bar"][start : start + models] for start in range(0, 3 * models, models)]
    ways = ("item", "item_unseen")  # no two items share a SID, so that the others repeat the first
    for model, result in enumerate(columns.values()):
        assert panels[0][model][2] == [result[way]["HR@10"] for way in ways]
        for panel, split in ((1, "history_length"), (2, "target_popularity")):
            buckets = result["by"][split]
            axes, x, heights, _ = panels[panel][model]
            labels = [text.get_text() for text in axes.get_xticklabels()]
            assert labels == [f"{name}\n{bucket['rows']} rows" for name, bucket in buckets.items()]
            assert heights == [bucket["HR@10"] for bucket in buckets.values()]
    on_bars = [call for call in drawn["errorbar"] if call[0] is not first]
    for (axes, x, heights, _), (other, at, value, (ends, *_)) in zip(drawn["bar"], on_bars, strict=True):
        assert axes is other and at == x and value == heights and np.min(ends) >= 0 and np.max(ends) > 0
    for panel in panels:  # no bar hides another one
        places = sorted(place for _, x, _, _ in panel for place in x)
        assert min(np.diff(places)) > 0.84 / models * 0.99
    legend = [text.get_text() for text in drawn["bar"][0][0].figure.legends[0].get_texts()]
    assert legend == list(columns)


def test_lists_shorter_than_10_have_a_curve_only(tmp_path, drawn):
    draw_metrics({"short": results(longest=5)}, tmp_path / "page.png")
    assert drawn["plot"][0][1] == [1, 3, 5]
    assert not any(np.any(ends) for _, _, _, (ends, *_) in drawn["errorbar"])
    assert all("the lists are shorter than 10" in axes.get_title() for axes, *_ in drawn["bar"])
    assert all(height == 0 for _, _, heights, _ in drawn["bar"] for height in heights)


def test_ways_of_counting_are_shown_where_they_differ(tmp_path, drawn):
    shared = {**results(), "items_sharing_a_sid": 4}
    draw_metrics({"a": shared}, tmp_path / "page.png", "toy, run 1")
    labels = [text.get_text() for text in drawn["bar"][0][0].get_xticklabels()]
    assert labels == ["SID level", "item level,\nties at random", "item level", "item level,\nunseen items"]
    assert drawn["bar"][0][0].figure.get_suptitle() == "toy, run 1: recommendations for 120 rows"


def test_test_splits_of_other_sizes_show_both(tmp_path, drawn):
    draw_metrics({"a": results(0, rows=100), "b": results(1, rows=150)}, tmp_path / "page.png")
    axes = drawn["bar"][0][0]
    assert axes.figure.get_suptitle() == "Recommendations for 100 or 150 rows"
    labels = [text.get_text() for text in drawn["bar"][-1][0].get_xticklabels()]
    assert any(" to " in label for label in labels)


def test_a_model_without_counts_leaves_its_bars_out(tmp_path, drawn):
    draw_metrics({"a": results(counted=False)}, tmp_path / "page.png")
    assert drawn["bar"][-1][0].get_title() == "HR@10 by popularity of the target: it was not counted"
    drawn["bar"].clear()
    draw_metrics({"a": results(counted=False), "b": results(1)}, tmp_path / "page.png")
    heights = [heights for _, _, heights, _ in drawn["bar"][-2:]]
    assert not any(heights[0]) and heights[1] == [b["HR@10"] for b in results(1)["by"]["target_popularity"].values()]


def test_the_name_must_be_that_of_a_picture(tmp_path):
    metrics = tmp_path / "test.metrics.json"
    metrics.write_text("{}")
    with pytest.raises(InputError, match=r"test.metrics.json: the page of plots is a PNG image; .* end in .png"):
        draw_metrics({"a": results()}, metrics)
    assert metrics.read_text() == "{}"


def test_a_failure_leaves_the_old_page(tmp_path):
    (tmp_path / "page.png").write_bytes(b"old")
    with pytest.raises(AttributeError):
        draw_metrics({"a": {**results(), "by": None}}, tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_importing_it_does_not_load_matplotlib():
    code = "import sys, scripts.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False).returncode == 0


# -------------------------------------------------------------------------------------------------------------- command
def test_the_command(tmp_path, capsys):
    files = [tmp_path / model / "test.metrics.json" for model in ("sft", "rl")]
    for seed, path in enumerate(files):
        write_json(path, results(seed))
    flags = {"metrics": [str(path) for path in files], "output": str(tmp_path / "page.png")}
    plot_models(PlotsFlags(**flags))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["sft/test", "rl/test"]
    assert f"{read_json(files[1])['item']['HR@10']:.4f}" in lines[2]
    assert lines[3] == f"  -> {tmp_path / 'page.png'}" and imread(tmp_path / "page.png").shape[0] == 1200
    plot_models(PlotsFlags(**flags, names=["one", "two"]))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ["one", "two"]


def test_wrong_input(tmp_path):
    path, old = str(tmp_path / "sft" / "test.metrics.json"), str(tmp_path / "old.metrics.json")
    write_json(path, results())
    write_json(old, {key: value for key, value in results().items() if key not in ("by", "item_expected")})
    page = str(tmp_path / "page.png")
    for files, names, message in [
        (
            [path, old],
            None,
            r"old.metrics.json: expected a metrics file of evaluate.py with item_expected, by; evaluate ag",
        ),
        ([path, path], None, r"--names: sft/test stands for two files of --metrics"),
        ([path], ["a", "b"], r"--names: expected 1 names, one for every file of --metrics, got 2"),
        ([str(tmp_path / "none.json")], None, r"--metrics: .*none.json: no such file"),
    ]:
        with pytest.raises(InputError, match=message):
            plot_models(PlotsFlags(metrics=files, output=page, names=names))
    write_json(old, [1])
    with pytest.raises(InputError, match="old.metrics.json: expected a metrics file of evaluate.py with sid"):
        plot_models(PlotsFlags(metrics=[old], output=page))
    assert not (tmp_path / "page.png").exists()
