"""The paired comparison: twins of both tests, naive paired figures, the command on files, and its error messages."""

import math
import random
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from tiny import make_dataset

from baselines import baselines
from minionerec.common.cli import parse_flags, run_command
from minionerec.common.files import InputError, read_json, write_json
from minionerec.common.records import Catalogue, read_rows
from minionerec.evaluation.significance import (
    check_same_rows,
    compare_paired,
    compute_item_ranks,
    format_comparison,
    mcnemar_test,
    sign_flip_test,
)
from minionerec.recommenders.settings import BaselinesFlags
from scripts.compare import CompareFlags, compare


# ---------------------------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize("only_a, only_b", [(0, 0), (1, 0), (5, 5), (2, 9), (9, 2), (0, 12), (40, 63)])
def test_mcnemar_sums_the_binomial_tail(only_a, only_b):
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n
    assert mcnemar_test(only_a, only_b) == pytest.approx(min(1, 2 * tail))


def exact_sign_flip(differences):
    """All 2**n choices of signs."""
    observed = abs(sum(differences))
    totals = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    return sum(total >= observed - 1e-12 for total in totals) / len(totals)


@pytest.mark.parametrize(
    "differences",
    [
        [0.5, 0.5, 0.5, -0.5, 0.5, 0.5],
        [1, 0.6309, -0.5, 0.4307, 0.3869, 0.3562, 0.1, -0.1, 0.2891],
        [0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.1],  # no order is further away, and only one as far
        [0.25, -0.25],
        [0.0, 0.0, 0.7],
    ],
)
def test_sign_flip_approaches_all_choices_of_signs(differences):
    exact = exact_sign_flip(differences)
    found = sign_flip_test(np.array(differences), permutations=40_000)
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 40_000) + 1e-4)


def test_sign_flip_of_hits_is_mcnemar():
    differences = np.repeat([1.0, -1.0, 0.0], [30, 16, 200])
    assert sign_flip_test(differences, permutations=40_000) == pytest.approx(mcnemar_test(30, 16), abs=0.005)


def test_a_p_value_is_never_zero_and_equal_models_have_one():
    assert sign_flip_test(np.ones(100), permutations=999) == 1 / 1000
    assert sign_flip_test(np.zeros(5)) == mcnemar_test(0, 0) == 1


# --------------------------------------------------------------------------------------------------------------- paired
def test_paired_by_hand():
    a, b = np.array([1, 0, 2, 3]), np.array([2, 1, 2, 0])
    result = compare_paired(a, b, 3)
    assert list(result) == ["HR@1", "HR@3", "NDCG@3", "MRR@3"]
    row = result["HR@1"]
    assert (row["a"], row["b"], row["difference"], row["wins"], row["losses"], row["p"]) == (0.25, 0.25, 0, 1, 1, 1)
    row = result["MRR@3"]
    assert (row["wins"], row["losses"]) == (1, 2)
    assert row["difference"] == pytest.approx((-1 / 2 + 1 + 0 - 1 / 3) / 4)
    assert result["NDCG@3"]["a"] == pytest.approx((1 + 1 / math.log2(3) + 1 / 2) / 4)


