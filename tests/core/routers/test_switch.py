"""SwitchRouter: top-1 whose weight is the probability itself."""

import pytest
import torch
from hypothesis import given

from moe_core import losses
from moe_core.capacity import CapacityRule
from moe_core.routers.switch import SwitchRouter

from ..helpers import cases, fast, randn, seeded
from .drawn import drawn, survives


@fast
@given(cases())
def test_every_routing_keeps_the_contract(case):
    case.K = 1
    assert survives(
        drawn(
            SwitchRouter,
            case.D,
            case.E,
            scale=case.scale,
            seed=case.seed,
            capacity_factor=case.capacity_factor,
        ),
        case,
    )


def test_the_weight_is_the_largest_probability_and_the_index_its_expert():
    routing = drawn(SwitchRouter, 8, 4, training=False)(randn(2, 5, 8))
    assert torch.equal(routing.expert_weights[..., 0], routing.logits.softmax(-1).amax(-1))
    assert torch.equal(routing.expert_indices[..., 0], routing.logits.argmax(-1))


def test_the_output_alone_gives_the_router_a_gradient():
    router = drawn(SwitchRouter, 8, 4, aux_loss_weight=0.0)
    (router(randn(2, 5, 8)).expert_weights * randn(2, 5, 1, seed=1)).sum().backward()
    assert router.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("n_tokens", "training", "places"),
    [(1024, True, 160), (1024, False, 256), (16, True, 3), (16, False, 4)],
)
def test_capacity_is_a_quarter_above_even_in_training_and_twice_even_in_eval(
    n_tokens, training, places
):
    assert drawn(SwitchRouter, 8, 8, training=training)(randn(1, n_tokens, 8)).capacity == places


def test_a_collapsed_router_keeps_only_as_many_tokens_as_there_are_places():
    router = drawn(SwitchRouter, 8, 4, scale=0.0, capacity_factor=1.0)
    routing = router(randn(1, 8, 8)).check()
    assert routing.capacity_mask.flatten().tolist() == [True, True] + [False] * 6


def test_the_balance_loss_is_on_unless_switched_off():
    x, router = randn(2, 5, 8), drawn(SwitchRouter, 8, 4, training=False)
    assert torch.equal(router(x).losses["load_balance"], 0.01 * losses.load_balance(router(x)))
    assert drawn(SwitchRouter, 8, 4, aux_loss_weight=0.0)(x).losses == {}


def test_jitter_multiplies_the_input():
    router = drawn(SwitchRouter, 8, 4, jitter_noise=0.5)
    assert (
        router(torch.zeros(1, 100, 8)).logits == 0
    ).all()  # added noise would not leave zeros alone
    one = drawn(SwitchRouter, 1, 4, jitter_noise=0.5)
    ratio = one(torch.ones(1, 500, 1)).logits / one.eval()(torch.ones(1, 500, 1)).logits
    assert 0.5 <= ratio.min() < 0.6 and 1.4 < ratio.max() <= 1.5


def test_in_eval_the_same_tokens_get_the_same_routing_twice():
    router, x = drawn(SwitchRouter, 8, 4, training=False), randn(2, 5, 8)
    assert torch.equal(router(x).logits, router(x).logits)
    assert not torch.equal(router.train()(x).logits, router(x).logits)


def test_the_rule_for_capacity_may_be_given_in_full():
    router = seeded(SwitchRouter, 8, 4, capacity_factor=CapacityRule(expert_capacity=3))
    assert router(randn(1, 20, 8)).capacity == 3
    assert seeded(SwitchRouter, 8, 4, capacity_factor=None)(randn(1, 20, 8)).capacity is None


def test_there_is_no_other_k():
    with pytest.raises(TypeError, match="top_k"):
        SwitchRouter(8, 4, top_k=2)
