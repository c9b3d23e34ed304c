"""What is told of a repeated measurement: the mean and the spread."""

from statistics import fmean

SEEDS = (0, 1, 2)  # one repetition each


def band(values: list[float], form: str = ".2f", spread: str = ".2f") -> str:
    """Mean ± half the spread."""
    return f"{fmean(values):{form}} ± {(max(values) - min(values)) / 2:{spread}}"
