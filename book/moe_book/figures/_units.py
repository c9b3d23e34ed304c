"""Large numbers in units one can read."""

BYTES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))
COUNTS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))


def in_bytes(largest: float) -> tuple[str, float]:
    """The decimal unit in which a figure up to ``largest`` bytes is written, and its size."""
    return next(((unit, size) for unit, size in BYTES if largest >= size), BYTES[-1])


def count(n: float) -> str:
    """Three digits and a letter for thousands, millions, billions (as models' names have it) or trillions: 671B, 37.6B, 107M."""
    unit, size = next(((unit, size) for unit, size in COUNTS if n >= 0.9995 * size), COUNTS[-1])
    return f"{n / size:.3g}{unit}" if n < 999.5 * size else f"{n / size:.0f}{unit}"
