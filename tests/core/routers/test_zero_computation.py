"""ZeroComputationRouter and what its cheap experts compute."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_core import (
    DispatchPlan,
    DropReason,
    MixtureOfExperts,
    ZeroComputationExperts,
    ZeroComputationRouter,
    losses,
)

from ..helpers import (
    about,
    close,
    config,
    experts_token_by_token,
    fast,
    mask,
    mlp_of_expert,
    randn,
    routing_of,
    seeded,
)


def layer(**options) -> MixtureOfExperts:
    names = "d_model", "top_k", "n_experts", "aux_loss_weight", "norm_topk_prob"
    fields = {name: options.pop(name) for name in names if name in options}
    return seeded(
        MixtureOfExperts, config(router="zero_computation", router_options=options, **fields)
    )


def by_hand(moe, x, routing):
    """Every token and every kept slot, one after the other, from the formulas."""
    cheap, E = moe.zero_computation_experts, moe.config.n_experts
    n_zero, n_copy, _n_constant = cheap.kinds
    y = torch.zeros_like(x)
    for b, n, k in torch.cartesian_prod(*map(torch.arange, routing.expert_indices.shape)).tolist():
        if routing.capacity_mask[b, n, k]:
            e, token = int(routing.expert_indices[b, n, k]), x[b, n]
            if e < E:
                out = mlp_of_expert(moe.experts, e, token)
            elif e < E + n_zero:
                out = token * 0
            elif e < E + n_zero + n_copy:
                out = token
            else:
                i = e - E - n_zero - n_copy
                alpha = torch.softmax(cheap.mix_weight[i] @ token, 0)
                out = alpha[0] * token + alpha[1] * cheap.constants[i]
            y[b, n] += routing.expert_weights[b, n, k] * out
    return y


@fast
@given(
    st.integers(0, 99),
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(1, 3),
    st.integers(0, 4),
    st.booleans(),
)
def test_the_layer_is_the_weighted_sum_of_all_kinds_of_experts(
    seed, n_zero, n_copy, n_constant, top_k, N, padded
):
    if n_zero + n_copy + n_constant == 0:
        n_copy = 1
    moe = layer(
        n_zero_experts=n_zero,
        n_copy_experts=n_copy,
        n_constant_experts=n_constant,
        top_k=top_k,
        n_experts=3,
    ).double()
    torch.nn.init.normal_(moe.router.weight, generator=torch.Generator().manual_seed(seed))
    x, padding_mask = (
        randn(2, N, 8, seed=seed, dtype=torch.float64),
        mask(2, N, seed=seed) if padded else None,
    )
    y, routing = moe(x, padding_mask)
    assert close(y, by_hand(moe, x, routing.check()))
    by_token = experts_token_by_token(moe.experts, x, routing)
    assert close(moe.experts(x, routing), by_token)


def test_only_slots_of_feed_forward_experts_become_rows():
    reasons = [[[0, 0], [0, DropReason.OVER_CAPACITY], [DropReason.PADDING] * 2]]
    routing = routing_of(
        [[[0, 3], [4, 1], [1, 2]]],
        5,
        reasons=reasons,
        capacity=2,
        padding_mask=torch.tensor([[True, True, False]]),
    )
    for static in (None, False, True):
        plan = DispatchPlan(routing.check(), 3, static=static)
        assert plan.kept_E.tolist() == [1, 0, 0]
        rows = plan.gather(torch.ones(1, 3, 2))
        assert rows.sum() == 2 and len(rows) == (6 if static else 1)
        y = plan.combine(rows, routing.expert_weights)
        assert torch.equal(y[0, :, 0], routing.expert_weights[0, :, 0] * torch.tensor([1, 0, 0]))


def test_a_zero_expert_gives_exactly_zero_and_a_copy_expert_the_token():
    x = randn(1, 2, 8)
    cheap, routing = (
        ZeroComputationExperts(8, 1, 1, 0),
        routing_of([[[2], [3]]], 4, weights=[[[0.5], [0.25]]]),
    )
    y = cheap(x, routing)
    assert (y[0, 0] == 0).all() and torch.equal(y[0, 1], 0.25 * x[0, 1])


def test_a_constant_expert_mixes_the_token_with_its_vector():
    cheap, x = ZeroComputationExperts(2, 0, 0, 1), torch.tensor([[[1.0, 2.0]]])
    with torch.no_grad():
        cheap.mix_weight.copy_(
            torch.tensor([[[torch.log(torch.tensor(3.0)), 0], [0, 0]]])
        )  # softmax of (ln 3, 0): 3/4, 1/4
        cheap.constants.copy_(torch.tensor([[8.0, 4.0]]))
    assert close(cheap(x, routing_of([[[0]]], 1)), torch.tensor([[[0.75 + 2, 1.5 + 1]]]))


def test_gradients_reach_all_that_the_cheap_experts_learn():
    moe, x = layer(top_k=4), randn(2, 8, 8).requires_grad_()
    moe(x)[0].square().sum().backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_cheap_experts_keep_the_inputs_dtype(dtype):
    moe = layer().to(dtype)
    y, routing = moe(randn(1, 3, 8, dtype=dtype))
    assert y.dtype == dtype and routing.check().expert_weights.dtype == torch.promote_types(
        dtype, torch.float32
    )


# The balance loss


@fast
@given(st.integers(0, 99))
def test_with_a_ratio_of_one_the_balance_loss_is_the_usual_one(seed):
    router = seeded(ZeroComputationRouter, 8, 4, 2, aux_loss_weight=0.5, seed=seed)
    routing = router(randn(2, 5, 8, seed=seed))
    assert close(routing.losses["load_balance"], 0.5 * losses.load_balance(routing))


def test_the_balance_loss_is_one_at_the_loads_the_ratio_asks_for():
    router = ZeroComputationRouter(
        8,
        2,
        1,
        n_zero_experts=1,
        n_copy_experts=1,
        n_constant_experts=0,
        ffn_ratio=3.0,
        aux_loss_weight=1.0,
    )
    indices = [[[0]] * 3 + [[1]] * 3 + [[2], [3]]]  # 3 : 3 : 1 : 1
    routing = routing_of(indices, 4, scores=torch.tensor([3.0, 3, 1, 1]).div(8).expand(1, 8, 4))
    assert router.balance_loss(routing).item() == about(1)
    even = routing_of([[[0], [1], [2], [3]]], 4)
    assert router.balance_loss(even).item() > 1.3  # 8/16 * (2/3 + 2)


# The bias


def with_bias(**options) -> ZeroComputationRouter:
    return seeded(
        ZeroComputationRouter, 8, 3, 2, bias_update_rate=0.1, mean_ffn_experts=1.5, **options
    )


def test_a_bias_update_of_a_case_by_hand():
    router = with_bias(n_constant_experts=0)
    routing = routing_of(
        [[[0, 1], [0, 3]], [[0, 4], [2, 1]]],
        5,
        reasons=[[[0, 0], [0, 0]], [[0, 0], [DropReason.PADDING] * 2]],
        padding_mask=torch.tensor([[True, True], [True, False]]),
    )
    router.update([routing])
    # 6 slots: 3, 1, 0 to the feed-forward experts; each should have 1.5 / (2 * 3) = 1/4 of them
    assert close(
        router.expert_bias, 0.1 * torch.tensor([1 / 4 - 3 / 6, 1 / 4 - 1 / 6, 1 / 4, 0, 0])
    )


def test_one_update_counts_all_micro_batches_as_one_batch():
    whole, x = with_bias(), randn(4, 5, 8)
    parts = copy.deepcopy(whole)
    whole.update([whole(x)])
    parts.update([parts(x[:1]), parts(x[1:])])
    assert torch.equal(whole.expert_bias, parts.expert_bias) and whole.expert_bias.abs().max() > 0


def test_without_a_token_or_a_rate_the_bias_stays():
    router = with_bias()
    router.update([])
    router.update([router(randn(1, 0, 8))])
    assert (router.expert_bias == 0).all()
    router = ZeroComputationRouter(8, 3, 2)
    router.update([router(randn(1, 5, 8))])
    assert (router.expert_bias == 0).all()


def test_the_bias_selects_and_does_nothing_else():
    router, x = with_bias(), randn(1, 6, 8)
    before = router(x)
    router.expert_bias[1] = 5.0
    after = router(x).check()
    assert (after.expert_indices[..., 0] == 1).all() and not (
        before.expert_indices[..., 0] == 1
    ).all()
    assert torch.equal(after.scores, before.scores) and torch.equal(after.logits, before.logits)
    chosen = after.scores.gather(-1, after.expert_indices)
    assert close(after.expert_weights, chosen / chosen.sum(-1, keepdim=True))


def test_the_bias_steers_to_the_number_of_feed_forward_experts_asked_for():
    router, x = (
        seeded(
            ZeroComputationRouter,
            8,
            4,
            3,
            n_copy_experts=4,
            bias_update_rate=0.1,
            mean_ffn_experts=2.0,
        ),
        randn(1, 128, 8),
    )
    assert abs(router(x).tokens_per_expert[:4].sum().item() / 128 - 2.0) > 0.3
    for _ in range(100):
        router.update([router(x)])
    counts = router(x).tokens_per_expert[:4]
    assert counts.sum().item() / 128 == pytest.approx(2.0, abs=0.1)
    assert counts.max() < 1.2 * counts.min()  # and the load is even among them


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_zero_experts": 0, "n_copy_experts": 0, "n_constant_experts": 0}, "must not all be 0"),
        ({"n_copy_experts": -1}, "n_copy_experts=-1 must be a whole number, at least 0"),
        ({"top_k": 8}, "top_k=8 must be between 1 and n_experts=7"),
        ({"ffn_ratio": 0}, "ffn_ratio=0 must be above 0"),
        (
            {"bias_update_rate": 0.1},
            "mean_ffn_experts=None must be given exactly when bias_update_rate=0.1",
        ),
        (
            {"mean_ffn_experts": 1.0},
            "mean_ffn_experts=1.0 must be given exactly when bias_update_rate=0.0",
        ),
        (
            {"bias_update_rate": 0.1, "mean_ffn_experts": 2.5},
            "mean_ffn_experts=2.5 must be at most 2",
        ),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ZeroComputationRouter(**{"d_model": 8, "n_experts": 4, "top_k": 2, **options})


def test_x_and_routing_must_belong_together():
    cheap = ZeroComputationExperts(8, 1, 1, 1)
    for x, routing in [
        (randn(1, 2, 8), routing_of([[[0]]], 4)),
        (randn(1, 1, 7), routing_of([[[0]]], 4)),
        (randn(1, 1, 8), routing_of([[[0]]], 2)),
    ]:
        with pytest.raises(ValueError, match="do not fit d_model=8 and 3 experts"):
            cheap(x, routing)
