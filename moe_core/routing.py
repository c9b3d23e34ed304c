"""Routing: the one object that leaves a router, and its contract."""

from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch
from torch import Tensor

WEIGHTS_ON = ("output", "input")


class DropReason(IntEnum):
    """Why a slot is not kept; the codes in ``Routing.drop_reason``."""

    KEPT = 0
    OVER_CAPACITY = 1
    PADDING = 2
    NOT_SELECTED = 3  # this token never asked for this expert


@dataclass(frozen=True, eq=False)
class Routing:
    """Which expert each slot of each token goes to, with which weight, and whether it got in.

    A slot is a pair (token, k). Routers in which a token may take any number of experts use K = E
    slots and mask the ones they do not take. With float64 input the float fields are float64.

    Attributes:
        expert_indices: (B, N, K) int64, the expert each slot goes to.
        expert_weights: (B, N, K) float32, what that expert's output is multiplied by.
        capacity_mask: (B, N, K) bool, True where the slot is kept: selected, and under capacity.
        logits, scores: (B, N, E) float32, before and after the score function; no selection bias.
        drop_reason: (B, N, K) int8, a ``DropReason`` for each slot.
        losses: name -> weighted, differentiable scalar.
        capacity: the most slots an expert may keep, None when dropless.
        padding_mask: (B, N) bool, True for real tokens, None when all are real.
        normalized: a promise that the K weights of a token sum to 1 (before any slot is dropped).
        dropless: a promise that every slot is kept: A = T*K is known without reading a tensor.
        weights_on: a weight multiplies the expert's "output", w f(x), or its "input", f(w x).
        capacity_scope: the capacity counts over the whole "batch", or within each "sequence".
        overflow: "drop" a slot over capacity, or hand its weight to the "shared" expert.
    """

    expert_indices: Tensor
    expert_weights: Tensor
    capacity_mask: Tensor
    logits: Tensor
    scores: Tensor
    drop_reason: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    capacity: int | None = None
    padding_mask: Tensor | None = None
    normalized: bool = False
    dropless: bool = False
    weights_on: str = "output"
    capacity_scope: str = "batch"
    overflow: str = "drop"

    @property
    def n_experts(self) -> int:
        return self.scores.shape[-1]

    @property
    def top_k(self) -> int:
        return self.expert_indices.shape[-1]

    @property
    def places_per_expert(self) -> int | None:
        """The most slots an expert can keep in the whole batch, None when dropless."""
        if self.capacity is None or self.capacity_scope == "batch":
            return self.capacity
        return self.capacity * self.scores.shape[0]

    @property
    def aux_loss(self) -> Tensor:
        """Sum of ``losses``; a zero scalar when there are none."""
        return sum(self.losses.values(), start=self.scores.new_zeros(()))

    @property
    def selected_mask(self) -> Tensor:
        """(B, N, K) bool: the slots the router asked for, whether or not there was room."""
        return self.capacity_mask | (self.drop_reason == DropReason.OVER_CAPACITY.value)

    @property
    def real_tokens(self) -> Tensor:
        """(B, N) bool: True where the token is not padding."""
        if self.padding_mask is not None:
            return self.padding_mask
        shape, device = self.expert_indices.shape[:2], self.expert_indices.device
        return torch.ones(shape, dtype=torch.bool, device=device)

    @property
    def tokens_per_expert(self) -> Tensor:
        """(E,) int64: kept slots per expert."""
        return self._count(self.capacity_mask).sum(0)

    @property
    def drop_rate(self) -> Tensor:
        """Scalar: the share of selected slots that found no room; 0 when nothing was selected."""
        dropped = (self.drop_reason == DropReason.OVER_CAPACITY.value).sum()
        return dropped / self.selected_mask.sum().clamp(min=1)

    @property
    def overflow_weight(self) -> Tensor:
        """(B, N): the summed weight of slots over capacity where overflow is "shared", else 0."""
        over_BNK = self.drop_reason == DropReason.OVER_CAPACITY.value
        if self.overflow == "drop":
            over_BNK = torch.zeros_like(over_BNK)
        # With its gradient: the router learns from a slot that the shared expert took over, too.
        return self.expert_weights.masked_fill(~over_BNK, 0).sum(-1)

    def slots_per_expert(self, scope: str = "batch") -> Tensor:
        """The load (E,) int64: selected slots per expert, before capacity; (B, E) by "sequence"."""
        return _pool(self._count(self.selected_mask), scope)

    def slot_share(self, scope: str = "batch") -> Tensor:
        """f_e, the share of selected slots that chose expert e: (E,), or (B, E) by "sequence"."""
        counts = self.slots_per_expert(scope).to(self.scores.dtype)
        return counts / counts.sum(-1, keepdim=True).clamp(min=1)

    def mean_score(self, scope: str = "batch") -> Tensor:
        """P_e, the mean score of e over real tokens, with gradient; shaped as ``slot_share``."""
        real_BN = self.real_tokens.to(self.scores.dtype)
        # A product and a sum, no matmul: autocast would run that in bfloat16.
        total_BE = (self.scores * real_BN.unsqueeze(-1)).sum(1)
        return _pool(total_BE, scope) / _pool(real_BN.sum(-1, keepdim=True), scope).clamp(min=1)

    def by_expert(self, values_BNK: Tensor) -> Tensor:
        """(B, N, K) -> (B, N, E): a slot's value at its expert, 0 where a token has no slot."""
        zeros_BNE = values_BNK.new_zeros(self.scores.shape)
        # A token has at most one slot per expert: each entry is written once, with the same bits.
        return zeros_BNE.scatter_add(-1, self.expert_indices, values_BNK)

    def with_losses(self, **losses: Tensor) -> "Routing":
        """The same routing with these weighted losses added."""
        return replace(self, losses={**self.losses, **losses})

    def check(self) -> "Routing":
        """Return the routing itself; raises ValueError where it breaks its contract.

        For tests and debugging: it reads tensor values, which synchronises with a GPU.
        """
        slots, tokens, E = self.expert_indices.shape, self.expert_indices.shape[:2], self.n_experts
        _require(self.weights_on in WEIGHTS_ON, f"weights_on={self.weights_on!r} is unknown")
        _require(self.overflow in ("drop", "shared"), f"overflow={self.overflow!r} is unknown")
        floats = torch.float32, torch.float64
        for name, shape, dtypes in (
            ("expert_indices", slots, (torch.int64,)),
            ("expert_weights", slots, floats),
            ("capacity_mask", slots, (torch.bool,)),
            ("drop_reason", slots, (torch.int8,)),
            ("logits", (*tokens, E), floats),
            ("scores", (*tokens, E), floats),
        ):
            tensor = getattr(self, name)
            found, wanted = tuple(tensor.shape), tuple(shape)
            _require(found == wanted, f"{name} has shape {found}, must be {wanted}")
            _require(tensor.dtype in dtypes, f"{name} has dtype {tensor.dtype}, not {dtypes[0]}")
            if dtypes is floats:
                _require(bool(tensor.isfinite().all()), f"{name} holds NaN or infinity")

        real_BN, reasons = self.real_tokens, self.drop_reason
        fits = real_BN.shape == tokens and real_BN.dtype == torch.bool
        _require(fits, f"padding_mask must be bool of shape {tuple(tokens)}")
        in_range = (self.expert_indices >= 0) & (self.expert_indices < E)
        _require(bool(in_range.all()), f"expert_indices must lie in [0, {E})")
        kept, over, padding = (
            reasons == reason.value
            for reason in (DropReason.KEPT, DropReason.OVER_CAPACITY, DropReason.PADDING)
        )
        _require(torch.equal(self.capacity_mask, kept), "capacity_mask and drop_reason disagree")
        _require(not self.dropless or bool(kept.all()), "dropless, but not every slot is kept")
        known = torch.isin(reasons, reasons.new_tensor(list(DropReason)))
        _require(bool(known.all()), "drop_reason holds a code that is no DropReason")
        _require(not bool(padding[real_BN].any()), "a real token has the reason PADDING")
        asked = self.selected_mask
        _require(not bool(asked[~real_BN].any()), "a padding token has a selected slot")
        twice = bool((self.by_expert(asked.long()) > 1).any())
        _require(not twice, "an expert is chosen twice for one token")

        if self.capacity is None:
            _require(not bool(over.any()), "a slot is over capacity, but capacity is None")
        else:
            loads = _pool(self._count(self.capacity_mask), self.capacity_scope)
            most = int(loads.max()) if loads.numel() else 0
            message = f"an expert keeps {most} slots, capacity is {self.capacity}"
            _require(most <= self.capacity, message)
        if self.normalized:
            off = (self.expert_weights.sum(-1) - 1).abs()[real_BN]
            # Loose enough for a float32 sum of K terms and a norm_eps of up to 1e-6.
            _require(bool((off < 1e-5).all()), "expert_weights of a token must sum to 1")
        for name, loss in self.losses.items():
            finite = loss.ndim == 0 and bool(loss.isfinite())
            _require(finite, f"losses[{name!r}] must be a finite scalar")
        return self

    def _count(self, mask_BNK: Tensor) -> Tensor:
        """(B, E) int64: slots under the mask per expert."""
        B, E = self.scores.shape[0], self.scores.shape[-1]
        counts_BE = torch.zeros(B, E, dtype=torch.int64, device=self.expert_indices.device)
        # scatter_add_ and not bincount, which synchronises with the GPU
        return counts_BE.scatter_add_(1, self.expert_indices.flatten(1), mask_BNK.flatten(1).long())


def _pool(values_BE: Tensor, scope: str) -> Tensor:
    if scope == "batch":
        return values_BE.sum(0)
    if scope == "sequence":
        return values_BE
    raise ValueError(f"scope={scope!r} must be one of 'batch', 'sequence'")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"Routing.check: {message}")
