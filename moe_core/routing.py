"""Routing: the one object that leaves a router, and its contract.

Everything downstream (dispatch, losses, metrics, figures) reads only this. Routers in which a token may take any number of
experts use K = E slots and mask the ones they do not take: one representation for all.
"""

from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch
from torch import Tensor

from .validate import one_of

WEIGHTS_ON = ("output", "input")


class DropReason(IntEnum):
    """Why a slot is not kept; the codes in ``Routing.drop_reason``."""

    KEPT = 0
    OVER_CAPACITY = 1
    PADDING = 2
    NOT_SELECTED = 3  # routers with K = E slots: this expert was never asked for (not among its choices, below its threshold, zero)


@dataclass(frozen=True, eq=False)
class Routing:
    """Which expert each slot of each token goes to, with which weight, and whether it got in.

    Attributes:
        expert_indices: (B, N, K) int64, the expert each slot goes to.
        expert_weights: (B, N, K) float32, the weight with which that expert's output is combined.
        capacity_mask: (B, N, K) bool, True where the slot is kept: selected, and under capacity.
        logits: (B, N, E) float32, before the score function; a selection bias never appears here.
        scores: (B, N, E) float32, after the score function; a selection bias never appears here.
        drop_reason: (B, N, K) int8, a ``DropReason`` for each slot.
        losses: name -> weighted, differentiable scalar.
        capacity: the most slots an expert may keep, None when dropless.
        capacity_scope: what the capacity is counted over: the whole "batch", or each "sequence" for itself.
        overflow: what becomes of the weight of a slot over capacity: "drop" it, or hand it to the "shared" expert.
        padding_mask: (B, N) bool, True for real tokens, None when all are real.
        normalized: the router promises that the K weights of a token sum to 1 (before any slot is dropped).
        dropless: the router promises that every slot is kept, so that A = T*K is known without reading a tensor.
        weights_on: what a weight multiplies: the expert's "output", w * f(x), or its "input", f(w * x), as in Llama 4.

    With float64 input the float fields are float64.
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
        """E."""
        return self.scores.shape[-1]

    @property
    def top_k(self) -> int:
        """K, the number of slots per token."""
        return self.expert_indices.shape[-1]

    @property
    def aux_loss(self) -> Tensor:
        """Sum of ``losses``; a zero scalar when there are none."""
        return sum(self.losses.values(), start=self.scores.new_zeros(()))

    @property
    def selected_mask(self) -> Tensor:
        """(B, N, K) bool: the slots the router asked for, whether or not there was room."""
        return self.capacity_mask | (self.drop_reason == DropReason.OVER_CAPACITY.value)

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
        """(B, N): the weight that each token's slots over capacity leave to the shared expert; 0 where overflow is dropped.

        A layer adds overflow_weight * shared(x), besides what the shared expert does anyway. Carries gradient: the router
        learns from a dropped slot too.
        """
        over_BNK = self.drop_reason == DropReason.OVER_CAPACITY.value
        if self.overflow == "drop":
            over_BNK = torch.zeros_like(over_BNK)
        return self.expert_weights.masked_fill(~over_BNK, 0).sum(-1)

    def slots_per_expert(self, scope: str = "batch") -> Tensor:
        """(E,) int64: selected slots per expert, before capacity: the load. (B, E) for scope="sequence"."""
        return _pool(self._count(self.selected_mask), scope)

    def slot_share(self, scope: str = "batch") -> Tensor:
        """f_e, the share of selected slots (before capacity) that chose expert e; sums to 1 over experts.

        Args:
            scope: "batch" pools all tokens -> (E,); "sequence" keeps the sequences apart -> (B, E).
        """
        counts = self.slots_per_expert(scope).to(self.scores.dtype)
        return counts / counts.sum(-1, keepdim=True).clamp(min=1)

    def mean_score(self, scope: str = "batch") -> Tensor:
        """P_e, the mean score of expert e over real tokens; carries gradient. Scope as in ``slot_share``."""
        real_BN = self.real_tokens.to(self.scores.dtype)
        total_BE = (self.scores * real_BN.unsqueeze(-1)).sum(
            1
        )  # no matmul: autocast would run it in bfloat16
        return _pool(total_BE, scope) / _pool(real_BN.sum(-1, keepdim=True), scope).clamp(min=1)

    @property
    def real_tokens(self) -> Tensor:
        """(B, N) bool: True where the token is not padding."""
        if self.padding_mask is not None:
            return self.padding_mask
        return torch.ones(
            self.expert_indices.shape[:2], dtype=torch.bool, device=self.expert_indices.device
        )

    def with_losses(self, **losses: Tensor) -> "Routing":
        """The same routing with these weighted losses added."""
        return replace(self, losses={**self.losses, **losses})

    def check(self) -> "Routing":
        """Raise ValueError where the routing breaks its contract; return the routing itself otherwise.

        For tests and debugging: it reads tensor values, so on a GPU it waits for the device.
        """
        slots, tokens, E = self.expert_indices.shape, self.expert_indices.shape[:2], self.n_experts
        _require(
            self.weights_on in WEIGHTS_ON,
            f"weights_on={self.weights_on!r} must be one of {WEIGHTS_ON}",
        )
        _require(
            self.overflow in ("drop", "shared"),
            f"overflow={self.overflow!r} must be 'drop' or 'shared'",
        )
        for name, dtypes in {
            "expert_indices": (torch.int64,),
            "expert_weights": (torch.float32, torch.float64),
            "capacity_mask": (torch.bool,),
            "drop_reason": (torch.int8,),
        }.items():
            tensor = getattr(self, name)
            _require(
                tensor.shape == slots,
                f"{name} has shape {tuple(tensor.shape)}, expert_indices {tuple(slots)}",
            )
            _require(
                tensor.dtype in dtypes, f"{name} has dtype {tensor.dtype}, must be {dtypes[0]}"
            )
        for name in ("logits", "scores"):
            tensor = getattr(self, name)
            _require(
                tensor.shape == (*tokens, E),
                f"{name} has shape {tuple(tensor.shape)}, must be {(*tokens, E)}",
            )
            _require(
                tensor.dtype in (torch.float32, torch.float64),
                f"{name} has dtype {tensor.dtype}, must be float32",
            )
        for name in ("expert_weights", "logits", "scores"):
            _require(bool(getattr(self, name).isfinite().all()), f"{name} holds NaN or infinity")
        real_BN = self.real_tokens
        _require(
            real_BN.shape == tokens and real_BN.dtype == torch.bool,
            f"padding_mask must be bool of shape {tuple(tokens)}",
        )
        in_range = (self.expert_indices >= 0) & (self.expert_indices < E)
        _require(bool(in_range.all()), f"expert_indices must lie in [0, {E})")
        _require(
            torch.equal(self.capacity_mask, self.drop_reason == DropReason.KEPT.value),
            "capacity_mask and drop_reason disagree",
        )
        _require(
            not self.dropless or bool(self.capacity_mask.all()),
            "the routing is dropless, but not every slot is kept",
        )
        known = torch.isin(
            self.drop_reason,
            torch.tensor(list(DropReason), dtype=torch.int8, device=self.drop_reason.device),
        )
        _require(bool(known.all()), "drop_reason holds a code that is no DropReason")
        padding = self.drop_reason == DropReason.PADDING.value
        _require(not bool(padding[real_BN].any()), "a real token has the reason PADDING")
        over = self.drop_reason == DropReason.OVER_CAPACITY.value
        _require(
            self.capacity is not None or not bool(over.any()),
            "a slot is over capacity, but capacity is None",
        )
        chosen_BNE = torch.zeros(*tokens, E, dtype=torch.int64, device=self.logits.device)
        chosen_BNE.scatter_add_(-1, self.expert_indices, self.selected_mask.long())
        _require(bool((chosen_BNE <= 1).all()), "an expert is chosen twice for one token")
        _require(
            not bool(self.selected_mask[~real_BN].any()), "a padding token has a selected slot"
        )
        if self.capacity is not None:
            kept = _pool(self._count(self.capacity_mask), self.capacity_scope)
            most = int(kept.max()) if kept.numel() else 0
            _require(
                most <= self.capacity, f"an expert keeps {most} slots, capacity is {self.capacity}"
            )
        if self.normalized:
            off = (self.expert_weights.sum(-1) - 1).abs()[real_BN]
            _require(bool((off < 1e-5).all()), "expert_weights of a token must sum to 1")
        for name, loss in self.losses.items():
            _require(
                loss.ndim == 0 and bool(loss.isfinite()),
                f"losses[{name!r}] must be a finite scalar",
            )
        return self

    def _count(self, mask_BNK: Tensor) -> Tensor:
        """(B, E) int64: how many slots under the mask went to each expert. scatter_add_, since bincount waits for the GPU."""
        B = self.expert_indices.shape[0]
        counts_BE = torch.zeros(
            B, self.n_experts, dtype=torch.int64, device=self.expert_indices.device
        )
        return counts_BE.scatter_add_(
            -1, self.expert_indices.flatten(1), mask_BNK.flatten(1).long()
        )


def _pool(values_BE: Tensor, scope: str) -> Tensor:
    one_of(("batch", "sequence"), scope=scope)
    return values_BE.sum(0) if scope == "batch" else values_BE


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"Routing.check: {message}")
