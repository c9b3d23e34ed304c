"""The contract of Routing, and what is derived from it."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given

from moe_core import DropReason, TopKRouter

from .helpers import cases, close, fast, randn, routing_of, seeded

KEPT, OVER, PAD = DropReason.KEPT, DropReason.OVER_CAPACITY, DropReason.PADDING


def made_by_a_router(**changes):
    """B=2, N=3, E=4, K=2; the last token is padding; two slots per expert at most; normalised weights."""
    padding_mask = torch.tensor([[True, True, True], [True, True, False]])
    router = seeded(TopKRouter, 8, 4, 2, capacity_factor=0.5, aux_loss_weight=0.01)
    return replace(router(randn(2, 3, 8), padding_mask).check(), **changes)


def test_sizes_are_read_from_the_shapes():
    routing = made_by_a_router()
    assert (routing.n_experts, routing.top_k) == (4, 2)


def test_tokens_per_expert_counts_kept_slots_only():
    routing = routing_of(
        [[[0, 1], [0, 1], [0, 2]]],
        4,
        reasons=[[[KEPT, KEPT], [KEPT, OVER], [OVER, KEPT]]],
        capacity=2,
    )
    assert routing.tokens_per_expert.tolist() == [2, 1, 1, 0]
    assert routing.tokens_per_expert.dtype == torch.int64


def test_drop_rate_is_the_share_of_selected_slots_without_room():
    padding_mask = torch.tensor([[True, True, False]])
    reasons = [[[KEPT, KEPT], [KEPT, OVER], [PAD, PAD]]]
    routing = routing_of(
        [[[0, 1], [0, 1], [0, 1]]], 2, reasons=reasons, padding_mask=padding_mask, capacity=2
    )
    assert routing.drop_rate == 1 / 4


def test_drop_rate_is_zero_when_nothing_was_selected():
    nothing = routing_of(
        torch.zeros(1, 2, 1),
        2,
        reasons=[[[PAD], [PAD]]],
        padding_mask=torch.tensor([[False, False]]),
    )
    assert nothing.drop_rate == 0


def test_selected_slots_are_the_kept_ones_and_those_without_room():
    routing = routing_of(
        [[[0], [0], [0]]],
        2,
        reasons=[[[KEPT], [OVER], [PAD]]],
        capacity=1,
        padding_mask=torch.tensor([[True, True, False]]),
    )
    assert routing.selected_mask.flatten().tolist() == [True, True, False]


def test_slot_share_counts_slots_before_capacity_and_without_padding():
    padding_mask = torch.tensor([[True, True, True], [True, False, False]])
    reasons = [[[KEPT], [OVER], [KEPT]], [[KEPT], [PAD], [PAD]]]
    routing = routing_of(
        [[[0], [0], [1]], [[1], [0], [0]]],
        2,
        reasons=reasons,
        padding_mask=padding_mask,
        capacity=2,
    )
    assert routing.slot_share().tolist() == [0.5, 0.5]
    assert close(routing.slot_share("sequence"), torch.tensor([[2 / 3, 1 / 3], [0, 1]]))


def test_mean_score_is_over_real_tokens():
    scores = [[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.9, 0.1]]]
    padding_mask = torch.tensor([[True, True], [True, False]])
    routing = routing_of(
        torch.zeros(2, 2, 1),
        2,
        scores=scores,
        reasons=[[[0], [0]], [[0], [PAD]]],
        padding_mask=padding_mask,
    )
    assert close(routing.mean_score(), torch.tensor([0.5, 0.5]))
    assert close(routing.mean_score("sequence"), torch.tensor([[0.75, 0.25], [0.0, 1.0]]))


@pytest.mark.parametrize("method", ["slot_share", "mean_score"])
def test_an_unknown_scope_is_refused(method):
    with pytest.raises(ValueError, match="scope='layer' must be one of 'batch', 'sequence'"):
        getattr(made_by_a_router(), method)("layer")


def test_aux_loss_is_zero_without_losses_and_their_sum_otherwise():
    routing = routing_of([[[0]]], 2)
    assert routing.aux_loss == 0 and routing.aux_loss.shape == ()
    assert routing.with_losses(a=torch.tensor(1.0)).with_losses(b=torch.tensor(0.5)).aux_loss == 1.5


def test_with_losses_leaves_the_original_alone():
    routing = routing_of([[[0]]], 2)
    routing.with_losses(a=torch.tensor(1.0))
    assert routing.losses == {}


def test_a_routing_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        made_by_a_router().capacity = 7


def changed(tensor, index, value):
    tensor = tensor.detach().clone()
    tensor[index] = value
    return tensor


FIRST = (0, 0, 0)
TAMPERINGS = {
    "float indices": (
        "expert_indices has dtype",
        lambda r: {"expert_indices": r.expert_indices.int()},
    ),
    "an index too large": (
        r"must lie in \[0, 4\)",
        lambda r: {"expert_indices": changed(r.expert_indices, FIRST, 4)},
    ),
    "a negative index": (
        r"must lie in \[0, 4\)",
        lambda r: {"expert_indices": changed(r.expert_indices, FIRST, -1)},
    ),
    "an expert twice": (
        "chosen twice",
        lambda r: {"expert_indices": changed(r.expert_indices, FIRST, r.expert_indices[0, 0, 1])},
    ),
    "bfloat16 weights": (
        "expert_weights has dtype",
        lambda r: {"expert_weights": r.expert_weights.bfloat16()},
    ),
    "a weight too few": (
        "expert_weights has shape",
        lambda r: {"expert_weights": r.expert_weights[..., :1]},
    ),
    "a NaN weight": (
        "expert_weights holds NaN",
        lambda r: {"expert_weights": changed(r.expert_weights, FIRST, torch.nan)},
    ),
    "weights off the sum": (
        "must sum to 1",
        lambda r: {"expert_weights": r.expert_weights * 1.001},
    ),
    "an integer mask": (
        "capacity_mask has dtype",
        lambda r: {"capacity_mask": r.capacity_mask.long()},
    ),
    "a mask of another shape": (
        "capacity_mask has shape",
        lambda r: {"capacity_mask": r.capacity_mask[:1]},
    ),
    "a slot let in": ("disagree", lambda r: {"capacity_mask": torch.ones_like(r.capacity_mask)}),
    "wide reasons": ("drop_reason has dtype", lambda r: {"drop_reason": r.drop_reason.long()}),
    "another reason": ("disagree", lambda r: {"drop_reason": torch.zeros_like(r.drop_reason)}),
    "padding selected": (
        "padding token",
        lambda r: {"drop_reason": changed(r.drop_reason, (1, 2, 0), OVER)},
    ),
    "an unknown reason": (
        "no DropReason",
        lambda r: {"drop_reason": torch.where(r.capacity_mask, r.drop_reason, 77)},
    ),
    "padding on a real token": (
        "real token has the reason PADDING",
        lambda r: {"drop_reason": torch.where(r.capacity_mask, r.drop_reason, PAD)},
    ),
    "over capacity without a capacity": ("capacity is None", lambda r: {"capacity": None}),
    "a padding mask of another shape": (
        "padding_mask must be",
        lambda r: {"padding_mask": torch.ones(3, 2, dtype=torch.bool)},
    ),
    "a float padding mask": ("padding_mask must be", lambda r: {"padding_mask": torch.ones(2, 3)}),
    "bfloat16 logits": ("logits has dtype", lambda r: {"logits": r.logits.bfloat16()}),
    "logits of too few experts": ("logits has shape", lambda r: {"logits": r.logits[..., :3]}),
    "infinite logits": (
        "logits holds NaN or infinity",
        lambda r: {"logits": changed(r.logits, FIRST, -torch.inf)},
    ),
    "half scores": ("scores has dtype", lambda r: {"scores": r.scores.half()}),
    "a NaN score": ("scores holds NaN", lambda r: {"scores": changed(r.scores, FIRST, torch.nan)}),
    "scores of fewer tokens": ("scores has shape", lambda r: {"scores": r.scores[:, :2]}),
    "dropless with a slot not kept": ("dropless, but", lambda r: {"dropless": True}),
    "a smaller capacity": ("capacity is 0", lambda r: {"capacity": 0}),
    "a loss per token": ("must be a finite scalar", lambda r: {"losses": {"a": torch.ones(3)}}),
    "a NaN loss": ("must be a finite scalar", lambda r: {"losses": {"a": torch.tensor(torch.nan)}}),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_check_notices(name):
    message, tamper = TAMPERINGS[name]
    routing = made_by_a_router()
    with pytest.raises(ValueError, match=f"Routing.check: .*{message}"):
        replace(routing, **tamper(routing)).check()


def test_check_returns_the_routing_itself():
    routing = made_by_a_router()
    assert routing.check() is routing


@fast
@given(cases())
def test_shares_are_a_distribution_over_experts_or_all_zero(case):
    routing = case.router()(case.x(), case.padding_mask())
    for scope in ("batch", "sequence"):
        for values in (routing.slot_share(scope), routing.mean_score(scope)):
            total = values.sum(-1)
            assert (((total - 1).abs() < 1e-5) | (total == 0)).all()
    assert 0 <= routing.drop_rate <= 1
    kept = routing.selected_mask.sum() - (routing.drop_reason == OVER).sum()
    assert routing.tokens_per_expert.sum() == routing.capacity_mask.sum() == kept
