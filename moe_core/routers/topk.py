"""TopKRouter: each token takes the K experts with the highest probability."""

import torch
from torch import Tensor

from .. import capacity, losses
from .._validate import at_least, boolean, top_k_fits
from ..routing import DropReason, Routing
from .base import Router


class TopKRouter(Router):
    r"""Token choice: softmax over all experts, then the K largest.

    .. math:: p = \mathrm{softmax}(h), \quad e_1..e_K = \mathrm{topk}(p), \quad w_k = p_{e_k} \Big/ \sum_j p_{e_j}

    Args:
        d_model, n_experts, top_k: D, E and K.
        capacity_factor: see ``moe_core.capacity``; None means dropless.
        norm_topk_prob: divide by the sum over the K chosen, as in the formula. False keeps w_k = p_{e_k}. With top_k=1 the
            division leaves w = 1 whatever the router does, and no gradient reaches it through the output: use False there.
        aux_loss_weight, z_loss_weight: coefficients of ``losses.load_balance`` and ``losses.z_loss``; 0 leaves a loss out.
        jitter_noise: see ``Router``.

    Raises:
        ValueError: an argument is out of range.

    Source: Shazeer et al. 2017 (arXiv 1701.06538); renormalised as in Jiang et al. 2024 (Mixtral, arXiv 2401.04088).
    """

    def __init__(self, d_model: int, n_experts: int, top_k: int, *, capacity_factor: float | None = None,
                 norm_topk_prob: bool = True, aux_loss_weight: float = 0.0, z_loss_weight: float = 0.0,
                 jitter_noise: float = 0.0):
        top_k_fits(top_k, n_experts)
        super().__init__(d_model, n_experts, jitter_noise=jitter_noise)
        boolean(norm_topk_prob=norm_topk_prob)
        at_least(0, aux_loss_weight=aux_loss_weight, z_loss_weight=z_loss_weight)
        if capacity_factor is not None:
            at_least(0, capacity_factor=capacity_factor)
        self.top_k, self.capacity_factor, self.norm_topk_prob = top_k, capacity_factor, norm_topk_prob
        self.aux_loss_weight, self.z_loss_weight = aux_loss_weight, z_loss_weight

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Route tokens.

        Args:
            x: (B, N, D).
            padding_mask: (B, N) bool, True for real tokens. Padding takes no place, counts in no loss and gets output 0.

        Returns:
            A ``Routing`` with K slots per token, the most probable expert first.

        Raises:
            ValueError: x or padding_mask has the wrong shape.
        """
        logits_BNE = self.logits(x)
        scores_BNE = torch.softmax(logits_BNE, dim=-1)
        weights_BNK, indices_BNK = torch.topk(scores_BNE, self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights_BNK = weights_BNK / weights_BNK.sum(dim=-1, keepdim=True)

        reason_BNK = torch.full_like(indices_BNK, DropReason.KEPT, dtype=torch.int8)
        if padding_mask is not None:
            if padding_mask.shape != x.shape[:2] or padding_mask.dtype != torch.bool:
                raise ValueError(f"padding_mask must be bool of shape {tuple(x.shape[:2])}, True for real tokens")
            reason_BNK = reason_BNK.masked_fill(~padding_mask.unsqueeze(-1), DropReason.PADDING)
        routing = Routing(
            expert_indices=indices_BNK, expert_weights=weights_BNK, capacity_mask=reason_BNK == DropReason.KEPT,
            logits=logits_BNE, scores=scores_BNE, drop_reason=reason_BNK, padding_mask=padding_mask,
            normalized=self.norm_topk_prob, dropless=padding_mask is None,
        )
        if self.capacity_factor is not None:
            routing = capacity.apply(routing, capacity_factor=self.capacity_factor)
        if self.aux_loss_weight > 0:
            routing = routing.with_losses(load_balance=self.aux_loss_weight * losses.load_balance(routing))
        if self.z_loss_weight > 0:
            routing = routing.with_losses(z_loss=self.z_loss_weight * losses.z_loss(routing))
        return routing
