"""Large numbers in units one can read."""

from moe_tools.units import count

__all__ = ["count", "in_bytes"]

BYTES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))


def in_bytes(largest: float) -> tuple[str, float]:
    """The decimal unit in which a figure up to ``largest`` bytes is written, and its size."""
    return next(((unit, size) for unit, size in BYTES if largest >= size), BYTES[-1])
