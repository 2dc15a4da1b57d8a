"""The page of a run and the tables over runs: their figures are those of the files, and everything is escaped."""

import html
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from run_folder import TRICKY, make_run, write_stage

from minionerec.common.files import InputError, read_json, write_json
from minionerec.evaluation.significance import compute_item_ranks, mcnemar_test
from minionerec.reports import pictures
from minionerec.reports.curves import POINTS, read_trainings
from minionerec.reports.figures import estimate_share, rank_models, split_rows
from minionerec.reports.page import format_change, format_metric, render_run
from minionerec.reports.results import average_runs, tabulate_runs
from minionerec.reports.runs import describe_rl, read_run, read_run_data
from scripts.plots import PlotsFlags, plot_models
from scripts.report import ReportFlags, report
from scripts.summary import SummaryFlags, summary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return render_run(read_run(folder))


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are laid out and not drawn, which takes most of the time of a page."""
    monkeypatch.setattr(pictures, "_close_figure", lambda figure, alt: pictures.Picture("data:,", alt))


class Checker(HTMLParser):
    """Every tag that is opened is closed, in order; texts and images are kept."""

    VOID = {"meta", "img", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.images, self.texts, self.links = [], [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))
        if tag == "a":
            self.links.append(dict(attributes)["href"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_models_and_data_are_found(folder):
    run = read_run(folder)
    assert [(model.name, model.kind) for model in run.models] == [
        ("popularity", "baseline"),
        ("likeness of texts", "baseline"),
        ("after SFT", "sft"),
        ("after RL", "rl"),
        ("after RL, fused", "fused"),
    ]
    assert run.data_set == "csv" and run.seed == 0 and run.models[2].minutes == 3.0  # training and evaluation
    data = read_run_data(run)
    assert len(data.test_rows) == run.models[0].metrics["rows"] and data.items[1]["categories"] == "tools, saws"


def test_the_page_is_whole_and_needs_nothing_else(page):
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert all(image["src"].startswith("data:image/svg+xml;base64,") and image["alt"] for image in checker.images)
    assert len(checker.images) >= 12
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "@import" not in page and "<script" not in page
    for link in checker.links:
        assert f'id="{link[1:]}"' in page


def test_titles_are_texts(page):
    assert TRICKY not in page and "&lt;script&gt;alert(" in page


def test_the_figures_are_those_of_the_files(folder, page):
    metrics = read_json(folder / "rl" / "test.metrics.json")["item"]
    for key in ("HR@5", "HR@10", "HR@20", "NDCG@10"):
        assert f">{format_metric(metrics[key])}<small>" in page.replace("\n", "")
    run = read_run(folder)
    data = read_run_data(run)
    files = [folder / name / "test.json" for name in ("sft", "rl")]
    sft, rl = (compute_item_ranks(read_json(path), data.catalogue, str(path), "info")[0] for path in files)
    hits = [(ranks > 0) & (ranks <= 10) for ranks in (sft, rl)]
    difference = hits[1].mean() - hits[0].mean()
    p = mcnemar_test(int((hits[0] & ~hits[1]).sum()), int((hits[1] & ~hits[0]).sum()))
    assert f"HR@10 <b>{format_change(float(difference))}</b>" in page and f"p {format_metric(p)}" in page


def test_groups_are_counted_as_they_say(folder):
    data = read_run_data(read_run(folder))
    splits = split_rows(data)
    assert list(splits) == ["History length", "Popularity of the target", "Repeated or new", "Category of the target"]
    for title, groups in splits.items():
        together = np.stack([mask for _, mask in groups]).sum(0)
        assert (together == 1).all() or title == "Category of the target"
    ((name, mask),) = splits["Category of the target"]  # tools is a category of all items
    assert name == "saws" and mask.tolist() == [row.item_id % 2 == 1 for row in data.test_rows]
    new = dict(splits["Repeated or new"]).get("new")
    assert new.tolist() == [row.item_id not in row.history_ids for row in data.test_rows]


def test_an_interval_of_no_hits():
    share = estimate_share(0, 10)
    assert share.value == 0 and share.low == 0 and 0.2 < share.high < 0.4


def test_the_summary_says_whose_weights_were_kept(tmp_path, capsys):
    for kept, said in (
        ("RL", "RL's weights were kept (sum"),
        ("SFT", "the SFT weights were kept, so that it is SFT's"),
    ):
        make_run(tmp_path / kept, kept=kept)
        summary(SummaryFlags(run_dir=str(tmp_path / kept)))
        assert f"after RL: {said}" in capsys.readouterr().out
        assert "likeness of texts" in read_json(tmp_path / kept / "summary.json")["metrics"]


def test_whose_weights_were_kept(tmp_path, page, undrawn):
    assert "RL's weights were kept" in page.replace("’", "'")
    make_run(tmp_path / "kept", kept="SFT")
    run = read_run(tmp_path / "kept")
    assert describe_rl(run)["kept"] == "SFT"
    other = render_run(run)
    assert "The SFT weights were kept" in other and "the SFT weights: RL found none that were better" in other
    assert set(tabulate_runs([run])["weights of"]) == {"", "SFT"}


def test_curves_of_long_logs_are_means(folder):
    trainings = {training.name: training for training in read_trainings(read_run(folder))}
    assert list(trainings) == ["SFT", "RL", "rqvae"]
    loss = trainings["SFT"].panels[0].curves
    steps, values = loss["train"]
    assert len(steps) == 200 <= POINTS and steps[0] == 1.5 and values[0] == pytest.approx((3 + 1.5) / 2)
    assert loss["validation"][0] == list(range(40, 401, 40))
    assert list(trainings["RL"].panels[2].curves) == ["sum", "rule"]


def test_a_run_without_its_data_says_so(folder, tmp_path, undrawn):
    shutil.copytree(folder, tmp_path / "moved")
    for path in (tmp_path / "moved" / "csv").glob("test*"):
        path.unlink()
    run = read_run(tmp_path / "moved")
    for record in run.records.values():
        record["settings"] = {key: str(value).replace("first", "gone") for key, value in record["settings"].items()}
    shown = render_run(run)
    assert "the run's data are not where they were" in html.unescape(shown) and "Not known:" in shown
    assert format_metric(run.models[0].metrics["item"]["HR@10"]) in shown


def test_models_of_other_rows_are_left_out(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / "sft" / "test.json"
    write_json(path, read_json(path)[:-1])
    run = read_run(tmp_path / "other")
    ranked, left_out = rank_models(run.models, read_run_data(run))
    assert len(ranked) == 4 and len(left_out) == 1 and "after SFT: was measured on" in left_out[0]


def test_several_runs(tmp_path, capsys, undrawn):
    values = []
    for seed in (1, 2):
        make_run(tmp_path / f"seed{seed}", seed=seed)
        values.append(read_json(tmp_path / f"seed{seed}" / "rl" / "test.metrics.json")["item"]["HR@10"])
    report(ReportFlags(folders=[str(tmp_path / "seed1"), str(tmp_path / "seed2")]))
    written = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    names = ["seed1/report.html", "seed2/report.html", "report.html", "results.csv", "results.md"]
    assert written == [str(tmp_path / name) for name in names]
    means = average_runs(tabulate_runs([read_run(tmp_path / f"seed{seed}") for seed in (1, 2)]))
    row = means[means["method"] == "after RL"].iloc[0]
    assert row["runs"] == 2 and row["HR@10"] == pytest.approx(np.mean(values))
    assert row["HR@10 sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    text = (tmp_path / "results.md").read_text()
    assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in text
    overview = (tmp_path / "report.html").read_text()
    assert 'href="seed2/report.html"' in overview and (tmp_path / "results.csv").read_text().count("\n") == 11


def test_wrong_input(tmp_path):
    with pytest.raises(InputError, match="none: no such folder"):
        report(ReportFlags(folders=[str(tmp_path / "none")]))
    with pytest.raises(InputError, match=r"no \*.metrics.json below it"):
        report(ReportFlags(folders=[str(tmp_path)]))
    write_json(tmp_path / "a" / "x.metrics.json", {"item": {}})
    with pytest.raises(InputError, match="x.metrics.json: expected a metrics file .* with item_unseen, rows, illegal"):
        report(ReportFlags(folders=[str(tmp_path / "a")]))
    with pytest.raises(InputError, match="is given twice"):
        report(ReportFlags(folders=[str(tmp_path), str(tmp_path)]))
    write_json(tmp_path / "a" / "x.stage.json", [])
    with pytest.raises(InputError, match="expected the record of a stage"):
        report(ReportFlags(folders=[str(tmp_path / "a")]))
    write_stage(tmp_path / "b", "x", "x", {})
    with pytest.raises(InputError, match="--output_dir .*: is one of the runs"):
        for name in ("c", "d"):
            make_run(tmp_path / name)
        report(ReportFlags(folders=[str(tmp_path / "c"), str(tmp_path / "d")], output_dir=str(tmp_path / "c")))


def test_dry_runs_write_nothing(tmp_path, capsys):
    folder = tmp_path / "seed0"
    make_run(folder)
    before = sorted(path for path in tmp_path.rglob("*"))
    report(ReportFlags(folders=[str(folder)], dry_run=True))
    summary(SummaryFlags(run_dir=str(folder), dry_run=True))
    plot_models(
        PlotsFlags(metrics=[str(folder / "rl/test.metrics.json")], output=str(tmp_path / "plots.png"), dry_run=True)
    )
    assert sorted(path for path in tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    for name in ("report.html", "results.csv", "results.md", "summary.json", "plots.png"):
        assert f"not written, dry run: {tmp_path}" in printed and f"/{name}\n" in printed
