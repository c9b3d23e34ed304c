"""What all routers share: options, one logit per expert, and the making of a Routing.

A forward is ``logits``, the idea of its paper, ``routing``, ``limit_capacity``, ``add_losses``.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..autocast import no_autocast
from ..capacity import CapacityRule
from ..routing import DropReason, Routing
from ..validate import at_least, between, whole


@dataclass(frozen=True)
class RouterOptions:
    """The arguments of a router, checked when given; a subclass of it has a subclass of these."""

    d_model: int
    n_experts: int
    _: KW_ONLY
    capacity_factor: float | CapacityRule | None = None
    aux_loss_weight: float = 0.0
    z_loss_weight: float = 0.0
    jitter_noise: float = 0.0

    def __init_subclass__(cls, fixed: Sequence[str] = ()):
        # An inherited option that this router does not take keeps the value it has.
        for name in fixed:
            setattr(cls, name, field(default=getattr(cls, name), init=False))
            cls.__annotations__.setdefault(name, object)

    def __post_init__(self):
        whole(1, d_model=self.d_model, n_experts=self.n_experts)
        between(0.0, 1.0, jitter_noise=self.jitter_noise)
        at_least(0, aux_loss_weight=self.aux_loss_weight, z_loss_weight=self.z_loss_weight)
        CapacityRule.of(self.capacity_factor)

    @property
    def total_experts(self) -> int:
        """The experts that a token may choose from."""
        return self.n_experts


class Router(nn.Module):
    """What a router inherits: h = x W^T, from tokens (B, N, D) to a ``Routing``.

    Args:
        d_model, n_experts: D and E. Also top_k: K, the slots of a token, or expansion: their mean.
        capacity_factor: places per slot at perfect balance, or a ``CapacityRule``; None: dropless.
        aux_loss_weight, z_loss_weight: coefficients of ``balance_loss`` and ``losses.z_loss``.
        jitter_noise: epsilon; in training the router (and only it) sees x times noise uniform in
            [1 - epsilon, 1 + epsilon]. Fedus et al. 2021 (arXiv 2101.03961), section 2.2.

    Attributes:
        options: the arguments; each is an attribute of the router, too.
        selection_bias: (E,) what is added to the scores to select by and to nothing else, or None.
        thresholds: (E,) what a logit is compared with to select, or None.
        cheap_experts: how many zero, copy and constant experts stand behind the others, or None.

    Raises ValueError where an argument is out of range, TypeError where there is no such one.
    """

    Options = RouterOptions
    top_k_is_a_mean = False  # True: a token takes any number of experts, ``expansion`` on average
    prescribes_start = False  # True: the paper says how the weights start, so a model lets them be
    selection_bias: Tensor | None = None
    thresholds: Tensor | None = None
    cheap_experts: tuple[int, int, int] | None = None

    def __init_subclass__(cls):
        cls.__signature__ = inspect.signature(cls.Options)  # what help() and editors show

    def __init__(self, *args, **options):
        super().__init__()
        self.options = self.Options(*args, **options)
        vars(self).update({f.name: getattr(self.options, f.name) for f in fields(self.options)})
        self.n_experts = self.options.total_experts
        self.capacity_rule = CapacityRule.of(self.capacity_factor)
        self.weight = nn.Parameter(torch.empty(self.n_experts, self.d_model))
        for name, value in self.initial_state().items():
            vars(self).pop(name, None)  # an option may have the name: the buffer takes its place
            self.register_buffer(name, _wide(value))
        self.reset_weight()

    def initial_state(self) -> dict[str, Tensor]:
        """The buffers a router starts with; ``update`` and nothing else may change them."""
        return {}

    def reset_parameters(self) -> None:
        """Draw the weight as nn.Linear does, uniform in +-1/sqrt(D), and start the state again."""
        self.reset_weight()
        for name, value in self.initial_state().items():
            getattr(self, name).copy_(value)

    def reset_weight(self) -> None:
        """Draw the weight; a router whose paper says how overrides this."""
        bound = 1 / math.sqrt(self.d_model)
        nn.init.uniform_(self.weight, -bound, bound)

    def _apply(self, fn, recurse=True):
        # What moves or casts a module. State moves but stays float32 at least.
        before = {name: b for name, b in self._buffers.items() if b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            cast = self._buffers[name]
            if cast.dtype.itemsize < buffer.dtype.itemsize:
                self._buffers[name] = buffer.to(cast.device, _wide(cast).dtype)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # load_state_dict(assign=True) takes the tensors as they are.
        for key in {prefix + name for name in self._buffers} & set(state_dict):
            state_dict[key] = _wide(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def mean_top_k(self) -> float:
        return self.expansion if self.top_k_is_a_mean else self.top_k

    def expected_share(self) -> Tensor:
        """(E,) float64, sums to 1: the share of the slots that each expert is meant to get."""
        return torch.full((self.n_experts,), 1 / self.n_experts, dtype=torch.float64)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, token_ids=None) -> Routing:
        """Route tokens x (B, N, D); raises ValueError where a shape or dtype does not fit.

        padding_mask (B, N) is True for real tokens, None when all are. Padding takes no place,
        counts in no loss, and its output is 0 if what stands there is finite. token_ids (B, N) are
        for routers that read them (hash routing).
        """
        raise TypeError(f"{type(self).__name__} is what routers inherit: it does not route")

    def logits(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, E), in float32 at least; ValueError where x is not (B, N, D)."""
        self.require_tokens(x)
        dtype = torch.promote_types(x.dtype, torch.float32)  # in bfloat16 other experts would win
        with no_autocast(x):
            x = x.to(dtype)
            if self.training and self.jitter_noise > 0:
                # A new tensor: the experts see x itself.
                x = x * torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            return F.linear(x, self.weight.to(dtype))

    def require_tokens(self, x: Tensor) -> None:
        """Raise ValueError unless x is (B, N, D)."""
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            found = tuple(x.shape)
            raise ValueError(f"x has shape {found}, must be (B, N, d_model={self.d_model})")

    def routing(
        self,
        indices_BNK: Tensor,
        weights_BNK: Tensor,
        logits_BNE: Tensor,
        scores_BNE: Tensor,
        padding_mask: Tensor | None = None,
        *,
        selected_BNK: Tensor | None = None,
        normalized: bool = False,
        weights_on: str = "output",
    ) -> Routing:
        """The Routing of a choice, before any capacity: slots are kept unless they are padding.

        ``selected_BNK`` is False where a token does not ask for this slot's expert (K = E slots).
        """
        reason_BNK = torch.full_like(indices_BNK, DropReason.KEPT.value, dtype=torch.int8)
        if selected_BNK is not None:
            reason_BNK = reason_BNK.masked_fill(~selected_BNK, DropReason.NOT_SELECTED.value)
        if padding_mask is not None:
            padding_BN1 = ~checked_padding_mask(padding_mask, indices_BNK).unsqueeze(-1)
            reason_BNK = reason_BNK.masked_fill(padding_BN1, DropReason.PADDING.value)
        return Routing(
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

    def every_expert(self, x: Tensor) -> Tensor:
        """(B, N, E) int64: slot e goes to expert e, for routers with K = E slots."""
        return torch.arange(self.n_experts, device=x.device).expand(*x.shape[:2], -1)

    def limit_capacity(self, routing: Routing) -> Routing:
        """Drop the slots for which ``capacity_rule`` leaves no room; all stay when dropless."""
        return self.capacity_rule.apply(routing, training=self.training)

    def add_losses(self, routing: Routing) -> Routing:
        """Add the losses whose coefficient is above 0."""
        added = {}
        if self.aux_loss_weight > 0:
            added["load_balance"] = self.aux_loss_weight * self.balance_loss(routing)
        if self.z_loss_weight > 0:
            added["z_loss"] = self.z_loss_weight * losses.z_loss(routing)
        return replace(routing, losses=routing.losses | added) if added else routing

    def balance_loss(self, routing: Routing) -> Tensor:
        """``losses.load_balance``, unless the router's paper has another."""
        return losses.load_balance(routing)

    def update(self, routings: Sequence[Routing]) -> None:
        """Change what the router learns outside the gradient, if anything.

        Call it on every rank, once per optimiser step, with the routings of all its micro-batches.
        """


def _wide(state: Tensor) -> Tensor:
    """In float32 at least: a bias that changes by 0.001 a step would stand still in bfloat16."""
    wide = torch.promote_types(state.dtype, torch.float32)
    return state.to(wide) if state.is_floating_point() else state


def checked_padding_mask(padding_mask: Tensor | None, x: Tensor) -> Tensor:
    """(B, N) bool, all True for None; raises ValueError where it does not fit x (B, N, ...)."""
    if padding_mask is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    # The message says what True means: for torch's key_padding_mask it is the opposite.
    if padding_mask.shape != x.shape[:2] or padding_mask.dtype != torch.bool:
        raise ValueError(
            f"padding_mask must be bool of shape {tuple(x.shape[:2])}, True for real tokens; "
            f"this one is {padding_mask.dtype} of shape {tuple(padding_mask.shape)}"
        )
    return padding_mask
