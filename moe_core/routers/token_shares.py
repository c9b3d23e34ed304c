"""How many tokens an expert is meant to take, exactly, and which ones are its best."""

from fractions import Fraction

import torch
from torch import Tensor


def as_fraction(value: float) -> Fraction:
    """The decimal as written, to six digits: 0.1 is a tenth, so shares of counts are exact."""
    return Fraction(str(value)).limit_denominator(10**6)


def floor_share(count, share: Fraction):
    """floor(count * share), exactly, for an int or an int64 tensor."""
    return count * share.numerator // share.denominator


def ceil_share(count, share: Fraction):
    """ceil(count * share), exactly, for an int or an int64 tensor."""
    return (count * share.numerator + share.denominator - 1) // share.denominator


@torch.no_grad()
def take_best(ranked_by_PSE: Tensor, real_PS: Tensor, count_PE: Tensor) -> Tensor:
    """(P, S, E) bool: each expert's ``count_PE`` best of the S tokens of each of P pools."""
    count_PE = torch.minimum(count_PE, real_PS.sum(-1, keepdim=True))
    # Padding comes last. A mask by rank and no topk: that would read the count on the host.
    ranked_by_PSE = ranked_by_PSE.masked_fill(~real_PS.unsqueeze(-1), -torch.inf)
    # Stable: ties go to the earlier token, the same one when a checkpointed forward runs again.
    order_PSE = ranked_by_PSE.argsort(dim=1, descending=True, stable=True)
    place_S1 = torch.arange(ranked_by_PSE.shape[1], device=ranked_by_PSE.device).unsqueeze(-1)
    taken_PSE = place_S1 < count_PE.unsqueeze(1)
    return torch.zeros_like(taken_PSE).scatter(1, order_PSE, taken_PSE)
