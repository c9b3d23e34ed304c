"""What all routers share: a linear map from a token to one logit per expert, computed in float32."""

import math
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._validate import between, whole
from ..routing import Routing


class Router(nn.Module):
    r"""Base class: holds the weight and computes the logits.

    .. math:: h = x W_r^\top

    Args:
        d_model, n_experts: D and E.
        jitter_noise: in training, x is first multiplied by noise uniform in [1 - jitter_noise, 1 + jitter_noise]; only the
            router sees it. Fedus et al. 2021 (arXiv 2101.03961), section 2.2.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, d_model: int, n_experts: int, *, jitter_noise: float = 0.0):
        super().__init__()
        whole(1, d_model=d_model, n_experts=n_experts)
        between(0.0, 1.0, jitter_noise=jitter_noise)
        self.d_model, self.n_experts, self.jitter_noise = d_model, n_experts, jitter_noise
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as nn.Linear draws its own: uniform in +-1/sqrt(D)."""
        bound = 1 / math.sqrt(self.d_model)
        nn.init.uniform_(self.weight, -bound, bound)

    def logits(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, E), in float32 at least, whatever the model's dtype: bf16 logits change which experts win.

        Raises:
            ValueError: x is not (B, N, D).
        """
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"x has shape {tuple(x.shape)}, must be (B, N, d_model={self.d_model})")
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype)
            if self.training and self.jitter_noise > 0:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            return F.linear(x, self.weight.to(dtype))

    def update(self, routings: Sequence[Routing]) -> None:
        """Change what the router learns outside the gradient; call once per optimiser step, with the routings of all its
        micro-batches. This router has no such state, so nothing changes."""
