"""What stands between an expert's two matrices: an activation, gated or not, clamped or not."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..validate import at_least, boolean, one_of

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),  # So et al. 2021, Primer
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),  # Hendrycks and Gimpel 2016; gpt-oss
}


def _quick_gelu_pullback(grad: Tensor, h: Tensor) -> Tensor:
    share = torch.sigmoid(1.702 * h)
    return grad * share * (1 + 1.702 * h * (1 - share))


PULLBACKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (d act(h), h) -> d h
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "relu": lambda grad, h: grad * (h > 0),
    "relu2": lambda grad, h: grad * 2 * F.relu(h),
    "quick_gelu": _quick_gelu_pullback,
}


@dataclass(frozen=True)
class Activation:
    r"""From what the first matrix gives to what the second one takes.

    .. math:: \mathrm{act}(h) \quad\text{or, gated,}\quad
        \mathrm{act}(\min(g, L)) \odot (\mathrm{clip}(u, -L, L) + o)

    Attributes:
        name: one of ``ACTIVATIONS``.
        glu: gated: the input is [g; u], twice as wide as the output (Shazeer 2020, 2002.05202).
        limit: L, or None for no clamp; only with glu. gpt-oss and DeepSeek-V4.
        up_offset: o; only with glu. 1 in gpt-oss.

    Raises ValueError where the name is unknown, or a clamp or an offset is given without glu.
    """

    name: str = "silu"
    glu: bool = True
    limit: float | None = None
    up_offset: float = 0.0

    def __post_init__(self):
        one_of(ACTIVATIONS, activation=self.name)
        boolean(glu=self.glu)
        if self.limit is not None:
            at_least(0, glu_limit=self.limit)
        at_least(float("-1e30"), up_offset=self.up_offset)
        if not self.glu and (self.limit is not None or self.up_offset):
            given = f"glu_limit={self.limit!r} and up_offset={self.up_offset!r}"
            raise ValueError(f"{given} must be None and 0 without glu")

    @classmethod
    @cache
    def known(cls, name: str, glu: bool, limit: float | None, up_offset: float) -> "Activation":
        """The one with these attributes, checked the first time only."""
        return cls(name, glu, limit, up_offset)

    def __call__(self, projected: Tensor) -> Tensor:
        """(..., 2F), or (..., F) without glu, to (..., F)."""
        act = ACTIVATIONS[self.name]
        if not self.glu:
            return act(projected)
        gate, up = self._clamped(projected)
        return act(gate) * (up + self.up_offset if self.up_offset else up)

    def pullback(self, grad: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of ``projected`` from the output's, which it overwrites; and the output."""
        grad_projected, output = torch.empty_like(projected), torch.empty_like(grad)
        # Some rows at a time: what lies between stays in the cache, and there is still enough of it
        # for several threads.
        n_rows = max(1, 2**17 // grad.shape[-1])
        parts = (tensor.split(n_rows) for tensor in (grad, projected, grad_projected, output))
        for rows in zip(*parts):
            self._pullback(*rows)
        return grad_projected, output

    def _pullback(self, grad: Tensor, projected: Tensor, grad_projected: Tensor, output: Tensor):
        act, act_pullback = ACTIVATIONS[self.name], PULLBACKS[self.name]
        if not self.glu:
            grad_projected.copy_(act_pullback(grad, projected))
            output.copy_(act(projected))
            return
        gate, up = self._clamped(projected)
        if self.up_offset:
            up = up + self.up_offset
        active, (grad_gate, grad_up) = act(gate), grad_projected.chunk(2, -1)
        torch.mul(active, up, out=output)
        torch.mul(grad, active, out=grad_up)
        grad_gate.copy_(act_pullback(grad.mul_(up), gate))
        if self.limit is not None:  # a clamped value no longer moves the output
            raw_gate, raw_up = projected.chunk(2, -1)
            grad_gate.masked_fill_(raw_gate > self.limit, 0)
            grad_up.masked_fill_(raw_up.abs() > self.limit, 0)

    def _clamped(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = projected.chunk(2, -1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate, up
