"""The SID report: every figure against loops over dictionaries, tables with known values, the page, and the command."""

import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from itertools import combinations, pairwise, permutations
from statistics import median

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minionerec.common.cli import parse_flags, run_command
from minionerec.common.embeddings import save_embeddings
from minionerec.common.files import InputError, read_json, write_json
from rq.index import quality_figures, quality_report
from rq.index.collisions import make_sid_tokens
from rq.index.quality_figures import measure_quality
from rq.index.quality_plot import format_quality
from rq.index.quality_report import list_report_files, write_report
from rq.quality import report_quality
from rq.settings import QualityFlags


def approximately(value):
    return pytest.approx(value, rel=1e-4, abs=1e-6)


def same(report, expected):
    """Equal up to the six digits that a report shows."""
    if isinstance(expected, dict):
        assert report.keys() == expected.keys()
        for key, value in expected.items():
            same(report[key], value)
    elif isinstance(expected, list):
        assert len(report) == len(expected)
        for one, other in zip(report, expected, strict=True):
            same(one, other)
    else:
        assert report == (approximately(expected) if isinstance(expected, float) else expected)


def cosine(one, other):
    lengths = math.sqrt(sum(a * a for a in one)) * math.sqrt(sum(b * b for b in other))
    return sum(a * b for a, b in zip(one, other, strict=True)) / lengths if lengths else 0.0


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else None


def spread(values):
    values = list(values)
    return {"mean": sum(values) / len(values), "median": float(median(values)), "max": max(values)}


def buckets(keys, end=""):
    sizes = Counter(keys)
    unique = sum(sizes[key] == 1 for key in keys)
    return {
        f"distinct_sids{end}": len(sizes),
        f"collision_rate{end}": 1.0 - len(sizes) / len(keys),
        f"items_with_unique_sid{end}": unique,
        f"items_sharing_a_sid{end}": len(keys) - unique,
        f"largest_bucket{end}": max(sizes.values()),
    }


def twin(sids, array, sizes=None, neighbours=10):
    """The report of all items (no sampling), written down from its definition."""
    n, rows, items = len(sids), array.astype(float).tolist(), range(len(sids))
    levels = len(sizes) if sizes else min(map(len, sids))
    sizes_known, sizes = sizes is not None, list(sizes or [])
    for level in range(len(sizes), levels):
        sizes.append(1 + max(int(re.search(r"\d+", sid[level])[0]) for sid in sids))
    near = {
        i: sorted((j for j in items if j != i), key=lambda j: -cosine(rows[i], rows[j]))[:neighbours] for i in items
    }
    centre = [mean(column) for column in zip(*rows, strict=True)]
    residuals = [list(row) for row in rows]
    total = sum((value - c) ** 2 for row in rows for value, c in zip(row, centre, strict=True))
    per_level = []
    for level in range(levels):
        usage = Counter(sid[level] for sid in sids)
        counts = [usage[token] for token in usage] + [0] * (sizes[level] - len(usage))
        bits = -sum(c / n * math.log2(c / n) for c in counts if c)
        prefix = [tuple(sid[: level + 1]) for sid in sids]
        children = defaultdict(set)
        for sid, beginning in zip(sids, prefix, strict=True):
            children[beginning].update(sid[level + 1 : level + 2])
        for token in usage:
            members = [i for i in items if sids[i][level] == token]
            vector = [mean(residuals[i][d] for i in members) for d in range(len(centre))]
            for i in members:
                residuals[i] = [value - v for value, v in zip(residuals[i], vector, strict=True)]
        error = sum(value**2 for row in residuals for value in row)
        agreement = mean(float(prefix[i] == prefix[j]) for i in items for j in near[i])
        chance = mean(float(a == b) for a, b in permutations(prefix, 2))
        per_level.append(
            {
                "level": level + 1,
                "codes": sizes[level],
                "codes_used": len(usage),
                "dead_codes": sizes[level] - len(usage),
                "entropy_bits": float(bits),
                "perplexity": 2.0**bits,
                # Half the mean absolute difference of two codes' counts over their mean count.
                "gini": mean(float(abs(a - b)) for a in counts for b in counts) / (2 * n / sizes[level]),
                "prefixes": len(set(prefix)),
                "items_per_prefix": spread(Counter(prefix).values()),
                "children_per_prefix": spread(map(len, children.values())) if level + 1 < levels else None,
                "reconstruction_error": error / total if total else 0.0,
                "neighbour_agreement": agreement,
                "random_agreement": chance,
                "lift": agreement / chance if chance else None,
                "cosine_within_prefix": mean(
                    cosine(rows[i], rows[j]) for i, j in combinations(items, 2) if prefix[i] == prefix[j]
                ),
            }
        )
    return {
        "items": n,
        "levels": levels,
        "codebook_sizes": sizes,
        "codebook_sizes_known": sizes_known,
        **buckets([tuple(sid) for sid in sids]),
        "items_with_extra_token": sum(len(sid) > levels for sid in sids),
        **buckets([tuple(sid[:levels]) for sid in sids], "_without_extra"),
        "reconstruction_error": per_level[-1]["reconstruction_error"],
        "codebook_reconstruction_error": None,
        "neighbours": min(neighbours, n - 1),
        "sampled_items": n,
        "seed": 0,
        "cosine_of_random_pairs": mean(cosine(rows[i], rows[j]) for i, j in combinations(items, 2)),
        "per_level": per_level,
    }


