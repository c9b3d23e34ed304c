"""How unequal the experts are: the squared coefficient of variation (Shazeer et al. 2017)."""

from torch import Tensor

from ..routing import Routing


def cv_squared(values_E: Tensor) -> Tensor:
    r"""Squared coefficient of variation of one number per expert.

    .. math:: \mathrm{CV}^2 = \frac{\frac{1}{E} \sum_e (v_e - \bar v)^2}{\bar v^2 + 10^{-10}}

    0 when all are equal, E - 1 when all but one are 0, 0.375 for [4, 2, 1, 1].
    Source: Shazeer et al. 2017 (arXiv 1701.06538), section 4.
    """
    # tensor2tensor's: the population's variance (dividing by E - 1 gives 0.5 for [4, 2, 1, 1]).
    mean = values_E.mean()
    return (values_E - mean).square().mean() / (mean.square() + 1e-10)


def importance(routing: Routing) -> Tensor:
    r"""How unequal the experts' total weights are, before capacity.

    .. math:: L = \mathrm{CV}^2(I), \quad I_e = \sum_t w_{t,e}

    0 at perfect balance, E - 1 when one expert has all the weight.
    Source: Shazeer et al. 2017 (arXiv 1701.06538), eq. 6-7.
    """
    return cv_squared(weight_per_expert(routing))


def load(routing: Routing, probability_BNE: Tensor) -> Tensor:
    r"""How unequal the experts' expected loads are; these have a gradient, where a count has none.

    .. math:: L = \mathrm{CV}^2(n), \quad n_e = \sum_t P(t, e)

    ``probability_BNE`` is P(t, e) that token t takes expert e, its noise drawn again.
    Source: Shazeer et al. 2017 (arXiv 1701.06538), eq. 10-11.
    """
    return cv_squared((probability_BNE * routing.real_tokens.unsqueeze(-1)).sum((0, 1)))


def weight_per_expert(routing: Routing) -> Tensor:
    """(E,) the weights of the slots that chose an expert, before capacity; carries gradient."""
    weights_BNE = routing.by_expert(routing.expert_weights * routing.selected_mask)
    return weights_BNE.sum((0, 1))
