"""Sinkhorn and BASE: balanced in training, plain in eval, and the assignment really is the best one."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_core.routers.balanced_assignment import (
    BalancedAssignmentRouter,
    balanced_assignment,
    cheapest_chain,
)
from moe_core.routers.sinkhorn import SinkhornRouter, sinkhorn

from ..helpers import about, cases, close, fast, lopsided, randn, seeded, stream


def router(cls=SinkhornRouter, **changes):
    return seeded(cls, **{"d_model": 8, "n_experts": 4, **changes})


# Sinkhorn


@fast
@given(cases(), st.booleans(), st.sampled_from([0.0, 1e-4]))
def test_every_routing_keeps_the_contract(case, training, tolerance):
    r = seeded(
        SinkhornRouter,
        case.D,
        case.E,
        case.K,
        tolerance=tolerance,
        max_rounds=20,
        capacity_factor=case.capacity_factor,
        z_loss_weight=0.01,
        seed=case.seed,
    ).train(training)
    with torch.no_grad():
        r.weight *= case.scale
    routing = r(case.x(), case.padding_mask()).check()
    assert routing.expert_indices.shape == (case.B, case.N, case.K)


def test_the_plan_has_equal_rows_and_equal_columns():
    logits, real = randn(40, 8) * 3, torch.arange(40) >= 5
    log_u, log_v = sinkhorn(logits, real, tolerance=1e-6, max_rounds=1000)
    plan = (logits + log_u.unsqueeze(1) + log_v).exp()
    assert close(plan.sum(1), real / 35)
    assert close(plan.sum(0), torch.full((8,), 1 / 8))
    assert log_v.mean().item() == about(0, size=1.0)


def test_it_is_the_scaling_of_the_exponentials():
    logits = randn(12, 4)
    kernel, u, v = logits.double().exp(), torch.ones(12).double(), torch.ones(4).double()
    for _ in range(200):
        u = 1 / (12 * (kernel * v).sum(1))
        v = 1 / (4 * (kernel * u.unsqueeze(1)).sum(0))
    log_u, log_v = sinkhorn(logits, torch.ones(12, dtype=torch.bool), tolerance=0, max_rounds=200)
    plan = (logits + log_u.unsqueeze(1) + log_v).exp().double()
    assert close(plan, kernel * u.unsqueeze(1) * v, dtype=torch.float32)


def test_a_collapsed_router_is_spread_in_training_and_collapsed_in_eval():
    r, x = lopsided(SinkhornRouter), stream(0)
    even = r(x).tokens_per_expert.double()
    assert even.max() / even.mean() < 2  # the plan is exactly even, its argmax is not
    collapsed = r.eval()(x)
    assert collapsed.tokens_per_expert[0] > 0.9 * x.shape[0] * x.shape[1]
    assert torch.equal(collapsed.expert_indices[..., 0], collapsed.logits.argmax(-1))


@pytest.mark.parametrize("top_k", [1, 2])
def test_weights_are_the_raw_scores_of_the_experts_chosen(top_k):
    r, x = lopsided(SinkhornRouter, top_k=top_k), stream(0)
    routing = r(x)
    scores = routing.logits.sigmoid() if top_k == 1 else routing.logits.softmax(-1)
    assert torch.equal(routing.expert_weights, scores.gather(-1, routing.expert_indices))
    routing.expert_weights.square().sum().backward()
    assert (r.weight.grad.abs().sum(-1) > 1e-4).all()


def test_logits_that_overflow_an_exponential_are_still_balanced():
    r = lopsided(SinkhornRouter, max_rounds=300)
    with torch.no_grad():
        r.weight *= 200  # logits up to a thousand
    routing = r(stream(0, N=16)).check()
    assert (routing.tokens_per_expert > 0).all() and routing.tokens_per_expert[0] < 32


def test_what_padding_holds_changes_no_route():
    r, real = lopsided(SinkhornRouter), stream(0, N=16)
    padding_mask = torch.tensor([[False] * 3 + [True] * 16] * 4)
    padded = r(torch.cat([100 * randn(4, 3, 8, seed=1), real], dim=1), padding_mask).check()
    assert torch.equal(padded.expert_indices[:, 3:], r(real).expert_indices)


def test_a_later_token_changes_an_earlier_route_in_training_and_not_in_eval():
    r, x = router(n_experts=2), randn(1, 8, 8)
    # The experts differ by x's first component alone, so that Sinkhorn cuts at the median.
    with torch.no_grad():
        r.weight.zero_()
        r.weight[0, 0] = 1.0
    x[0, :, 0] = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
    later = x.clone()
    later[0, 5:, 0] = -9.0
    assert r(x).expert_indices[0, 3] == 1 and r(later).expert_indices[0, 3] == 0
    r.eval()
    assert torch.equal(r(x).expert_indices[0, :5], r(later).expert_indices[0, :5])


def test_no_tensor_is_read_when_the_rounds_are_counted():
    with FakeTensorMode():
        r = SinkhornRouter(8, 4, 2, tolerance=0.0, max_rounds=3, z_loss_weight=0.01)
        routing = r(torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool))
        (routing.expert_weights.sum() + routing.aux_loss).backward()
        assert r.weight.grad.shape == r.weight.shape


# Balanced assignment


def best_total(scores, places) -> float:
    """From scipy: one column for each place in front of each expert."""
    columns = scores.double().repeat_interleave(places, dim=1).numpy()
    return float(columns[linear_sum_assignment(columns, maximize=True)].sum())


@pytest.mark.parametrize(
    ("T", "E"), [(12, 3), (64, 8), (128, 16), (7, 7), (10, 4), (3, 8), (50, 1)]
)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_assignment_is_the_best_balanced_one(T, E, scale):
    for seed in range(2):
        scores = scale * (randn(T, E, seed=seed) + randn(E, seed=100 + seed))
        expert, places = balanced_assignment(scores), -(-T // E)
        load = torch.zeros(E, dtype=torch.int64).scatter_add_(0, expert, torch.ones_like(expert))
        assert load.max() <= places and (T % E or load.tolist() == [places] * E)
        total = float(scores.double().gather(1, expert.unsqueeze(1)).sum())
        assert total == pytest.approx(best_total(scores, places), rel=1e-9, abs=1e-9 * scale)


@fast
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 999), st.sampled_from([0, 1, 2]))
def test_the_assignment_is_the_best_one_also_with_ties(T, E, seed, levels):
    scores = (randn(T, E, seed=seed) * levels).round()
    places = -(-T // E)
    every = itertools.product(range(E), repeat=T)
    best = max(
        sum(scores[t, e].item() for t, e in enumerate(a))
        for a in every
        if all(a.count(e) <= places for e in range(E))
    )
    expert = balanced_assignment(scores)
    assert (
        scores.gather(1, expert.unsqueeze(1)).sum() == best
        and max(expert.tolist().count(e) for e in range(E)) <= places
    )


def test_tokens_that_all_agree_are_still_split_evenly():
    assert (
        sorted(balanced_assignment(torch.tensor([[3.0, 2.0, 1.0]]).repeat(12, 1)).tolist())
        == [0] * 4 + [1] * 4 + [2] * 4
    )
    assert sorted(balanced_assignment(torch.zeros(6, 3)).tolist()) == [0, 0, 1, 1, 2, 2]


def test_the_cheapest_chain_goes_over_another_expert_when_that_costs_less():
    edge = torch.tensor(
        [[torch.inf, 1.0, 9.0], [2.0, torch.inf, 3.0], [0.0, 0.0, torch.inf]]
    ).double()
    assert cheapest_chain(
        edge, torch.tensor([True, False, False]), torch.tensor([False, False, True])
    ) == [0, 1, 2]
    edge[0, 1] = 7.0
    assert cheapest_chain(
        edge, torch.tensor([True, False, False]), torch.tensor([False, False, True])
    ) == [0, 2]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    scores = randn(4, 2)
    scores[1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        balanced_assignment(scores)


# BASE


@fast
@given(cases(), st.booleans())
def test_every_balanced_routing_keeps_the_contract_and_the_balance(case, training):
    r = seeded(BalancedAssignmentRouter, case.D, case.E, z_loss_weight=0.01, seed=case.seed).train(
        training
    )
    with torch.no_grad():
        r.weight *= case.scale
    routing = r(case.x(), case.padding_mask()).check()
    if training:
        assert int(routing.tokens_per_expert.max()) <= -(-int(routing.real_tokens.sum()) // case.E)


def test_training_gives_every_expert_exactly_as_many_and_eval_each_token_its_best():
    r, x = lopsided(BalancedAssignmentRouter), stream(0)
    assert r(x).check().tokens_per_expert.tolist() == [64] * 8
    greedy = r.eval()(x).check()
    assert (
        torch.equal(greedy.expert_indices[..., 0], greedy.logits.argmax(-1))
        and greedy.tokens_per_expert[0] > 300
    )


def test_the_weight_is_the_sigmoid_of_the_chosen_logit_and_trains_the_router():
    r, x = lopsided(BalancedAssignmentRouter), stream(0)
    routing = r(x)
    chosen = routing.logits.gather(-1, routing.expert_indices)
    assert close(routing.expert_weights, chosen.sigmoid())
    routing.expert_weights.sum().backward()
    assert (r.weight.grad.abs().sum(-1) > 1e-4).all()


def test_padding_is_not_assigned_and_changes_no_route():
    r, real = lopsided(BalancedAssignmentRouter), stream(0, N=16)
    padding_mask = torch.tensor([[False] * 3 + [True] * 16] * 4)
    padded = r(torch.cat([100 * randn(4, 3, 8, seed=1), real], dim=1), padding_mask).check()
    assert torch.equal(padded.expert_indices[:, 3:], r(real).expert_indices)
    assert padded.tokens_per_expert.tolist() == [8] * 8


def test_centroids_start_orthogonal_with_length_a_tenth():
    weight = router(BalancedAssignmentRouter).weight
    assert close(weight @ weight.T, 0.01 * torch.eye(4))


# Both


@pytest.mark.parametrize("cls", [SinkhornRouter, BalancedAssignmentRouter])
def test_the_same_batch_is_routed_the_same_way_twice(cls):
    r, x = lopsided(cls), stream(0)
    assert torch.equal(r(x).expert_indices, r(x).expert_indices)


@pytest.mark.parametrize("cls", [SinkhornRouter, BalancedAssignmentRouter])
@pytest.mark.parametrize("padding_mask", [torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 3)])
def test_a_padding_mask_of_another_shape_or_type_is_refused(cls, padding_mask):
    with pytest.raises(ValueError, match=r"padding_mask must be bool of shape \(2, 3\)"):
        router(cls)(randn(2, 3, 8), padding_mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, "top_k=5 must be between 1 and n_experts=4"),
        ({"tolerance": -1.0}, "tolerance=-1.0 must be at least 0"),
        ({"max_rounds": 0}, "max_rounds=0 must be a whole number, at least 1"),
        ({"jitter_noise": 1.0}, "jitter_noise=1.0 must be at least 0.0 and below 1.0"),
    ],
)
def test_an_argument_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        router(**changes)
