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

    ``mix_weight`` (n_constant, 2, D) is W of every constant expert, ``constants`` (n_constant, D)
    v. Raises ValueError where a number is not a whole one, or negative.
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
        bound = 1 / math.sqrt(self.d_model)
        for weight in (self.mix_weight, self.constants):
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of the cheap experts that each token of x (B, N, D) chose, in x's dtype.

        ``routing`` is over E + Z experts, of which the last Z are these. Exactly 0 for a token that
        chose none. Raises ValueError where x and routing do not fit.
        """
        n_ffn = routing.n_experts - sum(self.kinds)
        tokens = tuple(routing.expert_indices.shape[:2])
        if x.shape != (*tokens, self.d_model) or n_ffn < 0:
            found = f"a routing of {tokens} tokens to {routing.n_experts} experts"
            wanted = f"d_model={self.d_model} and {sum(self.kinds)} experts without computation"
            raise ValueError(f"x {tuple(x.shape)} and {found} do not fit {wanted}")
        weights_BNK = routing.expert_weights.masked_fill(~routing.capacity_mask, 0)
        weights_BNE = routing.by_expert(weights_BNK)
        _ffn, _zero, copy_BNZ, constant_BNZ = weights_BNE.split([n_ffn, *self.kinds], dim=-1)
        with no_autocast(x):
            x_BND = x.to(weights_BNK.dtype)
            mix_weight = self.mix_weight.to(x_BND.dtype)
            mix_BNZ2 = torch.einsum("bnd,zad->bnza", x_BND, mix_weight).softmax(-1)
            # Nothing is dispatched: a token gets a multiple of x and a sum of learned vectors.
            mixed_BNZ2 = constant_BNZ.unsqueeze(-1) * mix_BNZ2
            y = (copy_BNZ.sum(-1, keepdim=True) + mixed_BNZ2[..., 0].sum(-1, keepdim=True)) * x_BND
            y = y + torch.einsum("bnz,zd->bnd", mixed_BNZ2[..., 1], self.constants.to(x_BND.dtype))
        return y.to(x.dtype)
