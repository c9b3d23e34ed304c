"""Metrics against numbers one can check by hand, and against each other."""

import math

import pytest
import torch
from hypothesis import given

from moe_core import capacity, metrics
from moe_core.metrics import (
    coefficient_of_variation,
    dead_experts,
    drop_rate,
    expert_sets,
    flipped_tokens,
    load,
    load_entropy,
    load_share,
    max_violation,
    route_flips,
    router_entropy,
    summary,
)

from .helpers import Case, about, cases, fast, routing_of

OF_LOADS_4211 = routing_of([[[0], [0], [0], [0], [1], [1], [2], [3]]], 4)
BALANCED = routing_of([[[0, 1], [2, 3]]], 4)
COLLAPSED = routing_of(torch.zeros(2, 8, 1), 4)
EMPTY = routing_of(torch.zeros(0, 3, 2), 4)


def test_the_load_counts_slots_before_capacity():
    assert load(OF_LOADS_4211).tolist() == [4, 2, 1, 1] and load(OF_LOADS_4211).dtype == torch.int64
    assert load(capacity.apply(OF_LOADS_4211, expert_capacity=1)).tolist() == [4, 2, 1, 1]
    assert load_share(OF_LOADS_4211).tolist() == [0.5, 0.25, 0.125, 0.125]


@pytest.mark.parametrize(
    ("routing", "value"), [(OF_LOADS_4211, 1.0), (BALANCED, 0.0), (COLLAPSED, 3.0), (EMPTY, 0.0)]
)
def test_max_violation_is(routing, value):
    assert max_violation(routing).item() == value


@pytest.mark.parametrize(
    ("routing", "value"),
    [(OF_LOADS_4211, 0.375**0.5), (BALANCED, 0.0), (COLLAPSED, 3**0.5), (EMPTY, 0.0)],
)
def test_the_coefficient_of_variation_is(routing, value):
    assert coefficient_of_variation(routing).item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("routing", "value"),
    [(OF_LOADS_4211, 1.75 * math.log(2)), (BALANCED, math.log(4)), (COLLAPSED, 0.0), (EMPTY, 0.0)],
)
def test_the_entropy_of_the_load_is(routing, value):
    assert load_entropy(routing).item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "value"),
    [
        ([0.25, 0.25, 0.25, 0.25], math.log(4)),
        ([1.0, 0.0, 0.0, 0.0], 0.0),
        ([0.5, 0.5, 0.0, 0.0], math.log(2)),
        ([0.9, 0.9, 0.9, 0.9], math.log(4)),  # sigmoid scores need not sum to 1
        ([0.0, 0.0, 0.0, 0.0], 0.0),  # ReLU scores may all be 0
    ],
)
def test_the_entropy_of_the_router_is(scores, value):
    assert router_entropy(routing_of([[[0]]], 4, scores=[[scores]])).item() == about(value)


def test_a_router_may_be_undecided_about_every_token_and_still_send_all_to_one_expert():
    assert router_entropy(COLLAPSED).item() == about(math.log(4)) and load_entropy(COLLAPSED) == 0


def test_padding_does_not_count_in_the_entropy():
    scores = [[[0.5, 0.5], [1.0, 0.0]]]
    padded = routing_of(
        [[[0], [0]]],
        2,
        scores=scores,
        reasons=[[[0], [2]]],
        padding_mask=torch.tensor([[True, False]]),
    )
    assert router_entropy(padded).item() == about(math.log(2))
    assert load(padded).tolist() == [1, 0]


def test_an_expert_is_dead_when_nobody_asks_for_it():
    assert dead_experts(COLLAPSED).tolist() == [False, True, True, True]
    assert dead_experts(OF_LOADS_4211).tolist() == [False] * 4
    assert dead_experts(OF_LOADS_4211, share=0.125).tolist() == [False, False, True, True]
    full = capacity.apply(OF_LOADS_4211, expert_capacity=0)  # asked for, though nobody got in
    assert dead_experts(full).tolist() == [False] * 4
    with pytest.raises(ValueError, match="share=-0.1 must be at least 0"):
        dead_experts(COLLAPSED, share=-0.1)


def test_the_drop_rate_is_the_share_of_slots_asked_for():
    assert drop_rate(capacity.apply(OF_LOADS_4211, expert_capacity=2)) == 0.25
    assert drop_rate(OF_LOADS_4211) == 0 and drop_rate(EMPTY) == 0
    not_asked = routing_of([[[0], [0]]], 2, reasons=[[[3], [0]]])
    assert drop_rate(capacity.apply(not_asked, expert_capacity=0)) == 1


def test_several_routings_are_pooled_and_not_averaged():
    left, right = routing_of([[[0], [0], [0]]], 2), routing_of([[[1]]], 2)
    assert max_violation(left) == max_violation(right) == 1
    assert max_violation([left, right]) == 0.5  # loads [3, 1]
    assert dead_experts([left, right]).tolist() == [False, False]
    assert drop_rate([capacity.apply(left, expert_capacity=0), right]) == 0.75
    sure = routing_of([[[0]]], 2, scores=[[[1.0, 0.0]]])
    assert router_entropy([left, sure]).item() == about(0.75 * math.log(2))