def test_paired_interval_equals_drawing_pairs_of_rows():
    rng = np.random.default_rng(0)
    a = rng.choice([0, 1, 2, 7, 15], size=200)
    b = np.where(rng.random(200) < 0.7, a, rng.choice([0, 1, 3], size=200))
    result = compare_paired(a, b, 10)
    values = {
        "HR@10": lambda rank: float(0 < rank <= 10),
        "NDCG@10": lambda r: 1 / math.log2(r + 1) if 0 < r <= 10 else 0,
    }
    drawn = random.Random(1)
    for key, gain in values.items():
        differences = [gain(y) - gain(x) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        assert result[key]["difference"] == pytest.approx(sum(differences) / 200)
        means = [sum(drawn.choices(differences, k=200)) / 200 for _ in range(4000)]
        low, high = np.percentile(means, [2.5, 97.5])
        assert result[key]["interval_95"] == pytest.approx([low, high], abs=0.1 * (high - low))


def test_the_table_says_how_small_p_is():
    result = compare_paired(np.array([0] * 60), np.array([1] * 60), 3)
    lines = format_comparison(result).splitlines()
    expected = ["HR@1", "0.0000", "1.0000", "+1.0000", "[+1.0000,", "+1.0000]", "<0.0001", "60", "0"]
    assert lines[1].split() == expected and lines[0].split()[-4:] == ["b", "better", "a", "better"]


# ---------------------------------------------------------------------------------------------------------------- files
def row(user, item, sid, ranked, **more):
    return {"user_id": user, "item_id": item, "input": "", "output": sid, "predict": ranked, **more}


def test_item_ranks_of_sids_and_of_items():
    """Items 1 and 2 share a SID; without predict_items the more popular 2 stands first."""
    catalogue = Catalogue(["<x>", "<x>", "<y>"], ["", "", ""], [1, 2, 3], {2: 5})
    rows = [
        row("u", 1, "<x>", ["<y>", "<x>"]),
        row("u", 1, "<x>", ["<x>", "<x>"], predict_items=[1, 2]),
        row("u", 2, "<x>", ["<x>", "<x>"], predict_items=[1, 2]),
        row("u", 3, "<y>", ["<x>"]),
    ]
    ranks, longest = compute_item_ranks(rows, catalogue, "a.json", "info.txt")
    assert ranks.tolist() == [3, 1, 2, 0] and longest == 2
    with pytest.raises(InputError, match=r"a.json, row 2: item 3 with SID <x> is not in info.txt; is it the catalogue"):
        compute_item_ranks([rows[0], row("u", 3, "<x>", [])], catalogue, "a.json", "info.txt")


def test_the_first_row_that_differs_is_named():
    a = [row("u", 1, "<x>", []), row("v", 2, "<y>", []), row("w", 3, "<z>", [])]
    assert check_same_rows(a, [*a], "a.json", "b.json") == 3
    for other, said in [
        (row("v", 3, "<y>", []), "row 2 differs: user v, item 2 in a.json, but user v, item 3 in b.json"),
        (row("q", 2, "<y>", []), "row 2 differs: user v, item 2 in a.json, but user q, item 2 in b.json"),
    ]:
        with pytest.raises(InputError, match=said):
            check_same_rows(a, [a[0], other, other], "a.json", "b.json")
    for first, second, said in (
        (a, a[:2], "a.json has 3 rows, but b.json has 2"),
        (a[:1], a, "1 rows, but b.json has 3"),
    ):
        with pytest.raises(InputError, match=said):
            check_same_rows(first, second, "a.json", "b.json")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(paths of a dataset in which items share SIDs, folder of the predictions of its baselines)."""
    folder = tmp_path_factory.mktemp("compare")
    paths = make_dataset(folder / "data", shared=True)
    flags = {key: paths[key] for key in ("train_file", "test_data_path", "info_file")}
    baselines(BaselinesFlags(**flags, output_dir=str(folder / "out"), K=20, shared_sids=True))
    return paths, folder / "out"


def run_compare(data, a, b, **changes):
    paths, _ = data
    files = {"a": str(a), "b": str(b), "info_file": paths["info_file"], "train_file": paths["train_file"]}
    compare(CompareFlags(**{**files, **changes}))


def test_the_command_on_the_baselines(data, tmp_path, capsys):
    """Its figures are those of the two metrics files, and swapping the models turns them round."""
    _, folder = data
    a, b = folder / "popularity.json", folder / "transitions.json"
    run_compare(data, a, b, shared_sids=True, output=str(tmp_path / "ab.json"))
    printed = capsys.readouterr().out
    found = read_json(tmp_path / "ab.json")
    metrics = [read_json(path.with_name(f"{path.stem}.metrics.json"))["item"] for path in (a, b)]
    assert {"HR@1", "HR@20", "NDCG@3", "MRR@10"} <= set(found["item"]) and "HR@50" not in found["item"]
    for key, row in found["item"].items():
        assert (row["a"], row["b"]) == pytest.approx([result[key] for result in metrics], abs=1e-6)
    hits = [[r["item_id"] in r["predict_items"][:10] for r in read_json(path)] for path in (a, b)]
    wins = sum(y and not x for x, y in zip(*hits, strict=True))
    losses = sum(x and not y for x, y in zip(*hits, strict=True))
    ten = found["item"]["HR@10"]
    assert wins + losses > 0 and (ten["wins"], ten["losses"], ten["p"]) == (wins, losses, mcnemar_test(losses, wins))
    assert f"HR@10: {wins + losses} discordant rows (hit by one of the two): {wins} by b, {losses} by a" in printed
    assert f"{found['rows']} rows, lists of 20" in printed

    run_compare(data, b, a, shared_sids=True, output=str(tmp_path / "ba.json"))
    turned = read_json(tmp_path / "ba.json")["item"]["HR@10"]
    assert (turned["wins"], turned["losses"], turned["p"]) == (losses, wins, ten["p"])
    assert turned["difference"] == -ten["difference"]


def test_a_model_against_itself(data, tmp_path):
    path = data[1] / "transitions.json"
    run_compare(data, path, path, shared_sids=True, output=str(tmp_path / "same.json"))
    for result in read_json(tmp_path / "same.json")["item"].values():
        assert result["difference"] == 0 and result["interval_95"] == [0, 0] and result["p"] == 1


def test_models_with_other_sids(data, tmp_path):
    """Renamed SIDs of b come with their own info file; the figures stay those of the item lists."""
    paths, folder = data
    rename = str.maketrans("abc", "xyz")
    lines = [line.split("\t") for line in Path(paths["info_file"]).read_text().splitlines()]
    info = tmp_path / "renamed.txt"
    info.write_text("".join(f"{sid.translate(rename)}\t{title}\t{item}\n" for sid, title, item in lines))
    rows = read_json(folder / "transitions.json")
    for place, r in enumerate(rows):
        renamed = [sid.translate(rename) for sid in dict.fromkeys(r["predict"])]
        rows[place] = row(r["user_id"], r["item_id"], r["output"].translate(rename), renamed)
    write_json(tmp_path / "b.json", rows)
    a = folder / "transitions.json"
    with pytest.raises(InputError, match=r"b.json, row 1: item \d+ with SID <x_\d+>.* is not in .*info.txt"):
        run_compare(data, a, tmp_path / "b.json", shared_sids=True)
    run_compare(
        data, a, tmp_path / "b.json", shared_sids=True, info_file_b=str(info), output=str(tmp_path / "out.json")
    )
    catalogue = Catalogue([s.translate(rename) for s, _, _ in lines], [], [int(item) for _, _, item in lines])
    catalogue = catalogue.with_counts(read_rows(paths["train_file"]))
    ranks, _ = compute_item_ranks(rows, catalogue, "b.json", "info")
    hits = sum(0 < rank <= 10 for rank in ranks.tolist())
    assert read_json(tmp_path / "out.json")["item"]["HR@10"]["b"] == pytest.approx(hits / len(rows))


@pytest.mark.parametrize(
    "content, message",
    [
        ({"HR@10": 0.1}, "--a: .*a.json: expected a JSON list of predictions"),
        ([], "--a: .*a.json: expected a JSON list of predictions"),
        ([{"user_id": "u", "output": "<x>"}], "a.json, row 1: expected a prediction with item_id, pr"),
        ([7], "a.json, row 1: expected a prediction with user_id, item_id"),
    ],
)
def test_files_that_hold_no_predictions(data, tmp_path, content, message):
    write_json(tmp_path / "a.json", content)
    with pytest.raises(InputError, match=message):
        run_compare(data, tmp_path / "a.json", data[1] / "transitions.json", shared_sids=True)


def test_wrong_input_is_one_line_and_status_2(data, tmp_path, capsys):
    paths, folder = data
    rows = read_json(folder / "popularity.json")
    write_json(tmp_path / "b.json", [rows[1], rows[0], *rows[2:]])
    files = [f"--info_file={paths['info_file']}", f"--train_file={paths['train_file']}"]
    models = [f"--a={folder / 'popularity.json'}", f"--b={tmp_path / 'b.json'}"]
    with pytest.raises(SystemExit) as status:
        run_command(compare, parse_flags(CompareFlags, [*models, *files, "--shared_sids", "True"]))
    said = capsys.readouterr().err
    assert status.value.code == 2 and said.startswith("error: row 1 differs: user") and said.count("\n") == 1
    write_json(tmp_path / "b.json", [{**r, "predict": []} for r in rows])
    with pytest.raises(InputError, match="b.json: all lists of one of them are empty"):
        run_compare(data, folder / "popularity.json", tmp_path / "b.json", shared_sids=True)
