"""How many places there are, and who gets them."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_core import DropReason, capacity
from moe_core.capacity import expert_capacity

from .helpers import cases, fast, first_come_first_served, randn, routing_of


@pytest.mark.parametrize(
    ("n_tokens", "top_k", "n_experts", "capacity_factor", "places"),
    [
        (1024, 1, 8, 1.25, 160),  # Switch
        (1024, 2, 8, 1.25, 320),
        (10, 1, 1, 1.1, 11),
        (100, 1, 1, 1.1, 110),  # 100 * 1.1 is 110.00000000000001 in floats
        (100, 1, 10, 0.7, 7),
        (7, 1, 4, 1.0, 2),  # rounded up
        (1024, 2, 8, 0.0, 0),
        (1024, 2, 8, 0, 0),
        (0, 2, 8, 1.25, 0),
        (1, 1, 8, 0.01, 1),
        (4, 1, 2, 100, 200),  # more places than tokens
        (8, 1, 1, 1e-7, 1),
    ],
)
def test_capacity_is(n_tokens, top_k, n_experts, capacity_factor, places):
    assert expert_capacity(n_tokens, top_k, n_experts, capacity_factor) == places


@fast
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 256), st.integers(0, 1000))
def test_capacity_is_the_ceiling_of_the_decimal_as_written(n_tokens, top_k, n_experts, hundredths):
    exact = math.ceil(Fraction(n_tokens * top_k, n_experts) * Fraction(hundredths, 100))
    assert expert_capacity(n_tokens, top_k, n_experts, hundredths / 100) == exact


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 1, 1, 1.0), "n_tokens=-1 must be a whole number, at least 0"),
        ((8, 0, 1, 1.0), "top_k=0 must be a whole number, at least 1"),
        ((8, 1, 1.5, 1.0), "n_experts=1.5 must be a whole number, at least 1"),
        ((8, 1, 1, -0.1), "capacity_factor=-0.1 must be at least 0"),
        ((8, 1, 1, math.nan), "capacity_factor=nan must be at least 0"),
        ((8, 1, 1, math.inf), "capacity_factor=inf must be at least 0 and finite"),
    ],
)
def test_a_capacity_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        expert_capacity(*arguments)


def test_an_unknown_drop_policy_is_refused():
    with pytest.raises(ValueError, match="drop_policy='luck' must be one of 'position'"):
        capacity.apply(routing_of([[[0]]], 2), capacity_factor=1.0, drop_policy="luck")


def test_the_earliest_keep_their_place():
    routing = capacity.apply(
        routing_of([[[0, 1], [0, 1], [1, 0]]], 4), capacity_factor=1.0
    ).check()  # C = ceil(6 / 4) = 2
    assert routing.capacity == 2
    assert routing.capacity_mask.tolist() == [[[True, True], [True, True], [False, False]]]


def test_in_a_long_tie_the_earliest_keep_their_place():
    routing = capacity.apply(routing_of(torch.zeros(1, 1000, 1), 10), capacity_factor=7.0)
    assert routing.capacity_mask.flatten().nonzero().flatten().tolist() == list(range(700))


def test_a_dropped_slot_keeps_its_index_and_weight():
    before = routing_of([[[0], [0], [0], [1]]], 2)
    after = capacity.apply(before, capacity_factor=0.5)
    assert after.drop_reason.flatten().tolist() == [
        DropReason.KEPT,
        DropReason.OVER_CAPACITY,
        DropReason.OVER_CAPACITY,
        DropReason.KEPT,
    ]
    assert torch.equal(after.expert_indices, before.expert_indices) and torch.equal(
        after.expert_weights, before.expert_weights
    )
    assert (
        before.capacity is None and before.capacity_mask.all()
    )  # and the routing given is left as it was


def test_capacity_zero_keeps_nobody():
    routing = capacity.apply(routing_of([[[0], [1]]], 2), capacity_factor=0).check()
    assert routing.capacity == 0 and not routing.capacity_mask.any() and routing.drop_rate == 1


def test_more_places_than_tokens_keep_everybody():
    assert capacity.apply(routing_of([[[0], [0]]], 2), capacity_factor=100).capacity_mask.all()


def test_queue_places_count_the_kept_slots_before():
    routing = routing_of(
        [[[0, 1], [1, 0], [0, 1]]], 2, reasons=[[[0, 0], [1, 0], [0, 0]]], capacity=9
    )
    places = capacity.queue_places(routing)
    assert places[routing.capacity_mask].tolist() == [0, 0, 1, 2, 1]


@fast
@given(cases())
def test_the_position_policy_equals_a_queue_in_plain_python(case):
    routing = case.router(capacity_factor=None)(case.x(), case.padding_mask())
    for capacity_factor in (0.0, 0.3, 1.0, 2.0):
        after = capacity.apply(routing, capacity_factor=capacity_factor).check()
        assert torch.equal(after.capacity_mask, first_come_first_served(routing, after.capacity))


@fast
@given(cases())
def test_a_slot_is_turned_away_only_where_the_expert_is_full(case):
    routing = case.router(capacity_factor=0.75)(case.x(), case.padding_mask())
    turned_away = routing.expert_indices[routing.drop_reason == DropReason.OVER_CAPACITY]
    assert (routing.tokens_per_expert[turned_away] == routing.capacity).all()


@fast
@given(cases(), st.integers(0, 17))
def test_a_slots_fate_depends_only_on_slots_before_it(case, cut):
    router, x = case.router(capacity_factor=0.5), case.x()
    later = torch.arange(case.B * case.N).view(case.B, case.N, 1) >= cut
    other = torch.where(later, randn(*x.shape, seed=case.seed + 1), x)
    fate, other_fate = router(x).drop_reason, router(other).drop_reason
    assert torch.equal(fate.flatten(0, 1)[:cut], other_fate.flatten(0, 1)[:cut])


def test_slots_that_are_out_already_stay_out_and_do_not_queue():
    padding_mask = torch.tensor([[False, True, True]])
    reasons = [[[DropReason.PADDING], [0], [0]]]
    routing = routing_of([[[0], [0], [0]]], 3, reasons=reasons, padding_mask=padding_mask)
    after = capacity.apply(routing, capacity_factor=1.0).check()
    assert after.drop_reason.flatten().tolist() == [
        DropReason.PADDING,
        DropReason.KEPT,
        DropReason.OVER_CAPACITY,
    ]
    again = capacity.apply(replace(after, capacity=None), capacity_factor=1.0)
    assert torch.equal(again.drop_reason, after.drop_reason)
