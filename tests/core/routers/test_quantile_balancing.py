"""Quantile balancing: the bias balances, changes the choice alone, and moves once per step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_core.routers.quantile_balancing import QuantileBalancingRouter, balancing_bias

from ..helpers import about, cases, close, fast, lopsided, randn, seeded, stream


def router(**changes) -> QuantileBalancingRouter:
    return seeded(QuantileBalancingRouter, **{"d_model": 8, "n_experts": 4, "top_k": 2, **changes})


def max_violation(routing) -> float:
    load = routing.tokens_per_expert.double()
    return float(load.max() / load.mean() - 1)


@fast
@given(
    cases(), st.sampled_from(["sigmoid", "softmax"]), st.sampled_from([0.0, 0.9]), st.integers(1, 3)
)
def test_every_routing_keeps_the_contract_also_after_updates(
    case, score_func, ema_decay, n_alternations
):
    r = seeded(
        QuantileBalancingRouter,
        case.D,
        case.E,
        case.K,
        score_func=score_func,
        norm_topk_prob=case.normalized,
        ema_decay=ema_decay,
        n_alternations=n_alternations,
        capacity_factor=case.capacity_factor,
        seed=case.seed,
    )
    with torch.no_grad():
        r.weight *= case.scale
    for _ in range(2):
        routing = r(case.x(), case.padding_mask()).check()
        assert routing.expert_indices.shape == (case.B, case.N, case.K)
        r.update([routing, routing])
        assert r.beta.isfinite().all() and r.beta.mean().item() == about(0, size=1.0)


def test_one_turn_by_hand():
    # Two experts, K = 1, four tokens; alpha is the lower of the two scores. s - alpha for expert 0: 4, 3, 2, 0; for expert 1: 0, 0, 0, 1.
    scores = torch.tensor([[5.0, 1], [4, 1], [3, 1], [1, 2]])
    beta = balancing_bias(scores, torch.ones(4, dtype=torch.bool), 1, torch.zeros(2))
    assert beta.tolist() == [1.0, -1.0]  # the third largest of each, 2 and 0, less their mean
    # (s - beta) = [4, 2], [3, 2], [2, 2], [0, 3]: the third token is the one either expert may have.
    assert (scores - beta)[2].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_a_collapsed_router_is_balanced_within_a_few_steps(score_func):
    r = lopsided(QuantileBalancingRouter, top_k=2, score_func=score_func)
    assert max_violation(r(stream(0))) > 2  # one expert takes half of all slots, and there are 8
    for seed in range(1, 10):
        r.update([r(stream(seed))])
    r.eval()
    unseen = [max_violation(r(stream(seed))) for seed in range(10, 20)]
    assert (
        sum(unseen) / len(unseen) < 0.25
    )  # 1024 slots on 8 experts: chance alone makes about 0.15


def test_many_alternations_balance_the_batch_they_saw():
    r = lopsided(QuantileBalancingRouter, top_k=2, n_alternations=50)
    x = stream(0)
    r.update([r(x)])
    assert max_violation(r(x)) < 0.05


def test_the_bias_changes_the_choice_and_never_a_weight_or_a_score():
    r, x = router(norm_topk_prob=False), randn(2, 9, 8)
    plain = r(x)
    r.beta.copy_(torch.tensor([5.0, 0.0, 0.0, -5.0]))
    biased = r(x)
    assert (biased.expert_indices[..., 0] == 3).all() and not (
        plain.expert_indices[..., 0] == 3
    ).all()
    assert torch.equal(biased.scores, plain.scores) and torch.equal(biased.logits, plain.logits)
    assert torch.equal(biased.expert_weights, plain.scores.gather(-1, biased.expert_indices))


def test_normalised_weights_are_the_scores_over_their_sum():
    routing = router()(randn(2, 9, 8))
    chosen = routing.scores.gather(-1, routing.expert_indices)
    assert close(routing.expert_weights, chosen / chosen.sum(-1, keepdim=True))


def test_scores_that_underflow_still_make_weights_that_sum_to_one():
    r = router(d_model=1)
    with torch.no_grad():
        r.weight.copy_(torch.tensor([[-1000.0], [-1000.0], [-2000.0], [-3000.0]]))
    routing = r(torch.ones(1, 1, 1)).check()
    assert (routing.scores == 0).all() and routing.expert_weights.sum() == 1


def test_micro_batches_count_as_one_batch():
    whole, parts = router(), router()
    x = randn(4, 10, 8)
    padding_mask = torch.tensor([[True] * 7 + [False] * 3] * 4)
    whole.update([whole(x, padding_mask)])
    parts.update([parts(x[:1], padding_mask[:1]), parts(x[1:], padding_mask[1:])])
    assert close(whole.beta, parts.beta) and whole.beta.abs().max() > 0.01


def test_what_padding_holds_changes_no_bias():
    a, b, x = router(), router(), randn(2, 8, 8)
    padding_mask = torch.tensor([[True] * 5 + [False] * 3] * 2)
    a.update([a(x, padding_mask)])
    x[:, 5:] = 100 * randn(2, 3, 8, seed=1)
    b.update([b(x, padding_mask)])
    assert torch.equal(a.beta, b.beta)


def test_the_ema_mixes_the_old_bias_with_the_new():
    fresh, slow = router(), router(ema_decay=0.75)
    routing = fresh(randn(2, 16, 8))
    fresh.update([routing])
    slow.update([routing])
    assert close(slow.beta, 0.25 * fresh.beta)


def test_forward_changes_no_state_in_training_or_in_eval():
    r = router(jitter_noise=0.1)
    r.update([r(randn(2, 16, 8))])
    before = r.beta.clone()
    for training in (True, False):
        r.train(training)(randn(3, 5, 8, seed=1))
    assert torch.equal(r.beta, before)


def test_an_update_without_a_real_token_leaves_the_bias():
    r = router()
    r.update([r(randn(2, 16, 8))])
    before = r.beta.clone()
    r.update([r(randn(0, 4, 8)), r(randn(1, 4, 8), torch.zeros(1, 4, dtype=torch.bool))])
    r.update([])
    assert torch.equal(r.beta, before)


def test_with_every_expert_chosen_there_is_nothing_to_balance():
    r = router(top_k=4)
    r.update([r(randn(2, 16, 8))])
    assert not r.beta.any()


def test_a_token_routed_alone_goes_where_it_goes_in_the_batch_in_training_too():
    r = lopsided(QuantileBalancingRouter, top_k=2)
    r.update([r(stream(0))])
    x = stream(1, B=2, N=8)
    together = r(x)
    for b in range(2):
        for n in range(8):
            assert torch.equal(
                r(x[b : b + 1, n : n + 1]).expert_indices[0, 0], together.expert_indices[b, n]
            )


def test_the_state_survives_saving_and_a_cast_to_bfloat16():
    r = lopsided(QuantileBalancingRouter, top_k=2)
    r.update([r(stream(0))])
    copy = router(n_experts=8)
    copy.load_state_dict(r.state_dict())
    assert torch.equal(copy.beta, r.beta)
    assert r.bfloat16().beta.dtype == torch.float32 and torch.equal(r.beta, copy.beta)


def test_no_tensor_is_read_on_the_way():
    with FakeTensorMode():
        r = QuantileBalancingRouter(8, 4, 2, z_loss_weight=0.01)
        routing = r(torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool))
        (routing.expert_weights.sum() + routing.aux_loss).backward()
        r.update([routing])
        assert r.weight.grad.shape == r.weight.shape and r.beta.shape == (4,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, "top_k=5 must be between 1 and n_experts=4"),
        (
            {"score_func": "sqrt_softplus"},
            "score_func='sqrt_softplus' must be one of 'sigmoid', 'softmax'",
        ),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must be at least 0.0 and below 1.0"),
        ({"n_alternations": 0}, "n_alternations=0 must be a whole number, at least 1"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1 must be True or False"),
    ],
)
def test_an_argument_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        router(**changes)
