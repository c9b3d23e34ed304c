"""TopKRouter: what it selects, with which weight, and what it must not do."""

import pytest
import torch
from hypothesis import given

from moe_core import DropReason, TopKRouter, losses

from .helpers import cases, close, fast, randn, seeded


def router(**changes) -> TopKRouter:
    return seeded(TopKRouter, **{"d_model": 8, "n_experts": 4, "top_k": 2, **changes})


@fast
@given(cases())
def test_every_routing_keeps_the_contract(case):
    routing = case.router()(case.x(), case.padding_mask()).check()
    assert routing.expert_indices.shape == (case.B, case.N, case.K)


@fast
@given(cases())
def test_softmax_topk_renormalise_equals_topk_softmax(case):
    routing = case.router(norm_topk_prob=True)(case.x())
    chosen = routing.logits.gather(-1, routing.expert_indices)
    assert close(routing.expert_weights, chosen.softmax(-1))
    assert (
        torch.equal(chosen.sort(-1, descending=True).values, routing.logits.topk(case.K).values)
        or case.scale == 1e4
    )


def test_logits_are_the_linear_map_of_the_formula():
    x, r = randn(2, 3, 8), router()
    assert torch.equal(r(x).logits, x @ r.weight.T)
    assert torch.equal(r(x).scores, r(x).logits.softmax(-1))


def test_without_renormalisation_a_weight_is_the_probability_itself():
    routing = router(norm_topk_prob=False)(randn(2, 3, 8))
    assert torch.equal(routing.expert_weights, routing.scores.topk(2).values)
    assert not routing.normalized


def test_slots_come_most_probable_first():
    weights = router(top_k=4)(randn(2, 3, 8)).expert_weights
    assert (weights.diff(dim=-1) <= 0).all()


def test_top_k_equal_to_n_experts_keeps_the_whole_softmax():
    routing = router(top_k=4)(randn(2, 3, 8))
    weights_BNE = torch.zeros(2, 3, 4).scatter(-1, routing.expert_indices, routing.expert_weights)
    assert close(weights_BNE, routing.scores)


def test_tied_logits_still_give_k_different_experts_with_equal_weights():
    r = router(n_experts=8, top_k=3)
    torch.nn.init.zeros_(r.weight)
    routing = r(randn(2, 5, 8)).check()
    assert close(routing.expert_weights, torch.tensor(1 / 3))
    assert torch.equal(
        routing.expert_indices, r(randn(2, 5, 8)).expert_indices
    )  # and the same ones again: recomputation agrees


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_give_finite_weights_and_gradients(size):
    r = router(d_model=1, n_experts=4, aux_loss_weight=0.01, z_loss_weight=0.001)
    with torch.no_grad():
        r.weight.copy_(torch.tensor([[1.0], [0.5], [0.0], [-1.0]]))
    routing = r(torch.full((1, 2, 1), size)).check()
    (routing.expert_weights.square().sum() + routing.aux_loss).backward()
    assert routing.expert_weights[0, 0].tolist() == [1.0, 0.0] and r.weight.grad.isfinite().all()


# Gradient


def test_top_1_renormalised_gives_the_router_no_gradient_but_rounding():
    r = router(top_k=1, norm_topk_prob=True)
    routing = r(randn(2, 3, 8))
    (routing.expert_weights * randn(2, 3, 1, seed=1)).sum().backward()
    assert (routing.expert_weights == 1).all()
    assert close(r.weight.grad, torch.zeros_like(r.weight), size=1.0)  # the rounding of p / p


def test_top_1_not_renormalised_gives_the_router_a_gradient():
    r = router(top_k=1, norm_topk_prob=False)
    (r(randn(2, 3, 8)).expert_weights * randn(2, 3, 1, seed=1)).sum().backward()
    assert (
        r.weight.grad.abs().sum(-1) > 1e-4
    ).all()  # every expert: the softmax runs over all of them


def test_losses_reach_the_router_and_carry_their_coefficient():
    r = router(aux_loss_weight=0.01, z_loss_weight=0.001)
    routing = r(randn(2, 3, 8))
    assert set(routing.losses) == {"load_balance", "z_loss"}
    assert torch.equal(routing.losses["load_balance"], 0.01 * losses.load_balance(routing))
    assert torch.equal(routing.losses["z_loss"], 0.001 * losses.z_loss(routing))
    for loss in routing.losses.values():
        assert torch.autograd.grad(loss, r.weight, retain_graph=True)[0].abs().sum() > 0


def test_a_zero_coefficient_leaves_the_loss_out():
    assert router()(randn(1, 2, 8)).losses == {}


# Precision


def test_routing_is_float32_when_the_model_is_bfloat16():
    r, x = router(aux_loss_weight=0.01).bfloat16(), randn(4, 8, 8, dtype=torch.bfloat16)
    routing = r(x).check()
    exact = x.float() @ r.weight.float().T
    assert (
        routing.logits.dtype
        == routing.scores.dtype
        == routing.expert_weights.dtype
        == routing.aux_loss.dtype
        == torch.float32
    )
    assert torch.equal(routing.logits, exact)


def test_float64_stays_float64():
    routing = router().double()(randn(2, 3, 8, dtype=torch.float64)).check()
    assert routing.logits.dtype == routing.expert_weights.dtype == torch.float64