@st.composite
def indexes(draw):
    """(SIDs, embeddings, codebook sizes or None): few codes, so that prefixes and SIDs are shared, and extra tokens."""
    n, levels, size = draw(st.integers(1, 30)), draw(st.integers(1, 4)), draw(st.integers(1, 12))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    extra = random.integers(-2, 3, n) if draw(st.booleans()) else None
    sids = make_sid_tokens(random.integers(size, size=(n, levels)), extra)
    if draw(st.booleans()):
        sids = [tuple(sid) for sid in sids]
    array = (random.standard_normal((n, draw(st.integers(3, 6)))) + draw(st.sampled_from([0, 1]))).astype(np.float32)
    # Neighbours are told apart in float32: no two cosines to one item may be closer than that.
    units = array.astype(float) / np.linalg.norm(array.astype(float), axis=1, keepdims=True)
    assume(n < 3 or np.diff(np.sort(units @ units.T, axis=1)[:, :-1], axis=1).min() > 2e-6)
    return sids, array, [size] * levels if draw(st.booleans()) else None


@settings(deadline=None, max_examples=120)
@given(indexes(), st.integers(1, 12), st.sampled_from([40, 4_000_000]))
def test_every_figure_equals_its_definition(index, neighbours, entries):
    sids, array, sizes = index
    before = array.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_figures, "BLOCK_ENTRIES", entries)  # blocks of a few rows, and one block of all
        report = measure_quality(sids, array, codebook_sizes=sizes, neighbours=neighbours)
    same(report, twin(sids, array, sizes, neighbours))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert np.array_equal(array, before)


def clusters(n=600, count=6, dim=16):
    """(cluster of each item, embeddings near their cluster's centre)"""
    random = np.random.default_rng(1)
    label = random.integers(count, size=n)
    return label, (random.standard_normal((count, dim))[label] * 5 + random.standard_normal((n, dim))).astype(
        np.float32
    )


def test_even_use_and_a_single_code():
    codes = np.stack([np.arange(64) % 8, np.zeros(64, int)], axis=1)
    report = measure_quality(make_sid_tokens(codes), clusters(64)[1], codebook_sizes=[8, 32])
    first, second = report["per_level"]
    assert first["entropy_bits"] == 3 and first["perplexity"] == 8 and first["gini"] == 0 and first["dead_codes"] == 0
    assert second["entropy_bits"] == 0 and second["perplexity"] == 1 and second["dead_codes"] == 31
    assert second["gini"] == approximately(1 - 1 / 32)
    assert report["collision_rate"] == 1 - 8 / 64 and report["largest_bucket"] == 8
    assert first["children_per_prefix"] == {"mean": 1, "median": 1, "max": 1}


def test_good_codes_can_be_told_from_random_ones():
    label, array = clusters()
    random = np.random.default_rng(2)
    good = measure_quality(make_sid_tokens(label[:, None]), array)["per_level"][0]
    bad = measure_quality(make_sid_tokens(random.permutation(label)[:, None]), array)["per_level"][0]
    assert good["neighbour_agreement"] == 1 and good["lift"] == approximately(1 / good["random_agreement"])
    assert bad["lift"] == pytest.approx(1, abs=0.15) and bad["random_agreement"] == good["random_agreement"]
    assert good["cosine_within_prefix"] > 0.8 and bad["cosine_within_prefix"] < 0.2
    assert good["reconstruction_error"] < 0.2 and bad["reconstruction_error"] > 0.9


