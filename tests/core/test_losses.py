"""Auxiliary losses against values one can compute by hand."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_core import DropReason, losses

from .helpers import about, cases, close, fast, randn, routing_of

OVER, PAD = DropReason.OVER_CAPACITY, DropReason.PADDING


@pytest.mark.parametrize(
    ("n_experts", "top_k"), [(1, 1), (4, 1), (4, 2), (4, 3), (4, 4), (8, 2), (8, 8)]
)
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_balance_loss_is_1_when_uniform_for_every_k(n_experts, top_k, scope):
    token = torch.arange(n_experts).view(1, -1, 1)
    indices = ((token + torch.arange(top_k)) % n_experts).expand(
        2, -1, -1
    )  # each expert gets K slots of each sequence
    assert losses.load_balance(routing_of(indices, n_experts).check(), scope=scope).item() == about(
        1
    )


@pytest.mark.parametrize("n_experts", [1, 2, 8, 64])
def test_balance_loss_is_e_when_one_expert_gets_everything(n_experts):
    scores = torch.zeros(1, 5, n_experts)
    scores[..., 0] = 1
    assert (
        losses.load_balance(routing_of(torch.zeros(1, 5, 1), n_experts, scores=scores)) == n_experts
    )


def test_balance_loss_is_e_for_one_kept_slot_of_k_too():
    scores = torch.tensor([1.0, 0, 0, 0]).expand(1, 5, 4)
    reasons = torch.tensor([0, PAD, PAD, PAD]).expand(
        1, 5, 4
    )  # K = E slots, of which each token takes one
    assert (
        losses.load_balance(
            routing_of(torch.arange(4).expand(1, 5, 4), 4, scores=scores, reasons=reasons)
        )
        == 4
    )


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_loss_is_e_over_k_when_all_tokens_share_the_same_k_experts(top_k):
    scores = torch.zeros(1, 5, 8)
    scores[..., :top_k] = 1 / top_k
    loss = losses.load_balance(
        routing_of(torch.arange(top_k).expand(1, 5, top_k), 8, scores=scores)
    )
    assert loss.item() == about(8 / top_k)


def test_balance_loss_of_a_case_by_hand():
    scores = [[[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.5, 0.4, 0.1]]]
    # f = (3, 0, 1) / 4; P = (2.0, 1.1, 0.9) / 4; L = 3 * (3*2.0 + 1*0.9) / 16
    assert losses.load_balance(
        routing_of([[[0], [0], [2], [0]]], 3, scores=scores)
    ).item() == about(3 * 6.9 / 16)


def test_sequences_that_collapse_in_opposite_ways_look_balanced_only_when_pooled():
    scores = torch.tensor([[[1.0, 0.0]] * 3, [[0.0, 1.0]] * 3])
    routing = routing_of([[[0]] * 3, [[1]] * 3], 2, scores=scores)
    assert losses.load_balance(routing) == 1
    assert losses.load_balance(routing, scope="sequence") == 2


def test_balance_loss_has_the_gradient_of_the_mean_score_alone():
    routing = routing_of([[[0], [0], [1], [0]]], 4, scores=randn(1, 4, 4).softmax(-1))
    scores = routing.scores.clone().requires_grad_()
    losses.load_balance(replace(routing, scores=scores)).backward()
    expected = 4 * torch.tensor([3 / 4, 1 / 4, 0, 0]) / 4  # E f_e / T
    assert close(scores.grad, expected.expand(1, 4, 4))


def test_balance_loss_counts_slots_before_capacity():
    kept, dropped = ([[[0], [0], [1]]], None), ([[[0], [0], [1]]], [[[0], [OVER], [0]]])
    scores = randn(1, 3, 2).softmax(-1)
    values = [
        losses.load_balance(routing_of(i, 2, scores=scores, reasons=r, capacity=2))
        for i, r in (kept, dropped)
    ]
    assert torch.equal(*values)


def test_a_sequence_of_padding_only_does_not_dilute_the_loss():
    scores = torch.tensor([1.0, 0.0]).expand(2, 3, 2)
    padding_mask = torch.tensor([[True] * 3, [False] * 3])
    reasons = [[[0]] * 3, [[PAD]] * 3]
    routing = routing_of(
        torch.zeros(2, 3, 1), 2, scores=scores, reasons=reasons, padding_mask=padding_mask
    ).check()
    assert losses.load_balance(routing) == losses.load_balance(routing, scope="sequence") == 2


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="scope='global' must be one of 'batch', 'sequence'"):
        losses.load_balance(routing_of([[[0]]], 2), scope="global")


@pytest.mark.parametrize("n_experts", [1, 2, 8])
def test_z_loss_of_zero_logits_is_the_square_of_ln_e(n_experts):
    routing = replace(
        routing_of(torch.zeros(2, 3, 1), n_experts), logits=torch.zeros(2, 3, n_experts)
    )
    assert losses.z_loss(routing).item() == about(math.log(n_experts) ** 2)


def test_z_loss_of_zero_logits_at_8_experts_is_4_3241():
    routing = replace(routing_of([[[0]]], 8), logits=torch.zeros(1, 1, 8))
    assert round(losses.z_loss(routing).item(), 4) == 4.3241


@fast
@given(st.floats(-50, 50))
def test_shifting_the_logits_of_a_token_changes_its_z_loss_as_the_formula_says(shift):
    logits = randn(1, 1, 4, dtype=torch.float64)
    routing = replace(routing_of([[[0]]], 4), logits=logits + shift)
    assert losses.z_loss(routing).item() == pytest.approx(
        (logits.logsumexp(-1).item() + shift) ** 2, rel=1e-12, abs=1e-12
    )


def test_z_loss_skips_padding():
    logits = torch.tensor([[[0.0, 0.0], [30.0, -30.0]]])
    routing = routing_of(
        [[[0], [0]]], 2, reasons=[[[0], [PAD]]], padding_mask=torch.tensor([[True, False]])
    )
    assert losses.z_loss(replace(routing, logits=logits)).item() == about(math.log(2) ** 2)


@pytest.mark.parametrize(
    "loss", [losses.load_balance, lambda r: losses.load_balance(r, scope="sequence"), losses.z_loss]
)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_without_a_real_token_a_loss_is_zero(loss, shape):
    padding_mask = torch.zeros(shape, dtype=torch.bool)
    routing = routing_of(
        torch.zeros(*shape, 1), 4, reasons=torch.full((*shape, 1), PAD), padding_mask=padding_mask
    ).check()
    assert loss(routing) == 0 and loss(routing).shape == ()


@fast
@given(cases())
def test_both_scopes_agree_on_a_batch_of_one(case):
    if case.B and case.N:
        routing = case.router()(
            case.x()[:1], None if case.padding_mask() is None else case.padding_mask()[:1]
        )
        assert close(losses.load_balance(routing), losses.load_balance(routing, scope="sequence"))


@fast
@given(cases())
def test_losses_do_not_depend_on_the_order_of_the_tokens(case):
    router = case.router(capacity_factor=None)
    order = torch.randperm(case.N, generator=torch.Generator().manual_seed(case.seed))
    padding_mask = case.padding_mask()
    routing = router(case.x(), padding_mask)
    shuffled = router(case.x()[:, order], None if padding_mask is None else padding_mask[:, order])
    for loss in (losses.load_balance, losses.z_loss):
        assert close(loss(routing), loss(shuffled))
