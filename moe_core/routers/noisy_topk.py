"""NoisyTopKRouter: a learned amount of noise decides among the experts (Shazeer et al. 2017)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..autocast import no_autocast
from ..capacity import CapacityRule
from ..routing import Routing
from ..validate import at_least, top_k_fits
from .base import Router


class NoisyTopKRouter(Router):
    r"""Top-K of noisy logits, softmax over the K; the amount of noise depends on the token and is learned.

    .. math:: H_e = (x W_g^\top)_e + \epsilon_e \, \sigma_e, \quad \sigma_e = \mathrm{softplus}\big((x W_n^\top)_e\big) + \sigma_{min},
              \quad w = \mathrm{softmax}(\mathrm{topk}(H))

    with :math:`\epsilon` standard normal, in training only. Both weights start at zero: at first noise alone decides, evenly.

    Two losses keep the experts alike: ``losses.importance`` on the weights, and ``losses.load`` on ``probabilities``, the chance that
    an expert is among the K when its own noise is drawn again, which has a gradient where a count has none. In eval there is no
    noise, and the load is the count. ``Routing.logits`` and ``scores`` are without noise.

    Args:
        d_model, n_experts, top_k: D, E and K. With K = 1 the weight is always 1, and only the losses train the router.
        noise_epsilon: sigma_min, so that noise never vanishes; above 0. The paper has none, its code (tensor2tensor) has 0.01.
        importance_loss_weight, load_loss_weight: coefficients of the two losses; 0 leaves a loss out.
        capacity_factor, aux_loss_weight, z_loss_weight: see ``Router``.

    Attributes:
        weight: W_g (E, D). noise_weight: W_n (E, D).

    Raises:
        ValueError: an argument is out of range.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), eq. 3-5 (gating), 6-7 (importance), 8-11 (load), appendix A (zeros).
    """

    prescribes_start = True

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        *,
        noise_epsilon: float = 1e-2,
        importance_loss_weight: float = 0.1,
        load_loss_weight: float = 0.1,
        capacity_factor: float | CapacityRule | None = None,
        aux_loss_weight: float = 0.0,
        z_loss_weight: float = 0.0,
    ):
        top_k_fits(top_k, n_experts)
        at_least(1e-6, noise_epsilon=noise_epsilon)
        at_least(
            0, importance_loss_weight=importance_loss_weight, load_loss_weight=load_loss_weight
        )
        super().__init__(
            d_model,
            n_experts,
            capacity_factor=capacity_factor,
            aux_loss_weight=aux_loss_weight,
            z_loss_weight=z_loss_weight,
        )
        self.noise_weight = nn.Parameter(torch.zeros(n_experts, d_model))
        self.top_k, self.noise_epsilon = top_k, noise_epsilon
        self.importance_loss_weight, self.load_loss_weight = (
            importance_loss_weight,
            load_loss_weight,
        )

    def reset_parameters(self) -> None:
        """Set both weights to zero."""
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def noise_std(self, x: Tensor) -> Tensor:
        """sigma, (B, N, D) -> (B, N, E) in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with no_autocast(x):
            return (
                F.softplus(F.linear(x.to(dtype), self.noise_weight.to(dtype))) + self.noise_epsilon
            )

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Route tokens (B, N, D); K slots per token, the highest (noisy) logit first.

        Raises:
            ValueError: x or padding_mask has the wrong shape.
        """
        logits_BNE = self.logits(x)
        std_BNE = self.noise_std(x) if self.training else None
        noisy_BNE = (
            logits_BNE if std_BNE is None else logits_BNE + torch.randn_like(logits_BNE) * std_BNE
        )
        indices_BNK = noisy_BNE.detach().topk(self.top_k, dim=-1).indices
        weights_BNK = torch.softmax(noisy_BNE.gather(-1, indices_BNK), dim=-1)
        routing = self.route(
            indices_BNK,
            weights_BNK,
            logits_BNE,
            torch.softmax(logits_BNE, dim=-1),
            padding_mask=padding_mask,
            normalized=True,
        )
        if self.importance_loss_weight > 0:
            routing = routing.with_losses(
                importance=self.importance_loss_weight * losses.importance(routing)
            )
        if self.load_loss_weight > 0:
            probability_BNE = probabilities(logits_BNE, noisy_BNE, std_BNE, indices_BNK)
            routing = routing.with_losses(
                load=self.load_loss_weight * losses.load(routing, probability_BNE)
            )
        return routing


def probabilities(
    logits_BNE: Tensor, noisy_BNE: Tensor, std_BNE: Tensor | None, indices_BNK: Tensor
) -> Tensor:
    r"""The chance that each expert is among the K, when its own noise is drawn again and the others' stays.

    .. math:: P(x, e) = \Phi\!\left(\frac{(x W_g^\top)_e - \mathrm{kth\_excluding}(H, K, e)}{\sigma_e}\right)

    kth_excluding is the K-th largest of the other noisy logits: the (K+1)-th of all if e is among the K, else the K-th. All three
    are logits; comparing them with softmaxed values is a known bug (davidmrau/mixture-of-experts, issue 31).

    Args:
        logits_BNE, noisy_BNE: without and with noise. std_BNE: its standard deviation; None (no noise) gives 0 or 1.
        indices_BNK: the K chosen.

    Returns:
        (B, N, E); with K = E everywhere 1.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), eq. 8-9.
    """
    chosen_BNE = torch.zeros_like(logits_BNE, dtype=torch.bool).scatter(-1, indices_BNK, True)
    K, E = indices_BNK.shape[-1], logits_BNE.shape[-1]
    if std_BNE is None or K == E:
        return chosen_BNE.to(logits_BNE.dtype)
    top_BNk = noisy_BNE.topk(K + 1, dim=-1).values
    threshold_BNE = torch.where(chosen_BNE, top_BNk[..., K : K + 1], top_BNk[..., K - 1 : K])
    return torch.special.ndtr((logits_BNE - threshold_BNE) / std_BNE)