def test_error_falls_with_each_level_and_is_zero_for_a_code_per_item():
    random = np.random.default_rng(3)
    array = random.standard_normal((200, 6)).astype(np.float32) + 1000
    errors = [
        level["reconstruction_error"]
        for level in measure_quality(make_sid_tokens(random.integers(9, size=(200, 5))), array)["per_level"]
    ]
    assert 1 > errors[0] and all(one > other for one, other in pairwise(errors))
    assert measure_quality(make_sid_tokens(np.arange(200)[:, None]), array)["reconstruction_error"] == 0


def test_another_order_of_rows_gives_the_same_report():
    label, array = clusters(300)
    sids = make_sid_tokens(
        np.stack([label, np.random.default_rng(4).integers(5, size=300)], axis=1), np.arange(300) - 290
    )
    order = np.random.default_rng(5).permutation(300)
    same(measure_quality([sids[row] for row in order], array[order]), measure_quality(sids, array))


def test_a_sample_is_seeded_and_close_to_all():
    label, array = clusters(800, 40, 3)
    sids = make_sid_tokens(label[:, None])

    def agreement(**options):
        return measure_quality(sids, array, **options)["per_level"][0]["neighbour_agreement"]

    every, part = agreement(sample=800), agreement(sample=200)
    assert 0.2 < every < 0.98 and part == pytest.approx(every, abs=0.1)
    assert part == agreement(sample=200) != agreement(sample=200, seed=1)


@pytest.mark.parametrize("n, value", [(1, 0.0), (1, 0.1), (2, 0.0), (50, 0.0), (50, 0.1)])
def test_items_that_are_all_equal(n, value):
    report = measure_quality([["<a_3>", "<b_0>"]] * n, np.full((n, 7), value, np.float32))
    last = report["per_level"][1]
    assert report["reconstruction_error"] == 0 and report["largest_bucket"] == n
    if n == 1:
        assert last["neighbour_agreement"] is last["lift"] is last["cosine_within_prefix"] is None
        assert re.search(r"^2 +x .* - +- +- +- +-$", format_quality({"x": report}), re.MULTILINE)
    else:
        assert last["neighbour_agreement"] == last["lift"] == 1
        assert last["cosine_within_prefix"] == approximately(float(value > 0))


def test_zero_rows_have_cosine_zero_and_are_near_nothing():
    array = np.eye(4, dtype=np.float32)[[0, 0, 1, 1]]
    array = np.concatenate([array, np.zeros((1, 4), np.float32)])
    report = measure_quality([["<a_0>"], ["<a_0>"], ["<a_1>"], ["<a_1>"], ["<a_1>"]], array, neighbours=1)
    level = report["per_level"][0]
    # The zero row is as near to all others; the lowest, of another code, is its neighbour.
    assert level["neighbour_agreement"] == approximately(4 / 5)
    assert level["cosine_within_prefix"] == approximately((1 + 1 + 0 + 0) / 4)


def test_tokens_without_numbers_and_with_huge_ones():
    array = np.eye(3, dtype=np.float32)
    report = measure_quality([["<red>"], ["<green>"], ["<red>"]], array)
    assert report["codebook_sizes"] == [2] and not report["codebook_sizes_known"] and report["largest_bucket"] == 2
    level = measure_quality([["<a_999999999999>"], ["<a_1>"], ["<a_2>"]], array)["per_level"][0]
    assert level["dead_codes"] == 10**12 - 3 and level["gini"] == 1


