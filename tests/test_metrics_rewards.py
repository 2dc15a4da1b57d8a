"""Tables of hand-computed numbers for metrics and rewards, and slow twins for the GRPO formulas."""

import math

import pytest
import torch

from metrics import hit_ratio, item_rank, items_by_sid, ndcg, popularity, rank_of, score_predictions, summarise, table
from minionerec_trainer import group_advantages, grpo_token_loss
from rewards import REWARDS, ranking, ranking_only, rule

RANKS = [1, 3, None, 11]


# -------------------------------------------------------------------------------------------------------------- metrics
@pytest.mark.parametrize(
    "k, hits, gain",
    [
        (1, 0.25, 0.25),
        (2, 0.25, 0.25),
        (3, 0.5, 0.375),
        (10, 0.5, 0.375),
        (11, 0.75, (1 + 1 / 2 + 1 / math.log2(12)) / 4),
    ],
)
def test_hit_ratio_and_ndcg(k, hits, gain):
    assert hit_ratio(RANKS, k) == hits
    assert ndcg(RANKS, k) == pytest.approx(gain)


def test_ndcg_values_by_hand():
    assert [round(ndcg([rank], 10), 4) for rank in (1, 2, 3, 4, 10)] == [1.0, 0.6309, 0.5, 0.4307, 0.2891]
    assert ndcg([11], 10) == ndcg([None], 10) == 0


def test_rank_of():
    assert [rank_of(target, ["a", "b", "a"]) for target in "abc"] == [1, 2, None]
    assert rank_of("a", []) is None


def test_popularity():
    assert popularity([4, 2, 4, 4]) == {4: 3, 2: 1}


SIDS, ITEMS = ["x", "x", "y", "x", "z"], [5, 2, 9, 7, 1]


def test_items_that_share_a_sid_stand_by_popularity_then_id():
    assert items_by_sid(SIDS, ITEMS, {7: 3, 2: 1, 5: 1}) == {"x": [7, 2, 5], "y": [9], "z": [1]}
    assert items_by_sid(SIDS, ITEMS, {})["x"] == [2, 5, 7]


@pytest.mark.parametrize(
    "item, ranked, rank",
    [
        (7, ["x", "y"], 1),
        (5, ["x", "y"], 3),
        (9, ["x", "y"], 4),  # the three items of x stand before it
        (9, ["y", "x"], 1),
        (2, ["y", "x"], 3),
        (1, ["y", "x"], None),
        (9, ["not in the catalogue", "y"], 2),  # an illegal recommendation takes a place
    ],
)
def test_item_rank(item, ranked, rank):
    assert item_rank(item, ranked, items_by_sid(SIDS, ITEMS, {7: 3, 2: 1, 5: 1})) == rank


def test_summarise_stops_at_the_length_of_the_lists():
    assert set(summarise([1], [2], 5)["sid"]) == {"HR@1", "HR@3", "HR@5", "NDCG@1", "NDCG@3", "NDCG@5"}
    assert summarise([1, None], [2, None], 3)["item"] == {
        "HR@1": 0,
        "HR@3": 0.5,
        "NDCG@1": 0,
        "NDCG@3": pytest.approx(0.31546, abs=1e-5),
    }


def predictions(*rows):
    return [{"output": output, "item_id": item, "predict": ranked} for output, item, ranked in rows]


def test_score_predictions():
    """Item 2 shares its SID with the more popular item 7: a hit at SID level, second place at item level."""
    scores = score_predictions(
        predictions(
            ("x", 2, ["x", "y", "z"]), ("y", 9, ["x", "y", "bad"]), ("z", 1, ["y", "y"]), ("y", 9, ["y"]), ("z", 1, [])
        ),
        SIDS,
        ITEMS,
        {7: 3, 2: 1, 5: 1},
        3,
        [["y"], ["x"], [], ["z", "z"], ["x"]],
    )
    # Row 1 loses nothing before its target, row 2 the x before it; the others stay.
    assert scores["item_unseen"] == pytest.approx({"HR@1": 0.4, "NDCG@1": 0.4}, abs=1e-6)
    assert scores["seen_in_top_10"] == 2
    assert scores["sid"] == pytest.approx(
        {"HR@1": 0.4, "HR@3": 0.6, "NDCG@1": 0.4, "NDCG@3": (1 + 1 / math.log2(3) + 1) / 5}, abs=1e-6
    )
    assert scores["item"] == pytest.approx(
        {"HR@1": 0.2, "HR@3": 0.4, "NDCG@1": 0.2, "NDCG@3": (1 + 1 / math.log2(3)) / 5}, abs=1e-6
    )
    assert {key: scores[key] for key in ("rows", "illegal", "duplicates", "short_lists", "items_sharing_a_sid")} == {
        "rows": 5,
        "illegal": 1,
        "duplicates": 1,
        "short_lists": 3,
        "items_sharing_a_sid": 3,
    }


