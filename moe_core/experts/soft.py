"""SoftMoE: experts that see mixtures of tokens, so that nothing is chosen or dropped."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autocast import no_autocast
from ..validate import whole
from .bank import Experts


class SoftMoE(nn.Module):
    r"""Every slot of an expert gets a weighted mean of all tokens, every token one of all slots.

    .. math:: h_{n,s} = \hat x_n \cdot g \hat\varphi_s,
        \quad \tilde x_s = \sum_n \mathrm{softmax}_n(h)_{n,s} \, x_n,
        \quad y_n = \sum_s \mathrm{softmax}_s(h)_{n,s} \, f_{e(s)}(\tilde x_s)

    with unit vectors x^ and phi^ and a learned scale g. These are Soft MoE's own slots, inputs of
    an expert; elsewhere a slot is a (token, k) pair. **It is not causal**: a token's output depends
    on later tokens of its sequence through both means. Sequences do not see each other.

    Args:
        d_model, d_ff, n_experts: D, F and E.
        slots_per_expert: S; E*S = N costs what top-1 routing costs. Slot s is of expert s // S.
        activation, glu, backend: see ``Experts``.

    Raises ValueError where a size is not a positive whole number, or an option is unknown.
    Source: Puigcerver et al. 2023 (arXiv 2308.00951), sections 2.1, and 2.3 for unit vectors.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_experts: int,
        *,
        slots_per_expert: int = 1,
        activation: str = "silu",
        glu: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        whole(1, d_model=d_model, n_experts=n_experts, slots_per_expert=slots_per_expert)
        self.d_model, self.n_experts, self.slots_per_expert = d_model, n_experts, slots_per_expert
        self.phi = nn.Parameter(torch.empty(d_model, n_experts * slots_per_expert))
        self.scale = nn.Parameter(torch.ones(()))
        options = {"activation": activation, "glu": glu, "backend": backend}
        self.experts = Experts(d_model, d_ff, n_experts, **options)
        nn.init.normal_(self.phi, std=1 / math.sqrt(d_model))

    def mixing_weights(
        self, x: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Dispatch (B, N, E*S), a softmax over tokens, and combine, one over slots; float32.

        Both are exactly 0 for padding. Raises ValueError where x or padding_mask does not fit.
        """
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            found = tuple(x.shape)
            raise ValueError(f"x has shape {found}, must be (B, N, d_model={self.d_model})")
        dtype = torch.promote_types(x.dtype, torch.float32)
        with no_autocast(x):
            phi = self.scale.to(dtype) * F.normalize(self.phi.to(dtype), dim=0)
            logits_BNS = F.normalize(x.to(dtype), dim=-1) @ phi
        if padding_mask is None:
            return logits_BNS.softmax(1), logits_BNS.softmax(-1)
        if padding_mask.shape != x.shape[:2] or padding_mask.dtype != torch.bool:
            raise ValueError(
                f"padding_mask must be bool of shape {tuple(x.shape[:2])}, True for real tokens; "
                f"this one is {padding_mask.dtype} of shape {tuple(padding_mask.shape)}"
            )
        padding_BN1 = ~padding_mask.unsqueeze(-1)
        lowest = torch.finfo(dtype).min  # not -inf: a sequence of nothing but padding would be 0/0
        dispatch_BNS = logits_BNS.masked_fill(padding_BN1, lowest).softmax(1)
        both = dispatch_BNS, logits_BNS.softmax(-1)
        return tuple(weights_BNS.masked_fill(padding_BN1, 0) for weights_BNS in both)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D) in x's dtype; 0 for padding. No Routing: nothing is chosen."""
        dispatch_BNS, combine_BNS = self.mixing_weights(x, padding_mask)
        B, E, S, D = x.shape[0], self.n_experts, self.slots_per_expert, self.d_model
        wide = dispatch_BNS.dtype
        with no_autocast(x):
            slots_BSD = torch.einsum("bns,bnd->bsd", dispatch_BNS, x.to(wide)).to(x.dtype)
        # The bank wants rows sorted by expert: first expert 0's S slots of every sequence.
        rows_AD = slots_BSD.view(B, E, S, D).transpose(0, 1).reshape(E * B * S, D)
        rows_AD = self.experts.run_rows(rows_AD, torch.full((E,), B * S, device=x.device))
        slots_BSD = rows_AD.view(E, B, S, D).transpose(0, 1).reshape(B, E * S, D)
        with no_autocast(x):
            return torch.einsum("bns,bsd->bnd", combine_BNS, slots_BSD.to(wide)).to(x.dtype)
