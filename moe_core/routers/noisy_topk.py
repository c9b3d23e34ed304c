"""NoisyTopKRouter: a learned amount of noise decides among the experts (Shazeer et al. 2017)."""

from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..autocast import no_autocast
from ..routing import Routing
from ..validate import at_least, top_k_fits
from .base import Router, RouterOptions


@dataclass(frozen=True)
class NoisyTopKOptions(RouterOptions, fixed=("jitter_noise",)):
    """The arguments of ``NoisyTopKRouter``."""

    top_k: int
    _: KW_ONLY
    noise_epsilon: float = 1e-2
    importance_loss_weight: float = 0.1
    load_loss_weight: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        top_k_fits(self.top_k, self.n_experts)
        at_least(1e-6, noise_epsilon=self.noise_epsilon)
        at_least(0, importance_loss_weight=self.importance_loss_weight)
        at_least(0, load_loss_weight=self.load_loss_weight)


class NoisyTopKRouter(Router):
    r"""Top-K of noisy logits, softmax over the K; how noisy depends on the token and is learned.

    .. math:: H_e = (x W_g^\top)_e + \epsilon_e \, \sigma_e,
              \quad \sigma_e = \mathrm{softplus}\big((x W_n^\top)_e\big) + \sigma_{min},
              \quad w = \mathrm{softmax}(\mathrm{topk}(H))

    with :math:`\epsilon` standard normal, in training only; ``Routing.logits`` and ``scores`` are
    without it. W_g and W_n, ``weight`` and ``noise_weight`` (E, D), start at zero: noise alone
    decides, evenly. ``losses.importance`` of the weights and ``losses.load`` of ``probabilities``
    keep the experts alike. With K = 1 the weight is 1, and only losses train the router.

    Args, besides ``Router``'s:
        noise_epsilon: sigma_min, above 0, so that noise never vanishes; 0.01 in tensor2tensor.
        importance_loss_weight, load_loss_weight: coefficients of the two losses.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), eq. 3-11, appendix A (zeros).
    """

    Options = NoisyTopKOptions
    prescribes_start = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))

    def reset_weight(self) -> None:
        """Set both weights to zero."""
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def noise_std(self, x: Tensor) -> Tensor:
        """sigma, (B, N, D) -> (B, N, E) in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with no_autocast(x):
            spread_BNE = F.linear(x.to(dtype), self.noise_weight.to(dtype))
            return F.softplus(spread_BNE) + self.noise_epsilon

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, token_ids=None) -> Routing:
        """Route tokens (B, N, D); K slots per token, the highest (noisy) logit first."""
        logits_BNE = noisy_BNE = self.logits(x)
        std_BNE = self.noise_std(x) if self.training else None
        if std_BNE is not None:
            noisy_BNE = logits_BNE + torch.randn_like(logits_BNE) * std_BNE
        indices_BNK = noisy_BNE.detach().topk(self.top_k, dim=-1).indices
        weights_BNK = torch.softmax(noisy_BNE.gather(-1, indices_BNK), dim=-1)
        scores_BNE = torch.softmax(logits_BNE, dim=-1)
        choice = indices_BNK, weights_BNK, logits_BNE, scores_BNE, padding_mask
        routing = self.routing(*choice, normalized=True)
        routing = self.add_losses(self.limit_capacity(routing))
        if self.importance_loss_weight > 0:
            loss = self.importance_loss_weight * losses.importance(routing)
            routing = routing.with_losses(importance=loss)
        if self.load_loss_weight > 0:
            # These have a gradient, where a count has none; in eval, without noise, 0 or 1.
            probability_BNE = probabilities(logits_BNE, noisy_BNE, std_BNE, indices_BNK)
            loss = self.load_loss_weight * losses.load(routing, probability_BNE)
            routing = routing.with_losses(load=loss)
        return routing


def probabilities(
    logits_BNE: Tensor, noisy_BNE: Tensor, std_BNE: Tensor | None, indices_BNK: Tensor
) -> Tensor:
    r"""The chance (B, N, E) that each expert is among the K, if its own noise is drawn again.

    .. math:: P(x, e) = \Phi\!\left(
              \frac{(x W_g^\top)_e - \mathrm{kth\_excluding}(H, K, e)}{\sigma_e}\right)

    ``std_BNE`` is sigma, or None without noise: then 0 or 1.
    Source: Shazeer et al. 2017 (arXiv 1701.06538), eq. 8-9.
    """
    chosen_BNE = torch.zeros_like(logits_BNE, dtype=torch.bool).scatter(-1, indices_BNK, True)
    K, E = indices_BNK.shape[-1], logits_BNE.shape[-1]
    if std_BNE is None or K == E:
        return chosen_BNE.to(logits_BNE.dtype)
    # The K-th largest of the others: the (K+1)-th of all if e is among the K, else the K-th. Logits
    # all of them: softmaxed values here are a known bug (davidmrau/mixture-of-experts, issue 31).
    top_BNk = noisy_BNE.topk(K + 1, dim=-1).values
    others_BNE = torch.where(chosen_BNE, top_BNk[..., K : K + 1], top_BNk[..., K - 1 : K])
    return torch.special.ndtr((logits_BNE - others_BNE) / std_BNE)
