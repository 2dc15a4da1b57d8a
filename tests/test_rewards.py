"""Tables of hand-computed numbers for rewards, weighted terms, a user's own function, and what is refused."""

import math

import numpy as np
import pytest
import torch

from minionerec.common.embeddings import save_embeddings
from minionerec.common.files import InputError
from minionerec.common.records import Catalogue, Row
from minionerec.language.examples import Example
from minionerec.recommenders.networks import build_network, save_network
from minionerec.training.rewards import (
    PLAIN_REWARDS,
    NamedReward,
    RewardInputs,
    build_likelihood_reward,
    build_rewards,
    build_semantic_reward,
    build_transitions_reward,
    prefix,
    ranking,
    ranking_only,
    rule,
)

# -------------------------------------------------------------------------------------------------------------- rewards
W = [1, 1 / math.log2(3), 1 / 2, 1 / math.log2(5)]  # 1 / log2(rank + 1)


@pytest.mark.parametrize(
    "completions, target, hits, penalties",
    [
        (["a", "b", "c"], "a", [1, 0, 0], [0, -W[1] / sum(W[:3]), -W[2] / sum(W[:3])]),
        (["a", "b", "c"], "b", [0, 1, 0], [-W[0] / sum(W[:3]), 0, -W[2] / sum(W[:3])]),
        (["a", "b", "c", "d"], "d", [0, 0, 0, 1], [-W[0] / sum(W), -W[1] / sum(W), -W[2] / sum(W), 0]),
        (["a", "b", "c"], "e", [0, 0, 0], [0, 0, 0]),
        (["a", "a", "b"], "a", [1, 1, 0], [0, 0, -W[2] / sum(W[:3])]),  # sampled groups repeat themselves
        (["a", "b"], "ab", [0, 0], [0, 0]),  # equal, not contained
    ],
)
def test_rewards(completions, target, hits, penalties):
    assert rule(completions, target) == hits
    assert ranking_only(completions, target) == pytest.approx(penalties)
    assert ranking(completions, target) == pytest.approx(
        [hit + penalty for hit, penalty in zip(hits, penalties, strict=True)]
    )


def test_rank_penalty_in_numbers():
    assert ranking(["a", "b", "c"], "b") == pytest.approx([-0.46928, 1, -0.23464], abs=1e-5)


@pytest.mark.parametrize(
    "completion, target, share",
    [
        ("<a_1><b_2><c_3>", "<a_1><b_2><c_3>", 1),
        ("<a_1><b_2><c_4>", "<a_1><b_2><c_3>", 2 / 3),
        ("<a_1><b_3><c_3>", "<a_1><b_2><c_3>", 1 / 3),
        ("<a_2><b_2><c_3>", "<a_1><b_2><c_3>", 0),
        ("<a_1>", "<a_1><b_2><c_3><d_0>", 1 / 4),  # depths differ
        ("<a_1><b_2><c_3><d_0>", "<a_1><b_2>", 1),
        ("<a_12>", "<a_1>", 0),  # tokens, not characters
    ],
)
def test_prefix(completion, target, share):
    assert prefix(["<z_9>", completion], target) == pytest.approx([0, share])


def test_the_registry_names_them():
    assert PLAIN_REWARDS == {"rule": rule, "ranking": ranking, "ranking_only": ranking_only, "prefix": prefix}


# ------------------------------------------------------------------------------------------- rewards that need a file
CATALOGUE = Catalogue(["<a>", "<b>", "<c>", "<c>"], ["A", "B", "C", "D"], [5, 6, 7, 9])  # two items share <c>


def example(item, sid, history=(5,)):
    return Example("", [1], [2], "", "u", sid, item, "", tuple(history))


