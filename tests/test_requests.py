"""What the demo's API answers: limits, batches of unlike requests, and the levels of a search."""

import math

import pytest

from minionerec import Recommender
from minionerec.common.files import InputError
from minionerec.evaluation.requests import LONGEST_HISTORY, Request, answer_requests, read_request
from minionerec.evaluation.search_levels import trace_levels


@pytest.fixture(scope="module")
def recommender(trained):
    return Recommender.load(trained.checkpoint, num_beams=20)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"history": []}, f"history: expected a list of 1 to {LONGEST_HISTORY}"),
        ({"history": [1] * (LONGEST_HISTORY + 1)}, "history: expected a list"),
        ({"history": "Fargo"}, "history: expected a list"),
        ({"history": [1.5]}, "history: expected item ids"),
        ({"history": [True]}, "history: expected item ids"),
        ({"k": 0}, "k: expected a whole number from 1 to 20"),
        ({"k": 21}, "k: expected a whole number from 1 to 20"),
        ({"k": 6, "num_beams": 5}, "k: expected a whole number from 1 to 5"),
        ({"k": "many"}, "k: expected"),
        ({"num_beams": 21}, "num_beams: expected a whole number from 1 to 20"),
        ({"exclude_seen": "no"}, "exclude_seen: expected true or false"),
        ({"categories": "Tools"}, "categories: expected a list"),
        ({"categories": [3]}, "categories: expected texts"),
        ({"fuse_weight": -1}, "fuse_weight: expected a number from 0 to 100"),
        ({"fuse_weight": "much"}, "fuse_weight: expected a number"),
    ],
)
def test_limits(changed, said):
    asked = {"history": [1], "k": 5, "exclude_seen": True, "categories": None, "num_beams": 0, "most": 20} | changed
    with pytest.raises(InputError, match=said):
        read_request(**asked)


def test_numbers_as_json_writes_them():
    assert read_request(["a", 3], 5.0, False, ["x"], None, 20) == Request(("a", 3), 5, False, ("x",), 20)


def test_unlike_requests_are_answered_in_their_order(recommender):
    requests = [
        read_request([1, 2], 3, True, None, 0, 20),
        InputError("k: expected something else"),
        read_request([3], 7, False, None, 10, 20),
        read_request(["no such title"], 3, True, None, 0, 20),
        read_request([4, 5, 6], 5, True, None, 0, 20),
    ]
    answers = answer_requests(recommender, requests)
    assert [set(answer) for answer in answers] == [{"recommendations"}, {"error"}] * 2 + [{"recommendations"}]
    for number, history, k, options in (
        (0, [1, 2], 3, {}),
        (2, [3], 7, {"exclude_seen": False, "num_beams": 10}),
        (4, [4, 5, 6], 5, {}),
    ):
        (expected,) = recommender.recommend([history], k, **options)
        found = answers[number]["recommendations"]
        assert [item["item_id"] for item in found] == [item.item_id for item in expected]
        assert [item["score"] for item in found] == pytest.approx([item.score for item in expected], abs=1e-4)
    assert "expected something else" in answers[1]["error"] and "no item has" in answers[3]["error"]


@pytest.mark.parametrize("num_beams, k", [(20, 5), (4, 4), (1, 1)])
def test_levels_are_those_of_the_search(recommender, num_beams, k):
    """The last level holds the list, probabilities add up along the tree, and what goes on is what has children."""
    history = recommender.finder.find_history([1, 2, 3])
    levels = trace_levels(recommender, history, k, True, None, num_beams)
    (items,) = recommender.rank_histories([history], k, True, None, num_beams)
    assert len(levels) == max(len(sid.split("><")) for sid in recommender.catalogue.sids)
    for level, deeper in zip(levels, levels[1:], strict=False):
        assert 1 <= len(level) <= num_beams
        assert [beam.probability for beam in level] == sorted((beam.probability for beam in level), reverse=True)
        assert sum(beam.probability for beam in level) <= 1 + 1e-5
        for beam in deeper:
            (parent,) = [above for above in level if beam.prefix.startswith(above.prefix)]
            assert parent.survives and beam.probability <= parent.probability * (1 + 1e-5)
    prefixes = {beam.prefix: beam for level in levels for beam in level}
    listed = {item.sid for item in items}
    assert {beam.prefix for beam in levels[-1] if beam.survives} == listed
    for item in items:
        assert math.exp(item.score) <= prefixes[item.sid].probability * (1 + 1e-4)
