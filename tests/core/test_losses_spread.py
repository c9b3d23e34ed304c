"""Importance, load and L1 against values one can compute by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_core import DropReason, losses

from .helpers import about, cases, close, fast, randn, routing_of

OVER, PAD, NOT = DropReason.OVER_CAPACITY, DropReason.PADDING, DropReason.NOT_SELECTED


def test_cv_squared_has_the_population_variance():
    assert losses.cv_squared(torch.tensor([4.0, 2, 1, 1])).item() == about(
        0.375
    )  # dividing by E - 1 would give 0.5


@pytest.mark.parametrize("n_experts", [1, 2, 8])
def test_cv_squared_is_0_when_equal_and_e_minus_1_when_one_has_all(n_experts):
    assert losses.cv_squared(torch.full((n_experts,), 3.0)) == 0
    assert losses.cv_squared(torch.eye(n_experts)[0] * 7).item() == about(n_experts - 1)
    assert losses.cv_squared(torch.zeros(n_experts)) == 0


@fast
@given(st.integers(0, 99), st.floats(0.1, 100))
def test_cv_squared_does_not_depend_on_the_unit(seed, unit):
    values = randn(5, seed=seed, dtype=torch.float64).exp()
    # but for the epsilon beside the mean, 1e-10
    one, two = losses.cv_squared(unit * values), losses.cv_squared(values)
    assert close(one, two, dtype=torch.float32)


def test_importance_adds_up_weights_not_slots():
    weights = [[[0.9, 0.1], [0.6, 0.4]]]
    routing = routing_of(
        [[[0, 1], [0, 1]]], 2, weights=weights
    )  # two slots each, weights 1.5 and 0.5
    assert losses.importance(routing).item() == about(0.25)
    assert losses.load_balance(routing).item() == about(1)


def test_importance_counts_slots_over_capacity_but_neither_padding_nor_slots_not_asked_for():
    weights, padding_mask = [[[3.0, 1.0], [0.0, 2.0]]], torch.tensor([[True, True]])
    full = routing_of([[[0, 1], [0, 1]]], 2, weights=weights)
    over = routing_of(
        [[[0, 1], [0, 1]]], 2, weights=weights, reasons=[[[0, OVER], [0, OVER]]], capacity=2
    )
    assert losses.importance(full) == losses.importance(over) == 0
    unasked = routing_of(
        [[[0, 1], [0, 1]]],
        2,
        weights=weights,
        reasons=[[[0, 0], [0, NOT]]],
        padding_mask=padding_mask,
    )
    assert losses.importance(unasked).item() == about(0.25)  # 3 and 1
    padding = routing_of(
        [[[0, 1], [0, 1]]],
        2,
        weights=weights,
        reasons=[[[0, 0], [PAD, PAD]]],
        padding_mask=torch.tensor([[True, False]]),
    )
    assert losses.importance(padding).item() == about(0.25)


def test_importance_has_the_gradient_of_the_formula():
    weights = torch.tensor([[[3.0], [1.0]]], dtype=torch.float64, requires_grad=True)
    routing = routing_of(
        [[[0], [1]]], 2, weights=weights, scores=torch.full((1, 2, 2), 0.5, dtype=torch.float64)
    )
    losses.importance(routing).backward()
    # ((a - b) / (a + b))^2 at a = 3, b = 1: d/da = 2 (a - b) 2 b / (a + b)^3 = 1/8, d/db = -3/8
    assert weights.grad.flatten().tolist() == about([1 / 8, -3 / 8])


def test_load_is_the_spread_of_the_expected_counts_of_real_tokens():
    routing = routing_of(
        [[[0], [0], [0]]],
        2,
        reasons=[[[0], [0], [PAD]]],
        padding_mask=torch.tensor([[True, True, False]]),
    )
    probability = torch.tensor([[[0.9, 0.1], [0.6, 0.4], [0.0, 1.0]]])
    assert losses.load(routing, probability).item() == about(0.25)


@fast
@given(cases())
def test_importance_and_l1_are_finite_for_every_routing(case):
    routing = case.router()(case.x(), case.padding_mask())
    assert 0 <= losses.importance(routing) <= case.E - 1 + 1e-4
    total = losses.l1(routing)
    assert 0 <= total <= 1 + 1e-5 and losses.l1(routing, expansion=case.K).isfinite()
    if case.normalized and routing.real_tokens.any():
        assert total.item() == about(1)


def test_l1_is_the_mean_sum_of_weights_of_a_token():
    weights = [[[0.5, 0.2], [0.1, 7.0]]]
    routing = routing_of([[[0, 1], [0, 1]]], 2, weights=weights, reasons=[[[0, 0], [0, NOT]]])
    assert losses.l1(routing).item() == about((0.5 + 0.2 + 0.1) / 2)


def test_l1_makes_busy_experts_pay_more():
    weights = [[[0.5, 0.2], [0.1, 7.0]]]
    routing = routing_of([[[0, 1], [0, 1]]], 2, weights=weights, reasons=[[[0, 0], [0, NOT]]])
    # counts 2 and 1; f = E / (k T) * counts = (2, 1) at k = 1; (2 * 0.6 + 1 * 0.2) / 2
    assert losses.l1(routing, expansion=1).item() == about(0.7)
    assert losses.l1(routing, expansion=2).item() == about(0.35)


def test_l1_is_the_plain_one_when_the_load_is_even_and_the_expansion_met():
    routing = routing_of([[[0], [1], [2], [3]]], 4, weights=randn(1, 4, 1).abs())
    assert close(losses.l1(routing, expansion=1), losses.l1(routing))


def test_l1_pushes_every_weight_down_by_the_load_of_its_expert():
    weights = torch.tensor([[[0.5, 0.2], [0.1, 7.0]]], requires_grad=True)
    losses.l1(
        routing_of([[[0, 1], [0, 1]]], 2, weights=weights, reasons=[[[0, 0], [0, NOT]]]),
        expansion=1,
    ).backward()
    assert weights.grad.tolist() == [[[1.0, 0.5], [1.0, 0.0]]]  # f_e / T


@pytest.mark.parametrize("expansion", [0, -1.0, 3, float("nan"), True])
def test_an_expansion_that_cannot_be_is_refused(expansion):
    with pytest.raises(ValueError, match="expansion=.* must be above 0 and at most n_experts=2"):
        losses.l1(routing_of([[[0]]], 2), expansion=expansion)
