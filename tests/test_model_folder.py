"""A model folder recommends without any other file: its catalogue, its card, the Python interface, files of users."""

import csv
import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import HfApi, ModelCard

from minionerec import Recommender
from minionerec.common.files import InputError, write_json
from minionerec.common.model_folder import read_model_catalogue
from minionerec.common.records import Catalogue, read_info, read_rows
from minionerec.evaluation import batches
from minionerec.evaluation.histories import ItemFinder
from minionerec.evaluation.settings import EvaluateFlags, RecommendFlags
from minionerec.evaluation.user_files import parse_history, read_users
from recommend import recommend
from scripts.model_card import ModelCardFlags, complete_model_card


@pytest.fixture(scope="module")
def recommender(trained):
    return Recommender.load(trained.checkpoint, num_beams=30)


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the model folder that a test may change."""
    return Path(shutil.copytree(trained.checkpoint, tmp_path / "model"))


def write_users(path, histories):
    """A CSV file of users U0, U1, ... with their histories as list literals."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "history"])
        writer.writerows([f"U{number}", history] for number, history in enumerate(histories))
    return str(path)


# ------------------------------------------------------------------------------------------------------- the catalogue
def test_the_catalogue_says_what_the_training_data_say(trained):
    known = read_model_catalogue(trained.checkpoint)
    info, rows = read_info(trained.paths["info_file"]), read_rows(trained.paths["train_file"])
    assert known.catalogue.sid_of == info.sid_of
    assert known.catalogue.counts == Counter(row.item_id for row in rows)
    following = defaultdict(Counter)
    for row in rows:
        following[row.history_ids[-1]][row.item_id] += 1
    assert known.transitions == following
    assert known.max_history == max(len(row.history_ids) for row in rows)
    items = json.loads(Path(trained.paths["item_meta_path"]).read_text())
    assert {item: record["title"] for item, record in known.records.items()} == {
        int(item): record["title"] for item, record in items.items() if record["title"]
    }


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("counts.json", '{"a": 1}', "counts.json: 'a': expected an item id with a value of type int"),
        ("counts.json", "[1]", "counts.json: expected an object by item id"),
        ("transitions.json", '{"1": {"2": "x"}}', "transitions.json: '2': expected an item id"),
        ("settings.yaml", "max_history: many", "settings.yaml: expected max_history: int"),
        ("settings.yaml", "{", "settings.yaml, line 1: not valid YAML"),
        ("info.txt", "nothing", "info.txt, line 1: expected sid"),
    ],
)
def test_a_broken_catalogue_is_one_line(folder, name, text, said):
    (folder / "catalogue" / name).write_text(text)
    with pytest.raises(InputError, match=said):
        read_model_catalogue(folder)


def test_a_folder_without_catalogue_needs_an_info_file(trained, folder, capsys):
    shutil.rmtree(folder / "catalogue")
    flags = {"base_model": str(folder), "titles": "number 7,", "num_beams": 30}
    with pytest.raises(InputError, match=r"carries no catalogue/ .*give --info_file"):
        recommend(RecommendFlags(**flags))
    recommend(RecommendFlags(**flags, info_file=trained.paths["info_file"]))
    assert "after: Item number 7" in capsys.readouterr().out


def test_evaluation_needs_the_model_and_the_rows_only(trained, tmp_path):
    from evaluate import evaluate

    results = []
    for name, files in (
        ("alone", {}),
        ("named", {name: trained.paths[name] for name in ("info_file", "train_file")}),
    ):
        path = tmp_path / f"{name}.json"
        evaluate(
            EvaluateFlags(
                base_model=trained.checkpoint,
                test_data_path=trained.paths["test_data_path"],
                result_json_data=str(path),
                num_beams=10,
                **files,
            )
        )
        results.append(json.loads(path.read_text()))
    assert results[0] == results[1]


# ------------------------------------------------------------------------------------------------ the Python interface
def test_items_may_be_named_by_id_title_and_sid(recommender):
    catalogue = recommender.catalogue
    number = 7
    names = [catalogue.item_ids[number], str(catalogue.item_ids[number]), catalogue.titles[number].upper()]
    lists = recommender.recommend([[name] for name in (*names, catalogue.sids[number])], k=5)
    assert len(lists) == 4 and len(lists[0]) == 5
    assert lists.count(lists[0]) == 4
    for item in lists[0]:
        assert catalogue.sid_of[item.item_id] == item.sid
        assert catalogue.titles[catalogue.item_ids.index(item.item_id)] == item.title
    assert [item.score for item in lists[0]] == sorted((item.score for item in lists[0]), reverse=True)


