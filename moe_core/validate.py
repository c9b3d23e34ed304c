"""Checks of arguments, so that every error names the argument, its value and the allowed range."""


def at_least(lowest: float, **arguments: float) -> None:
    """Raise ValueError for the first argument that is below ``lowest``, infinite, or not a number at all."""
    for name, value in arguments.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not lowest <= value < float("inf")
        ):
            raise ValueError(f"{name}={value!r} must be at least {lowest} and finite")


def whole(lowest: int, **arguments: int) -> None:
    """Raise ValueError for the first argument that is not a whole number >= ``lowest``."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise ValueError(f"{name}={value!r} must be a whole number, at least {lowest}")


def between(lowest: float, highest: float, **arguments: float) -> None:
    """Raise ValueError for the first argument outside [lowest, highest)."""
    for name, value in arguments.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not lowest <= value < highest
        ):
            raise ValueError(f"{name}={value!r} must be at least {lowest} and below {highest}")


def boolean(**arguments: bool) -> None:
    """Raise ValueError for the first argument that is neither True nor False."""
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be True or False")


def one_of(allowed, **arguments: str) -> None:
    """Raise ValueError for the first argument that is not among ``allowed``."""
    for name, value in arguments.items():
        if value not in tuple(allowed):
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")


def top_k_fits(top_k: int, n_experts: int) -> None:
    """Raise ValueError unless 1 <= top_k <= n_experts, both whole numbers."""
    whole(1, n_experts=n_experts)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k={top_k!r} must be between 1 and n_experts={n_experts}")


def expansion_fits(expansion: float, n_experts: int) -> None:
    """Raise ValueError unless 0 < expansion <= n_experts: the mean number of experts per token, not always a whole one."""
    whole(1, n_experts=n_experts)
    if (
        isinstance(expansion, bool)
        or not isinstance(expansion, (int, float))
        or not 0 < expansion <= n_experts
    ):
        raise ValueError(
            f"expansion={expansion!r} must be above 0 and at most n_experts={n_experts}"
        )
