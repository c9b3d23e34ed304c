"""GShardRouter: top-2, the second by lot in training."""

import pytest
import torch
from hypothesis import given

from moe_core import DropReason, Experts, losses
from moe_core.capacity import CapacityRule
from moe_core.routers.gshard import GShardRouter

from ..helpers import cases, close, fast, randn, seeded
from .drawn import drawn, survives


def of_gates(first_gate, **options):
    """A router for x = ones (B, N, 1) whose first two experts get the probabilities first_gate and 1 - first_gate."""
    router = GShardRouter(1, 3, capacity_factor=options.pop("capacity_factor", None), **options)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[first_gate], [1 - first_gate], [1e-30]]).log())
    return router


@fast
@given(cases())
def test_every_routing_keeps_the_contract(case):
    if case.E > 1:
        router = drawn(
            GShardRouter,
            case.D,
            case.E,
            scale=case.scale,
            seed=case.seed,
            capacity_factor=case.capacity_factor,
            aux_loss_weight=0.01,
            z_loss_weight=0.001,
        )
        assert survives(router, case)
        routing = router(case.x(), case.padding_mask())
        assert routing.selected_mask.sum() == 2 * routing.real_tokens.sum()


@pytest.mark.parametrize("first_gate", [0.5, 0.6, 0.8, 0.95])
def test_the_second_expert_is_asked_with_twice_the_probability_of_its_gate(first_gate):
    n_tokens = 20_000
    routing = seeded(of_gates(first_gate), torch.ones(1, n_tokens, 1)).check()
    expected = 2 * (1 - first_gate)
    asked = routing.selected_mask[..., 1].double().mean().item()
    assert (
        abs(asked - expected) <= 5 * (expected * (1 - expected) / n_tokens) ** 0.5
    )  # 5 standard deviations; 0 at 2 g = 1
    assert routing.selected_mask[..., 0].all()


def test_a_second_expert_as_good_as_the_first_is_always_asked_and_a_useless_one_never():
    assert of_gates(0.5)(torch.ones(1, 1000, 1)).selected_mask.all()
    assert not of_gates(1 - 1e-9)(torch.ones(1, 1000, 1)).selected_mask[..., 1].any()


def test_gates_are_renormalised_once_and_keep_their_value_when_the_second_is_not_asked():
    routing = of_gates(0.8)(torch.ones(1, 200, 1))
    assert close(routing.expert_weights, torch.tensor([0.8, 0.2]))
    assert (
        routing.drop_reason[..., 1][~routing.selected_mask[..., 1]] == DropReason.NOT_SELECTED
    ).all()


def test_in_eval_the_second_expert_is_always_asked():
    router = of_gates(0.95).eval()
    assert all(router(torch.ones(1, 200, 1)).selected_mask.all() for _ in range(2))
    assert router(torch.ones(1, 200, 1)).dropless


def test_the_lot_can_be_switched_off_and_follows_the_default_generator():
    x = torch.ones(1, 200, 1)
    assert of_gates(0.95, random_second_expert=False)(x).selected_mask.all()
    masks = [seeded(of_gates(0.7), x, seed=seed).selected_mask for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_a_second_expert_not_asked_adds_exactly_nothing():
    router, experts, x = (
        drawn(GShardRouter, 4, 4, capacity_factor=None),
        seeded(Experts, 4, 8, 4, backend="loop"),
        randn(1, 50, 4),
    )
    routing = router(x)
    y = experts(x, routing)
    unasked = ~routing.selected_mask[0, :, 1]
    assert unasked.any() and not unasked.all()
    first = router.eval()(x)
    only = experts(x, first)  # both experts, for comparison
    assert close(y[0, ~unasked], only[0, ~unasked])
    assert not torch.allclose(y[0, unasked], only[0, unasked], atol=1e-3)


def test_first_choices_queue_before_all_second_ones():
    router = GShardRouter(2, 2, random_second_expert=False, capacity_factor=0.75)  # 3 places
    with torch.no_grad():
        router.weight.copy_(torch.eye(2))
    x = torch.tensor(
        [[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]]
    )  # first choices 0, 1, 1, 1; second 1, 0, 0, 0
    kept = router(x).check().capacity_mask[0].tolist()
    assert kept == [[True, False], [True, True], [True, True], [True, False]]


def test_a_rule_for_capacity_is_taken_as_it_is():
    router = GShardRouter(2, 2, capacity_factor=CapacityRule(factor=2.0, drop_policy="score"))
    assert router.capacity_rule == CapacityRule(factor=2.0, drop_policy="score")
    assert GShardRouter(2, 2, capacity_factor=None)(randn(1, 3, 2)).capacity is None


def test_a_slot_not_asked_takes_no_place():
    router = of_gates(1 - 1e-9, capacity_factor=1.0)
    routing = router(torch.ones(1, 9, 1))
    assert routing.capacity == 6 and routing.tokens_per_expert.tolist() == [6, 0, 0]


def test_the_balance_loss_counts_first_choices_and_is_e_squared_times_the_written_one():
    router, x = drawn(GShardRouter, 8, 4, aux_loss_weight=1.0, capacity_factor=None), randn(3, 7, 8)
    routing = router(x)
    count_E = torch.bincount(routing.expert_indices[..., 0].flatten(), minlength=4)
    written = (count_E / 21 * routing.scores.mean((0, 1))).mean()  # 1/E sum_e c_e/S m_e
    assert close(routing.losses["load_balance"], 16 * written)
    converted = losses.convert_loss(
        routing.losses["load_balance"], "moe_core", "gshard", n_experts=4, top_k=2
    )
    assert close(converted, written)


def test_the_gradient_reaches_the_router_through_weights_and_through_the_loss():
    for part in (lambda r: (r.expert_weights * randn(3, 7, 2)).sum(), lambda r: r.aux_loss):
        router = drawn(GShardRouter, 8, 4, aux_loss_weight=1.0)
        part(router(randn(3, 7, 8))).backward()
        assert router.weight.grad.abs().max() > 1e-3


def test_one_expert_is_not_enough():
    with pytest.raises(ValueError, match="top_k=2 must be between 1 and n_experts=1"):
        GShardRouter(8, 1)