def test_semantic_is_the_cosine_to_the_target_item():
    vectors = {5: np.array([2.0, 0.0]), 6: np.array([3.0, 3.0]), 7: np.array([0.0, 1.0]), 9: np.array([0.0, -5.0])}
    reward = build_semantic_reward(CATALOGUE, vectors)
    half = math.sqrt(0.5)
    assert reward(["<a>", "<b>"], example(5, "<a>")) == pytest.approx([1, half])
    assert reward(["<b>", "<a>", "<c>"], example(7, "<c>")) == pytest.approx([half, 0, 0])  # <c>: opposite items cancel
    vectors[9] = np.array([0.0, 4.0])
    assert build_semantic_reward(CATALOGUE, vectors)(["<c>"], example(7, "<c>")) == pytest.approx([1])


def test_likelihoods_stand_against_the_favourite():
    asked = []

    def after(row):
        asked.append(row.history_ids)
        return {9: 0.1, 7: 0.2, 6: 0.4, 5: 0.3}

    reward = build_likelihood_reward(CATALOGUE, after)
    assert reward(["<b>", "<a>", "<c>"], example(6, "<b>", (7, 5))) == pytest.approx(
        [1, 0.75, 0.5]
    )  # <c>: its best item
    assert asked == [(7, 5)]
    assert build_likelihood_reward(CATALOGUE, lambda row: {})(["<b>", "<c>"], example(6, "<b>")) == [0, 0]
    assert build_likelihood_reward(CATALOGUE, lambda row: {7: 0.2})(["<b>", "<c>"], example(6, "<b>")) == [0, 1]
    assert reward(["<b>", "<c>"], example(6, "<b>", ())) == [0, 0] and asked == [(7, 5)]


def train_row(history, target):
    return Row("u", (), tuple(history), (), "", target, "")


def test_transitions_without_the_rows_own():
    """5 was followed by 6 twice, once of it in the row itself, and by 7 once."""
    train = [train_row((5,), 6), train_row((9, 5), 6), train_row((5,), 7), train_row((7,), 9)]
    reward = build_transitions_reward(train, CATALOGUE)
    assert reward(["<a>", "<b>", "<c>"], example(6, "<b>", (5,))) == [0, 1, 1]  # 6: 2 - 1, against 7: 1
    assert reward(["<b>", "<c>"], example(5, "<a>", (5,))) == [1, 0.5]  # a row that is not among them
    # Newest first: 7 -> 9 counts 1, 5 -> 6 and 5 -> 7 half of 2 and of 1; without the row's own, 9 is left with
    # nothing.
    assert reward(["<b>", "<c>"], example(6, "<b>", (5, 7))) == pytest.approx([0, 1])
    assert reward(["<b>", "<c>"], example(9, "<c>", (5, 7))) == pytest.approx([1, 0.5])
    # The same item twice in the history: both places count the row's own transition.
    assert reward(["<b>", "<c>"], example(7, "<c>", (5, 5))) == pytest.approx([1, 0])


def inputs(catalogue=CATALOGUE, **files):
    return RewardInputs(catalogue, [], "cpu", files)


def test_content_likes_like_titles():
    catalogue = Catalogue(
        ["<a>", "<b>", "<c>"], ["steel pipe clamp", "steel pipe valve", "blue garden hose"], [0, 1, 2]
    )
    (term,) = build_rewards(["content"], inputs(catalogue))
    assert term(["<b>", "<c>"], Example("", [1], [2], "", "u", "<c>", 2, "", (0,))) == [1, 0]


@pytest.fixture
def files(tmp_path):
    save_embeddings(tmp_path / "x.npy", np.eye(4, dtype=np.float32), ["9", "7", "6", "5"], "made", ["title"])
    torch.manual_seed(0)
    shape = {"model": "sasrec", "hidden_size": 8, "num_layers": 1, "num_heads": 1, "dropout": 0.0, "max_history": 5}
    save_network(build_network([5, 6, 7, 9], shape), tmp_path / "cf")
    (tmp_path / "own.py").write_text(
        "def liked(completions, example):\n    return [len(example.history_ids) + len(c) for c in completions]\n"
        "def bad(completions, example):\n    return [float('nan')] * len(completions)\n"
        "def short(completions, example):\n    return [1]\n"
        "def fails(completions, example):\n    return 1 / 0\n"
        "word = 'not a function'\n"
    )
    (tmp_path / "broken.py").write_text("def (\n")
    return tmp_path