@pytest.mark.parametrize("metric", [load, max_violation, router_entropy, drop_rate, summary])
def test_no_routing_or_different_experts_are_refused(metric):
    with pytest.raises(ValueError, match="must hold at least one Routing"):
        metric([])
    with pytest.raises(ValueError, match="same number of experts"):
        metric([routing_of([[[0]]], 2), routing_of([[[0]]], 3)])


def test_a_flip_is_another_set_of_experts_and_not_another_order():
    before = routing_of([[[0, 1], [0, 1], [2, 3]]], 4)
    after = routing_of([[[1, 0], [0, 2], [2, 3]]], 4)
    assert flipped_tokens(before, after).tolist() == [[False, True, False]]
    assert route_flips(before, after).item() == about(1 / 3) and route_flips(before, before) == 0


def test_flips_of_the_experts_asked_for_are_not_those_of_the_experts_got():
    asked = routing_of([[[0], [0]]], 2)
    got = capacity.apply(asked, expert_capacity=1)
    assert route_flips(asked, got) == 0 and route_flips(asked, got, kept=True) == 0.5
    assert expert_sets(got, kept=True).tolist() == [[[True, False], [False, False]]]


def test_padding_flips_nothing():
    mask = torch.tensor([[True, False]])
    before = routing_of([[[0], [0]]], 2, reasons=[[[0], [2]]], padding_mask=mask)
    after = routing_of([[[1], [1]]], 2, reasons=[[[0], [2]]], padding_mask=mask)
    assert (
        flipped_tokens(before, after).tolist() == [[True, False]]
        and route_flips(before, after) == 1
    )
    assert route_flips(EMPTY, EMPTY) == 0
    all_real = routing_of(
        [[[0], [0]]], 2
    )  # the second token is real here and padding there: it cannot be compared
    assert (
        flipped_tokens(before, all_real).tolist() == [[False, False]]
        and route_flips(before, all_real) == 0
    )


def test_routings_of_other_tokens_cannot_be_compared():
    with pytest.raises(
        ValueError, match=r"routings of \(1, 8, 4\) and \(2, 8, 4\) \(B, N, E\) cannot be compared"
    ):
        route_flips(OF_LOADS_4211, COLLAPSED)


@fast
@given(cases())
def test_the_metrics_agree_with_a_count_in_plain_python(case: Case):
    routing = case.router()(case.x(), case.padding_mask())
    asked = routing.expert_indices[routing.selected_mask].tolist()
    counts = [asked.count(e) for e in range(case.E)]
    mean = sum(counts) / case.E
    assert load(routing).tolist() == counts
    assert max_violation(routing).item() == about((max(counts) - mean) / mean if mean else 0)
    variance = sum((c - mean) ** 2 for c in counts) / case.E
    assert coefficient_of_variation(routing).item() == pytest.approx(
        variance**0.5 / mean if mean else 0, abs=1e-9
    )
    assert dead_experts(routing).tolist() == [c == 0 for c in counts]
    assert drop_rate(routing).item() == about(routing.drop_rate.item())
    assert -1e-9 <= router_entropy(routing) <= math.log(case.E) + 1e-9


@fast
@given(cases())
def test_one_routing_in_parts_measures_as_the_whole(case: Case):
    router = case.router(capacity_factor=None, aux_loss_weight=0.0, z_loss_weight=0.0)
    x, mask = case.x(), case.padding_mask()
    parts = [router(x[b : b + 1], None if mask is None else mask[b : b + 1]) for b in range(case.B)]
    if parts:
        assert summary(parts) == pytest.approx(summary(router(x, mask)), abs=1e-6)


def test_no_metric_carries_a_gradient():
    routing = Case(2, 4, 3, 2, 0, 1.0, False, 1.0, True).router()(torch.ones(2, 4, 4))
    assert (
        routing.scores.requires_grad
        and not router_entropy(routing).requires_grad
        and not max_violation(routing).requires_grad
    )


def test_the_summary_is_plain_numbers():
    assert summary(OF_LOADS_4211) == {
        "max_violation": 1.0,
        "coefficient_of_variation": pytest.approx(0.375**0.5),
        "load_entropy": pytest.approx(1.75 * math.log(2)),
        "router_entropy": pytest.approx(math.log(4)),
        "drop_rate": 0.0,
        "dead_experts": 0,
    }
    assert all(type(value) in (int, float) for value in summary(OF_LOADS_4211).values())
    assert all(
        f.__doc__
        for name, f in vars(metrics).items()
        if callable(f) and getattr(f, "__module__", "") == "moe_core.metrics" and name[0] != "_"
    )
