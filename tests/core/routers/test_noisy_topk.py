"""NoisyTopKRouter: noise that is learned, and a load with a gradient."""

import math

import pytest
import torch
from hypothesis import given

from moe_core import losses
from moe_core.routers.noisy_topk import NoisyTopKRouter, probabilities

from ..helpers import about, cases, close, fast, randn, seeded
from .drawn import drawn, survives


def noisy_case(scale=1.0):
    """Clean and noisy logits, their std and the choice, for 3 x 5 tokens, 6 experts, K = 2, in float64."""
    clean, std = (
        scale * randn(3, 5, 6, dtype=torch.float64),
        randn(3, 5, 6, seed=1, dtype=torch.float64).exp(),
    )
    noisy = clean + std * randn(3, 5, 6, seed=2, dtype=torch.float64)
    return clean, noisy, std, noisy.topk(2).indices


@fast
@given(cases())
def test_every_routing_keeps_the_contract(case):
    router = drawn(
        NoisyTopKRouter,
        case.D,
        case.E,
        case.K,
        scale=case.scale,
        seed=case.seed,
        capacity_factor=case.capacity_factor,
        aux_loss_weight=0.01,
        z_loss_weight=0.001,
    )
    assert survives(router, case)


def test_both_weights_start_at_zero():
    router = seeded(NoisyTopKRouter, 8, 4, 2)
    assert {name: value.abs().sum().item() for name, value in router.named_parameters()} == {
        "weight": 0,
        "noise_weight": 0,
    }


def test_at_the_start_noise_alone_decides_and_does_so_evenly():
    routing = seeded(NoisyTopKRouter(8, 4, 2), randn(4, 2000, 8))
    assert (
        routing.slot_share().sub(0.25).abs().max() < 0.01
    )  # about 4 standard deviations of 16000 slots
    assert (routing.logits == 0).all()


def test_in_eval_there_is_no_noise():
    router, x = drawn(NoisyTopKRouter, 8, 4, 2, training=False), randn(2, 5, 8)
    one, two = router(x), router(x)
    assert torch.equal(one.expert_weights, two.expert_weights) and torch.equal(
        one.expert_indices, two.expert_indices
    )
    assert torch.equal(one.expert_indices, one.logits.topk(2).indices)
    assert close(one.expert_weights, one.logits.topk(2).values.softmax(-1))


def test_the_noise_is_normal_with_softplus_of_the_noise_weight_as_its_deviation():
    router = NoisyTopKRouter(1, 2, 2, noise_epsilon=0.01)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        router.noise_weight.copy_(torch.tensor([[0.0], [2.0]]))
    x = torch.ones(1, 40_000, 1)
    std = [math.log(2) + 0.01, math.log(1 + math.exp(2)) + 0.01]
    assert router.noise_std(x)[0, 0].tolist() == about(std)
    routing = seeded(router, x)
    first = routing.expert_weights.gather(-1, routing.expert_indices.argsort(-1))[
        ..., 0
    ]  # the weight of expert 0
    difference = torch.logit(first.double())  # H_0 - H_1, normal
    assert difference.mean().item() == pytest.approx(2, abs=0.06)
    assert difference.std().item() == pytest.approx(math.hypot(*std), rel=0.02)
    assert (routing.logits == torch.tensor([1.0, -1.0])).all()