def test_terms_with_weights_and_files(files):
    terms = build_rewards(
        ["rule:2", "semantic", "sasrec:-0.5", "module"],
        inputs(ada_path=str(files / "x.npy"), cf_path=str(files / "cf"), reward_module=f"{files / 'own.py'}:liked"),
    )
    assert [(term.name, term.weight) for term in terms] == [
        ("rule", 2),
        ("semantic", 1),
        ("sasrec", -0.5),
        ("module", 1),
    ]
    row = example(6, "<b>", (7, 5))
    found = [term(["<a>", "<b>"], row) for term in terms]
    assert found[0] == [0, 1] and found[1] == [0, 1] and found[3] == [5, 5]
    assert 0 < min(found[2]) and max(found[2]) <= 1


@pytest.mark.parametrize(
    "terms, given, said",
    [
        (
            ["rank"],
            {},
            "--reward_type rank: expected one of rule, ranking, ranking_only, prefix, semantic, content, transitions, "
            "sasrec, module",
        ),
        (["rule", "rule:2"], {}, "--reward_type: rule is given twice"),
        (["rule:x"], {}, "--reward_type rule:x: expected NAME or NAME:WEIGHT"),
        (["rule:0"], {}, "--reward_type rule:0"),
        (["rule:nan"], {}, "--reward_type rule:nan"),
        ([], {}, "--reward_type: expected one or more of rule"),
        (["semantic"], {}, "--reward_type semantic: needs --ada_path"),
        (["sasrec"], {}, "--reward_type sasrec: needs --cf_path"),
        (["module"], {}, "--reward_type module: needs --reward_module"),
        (["rule"], {"ada_path": "x.npy"}, "--ada_path: has an effect with --reward_type semantic only"),
        (["semantic"], {"ada_path": "nowhere.npy"}, "nowhere.npy: no such file"),
        (["sasrec"], {"cf_path": "nowhere"}, "no such file"),
        (["module"], {"reward_module": "own.py"}, "expected FILE.py:FUNCTION"),
        (["module"], {"reward_module": "other.py:liked"}, "expected FILE.py:FUNCTION"),
        (["module"], {"reward_module": "own.py:word"}, "has no function 'word'"),
        (["module"], {"reward_module": "broken.py:liked"}, "broken.py: does not load"),
    ],
)
def test_terms_that_are_refused(files, monkeypatch, terms, given, said):
    monkeypatch.chdir(files)
    with pytest.raises(InputError) as error:
        build_rewards(terms, inputs(**given))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_files_of_another_catalogue(files):
    other = Catalogue(["<a>", "<b>"], ["A", "B"], [5, 8])
    with pytest.raises(InputError, match="--ada_path .*: item 8 has no embedding there"):
        build_rewards(["semantic"], inputs(other, ada_path=str(files / "x.npy")))
    with pytest.raises(InputError, match="its items are not those of the info file"):
        build_rewards(["sasrec"], inputs(other, cf_path=str(files / "cf")))


@pytest.mark.parametrize(
    "name, said",
    [
        ("bad", "reward module: nan for <a>, target <b>"),
        ("short", "reward module: 1 numbers for 2 completions"),
        ("fails", "reward module: expected a list of numbers, got ZeroDivisionError"),
    ],
)
def test_a_users_function_that_goes_wrong(files, name, said):
    (term,) = build_rewards(["module"], inputs(reward_module=f"{files / 'own.py'}:{name}"))
    with pytest.raises(InputError, match=said):
        term(["<a>", "<c>"], example(6, "<b>"))


def test_values_become_floats():
    assert NamedReward("x", 1.0, lambda completions, row: torch.tensor([1, 2]))(["a", "b"], None) == [1.0, 2.0]
