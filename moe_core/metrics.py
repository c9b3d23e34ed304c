"""What a routing looks like: load, balance, entropy, drops, and how it differs from another one.

Functions of one Routing, or of several (a step's micro-batches), whose tokens they pool: balance
over a step is not the mean of its parts' balances. None has a gradient; all but ``summary`` leave
their answer on the device. All raise ValueError where there is no routing, or E differs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .routing import Routing
from .validate import at_least

Routings = Routing | Sequence[Routing]


def load(routings: Routings) -> Tensor:
    """(E,) int64: slots each expert was asked for, before capacity."""
    return torch.stack([routing.slots_per_expert() for routing in _several(routings)]).sum(0)


def load_share(routings: Routings) -> Tensor:
    """(E,) float: the load as shares that sum to 1; zeros when nothing was asked for."""
    counts_E = load(routings).double()
    return counts_E / counts_E.sum().clamp(min=1)


def max_violation(routings: Routings) -> Tensor:
    r"""MaxVio: by how much the most loaded expert exceeds the mean; 0 at perfect balance.

    .. math:: \mathrm{MaxVio} = \max_e \text{load}_e \big/ \overline{\text{load}} - 1

    E - 1 when every slot goes to one expert; loads [4, 2, 1, 1] give 1. One routing gives the
    MaxVio of a batch, many MaxVio global. Source: Wang et al. 2024 (arXiv 2408.15664), eq. 4.
    """
    share_E = load_share(routings)
    return (share_E.max() * len(share_E) - 1).clamp(min=0)


def coefficient_of_variation(routings: Routings) -> Tensor:
    """The load's standard deviation over its mean: [4, 2, 1, 1] gives the root of 0.375."""
    share_E = load_share(routings)
    # The population's standard deviation, as in losses.cv_squared; 0 and not NaN without a slot.
    return share_E.std(correction=0) / share_E.mean().clamp(min=torch.finfo(share_E.dtype).tiny)


def load_entropy(routings: Routings) -> Tensor:
    """Entropy in nats of the load: ln E at perfect balance, 0 when one expert gets everything."""
    return torch.special.entr(load_share(routings)).sum()


def router_entropy(routings: Routings) -> Tensor:
    r"""How undecided the router is about one token: the mean entropy of its scores, in nats.

    .. math:: \frac{1}{T} \sum_t -\sum_e p_{t,e} \ln p_{t,e}, \quad p_t = s_t \Big/ \sum_e s_{t,e}

    Not a measure of balance: a router can be undecided about every token and send them all to one
    expert. A token without any score counts 0.
    """
    total, n_tokens = 0.0, 0
    for routing in _several(routings):
        scores_BNE = routing.scores.detach().double().clamp(min=0)
        sum_BN1 = scores_BNE.sum(-1, keepdim=True)  # sigmoid and ReLU scores do not sum to 1
        entropy_BN = torch.special.entr(scores_BNE / torch.where(sum_BN1 > 0, sum_BN1, 1)).sum(-1)
        total = total + entropy_BN.masked_fill(~routing.real_tokens, 0).sum()
        n_tokens = n_tokens + routing.real_tokens.sum()
    return total / n_tokens.clamp(min=1)


def dead_experts(routings: Routings, share: float = 0.0) -> Tensor:
    """(E,) bool: experts whose share of the load is at most ``share``, not negative."""
    at_least(0, share=share)
    return load_share(routings) <= share


def drop_rate(routings: Routings) -> Tensor:
    """Share of the slots asked for that found no room; 0 when nothing was asked for."""
    asked = load(routings).sum()
    kept = torch.stack([routing.tokens_per_expert for routing in _several(routings)]).sum()
    return (asked - kept).double() / asked.clamp(min=1)


def flipped_tokens(before: Routing, after: Routing, *, kept: bool = False) -> Tensor:
    """(B, N) bool: real tokens whose set of experts differs between two routings.

    Of the same tokens, from two checkpoints, two precisions, ...; K may differ. ``kept`` compares
    the experts the token got, not those it asked for. Raises ValueError where B, N or E differ.
    """
    if before.scores.shape != after.scores.shape:
        one, other = tuple(before.scores.shape), tuple(after.scores.shape)
        raise ValueError(f"routings of {one} and {other} (B, N, E) cannot be compared")
    # Sets, not lists: which slot an expert stands in makes no difference to the output.
    differs_BN = (expert_sets(before, kept=kept) != expert_sets(after, kept=kept)).any(-1)
    return differs_BN & before.real_tokens & after.real_tokens


def route_flips(before: Routing, after: Routing, *, kept: bool = False) -> Tensor:
    """The share of real tokens for which ``flipped_tokens`` is True; 0 without a real token."""
    real_BN = before.real_tokens & after.real_tokens
    return flipped_tokens(before, after, kept=kept).sum() / real_BN.sum().clamp(min=1)


def expert_sets(routing: Routing, *, kept: bool = False) -> Tensor:
    """(B, N, E) bool: the experts each token asked for, or with ``kept`` the ones it got."""
    mask_BNK = routing.capacity_mask if kept else routing.selected_mask
    return routing.by_expert(mask_BNK.long()) > 0


def summary(routings: Routings) -> dict[str, float]:
    """The scalars of this file by name, as plain numbers, which synchronises with a GPU."""
    scalars = max_violation, coefficient_of_variation, load_entropy, router_entropy, drop_rate
    named = {f.__name__: float(f(routings)) for f in scalars}
    return named | {"dead_experts": int(dead_experts(routings).sum())}


def _several(routings: Routings) -> Sequence[Routing]:
    several = [routings] if isinstance(routings, Routing) else list(routings)
    if not several:
        raise ValueError("routings=[] must hold at least one Routing")
    if len({routing.n_experts for routing in several}) > 1:
        raise ValueError("the routings must all have the same number of experts")
    return several
