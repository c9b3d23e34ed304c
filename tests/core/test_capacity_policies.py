"""Who is turned away: every policy fills the same places, with the slots its order names first."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_core import DropReason, capacity
from moe_core.capacity import DROP_POLICIES
from moe_core.capacity import policies as drop_policies

from .helpers import Case, cases, fast, routing_of

SCOPES = ("batch", "sequence")
DETERMINISTIC = ("position", "slot_position", "score")


def queue_by_hand(routing, C, policy, scope):
    """The capacity mask of a deterministic policy, slot after slot in plain Python."""
    weight = routing.expert_weights.tolist()
    order = {
        "position": lambda b, n, k: (b, n, k),
        "slot_position": lambda b, n, k: (k, b, n),
        "score": lambda b, n, k: (-weight[b][n][k], b, n, k),
    }[policy]
    kept, taken = torch.zeros_like(routing.capacity_mask), {}
    for b, n, k in sorted(routing.capacity_mask.nonzero().tolist(), key=lambda slot: order(*slot)):
        queue = int(routing.expert_indices[b, n, k]), b if scope == "sequence" else None
        taken[queue] = taken.get(queue, 0) + 1
        kept[b, n, k] = taken[queue] <= C
    return kept


@fast
@given(
    cases(),
    st.sampled_from(DETERMINISTIC),
    st.sampled_from(SCOPES),
    st.sampled_from([0.0, 0.3, 1.0, 2.0]),
)
def test_each_policy_equals_a_queue_in_plain_python(case: Case, policy, scope, factor):
    before = case.router(capacity_factor=None)(case.x(), case.padding_mask())
    after = capacity.apply(before, capacity_factor=factor, drop_policy=policy, scope=scope).check()
    assert torch.equal(after.capacity_mask, queue_by_hand(before, after.capacity, policy, scope))


@fast
@given(cases(), st.sampled_from(list(DROP_POLICIES)), st.sampled_from(SCOPES), st.integers(0, 5))
def test_every_policy_keeps_as_many_slots_of_each_expert_and_never_more_than_there_are_places(
    case: Case, policy, scope, C
):
    before = case.router(capacity_factor=None)(case.x(), case.padding_mask())
    after = capacity.apply(before, expert_capacity=C, drop_policy=policy, scope=scope).check()
    kept, asked = after._count(after.capacity_mask), before._count(before.capacity_mask)
    if scope == "batch":
        kept, asked = kept.sum(0), asked.sum(0)
    assert torch.equal(kept, asked.clamp(max=C))
    dropped = before.capacity_mask & ~after.capacity_mask
    assert (after.drop_reason[dropped] == DropReason.OVER_CAPACITY).all()
    assert torch.equal(after.drop_reason[~dropped], before.drop_reason[~dropped])


def test_first_choices_come_before_second_choices():
    before = routing_of([[[0, 1], [1, 0], [0, 1]]], 2)
    kept = capacity.apply(before, expert_capacity=2, drop_policy="slot_position").capacity_mask
    assert kept.tolist() == [
        [[True, True], [True, False], [True, False]]
    ]  # 0: tokens 0 and 2; 1: token 1, then token 0's second
    kept = capacity.apply(before, expert_capacity=2, drop_policy="position").capacity_mask
    assert kept.tolist() == [[[True, True], [True, True], [False, False]]]


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
def test_the_highest_weights_stay_whatever_their_sign(sign):
    weights = torch.tensor([[[0.1], [0.4], [0.2], [0.3]]]) - (
        0 if sign > 0 else 10
    )  # all negative: still 0.4 is the highest
    before = routing_of([[[0], [0], [0], [1]]], 2, weights=weights)
    after = capacity.apply(before, expert_capacity=2, drop_policy="score")
    assert after.capacity_mask.flatten().tolist() == [False, True, True, True]


def test_equal_weights_leave_the_places_to_the_earliest():
    before = routing_of(torch.zeros(1, 1000, 1), 10)
    after = capacity.apply(before, expert_capacity=700, drop_policy="score")
    assert after.capacity_mask.flatten().nonzero().flatten().tolist() == list(range(700))


def test_the_random_policy_turns_everybody_away_equally_often_and_obeys_the_seed():
    before = routing_of(torch.zeros(1, 8, 1), 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kept = torch.stack(
            [
                capacity.apply(before, expert_capacity=2, drop_policy="random").capacity_mask
                for _ in range(2000)
            ]
        )
        torch.manual_seed(0)
        again = capacity.apply(before, expert_capacity=2, drop_policy="random").capacity_mask
    assert (kept.double().mean(0) - 0.25).abs().max() < 0.04  # four standard deviations
    assert torch.equal(kept[0], again)


def test_each_sequence_queues_for_itself():
    before = routing_of([[[0], [0], [0]], [[0], [0], [1]]], 2)
    after = capacity.apply(before, expert_capacity=2, scope="sequence").check()
    assert after.capacity_mask.squeeze(-1).tolist() == [[True, True, False], [True, True, True]]
    assert (
        capacity.apply(before, capacity_factor=1.0, scope="sequence").capacity == 2
    )  # ceil(3 / 2), not ceil(6 / 2)
    with pytest.raises(ValueError, match="an expert keeps 4 slots, capacity is 2"):
        replace(after, capacity_scope="batch").check()


@fast
@given(cases(), st.sampled_from(DETERMINISTIC))
def test_counted_per_sequence_the_rest_of_the_batch_does_not_matter(case: Case, policy):
    before = case.router(capacity_factor=None)(case.x(), case.padding_mask())
    together = capacity.apply(
        before, capacity_factor=0.5, drop_policy=policy, scope="sequence"
    ).capacity_mask
    for b in range(case.B):
        one = {
            name: getattr(before, name)[b : b + 1]
            for name in (
                "expert_indices",
                "expert_weights",
                "capacity_mask",
                "logits",
                "scores",
                "drop_reason",
            )
        }
        mask = None if before.padding_mask is None else before.padding_mask[b : b + 1]
        alone = replace(before, **one, padding_mask=mask)
        assert torch.equal(
            capacity.apply(alone, capacity_factor=0.5, drop_policy=policy).capacity_mask,
            together[b : b + 1],
        )


@pytest.mark.parametrize("formula", ["tutel", "megablocks"])
@pytest.mark.parametrize("scope", SCOPES)
def test_factor_zero_of_tutel_and_megablocks_keeps_everybody(formula, scope):
    before = routing_of([[[0], [0], [0]], [[0], [0], [1]]], 2)
    after = capacity.apply(before, capacity_factor=0, formula=formula, scope=scope).check()
    assert after.capacity_mask.all() and after.capacity == (5 if scope == "batch" else 3)
    assert (
        capacity.apply(
            routing_of(torch.zeros(0, 3, 1), 2), capacity_factor=0, formula=formula, scope=scope
        ).capacity
        == 0
    )


@pytest.mark.parametrize("policy", DROP_POLICIES)
@pytest.mark.parametrize("scope", SCOPES)
def test_more_places_than_tokens_keep_everybody_under_every_policy(policy, scope):
    before = routing_of([[[0, 1], [0, 2]]], 3)
    assert (
        capacity.apply(before, expert_capacity=10**6, drop_policy=policy, scope=scope)
        .check()
        .capacity_mask.all()
    )
    assert (
        capacity.apply(before, capacity_factor=1e6, drop_policy=policy, scope=scope)
        .check()
        .capacity_mask.all()
    )


@pytest.mark.parametrize("B_N", [(0, 3), (2, 0)])
@pytest.mark.parametrize("policy", DROP_POLICIES)
@pytest.mark.parametrize("scope", SCOPES)
def test_nobody_queues_where_nobody_is(B_N, policy, scope):
    before = routing_of(torch.zeros(*B_N, 2), 3)
    after = capacity.apply(before, capacity_factor=1.0, drop_policy=policy, scope=scope).check()
    assert after.capacity_mask.shape == (*B_N, 2) and not after.tokens_per_expert.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"drop_policy": "luck"},
            "drop_policy='luck' must be one of 'position', 'slot_position', 'score', 'random'",
        ),
        ({"scope": "world"}, "scope='world' must be one of 'batch', 'sequence'"),
        ({"overflow": "spill"}, "overflow='spill' must be one of 'drop', 'shared'"),
        ({"expert_capacity": -1}, "expert_capacity=-1 must be a whole number, at least 0"),
        ({"expert_capacity": 2.0}, "expert_capacity=2.0 must be a whole number, at least 0"),
        ({"formula": "mine"}, "formula='mine' must be one of"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        capacity.apply(routing_of([[[0]]], 2), **arguments)


def test_the_policies_are_documented():
    assert all(policy.__doc__ for policy in drop_policies.DROP_POLICIES.values())