@pytest.mark.parametrize(
    "sids, options, said",
    [
        ([["<a_1>", "<b_5>"]], {"codebook_sizes": [4, 5]}, "5 codes at level 2, but its tokens need 6"),
        ([["<a_1>"]], {"codebook_sizes": [4, 4]}, "2 levels, but the SID <a_1> has 1 tokens"),
        ([[]], {}, "at least one token"),
        ([], {}, "at least one; got 0 and 1"),
        ([["<a_1>"]] * 2, {}, "got 2 and 1"),
        ([["<a_1>"]], {"neighbours": 0}, "--neighbours 0"),
        ([["<a_1>"]], {"sample": 0}, "--sample 0"),
    ],
)
def test_wrong_input(sids, options, said):
    with pytest.raises(InputError, match=re.escape(said)) as error:
        measure_quality(sids, np.ones((1, 2), np.float32), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("n, levels", [(100, 3), (60, 6), (1, 1)])
def test_written_report_and_page(tmp_path, n, levels):
    label, array = clusters(n)
    extra = np.where(np.arange(n) % 9, -1, np.arange(n))
    sids = make_sid_tokens(np.stack([label] * levels, axis=1), extra)
    report = write_report(tmp_path / "x.index", sids, array, [6] * levels, codebook_error=0.25)
    figures, page = list_report_files(tmp_path / "x.index")
    assert (figures.name, page.name) == ("x.index.quality.json", "x.index.quality.png")
    assert read_json(figures) == report and report["codebook_reconstruction_error"] == 0.25
    content = page.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 20_000
    assert int.from_bytes(content[16:20]) == 1600 and int.from_bytes(content[20:24]) >= 1000
    assert sorted(tmp_path.iterdir()) == [figures, page]  # no temporary file is left


def test_table_holds_every_report_and_fits_120_columns():
    label, array = clusters(200)
    shallow = measure_quality(make_sid_tokens(label[:, None]), array)
    deep = measure_quality(make_sid_tokens(np.stack([label] * 4, axis=1)), array, codebook_sizes=[256] * 4)
    reports = {f"method {number}": deep if number % 2 else shallow for number in range(6)}
    text = format_quality(reports)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    for name, report in reports.items():
        assert sum(re.search(rf"\b{name}\b", line) is not None for line in lines) == 1 + 2 * report["levels"]
    row = next(line.split() for line in lines if line.startswith("4") and "method 3" in line)
    assert row[:6] == ["4", "method", "3", "6", "256", "250"]
    long = format_quality({"a/" * 40 + "x.index.json": deep})
    assert long.startswith("[1] a/") and "\n[1]  " in long and "unknown" in text and "unknown" not in long


@pytest.fixture
def no_page(monkeypatch):
    """A page takes a second to draw; where it is not looked at, a file that says whose it is will do."""
    monkeypatch.setattr(quality_report, "draw_quality", lambda report, sids, array, path, title: path.write_text(title))


def run_quality(arguments):
    run_command(report_quality, parse_flags(QualityFlags, arguments))


def make(folder, n=40):
    """Flags of a right command; embedding rows are in another order than the index."""
    label, array = clusters(n, 4, 5)
    sids = make_sid_tokens(np.stack([label, np.arange(n) % 7], axis=1))
    order = np.random.default_rng(6).permutation(n)
    write_json(folder / "toy.index.json", {str(item): sids[item] for item in range(n)})
    save_embeddings(folder / "toy.emb-x-td.npy", array[order], [str(item) for item in order], "x", ["title"])
    return ["--index", str(folder / "toy.index.json"), "--emb", str(folder / "toy.emb-x-td.npy")], sids, array


def test_command_matches_rows_by_id_and_prints_again_when_finished(tmp_path, capsys):
    flags, sids, array = make(tmp_path)
    run_quality(flags + ["--neighbours", "3"])
    expected = measure_quality(sids, array, neighbours=3)
    assert read_json(tmp_path / "toy.index.quality.json") == expected
    first = capsys.readouterr().out
    printed = format_quality({str(tmp_path / "toy.index.json"): expected})
    assert first.endswith(printed + "\n")
    page = (tmp_path / "toy.index.quality.png").read_bytes()
    run_quality(flags + ["--neighbours", "3"])
    again = capsys.readouterr().out
    assert "already done" in again and again.endswith(printed + "\n")
    run_quality(flags + ["--neighbours", "3", "--force", "True"])
    assert "already done" not in capsys.readouterr().out
    assert (tmp_path / "toy.index.quality.png").read_bytes() == page
    assert read_json(tmp_path / "toy.index.quality.stage.json")["status"] == "done"


def test_several_indexes_side_by_side(tmp_path, capsys, no_page):
    flags, sids, array = make(tmp_path)
    write_json(tmp_path / "flat.index.json", {str(item): [f"<a_{item}>"] for item in range(40)})
    flags[1] += f",{tmp_path / 'flat.index.json'}"
    run_quality(flags)
    both = {
        flags[1].split(",")[0]: measure_quality(sids, array),
        flags[1].split(",")[1]: measure_quality([[f"<a_{i}>"] for i in range(40)], array),
    }
    assert capsys.readouterr().out.endswith(format_quality(both) + "\n")
    assert read_json(tmp_path / "flat.index.quality.json")["collision_rate"] == 0
    assert (tmp_path / "flat.index.quality.png").read_text() == "flat.index"


def test_what_the_method_knew_is_kept_while_it_holds(tmp_path, capsys, no_page):
    flags, sids, array = make(tmp_path)
    stem = tmp_path / "toy.index"
    write_report(stem, sids, array, [16, 32], codebook_error=0.5)
    run_quality(flags)
    kept = read_json(list_report_files(stem)[0])
    assert kept["codebook_sizes"] == [16, 32] and kept["codebook_sizes_known"]
    assert kept["codebook_reconstruction_error"] == 0.5 and "from the report" in capsys.readouterr().out
    save_embeddings(tmp_path / "other.emb-x-td.npy", array[:, :3], [str(item) for item in range(40)], "x", ["title"])
    run_quality([*flags[:2], "--emb", str(tmp_path / "other.emb-x-td.npy")])
    other = read_json(list_report_files(stem)[0])
    assert other["codebook_sizes"] == [16, 32] and other["codebook_reconstruction_error"] is None
    run_quality([*flags, "--codebook_sizes", "8,8"])
    assert read_json(list_report_files(stem)[0])["codebook_sizes"] == [8, 8]
    written = list_report_files(stem)[0].stat().st_mtime_ns
    write_json(tmp_path / "toy.index.json", {str(item): ["<a_0>", f"<b_{item}>"] for item in range(40)})
    os.utime(tmp_path / "toy.index.json", ns=(written + 1, written + 1))  # clocks of files can be coarse
    run_quality(flags)
    assert read_json(list_report_files(stem)[0])["codebook_sizes"] == [1, 40]


def test_command_line_errors_are_one_line(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quality"])
    flags, sids, _ = make(tmp_path)
    index, emb = flags[1], flags[3]
    few = {str(item): sids[item] for item in range(39)}
    write_json(tmp_path / "few.index.json", few)
    write_json(tmp_path / "many.index.json", {**few, "39": sids[39], "77": sids[0]})
    write_json(tmp_path / "wrong.index.json", {"0": "a"})
    cases = [
        (["--index", index], "missing flag: --emb"),
        ([*flags, "--neighbors", "3"], "unknown flag --neighbors"),
        (["--index", str(tmp_path / "none.json"), "--emb", emb], "none.json: no such file"),
        (["--index", index, "--emb", str(tmp_path / "none.npy")], "none.npy: no such file"),
        (
            ["--index", str(tmp_path / "many.index.json"), "--emb", emb],
            f"many.index.json: item 77 has no embedding in {emb}",
        ),
        (["--index", str(tmp_path / "few.index.json"), "--emb", emb], "item 39 has no SID in"),
        (
            ["--index", str(tmp_path / "wrong.index.json"), "--emb", emb],
            "wrong.index.json, item 0: expected a list of tokens",
        ),
        ([*flags, "--codebook_sizes", "4,6"], "6 codes at level 2, but its tokens need 7"),
        ([*flags, "--sample", "0"], "--sample 0: expected 1 or more"),
    ]
    for arguments, said in cases:
        with pytest.raises(SystemExit) as stop:
            run_quality(arguments)
        errors = capfd.readouterr().err
        assert stop.value.code == 2 and said in errors and len(errors.strip().splitlines()) == 1
        assert not list(tmp_path.glob("*.quality.json"))


def test_items_bought_in_turn_share_codes_as_often_as_a_count_says(tmp_path):
    """By the command: rows of embeddings in another order than item ids, items that follow themselves left out."""
    sids = make_sid_tokens(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]))
    (tmp_path / "x.index.json").write_text(json.dumps(dict(zip("0123", sids, strict=True))))
    save_embeddings(tmp_path / "x.npy", np.eye(4, dtype=np.float32), list("2031"), "x", ["title"])
    samples = ["user_id:token\titem_id_list:token_seq\titem_id:token", "u\t3 0\t1", "u\t0 1\t2", "u\t2\t2", "u\t2\t3"]
    (tmp_path / "x.train.inter").write_text("\n".join(samples) + "\n")
    flags = QualityFlags(
        index=[str(tmp_path / "x.index.json")], emb=str(tmp_path / "x.npy"), train_file=str(tmp_path / "x.train.inter")
    )
    report_quality(flags)
    levels = json.loads((tmp_path / "x.index.quality.json").read_text())["per_level"]
    assert [level["consecutive_agreement"] for level in levels] == [approximately(2 / 3), 0]
    (tmp_path / "x.train.inter").write_text("\n".join([*samples, "u\t2\t9"]) + "\n")
    with pytest.raises(InputError, match="item 9"):
        report_quality(flags)
