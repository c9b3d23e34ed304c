"""TopKRouter: each token takes the K experts with the highest probability."""

import torch
from torch import Tensor

from .._validate import boolean, top_k_fits
from ..routing import Routing
from .base import Router


class TopKRouter(Router):
    r"""Token choice: softmax over all experts, then the K largest.

    .. math:: p = \mathrm{softmax}(h), \quad e_1..e_K = \mathrm{topk}(p), \quad w_k = p_{e_k} \Big/ \sum_j p_{e_j}

    Args:
        d_model, n_experts, top_k: D, E and K.
        norm_topk_prob: divide by the sum over the K chosen, as in the formula. False keeps w_k = p_{e_k}. With top_k=1 the
            division leaves w = 1 whatever the router does, and no gradient reaches it through the output: use False there.
        capacity_factor, aux_loss_weight, z_loss_weight, jitter_noise: see ``Router``.

    Raises:
        ValueError: an argument is out of range.

    Source: Shazeer et al. 2017 (arXiv 1701.06538); renormalised as in Jiang et al. 2024 (Mixtral, arXiv 2401.04088).
    """

    def __init__(self, d_model: int, n_experts: int, top_k: int, *, capacity_factor: float | None = None,
                 norm_topk_prob: bool = True, aux_loss_weight: float = 0.0, z_loss_weight: float = 0.0,
                 jitter_noise: float = 0.0):
        top_k_fits(top_k, n_experts)
        boolean(norm_topk_prob=norm_topk_prob)
        super().__init__(d_model, n_experts, capacity_factor=capacity_factor, aux_loss_weight=aux_loss_weight,
                         z_loss_weight=z_loss_weight, jitter_noise=jitter_noise)
        self.top_k, self.norm_topk_prob = top_k, norm_topk_prob

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Route tokens (B, N, D); K slots per token, the most probable expert first.

        Raises:
            ValueError: x or padding_mask has the wrong shape.
        """
        logits_BNE = self.logits(x)
        scores_BNE = torch.softmax(logits_BNE, dim=-1)
        weights_BNK, indices_BNK = torch.topk(scores_BNE, self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights_BNK = weights_BNK / weights_BNK.sum(dim=-1, keepdim=True)
        return self.route(indices_BNK, weights_BNK, logits_BNE, scores_BNE, padding_mask=padding_mask, normalized=self.norm_topk_prob)
