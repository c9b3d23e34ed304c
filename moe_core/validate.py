"""Checks of arguments: each raises ValueError with the argument's name, value and allowed range."""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # True is an int to Python


def at_least(lowest: float, **arguments: float) -> None:
    """Refuse what is below ``lowest``, infinite, or not a number at all."""
    for name, value in arguments.items():
        if not _is_number(value) or not lowest <= value < float("inf"):  # NaN fails, too
            raise ValueError(f"{name}={value!r} must be at least {lowest} and finite")


def whole(lowest: int, **arguments: int) -> None:
    """Refuse what is not a whole number >= ``lowest``."""
    for name, value in arguments.items():
        if not _is_whole(value) or value < lowest:
            raise ValueError(f"{name}={value!r} must be a whole number, at least {lowest}")


def between(lowest: float, highest: float, **arguments: float) -> None:
    """Refuse what is outside [lowest, highest)."""
    for name, value in arguments.items():
        if not _is_number(value) or not lowest <= value < highest:
            raise ValueError(f"{name}={value!r} must be at least {lowest} and below {highest}")


def boolean(**arguments: bool) -> None:
    """Refuse what is neither True nor False."""
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be True or False")


def one_of(allowed, **arguments: str) -> None:
    """Refuse what is not among ``allowed``."""
    for name, value in arguments.items():
        if value not in tuple(allowed):
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")


def top_k_fits(top_k: int, n_experts: int) -> None:
    """Refuse a K outside 1..E."""
    whole(1, n_experts=n_experts)
    if not _is_whole(top_k) or not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k={top_k!r} must be between 1 and n_experts={n_experts}")


def expansion_fits(expansion: float, n_experts: int) -> None:
    """Refuse a mean number of experts per token outside (0, E]; it may be a fraction."""
    whole(1, n_experts=n_experts)
    if not _is_number(expansion) or not 0 < expansion <= n_experts:
        allowed = f"above 0 and at most n_experts={n_experts}"
        raise ValueError(f"expansion={expansion!r} must be {allowed}")