def test_histories_are_searched_together_as_alone(recommender):
    histories = [[3], [4, 5, 6], list(range(12)), [2, 1]]
    together = recommender.recommend(histories, k=6)
    for history, items in zip(histories, together, strict=True):
        (alone,) = recommender.recommend([history], k=6)
        assert [item.item_id for item in alone] == [item.item_id for item in items]
        assert not {item.item_id for item in items} & set(history)


def test_seen_items_and_categories(trained, folder):
    path = folder / "catalogue" / "item.json"
    records = json.loads(path.read_text())
    wanted = {3, 8, 9, 20}
    for item, record in records.items():
        record["categories"] = "Tools, Hand drills" if int(item) in wanted else "Paper"
    path.write_text(json.dumps(records))
    recommender = Recommender.load(folder, num_beams=30)
    (items,) = recommender.recommend([[3]], k=10, categories=["hand DRILLS"])
    assert {item.item_id for item in items} == wanted - {3}
    (items,) = recommender.recommend([[3]], k=10, categories=["hand drills"], exclude_seen=False)
    assert {item.item_id for item in items} == wanted
    everything = {item.item_id for item in recommender.recommend([[3]], k=30, categories=["paper", "tools"])[0]}
    assert everything == set(recommender.catalogue.item_ids) - {3}
    with pytest.raises(InputError, match="no item is of 'Saws'"):
        recommender.recommend([[3]], categories=["Saws"])


@pytest.mark.parametrize(
    "histories, k, said",
    [
        ([[]], 5, "the history is empty"),
        ([[1], [99999]], 5, "no item has the id 99999"),
        ([["no such title"]], 5, "no item has 'no such title' in its title"),
        ([[1]], 31, "k 31: must be at least 1 and cannot exceed num_beams 30"),
        ([[1]], 0, "k 0: must be"),
    ],
)
def test_wrong_questions_are_one_line(recommender, histories, k, said):
    with pytest.raises(InputError, match=said):
        recommender.recommend(histories, k=k)


def test_no_histories_no_lists(recommender):
    assert recommender.recommend([]) == []


def test_fusion_from_the_tables_of_the_folder(trained, folder):
    """The folder's tables say what the train rows say; seen items and categories are left out before candidates."""
    from minionerec.evaluation.recommended_fusion import build_fused
    from minionerec.evaluation.setup import read_known_catalogue

    options = {"fuse": "transitions,content", "fuse_weight": [1.0, 0.5, 0.3], "num_beams": 12}
    recommender = Recommender.load(folder, **options)
    flags = RecommendFlags(base_model=str(folder), train_file=trained.paths["train_file"], **options)
    rows = read_rows(trained.paths["train_file"])
    from_rows = build_fused(flags, read_known_catalogue(flags, rows), rows)
    histories = [[1, 2, 3], [7], [4, 4, 9]]
    for ours, theirs in zip(recommender.fused.likelihoods, from_rows.likelihoods, strict=True):
        assert ours(histories) == theirs(histories)
    lists = recommender.recommend(histories, k=8)
    for history, items in zip(histories, lists, strict=True):
        assert len(items) == 8 and not {item.item_id for item in items} & set(history)
        assert [item.score for item in items] == sorted((item.score for item in items), reverse=True)
        assert all(item.reason and 0 < item.probability < 1 for item in items)
    alone = recommender.recommend(histories, k=8, fuse_weight=[1.0, 0.0, 0.0])
    plain = Recommender.load(folder, num_beams=12).recommend(histories, k=8)
    for fused, items in zip(alone, plain, strict=True):
        # The baselines bring candidates, so that what the beams missed may stand there too.
        assert {item.item_id for item in items[:3]} <= {item.item_id for item in fused}
        assert all(item.score == pytest.approx(item.probability) for item in fused)


# ------------------------------------------------------------------------------------------------------ files of users
@pytest.mark.parametrize(
    "cell, names",
    [
        ("[1, 2]", (1, 2)),
        ([1, "b"], (1, "b")),
        ("a; b ;", ("a", "b")),
        ('["a; b"]', ("a; b",)),
        ((3,), (3,)),
    ],
)
def test_cells(cell, names):
    assert parse_history(cell) == names


@pytest.mark.parametrize("cell", ["", " ", [], [""], None, 3, [1.5], [True], [None], "[oops]"])
def test_cells_that_are_no_history(cell):
    with pytest.raises(InputError):
        parse_history(cell)


