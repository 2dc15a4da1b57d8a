"""Recommendations for one history: the search and its order recomputed, titles found or named, the dialogue."""

import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from evaluate import evaluate
from minionerec.common.cli import parse_flags, run_command
from minionerec.common.files import InputError, read_json
from minionerec.common.records import Catalogue, read_info, read_rows
from minionerec.evaluation.histories import History, ItemFinder, find_latest_history, split_titles
from minionerec.evaluation.settings import EvaluateFlags, RecommendFlags
from minionerec.language.models import load_model
from minionerec.language.prompts import Encoder, load_checkpoint_prompts
from recommend import recommend

CATALOGUE = Catalogue(
    ["<a_1>", "<a_2>", "<a_3>", "<a_3>", "<a_4>", "<a_5>"],
    ["Red drill", "Drill bits, 10 pieces", "Sand Paper", "Fine sand paper", "Tape", "tape"],
    [0, 1, 2, 3, 4, 5],
)
LINE = re.compile(r"^ *(\d+) +(-[\d.]+) +([\d.]+)%  (\S+) +(.*)$")


def ask(trained, capsys, **flags):
    """([(rank, log-probability, probability, SID, title)], what was printed) of a call of recommend."""
    capsys.readouterr()
    recommend(RecommendFlags(base_model=trained.checkpoint, info_file=trained.paths["info_file"], **flags))
    printed = capsys.readouterr().out
    found = [match.groups() for match in map(LINE.match, printed.splitlines()) if match]
    return [(int(r), float(s), float(p) / 100, sid, title) for r, s, p, sid, title in found], printed


