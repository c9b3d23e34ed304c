"""What the experts without a matmul compute."""

import math

import torch
from torch import Tensor, nn

from ..autocast import no_autocast
from ..routing import Routing
from ..validate import whole


class ZeroComputationExperts(nn.Module):
    r"""Zero, copy and constant experts; they stand behind a routing's E others, in this order.

    .. math:: f_{zero}(x) = 0, \quad f_{copy}(x) = x,
        \quad f_{constant}(x) = \alpha_1 x + \alpha_2 v, \quad \alpha = \mathrm{softmax}(W x)

    Nothing is dispatched: a token gets a sum of multiples of x and of learned vectors.

    Args:
        d_model: D.
        n_zero_experts, n_copy_experts, n_constant_experts: how many of each, together Z.

    Attributes:
        mix_weight: W of every constant expert, (n_constant, 2, D).
        constants: v, (n_constant, D).

    Raises:
        ValueError: a number is not a whole one, or negative.

    Source: Jin et al. 2024 (MoE++, arXiv 2410.07348), section 3.1.
    """

    def __init__(
        self, d_model: int, n_zero_experts: int, n_copy_experts: int, n_constant_experts: int
    ):
        super().__init__()
        whole(1, d_model=d_model)
        whole(0, n_zero_experts=n_zero_experts, n_copy_experts=n_copy_experts)
        whole(0, n_constant_experts=n_constant_experts)
        self.d_model, self.kinds = d_model, (n_zero_experts, n_copy_experts, n_constant_experts)
        self.mix_weight = nn.Parameter(torch.empty(n_constant_experts, 2, d_model))
        self.constants = nn.Parameter(torch.empty(n_constant_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W and v as nn.Linear draws its weight: uniform in +-1/sqrt(D)."""
        for weight in (self.mix_weight, self.constants):
            nn.init.uniform_(weight, -1 / math.sqrt(self.d_model), 1 / math.sqrt(self.d_model))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of the cheap experts that each token chose.

        Args:
            x: (B, N, D) tokens.
            routing: over E + Z experts; the last Z are these.

        Returns:
            (B, N, D) in x's dtype; exactly 0 for a token that chose none of them.

        Raises:
            ValueError: x and routing do not belong together.
        """
        n_ffn = routing.n_experts - sum(self.kinds)
        tokens = tuple(routing.expert_indices.shape[:2])
        if x.shape != (*tokens, self.d_model) or n_ffn < 0:
            raise ValueError(
                f"x {tuple(x.shape)} and a routing of {tokens} tokens to {routing.n_experts} "
                f"experts do not fit d_model={self.d_model} and {sum(self.kinds)} experts "
                "without computation"
            )
        weights_BNK = routing.expert_weights.masked_fill(~routing.capacity_mask, 0)
        weights_BNE = routing.by_expert(weights_BNK)
        _ffn, _zero, copy_BNZ, constant_BNZ = weights_BNE.split([n_ffn, *self.kinds], dim=-1)
        with no_autocast(x):
            x_BND = x.to(weights_BNK.dtype)
            mix_BNZ2 = torch.einsum(
                "bnd,zad->bnza", x_BND, self.mix_weight.to(x_BND.dtype)
            ).softmax(-1)
            mixed_BNZ2 = constant_BNZ.unsqueeze(-1) * mix_BNZ2
            y = (copy_BNZ.sum(-1, keepdim=True) + mixed_BNZ2[..., 0].sum(-1, keepdim=True)) * x_BND
            y = y + torch.einsum("bnz,zd->bnd", mixed_BNZ2[..., 1], self.constants.to(x_BND.dtype))
        return y.to(x.dtype)
