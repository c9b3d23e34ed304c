"""Capacity: how many places, who gets them, and what a dropped token returns."""

import torch
import torch.nn.functional as F

from moe_core import DropReason, Experts, TopKRouter, capacity

from .bug import Bug, certain, reads_logits, route


def by_score(routing, places):
    return capacity.apply(routing, expert_capacity=places, drop_policy="score").capacity_mask


def by_position(routing, places):
    return capacity.apply(routing, expert_capacity=places, drop_policy="position").capacity_mask


# 7 -------------------------------------------------------------------------------------------------------------------------------
class DroppedTokensReturnThemselves(Experts):
    def forward(self, x, routing):
        dropped = routing.drop_reason == DropReason.OVER_CAPACITY
        return (
            super().forward(x, routing)
            + (routing.expert_weights * dropped).sum(-1, keepdim=True) * x
        )


def a_dropped_token_adds_exactly_zero(make):
    """Without a place anywhere, the layer's output is exactly 0: the residual connection alone carries the token."""
    x = torch.randn(1, 6, 4)
    routing = capacity.apply(route(x), expert_capacity=0)
    size = make(4, 8, 4)(x, routing).abs().max().item()
    assert size == 0, f"dropped tokens return up to {size:.2f}"


# 8 -------------------------------------------------------------------------------------------------------------------------------
def logits_ranked_against_zeros(routing, places):
    indices, E = routing.expert_indices.flatten(0, 1), routing.n_experts
    logits = routing.logits.flatten(0, 1).gather(-1, indices)
    table_TE = torch.zeros(len(indices), E).scatter(
        -1, indices, logits
    )  # 0 where a token did not choose the expert
    best = table_TE.topk(min(places, len(indices)), dim=0).indices
    kept_TE = torch.zeros(len(indices), E, dtype=torch.bool).scatter(0, best, True)
    return kept_TE.gather(-1, indices).view(routing.expert_indices.shape)


def the_best_fill_every_place(keep):
    """Where more ask than there are places, as many stay as there are places: the likeliest, also when all logits are negative."""
    logits = -torch.rand(1, 40, 4) - 1
    routing = route(logits)
    kept = keep(routing, 3)
    for e in range(4):
        asks = routing.expert_indices == e
        stays = (asks & kept).sum().item()
        assert stays == min(3, asks.sum().item()), (
            f"{asks.sum().item()} tokens ask for expert {e}, 3 places, {stays} stay"
        )
        stay, go = routing.expert_weights[asks & kept], routing.expert_weights[asks & ~kept]
        assert not len(go) or stay.min() >= go.max(), f"expert {e} turned a likelier token away"


# 9 -------------------------------------------------------------------------------------------------------------------------------
def topk_of_the_capacity(routing, places):
    indices, E = routing.expert_indices.flatten(0, 1), routing.n_experts
    table_TE = torch.zeros(len(indices), E).scatter(
        -1, indices, routing.expert_weights.flatten(0, 1)
    )
    best = table_TE.topk(places, dim=0).indices
    kept_TE = torch.zeros(len(indices), E, dtype=torch.bool).scatter(0, best, True)
    return kept_TE.gather(-1, indices).view(routing.expert_indices.shape)


def with_more_places_than_tokens_everybody_stays(keep):
    """A capacity larger than the number of tokens keeps everybody, and does not crash."""
    assert keep(route(torch.randn(1, 5, 4)), 6).all(), "somebody was dropped though there was room"


# 10 ------------------------------------------------------------------------------------------------------------------------------
def earliest_by_topk_of_ones(routing, places):
    asked_TE = F.one_hot(routing.expert_indices.flatten(), routing.n_experts)  # top-1
    earliest = asked_TE.topk(places, dim=0, sorted=False).indices
    kept_TE = torch.zeros_like(asked_TE, dtype=torch.bool).scatter(0, earliest, True)
    return kept_TE.gather(-1, routing.expert_indices.flatten(0, 1)).view(
        routing.expert_indices.shape
    )


def the_earliest_stay(keep):
    """Of 1000 tokens that want one of 700 places, the first 700 stay."""
    kept = keep(route(certain([0] * 1000, 2)), 700).flatten()
    right = kept[:700].sum().item()
    assert right == 700, f"{right} of the 700 earliest stay"


# 23 ------------------------------------------------------------------------------------------------------------------------------
class FactorNeverUsed(TopKRouter):
    def __init__(self, d_model, n_experts, top_k, capacity_factor=1.25):
        super().__init__(d_model, n_experts, top_k)
        self.capacity_factor = capacity_factor


def capacity_bounds_the_load(make):
    """With a capacity factor of 1, no expert keeps more than T * K / E slots."""
    router = reads_logits(make(4, 4, 1, capacity_factor=1.0))
    most = router(certain([0] * 8, 4)).tokens_per_expert.max().item()
    assert most <= 2, f"an expert keeps {most} slots, there are 2 places"


def places_counted_from_one(routing, places):
    asked_TE = F.one_hot(routing.expert_indices.flatten(), routing.n_experts)  # top-1
    place_TE = asked_TE.cumsum(0) * asked_TE  # 1 for the first
    kept_TE = (place_TE > 0) & (place_TE < places)
    return kept_TE.gather(-1, routing.expert_indices.flatten(0, 1)).view(
        routing.expert_indices.shape
    )


def no_place_is_lost(keep):
    """Four tokens, three places: three stay."""
    stay = keep(route(certain([0] * 4, 2)), 3).sum().item()
    assert stay == 3, f"{stay} of 3 places are used"


BUGS = [
    Bug(
        7,
        "dropped tokens return p * x",
        "dropped tokens are scaled by 1 + p in the residual stream",
        "the output starts as a copy of the input, and all of it is multiplied by the router's probability",
        "transformers #37017; labml SwitchFeedForward",
        DroppedTokensReturnThemselves,
        Experts,
        a_dropped_token_adds_exactly_zero,
        "dropped tokens return",
    ),
    Bug(
        8,
        "logits are ranked against zeros",
        "tokens are dropped though places are free",
        "tokens that did not choose the expert stand in the ranking as 0, above every negative logit",
        "DeepSpeed #8007, #7986",
        logits_ranked_against_zeros,
        by_score,
        the_best_fill_every_place,
        "3 places, 0 stay",
    ),
    Bug(
        9,
        "capacity above the number of tokens",
        "a crash on the last, short batch",
        "topk of more than there is",
        "DeepSpeed #5353, #8155",
        topk_of_the_capacity,
        by_score,
        with_more_places_than_tokens_everybody_stays,
        "k out of range",
    ),
    Bug(
        10,
        "earliest first, by topk of zeros and ones",
        "arbitrary tokens stay; others on another device",
        "topk promises no order among equal values",
        "Megatron-LM, position policy",
        earliest_by_topk_of_ones,
        by_position,
        the_earliest_stay,
        r"^AssertionError: \d+ of the 700",
    ),
    Bug(
        23,
        "a capacity factor that nobody reads",
        "nothing is ever dropped, and memory grows with imbalance",
        "the argument is stored and never used",
        "Keras Switch example",
        FactorNeverUsed,
        TopKRouter,
        capacity_bounds_the_load,
        "keeps 8 slots",
    ),
    Bug(
        23,
        "places counted from one",
        "each expert leaves one place empty",
        "a position that starts at 1 is compared with <",
        "Keras Switch example",
        places_counted_from_one,
        by_position,
        no_place_is_lost,
        "2 of 3 places",
    ),
]