def test_autocast_changes_no_bit_of_a_routing_or_its_losses():
    r, x = router(n_experts=8, aux_loss_weight=0.01, z_loss_weight=0.001), randn(4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = r(x)
    plain = r(x)
    for name in ("logits", "scores", "expert_weights", "expert_indices", "aux_loss"):
        assert torch.equal(getattr(cast, name), getattr(plain, name)), name


# Jitter


def test_jitter_multiplies_the_input_by_at_most_its_epsilon():
    r = router(d_model=1, jitter_noise=0.1)
    x = randn(4, 16, 1).abs() + 1
    ratio = r(x).logits[..., 0] / (x @ r.weight.T)[..., 0]
    assert (ratio >= 0.9 - 1e-6).all() and (ratio <= 1.1 + 1e-6).all()
    assert ratio.min() < 0.95 and ratio.max() > 1.05
    assert (r(torch.zeros(1, 2, 1)).logits == 0).all()  # what is added would show here


def test_jitter_is_for_training_only():
    r, x = router(jitter_noise=0.5), randn(2, 3, 8)
    assert not torch.equal(r(x).logits, r(x).logits)
    r.eval()
    assert torch.equal(r(x).logits, x @ r.weight.T)


def test_jitter_leaves_the_input_as_it_was():
    x = randn(2, 3, 8)
    router(jitter_noise=0.5)(x)
    assert torch.equal(x, randn(2, 3, 8))


# Padding


def test_padding_is_not_selected_and_says_so():
    padding_mask = torch.tensor([[True, False], [False, True]])
    routing = router()(randn(2, 2, 8), padding_mask).check()
    assert torch.equal(routing.capacity_mask.any(-1), padding_mask)
    assert torch.equal(routing.drop_reason[..., 0] == DropReason.PADDING, ~padding_mask)
    assert routing.tokens_per_expert.sum() == 4 and routing.drop_rate == 0


def test_what_padding_holds_changes_no_loss_and_no_count():
    r = router(aux_loss_weight=1.0, z_loss_weight=1.0)
    real = randn(2, 3, 8)
    padded = torch.cat([100 * randn(2, 2, 8, seed=1), real], dim=1)
    padding_mask = torch.tensor([[False, False, True, True, True]] * 2)
    with_padding, without = r(padded, padding_mask), r(real)
    assert torch.equal(with_padding.tokens_per_expert, without.tokens_per_expert)
    for name in without.losses:
        assert close(with_padding.losses[name], without.losses[name]), name


def test_padding_takes_no_place_in_the_queue():
    r = router(n_experts=2, top_k=1, capacity_factor=1.0)
    x = randn(1, 1, 8).expand(1, 4, 8)  # all want the same expert, which has 2 places
    padding_mask = torch.tensor([[False, False, True, True]])
    assert r(x).capacity_mask.flatten().tolist() == [True, True, False, False]
    assert r(x, padding_mask).capacity_mask.flatten().tolist() == [False, False, True, True]


def test_a_batch_of_padding_only_has_zero_losses_and_finite_gradients():
    r = router(aux_loss_weight=1.0, z_loss_weight=1.0)
    routing = r(randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool)).check()
    routing.aux_loss.backward()
    assert routing.aux_loss == 0 and (r.weight.grad == 0).all()


@pytest.mark.parametrize(
    "padding_mask",
    [torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 3), torch.ones(6, dtype=torch.bool)],
)
def test_a_padding_mask_of_another_shape_or_type_is_refused(padding_mask):
    with pytest.raises(ValueError, match=r"padding_mask must be bool of shape \(2, 3\)"):
        router()(randn(2, 3, 8), padding_mask)


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 7), (1, 2, 3, 8)])
def test_an_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"must be \(B, N, d_model=8\)"):
        router()(randn(*shape))


# What it leaves alone


def test_forward_and_update_change_nothing_in_the_router():
    r = router(capacity_factor=1.0, aux_loss_weight=0.01, jitter_noise=0.1)
    before, attributes = {k: v.clone() for k, v in r.state_dict().items()}, set(vars(r))
    assert r.update([r(randn(2, 3, 8))]) is None
    assert set(vars(r)) == attributes
    assert all(torch.equal(v, before[k]) for k, v in r.state_dict().items())


@fast
@given(cases())
def test_a_token_routed_alone_goes_where_it_goes_in_the_batch(case):
    r = case.router(capacity_factor=None)
    together = r(case.x())
    for b in range(case.B):
        for n in range(case.N):
            alone = r(case.x()[b : b + 1, n : n + 1])
            assert close(alone.scores[0, 0], together.scores[b, n]) or case.scale == 1e4
            if case.scale == 1.0:
                assert torch.equal(alone.expert_indices[0, 0], together.expert_indices[b, n])


def test_renaming_the_experts_renames_the_indices_and_nothing_else():
    r, x, new_name = router(aux_loss_weight=1.0), randn(2, 5, 8), torch.tensor([2, 0, 3, 1])
    plain = r(x)
    with torch.no_grad():
        r.weight[new_name] = r.weight.clone()
    renamed = r(x)
    assert torch.equal(renamed.expert_indices, new_name[plain.expert_indices])
    assert close(renamed.expert_weights, plain.expert_weights)
    assert close(renamed.aux_loss, plain.aux_loss)