def test_the_weights_are_the_softmax_of_the_chosen_noisy_logits():
    router, x = drawn(NoisyTopKRouter, 8, 6, 3), randn(2, 5, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noisy = router.logits(x) + torch.randn(2, 5, 6) * router.noise_std(x)
    routing = seeded(router, x)
    assert torch.equal(routing.expert_indices, noisy.topk(3).indices)
    assert close(routing.expert_weights, noisy.topk(3).values.softmax(-1))


def test_the_threshold_is_the_kth_largest_of_the_other_noisy_logits():
    clean, noisy, std, indices = noisy_case()
    p = probabilities(clean, noisy, std, indices)
    for e in range(6):
        others = noisy[..., [i for i in range(6) if i != e]]
        z = (clean[..., e] - others.topk(2).values[..., 1]) / std[..., e]
        assert close(p[..., e], 0.5 * (1 + torch.erf(z / math.sqrt(2))))


def test_the_probability_is_how_often_the_expert_is_chosen_when_its_own_noise_is_drawn_again():
    clean, noisy, std, indices = noisy_case()
    p, n = probabilities(clean, noisy, std, indices), 20_000
    for e in (0, 3):
        again = noisy[0, 0].expand(n, 6).clone()
        again[:, e] = clean[0, 0, e] + std[0, 0, e] * randn(n, seed=9, dtype=torch.float64)
        often = (again.topk(2).indices == e).any(-1).double().mean()
        assert abs(often - p[0, 0, e]) < 4 * (0.25 / n) ** 0.5


def test_the_probability_does_not_change_when_all_logits_shift():
    clean, noisy, std, indices = noisy_case()
    shifted = probabilities(
        clean + 7, noisy + 7, std, indices
    )  # logits compared with softmaxed thresholds would
    assert close(shifted, probabilities(clean, noisy, std, indices))


def test_with_k_equal_to_e_every_expert_is_certain():
    clean, noisy, std, _ = noisy_case()
    assert (probabilities(clean, noisy, std, noisy.topk(6).indices) == 1).all()
    routing = drawn(NoisyTopKRouter, 8, 4, 4, load_loss_weight=1.0)(randn(2, 5, 8))
    assert routing.losses["load"] == 0


def test_without_noise_the_load_is_the_count():
    router, x = (
        drawn(NoisyTopKRouter, 8, 4, 2, load_loss_weight=1.0, training=False),
        randn(2, 5, 8),
    )
    routing = router(x)
    assert close(routing.losses["load"], losses.cv_squared(routing.slots_per_expert().float()))


def test_the_losses_are_weighted_and_left_out_at_zero():
    x = randn(2, 5, 8)
    routing = seeded(
        drawn(NoisyTopKRouter, 8, 4, 2, importance_loss_weight=0.5, load_loss_weight=0.25), x
    )
    twice = seeded(
        drawn(NoisyTopKRouter, 8, 4, 2, importance_loss_weight=1.0, load_loss_weight=0.5), x
    )
    assert torch.equal(routing.losses["importance"], 0.5 * losses.importance(routing))
    assert close(2 * routing.aux_loss, twice.aux_loss)
    assert (
        seeded(
            drawn(NoisyTopKRouter, 8, 4, 2, importance_loss_weight=0.0, load_loss_weight=0.0), x
        ).losses
        == {}
    )


@pytest.mark.parametrize("part", ["output", "importance", "load"])
def test_the_gradient_reaches_both_weights(part):
    router = drawn(NoisyTopKRouter, 8, 4, 2)
    routing = seeded(router, randn(2, 5, 8))
    (
        (routing.expert_weights * randn(2, 5, 2)).sum()
        if part == "output"
        else routing.losses[part]
    ).backward()
    assert router.weight.grad.abs().max() > 1e-5 and router.noise_weight.grad.abs().max() > 1e-5


def test_a_step_against_the_load_loss_lowers_it():
    router, x = (
        drawn(NoisyTopKRouter, 8, 4, 2, importance_loss_weight=0.0, load_loss_weight=1.0),
        randn(1, 50, 8) + 1,
    )
    values = []
    for _ in range(10):
        loss = seeded(router, x).aux_loss
        values.append(loss.item())
        router.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in router.parameters():
                parameter -= 5 * parameter.grad
    assert values[-1] < 0.5 * values[0] and values[0] > 0.1


def test_padding_counts_in_neither_loss():
    x, padding_mask = randn(1, 6, 8), torch.tensor([[True] * 4 + [False] * 2])
    router = drawn(
        NoisyTopKRouter, 8, 4, 2, importance_loss_weight=1.0, load_loss_weight=1.0, training=False
    )
    padded, alone = router(x, padding_mask).check(), router(x[:, :4])
    assert close(padded.losses["load"], alone.losses["load"])
    assert close(padded.losses["importance"], alone.losses["importance"])
    training = drawn(NoisyTopKRouter, 8, 4, 2, load_loss_weight=1.0)
    moved = x.clone()
    moved[:, 4:] = 100
    assert torch.equal(
        seeded(training, x, padding_mask).aux_loss, seeded(training, moved, padding_mask).aux_loss
    )


def test_noise_must_not_vanish():
    with pytest.raises(ValueError, match="noise_epsilon=0 must be at least 1e-06"):
        NoisyTopKRouter(8, 4, 2, noise_epsilon=0)


def test_an_input_that_is_not_finite_is_refused_by_check():
    x = randn(1, 3, 8)
    x[0, 1, 2] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        drawn(NoisyTopKRouter, 8, 4, 2)(x).check()
