"""Capacity: how many slots an expert may keep, who is turned away, and what becomes of them."""

from .formulas import FORMULAS, expert_capacity
from .policies import DROP_POLICIES, queue_places
from .rule import OVERFLOWS, CapacityRule, apply