def test_digits_are_ids_and_no_titles_where_a_file_holds_ids(tmp_path):
    """Films are called "187" and "1984"."""
    catalogue = Catalogue(["<a>", "<b>", "<c>"], ["1984", "187", "alien"], [187, 1984, 3])
    plain, raw = ItemFinder(catalogue), ItemFinder(catalogue, {187: "3", 1984: "187", 3: "x7"})
    for cell in ([187, 1984], "[187, 1984]", "187; 1984", ["187", "1984"]):
        write_json(tmp_path / "u.jsonl", {"history": cell}, indent=None)
        (user,) = read_users(str(tmp_path / "u.jsonl"))
        assert plain.find_history(user.history, has_ids=user.has_ids).item_ids == [187, 1984]
    write_json(tmp_path / "u.jsonl", {"history_item_title": "187; 1984"}, indent=None)
    (user,) = read_users(str(tmp_path / "u.jsonl"))
    assert plain.find_history(user.history, has_ids=user.has_ids).item_ids == [1984, 187]
    write_json(tmp_path / "u.jsonl", {"history_item_id": "[187]"}, indent=None)
    (user,) = read_users(str(tmp_path / "u.jsonl"))
    assert raw.find_history(user.history, has_ids=user.has_ids).item_ids == [187]
    assert raw.find_history([187, "3", "x7", "alien"], has_ids=True).item_ids == [1984, 187, 3, 3]
    with pytest.raises(InputError, match="no item has the id 1984"):
        raw.find_history([1984], has_ids=True)


def test_every_format_reads_the_same_users(tmp_path):
    histories = [[1, 2], [3]]
    csv_file = write_users(tmp_path / "users.csv", histories)
    (tmp_path / "users.jsonl").write_text(
        "".join(json.dumps({"user_id": f"U{n}", "history": h}) + "\n" for n, h in enumerate(histories))
    )
    table = pyarrow.table({"user_id": ["U0", "U1"], "history": histories})
    pyarrow.parquet.write_table(table, tmp_path / "users.parquet")
    read = [
        [(user.user_id, tuple(map(int, user.history))) for user in read_users(str(tmp_path / f"users.{kind}"))]
        for kind in ("csv", "jsonl", "parquet")
    ]
    assert csv_file.endswith("users.csv")
    assert read == [[("U0", (1, 2)), ("U1", (3,))]] * 3


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_file_of_users(trained, recommender, tmp_path, capsys, kind):
    """What is written is what `recommend` says; rows that cannot be read are listed and the others go on."""
    users = write_users(tmp_path / "users.csv", [[1, 2], [99999], ["item number 7, 'quoted'"], "", [3]])
    output = tmp_path / f"lists.{kind}"
    flags = {"base_model": trained.checkpoint, "input": users, "output": str(output), "top": 4, "num_beams": 30}
    recommend(RecommendFlags(**flags, exclude_seen=True, max_history=recommender.max_history))
    expected = recommender.recommend([[1, 2], [7], [3]], k=4)
    if kind == "jsonl":
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        found = [(user["user_id"], item["item_id"]) for user in lines for item in user["recommendations"]]
    elif kind == "csv":
        found = [(row["user_id"], int(row["item_id"])) for row in csv.DictReader(output.open())]
    else:
        rows = pyarrow.parquet.read_table(output).to_pylist()
        found = [(row["user_id"], row["item_id"]) for row in rows]
        assert [row["rank"] for row in rows] == [1, 2, 3, 4] * 3
    items = [item.item_id for items in expected for item in items]
    assert found == list(zip(["U0"] * 4 + ["U2"] * 4 + ["U4"] * 4, items, strict=True))
    skipped = [json.loads(line) for line in (tmp_path / f"lists.{kind}.skipped.jsonl").read_text().splitlines()]
    assert [(user["user_id"], user["row"]) for user in skipped] == [("U1", 2), ("U3", 4)]
    assert "99999" in skipped[0]["problem"] and skipped[1]["problem"] == "the history is empty"
    assert not (tmp_path / f"lists.{kind}.partial").exists()
    capsys.readouterr()
    recommend(RecommendFlags(**flags, exclude_seen=True, max_history=recommender.max_history))
    assert "already done" in capsys.readouterr().out


