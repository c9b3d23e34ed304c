"""Capacity: how many slots an expert may keep (formulas), who is turned away (policies), and what becomes of them (rule)."""

from .formulas import FORMULAS, expert_capacity
from .policies import DROP_POLICIES, queue_places
from .rule import OVERFLOWS, CapacityRule, apply

__all__ = [
    "DROP_POLICIES",
    "FORMULAS",
    "OVERFLOWS",
    "CapacityRule",
    "apply",
    "expert_capacity",
    "queue_places",
]
