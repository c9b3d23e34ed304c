"""SwitchRouter: one expert per token (Fedus et al. 2021)."""

from dataclasses import dataclass

from ..capacity import CapacityRule
from .topk import SCORING, TopKOptions, TopKRouter


@dataclass(frozen=True)
class SwitchOptions(TopKOptions, fixed=("top_k", *SCORING)):
    """The arguments of ``SwitchRouter``."""

    top_k: int = 1
    norm_topk_prob: bool = False
    capacity_factor: float | CapacityRule | None = CapacityRule(factor=1.25, eval_factor=2.0)
    aux_loss_weight: float = 0.01
    jitter_noise: float = 0.01


class SwitchRouter(TopKRouter):
    r"""Top-1 with the probability itself as weight: renormalised, it would be 1 and teach nothing.

    .. math:: p = \mathrm{softmax}(h), \quad e = \arg\max p, \quad w = p_e

    The capacity factor is 1.25 in training and 2 in eval unless told otherwise.
    Source: Fedus et al. 2021 (arXiv 2101.03961), sections 2.1, 2.2 and 2.4; the factors as in its
    authors' configuration files.
    """

    Options = SwitchOptions
