"""LossFreeRouter: the bias selects, moves once per step, and does nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_core import losses
from moe_core.routers.loss_free import LossFreeRouter

from ..helpers import about, cases, close, fast, randn, routing_of
from .drawn import drawn, survives


def routing_with(counts):
    """A top-1 Routing in which expert e got counts[e] tokens."""
    indices = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).view(
        1, -1, 1
    )
    return routing_of(indices, len(counts))


def router(n_experts=4, top_k=1, **options) -> LossFreeRouter:
    return LossFreeRouter(8, n_experts, top_k, **options)


@fast
@given(cases())
def test_every_routing_keeps_the_contract(case):
    r = drawn(
        LossFreeRouter,
        case.D,
        case.E,
        case.K,
        scale=case.scale,
        seed=case.seed,
        capacity_factor=case.capacity_factor,
        sequence_loss_weight=0.01,
        z_loss_weight=0.001,
        norm_topk_prob=case.normalized,
    )
    r.expert_bias.copy_(3 * randn(case.E, seed=case.seed))
    assert survives(r, case)


def test_after_one_step_busy_experts_have_gone_down_and_idle_ones_up():
    r = router()
    r.update([routing_with([5, 3, 0, 0])])  # the mean is 2: down, down, up, up
    assert close(r.expert_bias, 0.001 * torch.tensor([-1.0, -1.0, 1.0, 1.0]))


def test_the_step_is_u_times_the_sign_with_the_mean_taken_off():
    r = router(bias_update_rate=0.01)
    r.update([routing_with([9, 1, 1, 1])])  # signs -1, 1, 1, 1 with mean 1/2
    assert close(r.expert_bias, 0.01 * torch.tensor([-1.5, 0.5, 0.5, 0.5]))


def test_the_proportional_step_is_the_relative_violation():
    r = router(bias_update="proportional", bias_update_rate=0.1)
    r.update([routing_with([4, 2, 1, 1])])  # mean 2
    assert close(r.expert_bias, 0.1 * torch.tensor([-1.0, 0.0, 0.5, 0.5]))
    same = router(bias_update="proportional", bias_update_rate=0.1)
    same.update([routing_with([40, 20, 10, 10])])
    assert torch.equal(same.expert_bias, r.expert_bias)  # u means the same at any batch size


@pytest.mark.parametrize("rule", ["sign", "proportional"])
@pytest.mark.parametrize("counts", [[3, 3, 3, 3], [0, 0, 0, 0]])
def test_a_balanced_or_an_empty_step_leaves_the_bias_alone(rule, counts):
    r = router(bias_update=rule)
    r.update([routing_with(counts)])
    assert (r.expert_bias == 0).all()
    r.update([])
    assert (r.expert_bias == 0).all()


def test_micro_batches_are_counted_together_before_the_one_step():
    together, apart = router(), router()
    parts = [routing_with([5, 0, 1, 0]), routing_with([0, 2, 0, 0])]
    together.update(parts)  # 5 2 1 0, of which the mean is 2: down, stay, up, up
    for part in parts:
        apart.update([part])
    assert close(together.expert_bias, 0.001 * torch.tensor([-1.25, -0.25, 0.75, 0.75]))
    assert not torch.allclose(
        together.expert_bias, apart.expert_bias, atol=1e-5
    )  # so that the test can tell them apart


@fast
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=4),
    st.sampled_from(["sign", "proportional"]),
)
def test_how_the_step_is_cut_into_micro_batches_does_not_matter(parts, rule):
    together, apart = router(bias_update=rule), router(bias_update=rule)
    together.update([routing_with([sum(column) for column in zip(*parts)])])
    apart.update([routing_with(part) for part in parts])
    assert torch.equal(together.expert_bias, apart.expert_bias)


def test_counts_are_exact_where_bfloat16_and_float32_are_not():
    many, step = 2**24, torch.ones(4, dtype=torch.int64)

    class Counted:  # what update reads of a Routing
        def __init__(self, counts_E):
            self.counts_E = counts_E

        def slots_per_expert(self):
            return self.counts_E

    r = router()
    r.update(
        [
            Counted(torch.tensor([many, many, many, many])),
            Counted(step * torch.tensor([1, 0, 0, 0])),
            Counted(step * 0),
        ]
    )
    assert r.expert_bias.sign().tolist() == [
        -1,
        1,
        1,
        1,
    ]  # in float32 2**24 + 1 is 2**24, and nothing would move


def test_the_mean_of_the_bias_stays_at_zero():
    r = router()
    for _ in range(300):
        r.update(
            [routing_with([9, 1, 1, 1])]
        )  # three of four signs are +: the mean would reach 300 * 0.0005
    assert r.expert_bias.mean().item() == about(0, size=0.5)  # the largest bias
    assert r.expert_bias[1] - r.expert_bias[0] == pytest.approx(0.6, rel=1e-4)


def test_taking_the_mean_off_changes_no_choice():
    r, x = drawn(LossFreeRouter, 8, 8, 2, n_groups=4, topk_groups=2), randn(2, 50, 8)
    r.expert_bias.copy_(randn(8))
    before = r(x).expert_indices
    r.expert_bias += 5.0
    assert torch.equal(r(x).expert_indices, before)


def test_bias_changes_selection_never_weights():
    r, x = drawn(LossFreeRouter, 8, 4, 2), randn(2, 50, 8)
    plain = r(x)
    r.expert_bias.copy_(torch.tensor([5.0, 0, 0, -5.0]))
    biased = r(x).check()
    assert not torch.equal(plain.expert_indices, biased.expert_indices)
    assert (biased.expert_indices == 0).any(-1).all() and not (biased.expert_indices == 3).any()
    assert torch.equal(plain.scores, biased.scores) and torch.equal(plain.logits, biased.logits)
    chosen = biased.scores.gather(-1, biased.expert_indices)
    assert close(biased.expert_weights, chosen / chosen.sum(-1, keepdim=True))


def test_the_bias_has_no_gradient_and_is_no_parameter():
    r = drawn(LossFreeRouter, 8, 4, 2, sequence_loss_weight=1.0)
    routing = r(randn(2, 5, 8))
    (routing.expert_weights.square().sum() + routing.aux_loss).backward()
    assert [name for name, _ in r.named_parameters()] == ["weight"]
    assert not r.expert_bias.requires_grad and "expert_bias" in r.state_dict()
    assert r.weight.grad.abs().max() > 0


def test_the_bias_is_float32_in_a_bfloat16_model_and_moves_there():
    r = router().bfloat16()
    assert r.expert_bias.dtype == torch.float32 and r.weight.dtype == torch.bfloat16
    r.expert_bias += torch.tensor([1.0, -1.0, 0.0, 0.0])
    for _ in range(10):
        r.update([routing_with([5, 0, 0, 3])])
    # 1 - 10 * 0.001; next to 1, bfloat16 has steps of 0.004 and would not have moved
    assert r.expert_bias[0].item() == about(0.99)
    assert r(randn(1, 3, 8).bfloat16()).check().scores.dtype == torch.float32


def test_padding_and_capacity_are_not_seen_by_the_bias():
    x, padding_mask = randn(2, 6, 8), torch.tensor([[True] * 6, [False] * 6])
    seen, padded, full = (
        drawn(LossFreeRouter, 8, 4, 1, capacity_factor=c) for c in (None, None, 0.5)
    )
    seen.update([seen(x[:1])])
    padded.update([padded(x, padding_mask)])
    full.update([full(x[:1])])
    assert torch.equal(seen.expert_bias, padded.expert_bias) and torch.equal(
        seen.expert_bias, full.expert_bias
    )


def test_an_update_rate_of_zero_freezes_the_bias():
    r = router()
    r.expert_bias += 6.9  # as released models have it: the mean is not taken off either
    before, r.bias_update_rate = r.expert_bias.clone(), 0.0
    r.update([routing_with([9, 1, 1, 1])])
    assert torch.equal(r.expert_bias, before)


@pytest.mark.parametrize(("rule", "rate"), [("sign", 0.01), ("proportional", 0.02)])
def test_a_router_with_favourites_becomes_balanced_without_any_loss(rule, rate):
    r = drawn(LossFreeRouter, 8, 8, 2, scale=0.5, bias_update=rule, bias_update_rate=rate)
    worst = []
    for step in range(80):
        routing = r(randn(4, 64, 8, seed=step) + 1)  # the offset makes favourites
        worst.append((8 * routing.slot_share().max() - 1).item())  # MaxVio
        r.update([routing])
    assert worst[0] > 1.5 and sum(worst[-10:]) / 10 < 0.35
    assert r(randn(1, 4, 8)).losses == {}


def test_the_sequence_loss_is_weighted_and_off_by_default():
    r, x = drawn(LossFreeRouter, 8, 4, 2, sequence_loss_weight=0.5), randn(2, 5, 8)
    routing = r(x)
    assert torch.equal(routing.losses["sequence_balance"], 0.5 * losses.sequence_balance(routing))
    assert drawn(LossFreeRouter, 8, 4, 2)(x).losses == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias_update": "pid"}, "bias_update='pid' must be one of 'sign', 'proportional'"),
        ({"bias_update_rate": -1.0}, "bias_update_rate=-1.0 must be at least 0"),
        ({"n_groups": 3}, "n_groups=3 must divide n_experts=4"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        router(**options)
