"""The rule of capacity: how many slots an expert may keep, and what becomes of the others."""

from dataclasses import dataclass, fields, replace

from ..routing import DropReason, Routing
from ..validate import at_least, one_of, whole
from .formulas import FLOORS, FORMULAS, ZERO_MEANS_LARGEST_LOAD, as_written
from .policies import DROP_POLICIES, queue_places

OVERFLOWS = ("drop", "shared")


@dataclass(frozen=True)
class CapacityRule:
    """All that can be said about capacity, in place of the number ``capacity_factor``.

    Attributes:
        factor: places per slot at perfect balance, in training. None: dropless.
        eval_factor: the same in eval; "as in training", or None: dropless.
        expert_capacity: a fixed number of places instead, also in eval (unless eval_factor=None).
        formula, min_capacity: see ``expert_capacity``; K is the number of slots.
        scope: "batch": one queue per expert and C from B*N tokens; "sequence": each sequence has
            its own queues, and C comes from its N tokens.
        drop_policy: a name in ``DROP_POLICIES``; in eval "random" is "position".
        overflow: "drop": a dropped slot adds nothing. "shared": the shared expert gets its weight.

    Raises ValueError where a name is unknown, a number out of range, or given twice.
    Source of the two factors: Fedus et al. 2021, 1.25 in training and 2 in eval.
    """

    factor: float | None = None
    eval_factor: float | str | None = "as in training"
    expert_capacity: int | None = None
    formula: str = "exact"
    min_capacity: int | None = None
    scope: str = "batch"
    drop_policy: str = "position"
    overflow: str = "drop"

    def __post_init__(self):
        one_of(FORMULAS, formula=self.formula)
        one_of(("batch", "sequence"), scope=self.scope)
        one_of(DROP_POLICIES, drop_policy=self.drop_policy)
        one_of(OVERFLOWS, overflow=self.overflow)
        if self.factor is not None:
            at_least(0, factor=self.factor)
        if isinstance(self.eval_factor, str):
            one_of(("as in training",), eval_factor=self.eval_factor)
        elif self.eval_factor is not None:
            at_least(0, eval_factor=self.eval_factor)
        if self.min_capacity is not None:
            whole(0, min_capacity=self.min_capacity)
        if self.expert_capacity is not None:
            whole(0, expert_capacity=self.expert_capacity)
            fixed = f"expert_capacity={self.expert_capacity}"
            if self.factor is not None or self.eval_factor not in (None, "as in training"):
                raise ValueError(f"give either {fixed} or a factor, not both")
            if self.formula != "exact" or self.min_capacity is not None:
                raise ValueError(f"{fixed} is not computed: formula and min_capacity have no use")
        # Decided here, once: the factor of each mode, as a fraction where decimals are exact.
        factors = (self._eval_factor, self.factor)
        if self.formula == "exact":
            factors = tuple(None if factor is None else as_written(factor) for factor in factors)
        object.__setattr__(self, "_factors", factors)  # [training]

    @property
    def _eval_factor(self) -> float | None:
        return self.factor if isinstance(self.eval_factor, str) else self.eval_factor

    @classmethod
    def of(cls, capacity_factor: "float | dict | CapacityRule | None") -> "CapacityRule":
        """The rule that the number alone stands for; a rule, or one as a dict, stays what it is."""
        if isinstance(capacity_factor, CapacityRule):
            return capacity_factor
        if isinstance(capacity_factor, dict):
            unknown = sorted(set(capacity_factor) - {f.name for f in fields(cls)})
            if unknown:
                raise ValueError(f"unknown keys in CapacityRule: {', '.join(unknown)}")
            return cls(**capacity_factor)
        if capacity_factor is not None:
            at_least(0, capacity_factor=capacity_factor)
        return cls(factor=capacity_factor)

    def dropless(self, training: bool) -> bool:
        """Whether nobody is ever turned away, in this mode."""
        if not training and self.eval_factor is None:
            return True
        return self.expert_capacity is None and self._factors[training] is None

    def apply(self, routing: Routing, *, training: bool) -> Routing:
        """Drop the slots without room; they keep index and weight, and the reason OVER_CAPACITY."""
        if self.dropless(training):
            return routing
        # A model in eval gives the same answer twice.
        policy = self.drop_policy if training or self.drop_policy != "random" else "position"
        capacity = self.places(routing, training)
        places_BNK = queue_places(routing, policy, self.scope)
        over_BNK = routing.capacity_mask & (places_BNK >= capacity)
        kept_BNK = routing.capacity_mask & ~over_BNK
        reasons = routing.drop_reason.masked_fill(over_BNK, DropReason.OVER_CAPACITY.value)
        rule = {"capacity": capacity, "capacity_scope": self.scope, "overflow": self.overflow}
        return replace(routing, dropless=False, capacity_mask=kept_BNK, drop_reason=reasons, **rule)

    def places(self, routing: Routing, training: bool) -> int:
        """C for a routing of this shape, in a mode that is not dropless."""
        if self.expert_capacity is not None:
            return self.expert_capacity
        B, N, K = routing.expert_indices.shape
        factor, E = self._factors[training], routing.scores.shape[-1]
        floor = FLOORS[self.formula] if self.min_capacity is None else self.min_capacity
        if factor == 0 and self.formula in ZERO_MEANS_LARGEST_LOAD:
            loads = routing.slots_per_expert(self.scope)  # its maximum synchronises with a GPU
            return max(int(loads.max()) if loads.numel() else 0, floor)
        n_tokens = N if self.scope == "sequence" else B * N
        return max(FORMULAS[self.formula](n_tokens, K, E, factor), floor)


def apply(
    routing: Routing,
    *,
    capacity_factor: float | None = 1.0,
    expert_capacity: int | None = None,
    **rule,
) -> Routing:
    """The routing after a ``CapacityRule`` of these fields."""
    # The factor has a default, so a fixed number of places takes precedence.
    factor = capacity_factor if expert_capacity is None else None
    rule = CapacityRule(factor, expert_capacity=expert_capacity, **rule)
    return rule.apply(routing, training=True)