def test_a_list_as_long_as_the_catalogue_is_not_short():
    scores = score_predictions(
        predictions(("x", 2, ["x", "y", "z"]), ("x", 2, ["x", "y"])), SIDS, ITEMS, {}, 50, [[], []]
    )
    assert scores["short_lists"] == 1 and scores["illegal"] == scores["duplicates"] == 0


def test_table_shows_what_was_measured():
    result = {"item": {"HR@1": 0.25, "NDCG@10": 0.5}, "item_unseen": {"HR@10": 0.75}, "illegal": 3}
    lines = table({"model": result}).splitlines()
    assert lines[1].split() == ["model", "0.2500", "-", "-", "-", "-", "0.5000", "3", "0.7500", "-"]


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
    assert ranking(completions, target) == pytest.approx([hit + penalty for hit, penalty in zip(hits, penalties)])


def test_rank_penalty_in_numbers():
    assert ranking(["a", "b", "c"], "b") == pytest.approx([-0.46928, 1, -0.23464], abs=1e-5)


def test_the_registry_names_them():
    assert REWARDS["rule"] is rule and REWARDS["ranking"] is ranking and REWARDS["ranking_only"] is ranking_only


# ----------------------------------------------------------------------------------------------------------------- GRPO
def test_group_advantages():
    assert group_advantages([1, 0, 0, 0]).tolist() == pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3])
    half = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert group_advantages([0.5, -0.5]).tolist() == pytest.approx([half, -half])
    values = group_advantages([0.3, -0.1, 0.9, 0.2, 0.2])
    assert values.sum().item() == pytest.approx(0, abs=1e-6) and values.std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("rewards", [[0.0] * 4, [1.0] * 4, [0.1] * 16, [0.7]])
def test_equal_rewards_say_nothing(rewards):
    """Exactly zero: a mean that is off by one rounding would be blown up by the division."""
    assert group_advantages(rewards).tolist() == [0] * len(rewards)


def test_token_loss_value_and_gradient():
    """The twin writes the ratio to a frozen old policy and the k3 estimator out, and differentiates by hand."""
    generator = torch.Generator().manual_seed(0)
    log_probs = (-3 * torch.rand(40, generator=generator, dtype=torch.float64)).requires_grad_()
    reference = -3 * torch.rand(40, generator=generator, dtype=torch.float64)
    advantages = torch.randn(40, generator=generator, dtype=torch.float64)
    for beta in (0.0, 0.04, 1.0):
        loss, divergence = grpo_token_loss(log_probs, reference, advantages, beta)
        policy, base = log_probs.detach().exp(), reference.exp()
        kl = base / policy - torch.log(base / policy) - 1
        torch.testing.assert_close(loss.detach(), -advantages + beta * kl)
        torch.testing.assert_close(divergence, kl)
        assert (divergence >= 0).all() and not divergence.requires_grad
        (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
        torch.testing.assert_close(gradient, -advantages + beta * (1 - base / policy))

        twin = log_probs.detach().clone().requires_grad_()
        ratio = twin.exp() / policy
        difference = reference - twin
        (-(ratio * advantages) + beta * (difference.exp() - difference - 1)).sum().backward()
        torch.testing.assert_close(gradient, twin.grad)


def test_without_reference_there_is_no_divergence():
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, divergence = grpo_token_loss(log_probs, None, torch.tensor([2.0, -1.0]), 5.0)
    assert loss.tolist() == [-2, 1] and divergence.tolist() == [0, 0]
    loss.sum().backward()
    assert log_probs.grad.tolist() == [-2, 1]
