"""What all routers share: a linear map from a token to one logit per expert, computed in float32, and the making of a Routing."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..autocast import no_autocast
from ..capacity import CapacityRule
from ..routing import DropReason, Routing
from ..validate import at_least, between, whole


class Router(nn.Module):
    r"""What a router inherits: holds the weight, computes the logits, and turns choices into a checked-shape ``Routing``.

    .. math:: h = x W_r^\top

    A subclass writes ``forward(x, padding_mask=None)`` and ends with ``return self.route(...)``.

    Args:
        d_model, n_experts: D and E.
        capacity_factor: places per slot at perfect balance, None means dropless; or a ``CapacityRule``, which says the rest
            (a factor for eval, the formula, who is dropped, where the overflow goes).
        aux_loss_weight, z_loss_weight: coefficients of ``balance_loss`` and of ``losses.z_loss``; 0 leaves a loss out.
        jitter_noise: in training, x is first multiplied by noise uniform in [1 - jitter_noise, 1 + jitter_noise]; only the
            router sees it. Fedus et al. 2021 (arXiv 2101.03961), section 2.2.

    Attributes:
        needs_token_ids: True where forward wants ``token_ids`` (B, N) as a third argument (hash routing).
        prescribes_start: True where the paper says how the weights start (zero, orthogonal), so that a model leaves them alone.

    Raises:
        ValueError: an argument is out of range.
    """

    needs_token_ids = False
    prescribes_start = False

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        capacity_factor: float | CapacityRule | None = None,
        aux_loss_weight: float = 0.0,
        z_loss_weight: float = 0.0,
        jitter_noise: float = 0.0,
    ):
        super().__init__()
        whole(1, d_model=d_model, n_experts=n_experts)
        between(0.0, 1.0, jitter_noise=jitter_noise)
        at_least(0, aux_loss_weight=aux_loss_weight, z_loss_weight=z_loss_weight)
        self.capacity_rule = CapacityRule.of(capacity_factor)
        self.d_model, self.n_experts, self.jitter_noise = d_model, n_experts, jitter_noise
        self.aux_loss_weight, self.z_loss_weight = aux_loss_weight, z_loss_weight
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as nn.Linear draws its own, uniform in +-1/sqrt(D); a bias, where a router has one, starts at zero."""
        bound = 1 / math.sqrt(self.d_model)
        if self.weight is not None:  # a hash router with nothing to learn has none
            nn.init.uniform_(self.weight, -bound, bound)
        for name in ("bias", "expert_bias"):
            if getattr(self, name, None) is not None:
                nn.init.zeros_(getattr(self, name))

    def _apply(self, fn, recurse=True):
        """Move or cast the module; the state of a router (its floating-point buffers) moves but stays float32 at least: a bias
        that changes by 0.001 a step would stand still in bfloat16."""
        state = {
            name: buffer
            for name, buffer in self._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        }
        super()._apply(fn, recurse)
        for name, buffer in state.items():
            cast = self._buffers[name]
            if cast.dtype.itemsize < buffer.dtype.itemsize:
                self._buffers[name] = buffer.to(
                    cast.device, torch.promote_types(cast.dtype, torch.float32)
                )
        return self

    def logits(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, E), in float32 at least, whatever the model's dtype: bf16 logits change which experts win.

        Raises:
            ValueError: x is not (B, N, D).
        """
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, must be (B, N, d_model={self.d_model})"
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        with no_autocast(x):
            x = x.to(dtype)
            if self.training and self.jitter_noise > 0:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            return F.linear(x, self.weight.to(dtype))

    def route(
        self,
        indices_BNK: Tensor,
        weights_BNK: Tensor,
        logits_BNE: Tensor,
        scores_BNE: Tensor,
        *,
        padding_mask: Tensor | None = None,
        selected_BNK: Tensor | None = None,
        normalized: bool = False,
        apply_capacity: bool = True,
        weights_on: str = "output",
    ) -> Routing:
        """Make the Routing: mark padding, drop what finds no room, add the common losses.

        Args:
            indices_BNK, weights_BNK: the expert of each slot and the weight of its output.
            logits_BNE, scores_BNE: before and after the score function, without any selection bias.
            padding_mask: (B, N) bool, True for real tokens. Padding takes no place, counts in no loss and gets output 0,
                as long as what stands there is finite.
            selected_BNK: (B, N, K) bool, for routers with K = E slots: False where the expert is not asked for.
            normalized: the K weights of a token sum to 1.
            apply_capacity: False where the router limits its experts in its own way.
            weights_on: "output" or "input"; see ``Routing``.

        Raises:
            ValueError: padding_mask has the wrong shape or dtype.
        """
        reason_BNK = torch.full_like(indices_BNK, DropReason.KEPT.value, dtype=torch.int8)
        if selected_BNK is not None:
            reason_BNK = reason_BNK.masked_fill(~selected_BNK, DropReason.NOT_SELECTED.value)
        if padding_mask is not None:
            require_padding_mask(padding_mask, indices_BNK.shape[:2])
            reason_BNK = reason_BNK.masked_fill(
                ~padding_mask.unsqueeze(-1), DropReason.PADDING.value
            )
        routing = Routing(
            expert_indices=indices_BNK,
            expert_weights=weights_BNK,
            capacity_mask=reason_BNK == DropReason.KEPT.value,
            logits=logits_BNE,
            scores=scores_BNE,
            drop_reason=reason_BNK,
            padding_mask=padding_mask,
            normalized=normalized,
            dropless=padding_mask is None and selected_BNK is None,
            weights_on=weights_on,
        )
        if apply_capacity:
            routing = self.capacity_rule.apply(routing, training=self.training)
        if self.aux_loss_weight > 0:
            routing = routing.with_losses(
                load_balance=self.aux_loss_weight * self.balance_loss(routing)
            )
        if self.z_loss_weight > 0:
            routing = routing.with_losses(z_loss=self.z_loss_weight * losses.z_loss(routing))
        return routing

    def balance_loss(self, routing: Routing) -> Tensor:
        """What ``aux_loss_weight`` multiplies: ``losses.load_balance``, unless the router's paper has another."""
        return losses.load_balance(routing)

    def every_expert(self, x: Tensor) -> Tensor:
        """(B, N, E) int64: slot e goes to expert e, for routers with K = E slots."""
        return torch.arange(self.n_experts, device=x.device).expand(*x.shape[:2], -1)

    def update(self, routings: Sequence[Routing]) -> None:
        """Change what the router learns outside the gradient; call once per optimiser step, with the routings of all its
        micro-batches. A router without such state changes nothing."""


def require_padding_mask(padding_mask: Tensor, tokens_BN: torch.Size) -> None:
    """Raise ValueError unless the mask is bool of shape (B, N); for routers that use it before ``route`` does."""
    if padding_mask.shape != tokens_BN or padding_mask.dtype != torch.bool:
        raise ValueError(
            f"padding_mask must be bool of shape {tuple(tokens_BN)}, True for real tokens; "
            f"this one is {padding_mask.dtype} of shape {tuple(padding_mask.shape)}"
        )