def test_a_file_that_was_cut_off_goes_on(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "CHUNK", 2)
    users = write_users(tmp_path / "users.csv", [[number] for number in range(7)])
    flags = {"base_model": trained.checkpoint, "input": users, "num_beams": 10, "top": 3}
    recommend(RecommendFlags(**flags, output=str(tmp_path / "whole.csv")))
    plain, calls = batches.recommend_to_users, []

    def stop_in_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(batches, "recommend_to_users", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        recommend(RecommendFlags(**flags, output=str(tmp_path / "broken.csv")))
    assert not (tmp_path / "broken.csv").exists()
    recommend(RecommendFlags(**flags, output=str(tmp_path / "broken.csv")))
    assert len(calls) == 3 + 2  # two of four chunks were there
    assert (tmp_path / "broken.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize(
    "text, flags, said",
    [
        (
            "user_id,other\nU1,3\n",
            {},
            "row 1: no column history or .*; found user_id, other; --history_column names another",
        ),
        ("user_id,history\nU1,3\n", {"history_column": "items"}, "row 1: no column items"),
        ("user_id,history\nU1,3\n", {"user_column": "who"}, "row 1: no column who; found user_id, history"),
        ("", {}, "expected a header line"),
    ],
)
def test_files_without_the_column(trained, tmp_path, text, flags, said):
    (tmp_path / "users.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        recommend(
            RecommendFlags(
                base_model=trained.checkpoint,
                input=str(tmp_path / "users.csv"),
                output=str(tmp_path / "out.csv"),
                **flags,
            )
        )


def test_users_in_a_column_of_another_name(trained, tmp_path, capsys):
    """Their names are in the recommendations and among those left out; without the flag a line says what happens."""
    text = "customer,bought,history\nanna,1; 2,3\nben,99999,3\n"
    users, output = tmp_path / "users.csv", tmp_path / "lists.csv"
    users.write_text(text)
    flags = {"base_model": trained.checkpoint, "num_beams": 10, "top": 2}
    columns = {"user_column": "customer", "history_column": "bought"}
    recommend(RecommendFlags(**flags, **columns, input=str(users), output=str(output)))
    assert [row["user_id"] for row in csv.DictReader(output.open())] == ["anna", "anna"]
    assert json.loads((tmp_path / "lists.csv.skipped.jsonl").read_text())["user_id"] == "ben"
    assert "--user_column" not in capsys.readouterr().out
    assert [user.user_id for user in read_users(str(users), "bought")] == ["1", "2"]
    said = "no column user_id, users are row numbers; --user_column names one of customer, history\n"
    assert capsys.readouterr().out.count(said) == 1
    for name in columns:
        with pytest.raises(InputError, match=f"--{name}: has an effect with --input only"):
            recommend(RecommendFlags(**flags, **{name: "x"}, titles="a"))


def test_formats_are_told_by_name(trained):
    for flags in ({"input": "users.txt", "output": "x.csv"}, {"input": "users.csv", "output": "x"}):
        with pytest.raises(InputError, match=r"expected a file named \*\.csv, \*\.jsonl, \*\.parquet"):
            recommend(RecommendFlags(base_model=trained.checkpoint, **flags))


# ------------------------------------------------------------------------------------------------------------ the card
def test_the_card_is_one_of_the_hub(trained, folder, tmp_path):
    card = ModelCard.load(folder / "README.md")
    card.data.to_dict()
    assert card.data.library_name == "transformers"
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}
    assert "no user and no whole history" in card.text.lower()
    metrics = tmp_path / "test.metrics.json"
    for value in (0.25, 0.5):  # the later figures replace the earlier ones
        metrics.write_text(json.dumps({"item": {"HR@10": value, "NDCG@10": 0.125, "MRR@10": 0.1}}))
        complete_model_card(ModelCardFlags(model=str(folder), metrics=str(metrics)))
    card = ModelCard.load(folder / "README.md")
    found = {
        (result.dataset_split, result.metric_name): result.metric_value
        for result in card.data.eval_results
        if result.dataset_split == "test"
    }
    assert found == {("test", "HR@10"): 0.5, ("test", "NDCG@10"): 0.125}
    assert "| test |  | 0.5000 | 0.1250 |" in card.text
    assert card.text.count("## Results") == 1


def test_a_folder_is_pushed_whole(folder, monkeypatch):
    sent = {}

    class Repo:
        repo_id = "me/model"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: sent.update(name=name, **options) or Repo())
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: sent.update(options))
    flags = {"model": str(folder), "push_to_hub": True, "hub_model_id": "me/model", "hub_private_repo": True}
    complete_model_card(ModelCardFlags(**flags))
    assert sent["folder_path"] == str(folder) and sent["private"] and sent["name"] == "me/model"

    def refuse(self, **options):
        raise OSError("401 Client Error\nlong story")

    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    with pytest.raises(InputError, match=r"not sent \(401 Client Error\); .* is complete"):
        complete_model_card(ModelCardFlags(**flags))


@pytest.mark.parametrize(
    "flags, said",
    [
        ({}, "expected --metrics, --push_to_hub True, or both"),
        ({"push_to_hub": True}, "needs --hub_model_id"),
        ({"hub_model_id": "me/model"}, "has an effect with --push_to_hub True only"),
        ({"metrics": "no.json"}, "no such file"),
    ],
)
def test_what_a_card_cannot_be_made_of(folder, flags, said):
    with pytest.raises(InputError, match=said):
        complete_model_card(ModelCardFlags(model=str(folder), **flags))