@pytest.fixture(scope="module")
def exact(trained):
    """A function: {SID: log-probability after a history of SIDs}, by one ordinary forward per item of the catalogue."""
    model, tokenizer = load_model(trained.checkpoint, "base_model")
    encoder = Encoder(tokenizer, load_checkpoint_prompts(trained.checkpoint))
    sids = read_info(trained.paths["info_file"]).sids

    def scores(history):
        (prompt,) = encoder.prompt_ids(["".join(history)])
        result = {}
        for sid, target in zip(sids, encoder.target_ids("next_sid", sids), strict=True):
            with torch.no_grad():
                log_probs = model.eval()(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
            result[sid] = sum(log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(target))
        return result

    return scores


def assert_exact(found, scores, top):
    """The first `top` of `scores`, with ranks, log-probabilities and probabilities."""
    best = sorted(scores, key=lambda sid: -scores[sid])[:top]
    assert [(rank, sid) for rank, _, _, sid, _ in found] == list(enumerate(best, 1))
    for _, score, probability, sid, _ in found:
        assert score == pytest.approx(scores[sid], abs=2e-4)
        assert probability == pytest.approx(math.exp(scores[sid]), abs=1e-5)


def test_titles_of_a_history(trained, capsys, exact):
    catalogue = read_info(trained.paths["info_file"])
    found, printed = ask(trained, capsys, titles="item NUMBER 7, 'quoted'; number 12,", num_beams=30)
    assert_exact(found, exact([catalogue.sids[7], catalogue.sids[12]]), 10)
    assert printed.splitlines()[0] == f"after: {catalogue.titles[7]} | {catalogue.titles[12]}"
    assert [title for *_, title in found] == [catalogue.titles[catalogue.sids.index(sid)] for *_, sid, _ in found]
    as_list, _ = ask(trained, capsys, titles='["number 7,", "<a_2><b_2><c_0>"]', num_beams=30)
    assert as_list == found


def test_everything_known_of_a_user(trained, capsys, exact):
    path = trained.paths["test_data_path"]
    row = read_rows(path)[-1]
    whole = [*row.history_sids, row.sid]
    flags = {"history_file": path, "user_id": row.user_id, "num_beams": 30}
    found, printed = ask(trained, capsys, **flags, max_history=0, top=4)
    assert_exact(found, exact(whole), 4)
    assert printed.splitlines()[0] == "after: " + " | ".join([*row.history_titles, row.title])
    found, printed = ask(trained, capsys, **flags, max_history=2)
    assert_exact(found, exact(whole[-2:]), 10)
    assert printed.splitlines()[0] == f"after: {row.history_titles[-1]} | {row.title}"
    assert len(whole) > 10  # the default shows ten
    assert_exact(ask(trained, capsys, **flags)[0], exact(whole[-10:]), 10)


def test_what_a_user_knows_is_left_out(trained, capsys, exact):
    """Also what the model is not shown, and the list is as long as before."""
    path = trained.paths["test_data_path"]
    row = read_rows(path)[-1]
    flags = {"history_file": path, "user_id": row.user_id, "max_history": 1, "num_beams": 19, "top": 19}
    found, _ = ask(trained, capsys, **flags, exclude_seen=True)
    scores = exact([row.sid])
    for sid in {*row.history_sids, row.sid}:
        del scores[sid]
    assert len(scores) == 19
    assert_exact(found, scores, 19)


def test_cutoff_len_shortens_the_history_shown(trained, capsys, exact):
    sids = read_info(trained.paths["info_file"]).sids
    found, printed = ask(trained, capsys, titles="number 1,;number 2,;number 3,", num_beams=30, cutoff_len=12)
    count = printed.splitlines()[0].count("Item number")
    assert count == 1
    assert_exact(found, exact(sids[3:4]), 10)


def test_items_that_share_a_sid_stand_under_one_rank(trained, tmp_path, capsys):
    """By item id, or the most frequent target first if a train file is given."""
    catalogue = read_info(trained.paths["info_file"])
    targets = [row.item_id for row in read_rows(trained.paths["train_file"])]
    rare, frequent = next((a, b) for b in range(30) for a in range(b) if targets.count(a) < targets.count(b))
    shared = catalogue.sids[5]
    others = enumerate(
        (sid, title) for sid, title in zip(catalogue.sids, catalogue.titles, strict=True) if sid != shared
    )
    lines = [f"{sid}\t{title}\t{1000 + place}" for place, (sid, title) in others]
    lines += [f"{shared}\tfrequent one\t{frequent}", f"{shared}\trare one\t{rare}"]
    (tmp_path / "info.txt").write_text("\n".join(lines) + "\n")
    flags = {"base_model": trained.checkpoint, "info_file": str(tmp_path / "info.txt")}
    flags |= {"titles": "number 4,", "num_beams": 30, "top": 30}

    def shown(**more):
        capsys.readouterr()
        recommend(RecommendFlags(**flags, **more, shared_sids=True))
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 + 29 + 2  # 30 ranks, one of them two lines
        place = next(place for place, line in enumerate(lines) if shared in line)
        width = lines[1].index("title")
        assert not lines[place + 1][:width].strip()
        return [line[width:] for line in lines[place : place + 2]]

    assert shown(train_file=trained.paths["train_file"]) == ["frequent one", "rare one"]
    assert shown() == ["rare one", "frequent one"]
    with pytest.raises(InputError, match="belongs to the item of line"):
        recommend(RecommendFlags(**flags))


def test_a_fused_list_is_that_of_evaluate_with_its_reasons(trained, capsys, tmp_path):
    """Weights and baselines are read from the evaluation; the codes of a SID are put into words too."""
    paths = trained.paths
    files = {key: paths[key] for key in ("train_file", "info_file", "item_meta_path")}
    row = read_rows(paths["test_data_path"])[-1]
    evaluate(
        EvaluateFlags(
            **files,
            base_model=trained.checkpoint,
            test_data_path=paths["test_data_path"],
            result_json_data=str(tmp_path / "test.json"),
            fuse="transitions,content",
            fuse_weight=[0.5, 0.3, 0.2],
            num_beams=12,
            K=12,
        )
    )
    predicted = read_json(tmp_path / "test.fused.json")[-1]
    words = {"prefixes": [{"prefix": f"<a_{code}>", "words": ["alpha", f"beta{code}"]} for code in range(5)]}
    (tmp_path / "words.json").write_text(json.dumps(words))
    flags = {"num_beams": 12, "fused_metrics": str(tmp_path / "test.fused.metrics.json"), **files}
    del flags["info_file"]
    found, printed = ask(
        trained,
        capsys,
        titles="; ".join(row.history_sids),
        explained_sids=str(tmp_path / "words.json"),
        **flags,
    )
    assert not found  # scores are sums of probabilities, never below 0
    lines = printed.splitlines()[2:]
    for rank, start in enumerate(range(0, len(lines), 3)):
        number, score, _, sid, *_ = lines[start].split()
        assert (int(number), sid) == (rank + 1, predicted["predict"][rank])
        assert float(score) == pytest.approx(predicted["score"][rank], abs=1e-4)
        assert lines[start + 1].strip() == predicted["reasons"][rank]
        code = sid[3 : sid.index(">")]
        assert lines[start + 2].strip() == f"<a_{code}>: alpha, beta{code}"
    assert len(lines) == 30 and "bought after Item number" in printed and "like Item number" in printed
    seen = set(row.history_sids)
    _, printed = ask(trained, capsys, titles="; ".join(row.history_sids), exclude_seen=True, **flags)
    shown = [line.split()[3] for line in printed.splitlines()[2::2]]
    kept = [sid for sid in predicted["predict"] if sid not in seen]
    assert not seen & set(shown) and [sid for sid in shown if sid in kept] == [sid for sid in kept if sid in shown]


def test_a_dialogue(trained, capsys, monkeypatch):
    """Errors do not end it; an empty line or the end of the input does."""
    lines = ["no such thing", "number 4,", "number", "[1, oops]", "number 5,"]
    for end in ("", "\n\nnumber 6,\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + end))
        found, printed = ask(trained, capsys, interactive=True, top=3)
        assert [rank for rank, *_ in found] == [1, 2, 3, 1, 2, 3]
        assert [line for line in printed.splitlines() if "after: " in line] == [
            "> after: Item number 4, 'quoted'",
            "> after: Item number 5, 'quoted'",
        ]
        errors = [line for line in printed.splitlines() if "error: " in line]
        assert ["no item has", "30 items have 'number'", "expected a list"] == [
            next((said for said in ("no item has", "30 items have 'number'", "expected a list") if said in line), line)
            for line in errors
        ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("number 5,\n"))
    once, _ = ask(trained, capsys, titles="number 5,", top=3)
    assert ask(trained, capsys, interactive=True, top=3)[0] == once


# ------------------------------------------------------------------------------------------------- titles and histories
@pytest.mark.parametrize(
    "title, place",
    [
        ("red drill", 0),
        ("  RED   drill ", 0),
        ("bits", 1),
        ("sand paper", 2),  # an exact title wins over a part of another
        ("fine", 3),
        ("paper", 2),  # two items, but one SID
        ("<a_5>", 5),
        ("<a_3>", 2),
    ],
)
def test_finding_an_item(title, place):
    assert ItemFinder(CATALOGUE).find(title) == place


@pytest.mark.parametrize(
    "title, said",
    [
        ("drill", "2 items have 'drill' in their title; .*: 'Red drill' <a_1>; 'Drill bits, 10 pieces' <a_2>$"),
        (
            "TAPE",
            "2 items have 'TAPE' in their title; write one title in full, or its SID: 'Tape' <a_4>; 'tape' <a_5>$",
        ),
        ("red sand", "no item has 'red sand' in its title; nearest: 'Red drill' <a_1>; 'Sand Paper' <a_3>; 'Fine sand"),
        ("hammer", "no item has 'hammer' in its title$"),
    ],
)
def test_titles_that_are_not_one_item(title, said):
    with pytest.raises(InputError, match=said) as error:
        ItemFinder(CATALOGUE).find(title)
    assert "\n" not in str(error.value)


def test_an_article_may_stand_in_front():
    films = Catalogue(
        ["<a_1>", "<a_2>", "<a_3>"], ["Empire Strikes Back, The (1980)", "Alien, An", "Theory, A"], [0, 1, 2]
    )
    finder = ItemFinder(films)
    names = ("The Empire Strikes Back (1980)", "an alien", "a theory", "Alien, An", "the empire strikes")
    assert [finder.find(name) for name in names] == [0, 1, 2, 1, 0]


def test_at_most_five_candidates_of_at_most_sixty_characters():
    many = Catalogue([f"<a_{i}>" for i in range(9)], [f"Pen {i}" for i in range(9)], list(range(9)))
    for title in ("pen", "blue pen"):
        with pytest.raises(InputError) as error:
            ItemFinder(many).find(title)
        assert str(error.value).count("<a_") == 5
    long = Catalogue(["<a_1>"], ["word " * 30], [0])
    with pytest.raises(InputError, match=r"nearest: '(word ){11}\.\.\.' <a_1>$"):
        ItemFinder(long).find("another word")


def test_splitting_titles():
    assert split_titles(" a; b c ;; ") == ["a", "b c"]
    assert split_titles('["a; b", "c"]') == split_titles("['a; b', 'c']") == ["a; b", "c"]
    assert split_titles("[2 pack] tape; pen") == ["[2 pack] tape", "pen"]
    for text in (" ; ", "[]", ""):
        with pytest.raises(InputError, match="no titles; expected"):
            split_titles(text)


def test_the_latest_row_of_a_user(trained):
    path = trained.paths["train_file"]
    rows = read_rows(path)
    for user in ("U0", "U7"):
        last = [row for row in rows if row.user_id == user][-1]
        expected = History(
            [*last.history_sids, last.sid], [*last.history_titles, last.title], [*last.history_ids, last.item_id]
        )
        assert find_latest_history(rows, user, path) == expected
    with pytest.raises(
        InputError, match="--user_id nobody: .*train.csv has no row of this user; the first one there is U0"
    ):
        find_latest_history(rows, "nobody", path)


# ---------------------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    "flags, said",
    [
        ({}, "expected one of --user_id with --history_file, --titles, --interactive True"),
        ({"titles": "a", "interactive": True}, "expected one of"),
        ({"titles": "a", "history_file": "x.csv"}, "--user_id and --history_file go together"),
        ({"user_id": "U1"}, "--user_id and --history_file go together"),
        ({"titles": "a", "top": 51}, "--top 51: must be at least 1 and cannot exceed --num_beams 50"),
        ({"titles": "a", "top": 0}, "--top 0: must be at least 1"),
        ({"titles": "a", "max_history": -1}, "--max_history -1: must be 0"),
        ({"titles": "no such thing"}, "no item has 'no such thing' in its title"),
        ({"titles": "a", "fuse": "content"}, "--fuse: needs --fuse_weight, or --fused_metrics"),
        ({"titles": "a", "fuse": "content", "fuse_weight": [1.0]}, "--fuse content: needs --train_file"),
        ({"titles": "a", "fuse_weight": [1.0]}, "--fuse_weight: has an effect with --fuse or --fused_metrics only"),
        ({"titles": "a", "fuse": "content", "fused_metrics": "x"}, "--fused_metrics: names baselines and weights"),
        ({"titles": "a", "fuse": "luck", "fuse_weight": [1.0], "train_file": "x"}, "--fuse luck: expected one of"),
        ({"titles": "a", "fuse": "content", "fuse_weight": [1.0], "engine": "vllm"}, "--engine vllm: has no --fuse"),
        ({"titles": "a", "explained_sids": __file__}, "not valid JSON"),
    ],
)
def test_flags_that_cannot_be(trained, flags, said):
    """All of it is found before a model is loaded."""
    with pytest.raises(InputError, match=said):
        recommend(RecommendFlags(base_model="no model", info_file=trained.paths["info_file"], **flags))


def test_a_history_that_the_model_does_not_know(trained, tmp_path):
    text = Path(trained.paths["test_data_path"]).read_text().splitlines()
    row = read_rows(trained.paths["test_data_path"])[0]
    (tmp_path / "test.csv").write_text("\n".join([text[0], text[1].replace(row.sid, "<z_1>")]) + "\n")
    with pytest.raises(InputError, match="does not know the SID token <z_1>"):
        recommend(
            RecommendFlags(
                base_model=trained.checkpoint,
                info_file=trained.paths["info_file"],
                history_file=str(tmp_path / "test.csv"),
                user_id=row.user_id,
            )
        )


def test_on_the_command_line(trained, capsys):
    paths = trained.paths
    argv = ["--base_model", trained.checkpoint, "--info_file", paths["info_file"], "--shared_sids", "--top", "2"]
    run_command(recommend, parse_flags(RecommendFlags, [*argv, "--titles", "number 5,; number 6,"]))
    assert len(capsys.readouterr().out.splitlines()) == 4
    with pytest.raises(SystemExit):
        run_command(recommend, parse_flags(RecommendFlags, [*argv, "--titles", "number"]))
    assert capsys.readouterr().err.startswith("error: 30 items have 'number' in their title")
