"""Capacity: how many slots an expert may keep, who is turned away, and what becomes of them."""

from dataclasses import dataclass, fields, replace

from ..routing import DropReason, Routing
from ..validate import at_least, one_of, whole
from .formulas import FORMULAS, expert_capacity, needs_largest_load
from .policies import DROP_POLICIES, queue_places

__all__ = [
    "DROP_POLICIES",
    "FORMULAS",
    "OVERFLOWS",
    "CapacityRule",
    "apply",
    "expert_capacity",
    "queue_places",
]

OVERFLOWS = ("drop", "shared")


def apply(
    routing: Routing,
    *,
    capacity_factor: float = 1.0,
    expert_capacity: int | None = None,
    formula: str = "exact",
    min_capacity: int | None = None,
    scope: str = "batch",
    drop_policy: str = "position",
    overflow: str = "drop",
) -> Routing:
    """Drop the slots for which there is no room; they keep their index and weight, with the reason OVER_CAPACITY.

    Args:
        routing: as a router made it; slots that are not kept already do not queue.
        capacity_factor, formula, min_capacity: see ``moe_core.capacity.expert_capacity``; K is the number of slots, so E for
            routers with K = E slots. Tutel's and MegaBlocks' factor 0 reads the loads, so that a GPU has to be waited for;
            everything else is known from shapes.
        expert_capacity: this many places, whatever the shapes; the factor and the formula are then not used.
        scope: "batch": one queue per expert and C from B*N tokens; "sequence": every sequence has its own queues, and C
            is counted from its N tokens.
        drop_policy: who is turned away, a name in ``DROP_POLICIES``.
        overflow: "drop": a dropped slot adds nothing. "shared": its weight goes to the shared expert, see
            ``Routing.overflow_weight``.

    Raises:
        ValueError: a name is unknown or a number out of range.
    """
    one_of(OVERFLOWS, overflow=overflow)
    capacity = expert_capacity
    if capacity is None:
        capacity = _places(routing, capacity_factor, formula, min_capacity, scope)
    whole(0, expert_capacity=capacity)
    over_BNK = routing.capacity_mask & (queue_places(routing, drop_policy, scope) >= capacity)
    return replace(
        routing,
        capacity=capacity,
        capacity_scope=scope,
        overflow=overflow,
        dropless=False,
        capacity_mask=routing.capacity_mask & ~over_BNK,
        drop_reason=routing.drop_reason.masked_fill(over_BNK, DropReason.OVER_CAPACITY.value),
    )


def _places(
    routing: Routing, capacity_factor: float, formula: str, min_capacity: int | None, scope: str
) -> int:
    B, N, K = routing.expert_indices.shape
    load = None
    if needs_largest_load(formula, capacity_factor):
        loads = routing.slots_per_expert(scope)
        load = int(loads.max()) if loads.numel() else 0
    return expert_capacity(
        N if scope == "sequence" else B * N,
        K,
        routing.n_experts,
        capacity_factor,
        formula=formula,
        min_capacity=min_capacity,
        largest_load=load,
    )


@dataclass(frozen=True)
class CapacityRule:
    """All that can be said about capacity; give it to a router or a config in place of the number ``capacity_factor``.

    Attributes:
        factor: places per slot at perfect balance, in training. None: dropless.
        eval_factor: the same in eval; "as in training", or None: dropless.
        expert_capacity: a fixed number of places instead of any factor, in training and in eval (unless eval_factor=None).
        formula, min_capacity, scope, drop_policy, overflow: see ``apply``. With drop_policy="random" eval falls back to
            "position": a model in eval gives the same answer twice.

    Raises:
        ValueError: a name is unknown, a number out of range, or a number is given twice.

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
            if self.factor is not None or self.eval_factor not in (None, "as in training"):
                raise ValueError(
                    f"give either expert_capacity={self.expert_capacity} or a factor, not both"
                )
            if self.formula != "exact" or self.min_capacity is not None:
                raise ValueError(
                    f"expert_capacity={self.expert_capacity} is not computed: formula and min_capacity have no use"
                )

    @classmethod
    def of(cls, capacity_factor: "float | dict | CapacityRule | None") -> "CapacityRule":
        """The rule that the number alone stands for; a rule stays as it is, also when it comes as a dict out of JSON."""
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
        return self.expert_capacity is None and self._factor(training) is None

    def apply(self, routing: Routing, *, training: bool) -> Routing:
        """The routing after this rule: unchanged when dropless, see ``moe_core.capacity.apply`` otherwise."""
        if self.dropless(training):
            return routing
        policy = "position" if self.drop_policy == "random" and not training else self.drop_policy
        return apply(
            routing,
            capacity_factor=self._factor(training),
            expert_capacity=self.expert_capacity,
            formula=self.formula,
            min_capacity=self.min_capacity,
            scope=self.scope,
            drop_policy=policy,
            overflow=self.overflow,
        )

    def _factor(self, training: bool) -> float | None:
        return self.factor if training or isinstance(self.eval_factor, str) else self.eval_factor
