"""Large numbers, bytes and seconds in units one can read."""

COUNTS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))
DURATIONS = (("days", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3))


def count(n: float) -> str:
    """Three digits and a letter, billions as models' names have them: 671B, 37.6B, 107M, 12k."""
    unit, size = next(((unit, size) for unit, size in COUNTS if n >= 0.9995 * size), COUNTS[-1])
    return f"{n / size:.3g}{unit}" if n < 999.5 * size else f"{n / size:.0f}{unit}"


def gigabytes(n_bytes: float) -> str:
    """Bytes in GB or MB; 1 GB = 1e9 bytes."""
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.3g} MB"


def duration(seconds: float) -> str:
    """In the largest unit of which there is one, microseconds at least."""
    for name, unit in DURATIONS:
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e6:.3g} us"
