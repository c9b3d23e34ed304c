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

    Args:
        d_model, n_experts: D and E. K is 1.
        capacity_factor: 1.25 in training and 2 in eval unless told otherwise; see ``Router``.
        aux_loss_weight, z_loss_weight, jitter_noise: see ``Router``; 0.01, 0 and 0.01.

    Raises:
        ValueError: an argument is out of range.

    Source: Fedus et al. 2021 (arXiv 2101.03961), sections 2.1, 2.2 and 2.4; the factors as in its
    authors' configuration files.
    """

    Options = SwitchOptions
