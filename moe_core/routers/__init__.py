"""Routers: one file, one idea. Each maps tokens (B, N, D) to a ``Routing``."""

from .base import Router
from .topk import TopKRouter

__all__ = ["Router", "TopKRouter"]
