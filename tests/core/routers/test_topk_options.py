"""TopKRouter's options: what scores, what selects, what weighs, and that none leaks into another."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_core import Experts, TopKRouter
from moe_core.routers.topk import SCORE_FUNCS, keep_best_groups, sqrt_softplus

from ..helpers import about, close, fast, mlp_of_expert, randn, seeded

SCORES = {
    "softmax": lambda hs: [
        math.exp(h - max(hs)) / sum(math.exp(g - max(hs)) for g in hs) for h in hs
    ],
    "sigmoid": lambda hs: [1 / (1 + math.exp(-h)) for h in hs],
    "sqrt_softplus": lambda hs: [math.sqrt(math.log1p(math.exp(h))) for h in hs],
}


def router(logits_E=None, **changes) -> TopKRouter:
    """A router with drawn weight and biases; one whose logits are x times ``logits_E`` where these are given."""
    if logits_E is not None:
        changes = {"d_model": 1, "n_experts": len(logits_E), **changes}
    r = seeded(TopKRouter, **{"d_model": 8, "n_experts": 8, "top_k": 2, **changes})
    with torch.no_grad():
        if logits_E is not None:
            r.weight.copy_(torch.tensor(logits_E, dtype=torch.float32).unsqueeze(-1))
        elif r.bias is not None:
            r.bias.copy_(randn(r.n_experts, seed=1))
    if r.expert_bias is not None:
        r.expert_bias.copy_(randn(r.n_experts, seed=2))
    return r


ONE = torch.ones(1, 1, 1)  # the token for which the logits are logits_E


@st.composite
def options(draw):
    """Sizes and options that fit together."""
    n_groups, size = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    topk_groups = draw(st.integers(1, n_groups))
    after = draw(st.booleans())
    return {
        "n_experts": n_groups * size,
        "top_k": draw(st.integers(1, topk_groups * size)),
        "n_groups": n_groups,
        "topk_groups": topk_groups,
        "group_score": draw(st.sampled_from(["max", "top2_sum"])),
        "score_func": draw(st.sampled_from(list(SCORE_FUNCS))),
        "score_after_topk": after,
        "norm_topk_prob": draw(st.booleans()),
        "norm_eps": draw(st.sampled_from([0.0, 1e-20])),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "bias": draw(st.booleans()),
        "expert_bias": draw(st.booleans()),
    }


def by_hand(r: TopKRouter, hs: list[float]) -> dict[int, float]:
    """Expert -> weight for one token, in plain Python."""
    scores, E = SCORES[r.score_func](hs), r.n_experts
    choice = [(h if r.score_after_topk else s) for h, s in zip(hs, scores)]
    if r.expert_bias is not None:
        choice = [c + b for c, b in zip(choice, r.expert_bias.tolist())]
    size = E // r.n_groups
    groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(r.n_groups)]
    worth = [g[0] if r.group_score == "max" else g[0] + g[1] for g in groups]
    best = sorted(range(r.n_groups), key=lambda g: -worth[g])[: r.topk_groups]
    allowed = [e for e in range(E) if e // size in best]
    chosen = sorted(allowed, key=lambda e: -choice[e])[: r.top_k]
    values = (
        SCORES[r.score_func]([hs[e] for e in chosen])
        if r.score_after_topk
        else [scores[e] for e in chosen]
    )
    total = sum(values) + r.norm_eps if r.norm_topk_prob else 1
    return {e: r.routed_scaling_factor * v / total for e, v in zip(chosen, values)}


@fast
@given(options(), st.integers(0, 999))
def test_every_combination_of_options_is_the_formula(opts, seed):
    r, x = router(**opts).double(), randn(1, 4, 8, seed=seed, dtype=torch.float64)
    routing = r(x).check()
    for n in range(4):
        expected = by_hand(r, routing.logits[0, n].tolist())
        assert routing.expert_indices[0, n].tolist() == list(expected)
        assert routing.expert_weights[0, n].tolist() == pytest.approx(
            list(expected.values()), rel=1e-9
        )
    assert torch.equal(routing.scores, SCORE_FUNCS[r.score_func](routing.logits))


@fast
@given(options(), st.sampled_from([0.0, 1e4, -1e4]), st.booleans(), st.integers(0, 99))
def test_extreme_logits_keep_the_contract_and_finite_gradients(opts, size, same, seed):
    r = router(d_model=1, **opts)
    with torch.no_grad():
        r.weight.copy_(torch.ones_like(r.weight) if same else randn(r.n_experts, 1, seed=seed))
    routing = r(torch.full((2, 3, 1), size)).check()
    (routing.expert_weights.square().sum() + routing.scores.square().sum()).backward()
    assert all(p.grad.isfinite().all() for p in r.parameters())


@fast
@given(options(), st.sampled_from([math.nan, math.inf]))
def test_a_token_that_is_not_finite_is_refused(opts, value):
    x = randn(1, 2, 8)
    x[0, 1, 3] = value
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        router(**opts)(x).check()


# Score before or after


@fast
@given(st.integers(1, 8), st.integers(0, 999), st.sampled_from([0.1, 1.0, 10.0]))
def test_softmax_topk_renormalise_equals_topk_softmax_with_gradients(K, seed, scale):
    x, sides = scale * randn(1, 5, 8, seed=seed), []
    for opts in ({"norm_topk_prob": True}, {"score_after_topk": True, "norm_topk_prob": False}):
        r = router(top_k=K, **opts)
        routing = r(x).check()
        assert routing.normalized
        (routing.expert_weights * randn(1, 5, K, seed=seed + 1)).sum().backward()
        sides.append((routing, r.weight.grad))
    (before, before_grad), (after, after_grad) = sides
    assert torch.equal(before.expert_indices, after.expert_indices)
    assert close(before.expert_weights, after.expert_weights)
    assert torch.allclose(before_grad, after_grad, atol=1e-5 * max(1, scale))


def test_scored_after_the_choice_the_scores_still_know_every_expert():
    """A loss over the chosen ones alone would give the others no gradient."""
    r = router(score_after_topk=True, norm_topk_prob=False, aux_loss_weight=1.0)
    r(randn(1, 1, 8)).aux_loss.backward()
    assert (r.weight.grad.abs().sum(-1) > 0).all()


def test_logits_choose_where_saturated_scores_are_tied():
    logits = [20.0, 40.0, 30.0]
    assert (
        router(logits, top_k=1, score_func="sigmoid", score_after_topk=True)(
            ONE
        ).expert_indices.item()
        == 1
    )
    assert router(logits, top_k=1, score_func="sigmoid")(ONE).scores.unique().tolist() == [1.0]


def test_sqrt_softplus_has_its_values_and_a_finite_gradient_everywhere():
    h = torch.tensor([0.0, 400.0, -2.0, -200.0, -1e4], requires_grad=True)
    s = sqrt_softplus(h)
    s.sum().backward()
    assert s[:2].tolist() == about([math.sqrt(math.log(2)), 20.0]) and s[2] < s[0]
    assert (s > 0).all() and s[3:].max() < 1e-15
    assert (
        h.grad[0].item() == about(0.25 / math.sqrt(math.log(2)))
        and h.grad.isfinite().all()
        and h.grad[4] == 0
    )


# Renormalise and scale


def test_the_scaling_factor_multiplies_the_weights_and_takes_back_the_promise_of_one():
    plain, scaled = (
        router()(randn(2, 3, 8)),
        router(routed_scaling_factor=2.5)(randn(2, 3, 8)).check(),
    )
    assert torch.equal(scaled.expert_weights, 2.5 * plain.expert_weights)
    assert plain.normalized and not scaled.normalized
    assert torch.equal(scaled.scores, plain.scores)


@pytest.mark.parametrize("score_func", ["sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("norm_eps", [0.0, 1e-20])
def test_weights_of_scores_that_all_underflow_are_finite(score_func, norm_eps):
    r = router([-1e4, -2e4, -3e4], top_k=2, score_func=score_func, norm_eps=norm_eps)
    weights = r(ONE).check().expert_weights
    weights.sum().backward()
    assert (weights >= 0).all() and (weights <= 1).all() and r.weight.grad.isfinite().all()


@pytest.mark.parametrize("changes", [{"expert_bias": True}, {"norm_eps": 0.5}])
def test_a_sum_of_one_is_not_promised_where_it_may_fail(changes):
    r = router([1e4, 0.0, 0.0], **changes)
    if r.expert_bias is not None:
        r.expert_bias.copy_(torch.tensor([0.0, 5.0, 5.0]))  # selects the two whose probability is 0
    routing = r(ONE).check()
    assert routing.expert_weights.sum() < 0.9 and not routing.normalized


# The two biases


def test_a_router_bias_is_a_part_of_the_logits():
    x, r = randn(2, 3, 8), router(bias=True)
    assert torch.equal(r(x).logits, x @ r.weight.T + r.bias)
    r(x).expert_weights[..., 0].sum().backward()
    assert r.bias.grad.abs().sum() > 1e-3


def test_an_expert_bias_changes_the_selection_and_never_logits_scores_or_weights():
    x, r = randn(4, 16, 8), router(expert_bias=True, score_func="sigmoid", norm_topk_prob=False)
    biased = r(x).check()
    r.expert_bias.zero_()
    plain = r(x)
    assert not torch.equal(biased.expert_indices, plain.expert_indices)
    assert torch.equal(biased.logits, plain.logits) and torch.equal(biased.scores, plain.scores)
    assert torch.equal(biased.expert_weights, plain.scores.gather(-1, biased.expert_indices))


def test_an_expert_bias_is_state_without_gradient_that_forward_leaves_alone():
    r = router(expert_bias=True)
    before = r.expert_bias.clone()
    assert "expert_bias" in r.state_dict() and "expert_bias" not in dict(r.named_parameters())
    r(randn(2, 3, 8)).expert_weights.sum().backward()
    assert not r.expert_bias.requires_grad and torch.equal(r.expert_bias, before)


def test_an_expert_bias_stays_float32_in_a_bfloat16_model_and_grows_with_a_float64_one():
    r, value = router(expert_bias=True), 1 + 2.0**-20
    r.expert_bias.fill_(value)
    for cast in (lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)):
        assert cast(r).expert_bias.dtype == torch.float32 and (r.expert_bias == value).all()
    assert r.weight.dtype == torch.bfloat16
    assert r.double().expert_bias.dtype == torch.float64 and (r.expert_bias == value).all()
    assert r.float().expert_bias.dtype == torch.float32


def test_reset_parameters_starts_both_biases_at_zero_also_where_memory_was_empty():
    with torch.device("meta"):
        r = TopKRouter(8, 4, 2, bias=True, expert_bias=True)
    r = r.to_empty(device="cpu")
    r.reset_parameters()
    assert (r.bias == 0).all() and (r.expert_bias == 0).all() and r.weight.abs().max() <= 1 / 8**0.5
    assert r.expert_bias.dtype == torch.float32


# Groups


@fast
@given(st.integers(0, 999), st.sampled_from(["max", "top2_sum"]), st.sampled_from([-5.0, 0.0]))
def test_a_token_stays_inside_its_best_groups(seed, group_score, shift):
    r = router(
        n_experts=12,
        top_k=3,
        n_groups=4,
        topk_groups=2,
        group_score=group_score,
        score_func="sigmoid",
        expert_bias=True,
    )
    r.expert_bias += shift  # below zero, everything outside the groups looks good to a mask of 0
    routing = r(randn(2, 5, 8, seed=seed)).check()
    choice = (routing.scores + r.expert_bias).unflatten(-1, (4, 3))
    worth = choice.amax(-1) if group_score == "max" else choice.sort(-1).values[..., 1:].sum(-1)
    best = worth.topk(2).indices
    assert ((routing.expert_indices // 3).unsqueeze(-1) == best.unsqueeze(-2)).any(-1).all()


def test_a_mask_of_zero_would_let_experts_outside_the_groups_in_once_a_biased_score_is_negative():
    positive = torch.tensor([0.9, 0.8, 0.7, 0.6])
    kept = keep_best_groups(positive, 2, 1, "max")
    assert kept.tolist() == [about(0.9), about(0.8), -math.inf, -math.inf]
    with_zero = kept.masked_fill(kept == -math.inf, 0)
    assert torch.equal(
        kept.topk(2).indices, with_zero.topk(2).indices
    )  # softmax scores: no difference
    kept = keep_best_groups(positive - 5, 2, 1, "max")
    with_zero = kept.masked_fill(kept == -math.inf, 0)
    assert kept.topk(2).indices.tolist() == [0, 1] and sorted(
        with_zero.topk(2).indices.tolist()
    ) == [2, 3]


def test_the_two_group_scores_disagree_about_one_star_and_two_good_ones():
    choice = torch.tensor([0.9, 0.1, 0.6, 0.6])
    assert keep_best_groups(choice, 2, 1, "max").isfinite().tolist() == [True, True, False, False]
    assert keep_best_groups(choice, 2, 1, "top2_sum").isfinite().tolist() == [
        False,
        False,
        True,
        True,
    ]


def test_all_groups_kept_are_no_groups():
    x = randn(2, 3, 8)
    free, grouped = router()(x), router(n_groups=4, topk_groups=4)(x)
    assert torch.equal(free.expert_indices, grouped.expert_indices) and torch.equal(
        free.expert_weights, grouped.expert_weights
    )


# The weight on the input


def test_a_weight_on_the_input_is_inside_the_expert():
    x = randn(2, 3, 8, dtype=torch.float64)
    r = router(
        weights_on="input", score_func="sigmoid", norm_topk_prob=False, capacity_factor=1.0
    ).double()
    experts = seeded(Experts, 8, 6, 8, backend="loop").double()
    routing = r(x).check()
    y = experts(x, routing)
    assert not routing.capacity_mask.all()
    for b, n in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        expected = torch.zeros(8, dtype=torch.float64)
        for kept, e, w in zip(
            routing.capacity_mask[b, n], routing.expert_indices[b, n], routing.expert_weights[b, n]
        ):
            expected = expected + kept * mlp_of_expert(experts, e, w * x[b, n])
        assert close(y[b, n], expected)
    (gradient,) = torch.autograd.grad(y.square().sum(), r.weight)
    assert gradient.abs().max() > 1e-6


# Arguments


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"score_func": "tanh"},
            "score_func='tanh' must be one of 'softmax', 'sigmoid', 'sqrt_softplus'",
        ),
        ({"score_after_topk": 1}, "score_after_topk=1 must be True or False"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0 must be at least 0"),
        (
            {"routed_scaling_factor": math.inf},
            "routed_scaling_factor=inf must be at least 0 and finite",
        ),
        ({"bias": "yes"}, "bias='yes' must be True or False"),
        ({"expert_bias": None}, "expert_bias=None must be True or False"),
        ({"n_groups": 3}, "n_groups=3 must divide n_experts=8"),
        ({"n_groups": 0}, "n_groups=0 must be a whole number"),
        ({"n_groups": 2, "topk_groups": 3}, "topk_groups=3 must be between 1 and n_groups=2"),
        (
            {"n_groups": 4, "topk_groups": 1, "top_k": 3},
            "top_k=3 must be at most 2, the experts in topk_groups=1 groups of 2",
        ),
        ({"n_groups": 8, "topk_groups": 4, "group_score": "top2_sum"}, "leaves 1 expert a group"),
        ({"group_score": "mean"}, "group_score='mean' must be one of 'max', 'top2_sum'"),
        ({"weights_on": "both"}, "weights_on='both' must be one of 'output', 'input'"),
    ],
)
def test_a_wrong_option_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(**{"d_model": 8, "n_experts": 8, "top_k": 2, **changes})
