"""Balance between devices, each of which holds E / D neighbouring experts (DeepSeek-V2)."""

from torch import Tensor

from ..routing import Routing
from ..validate import whole


def device_balance(routing: Routing, n_devices: int, *, scope: str = "batch") -> Tensor:
    r"""Even work for the D devices, whatever happens among the experts of one.

    .. math:: L = \sum_d f'_d P'_d, \quad f'_d = \frac{D}{E} \sum_{e \in d} f_e,
        \quad P'_d = \sum_{e \in d} P_e

    with :math:`f_e` = E times the share of slots that went to e, and P the mean score, of scores
    that sum to 1. It is 1 at perfect balance between devices, D when one gets everything with
    certainty. Raises ValueError where n_devices does not divide E, or scope is unknown.
    Source: DeepSeek-AI 2024 (DeepSeek-V2, arXiv 2405.04434), section 2.2.3, eq. 26-28.
    """
    share = _by_device(routing.slot_share(scope), n_devices) * n_devices
    score = _by_device(routing.mean_score(scope), n_devices)
    return _mean((share * score).sum(-1), routing)


def communication_balance(
    routing: Routing, n_devices: int, max_devices: int, *, scope: str = "batch"
) -> Tensor:
    r"""Even numbers of tokens received: M bounds what a device sends, nothing what it receives.

    .. math:: L = \sum_d f''_d P''_d, \quad f''_d = \frac{D}{M T} \sum_t 1[t \text{ is sent to } d],
        \quad P''_d = \sum_{e \in d} P_e

    It is 1 when each token visits M = max_devices devices and all receive the same number; slots
    count before capacity, scores sum to 1. Raises ValueError where n_devices does not divide E,
    max_devices is not between 1 and n_devices, or scope is unknown.
    Source: DeepSeek-AI 2024 (DeepSeek-V2, arXiv 2405.04434), section 2.2.3, eq. 29-31.
    """
    score = _by_device(routing.mean_score(scope), n_devices)
    whole(1, max_devices=max_devices)
    if max_devices > n_devices:
        raise ValueError(f"max_devices={max_devices} must be between 1 and n_devices={n_devices}")
    device_BNK = routing.expert_indices // (routing.n_experts // n_devices)
    visits_BND = routing.scores.new_zeros(*routing.scores.shape[:2], n_devices)
    asked_BNK = routing.selected_mask.to(visits_BND.dtype)
    # A token with two experts on one device is sent there once.
    visits_BND = visits_BND.scatter_add(-1, device_BNK, asked_BNK).clamp(max=1)
    received, tokens = visits_BND.sum(1), routing.real_tokens.sum(1, keepdim=True)
    if scope == "batch":
        received, tokens = received.sum(0), tokens.sum(0)
    share = received * n_devices / (max_devices * tokens.clamp(min=1))
    return _mean((share * score).sum(-1), routing)


def _by_device(values: Tensor, n_devices: int) -> Tensor:
    """(..., E) -> (..., D), summed over the experts of each device."""
    E = values.shape[-1]
    whole(1, n_devices=n_devices)
    if E % n_devices:
        raise ValueError(f"n_devices={n_devices} must divide n_experts={E}")
    return values.unflatten(-1, (n_devices, E // n_devices)).sum(-1)


def _mean(loss: Tensor, routing: Routing) -> Tensor:
    """The loss itself, or the mean over the sequences that have a real token."""
    return loss if loss.ndim == 0 else loss.sum() / routing.real_tokens.any(-1).sum().clamp(min=1)
