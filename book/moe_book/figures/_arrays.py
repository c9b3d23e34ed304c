"""Tensors, arrays and lists as numpy arrays."""

import numpy as np


def array(values, ndim: int | None = None, name: str = "values") -> np.ndarray:
    """A float64 (or bool, or int64) numpy copy of a tensor, array or nested list.

    Raises:
        ValueError: it does not have ndim dimensions.
    """
    if hasattr(values, "detach"):
        values = (
            values.detach().cpu().numpy()
            if values.dtype.itemsize >= 4 or not values.is_floating_point()
            else values.detach().float().cpu().numpy()
        )
    out = np.asarray(values)
    out = out.astype(np.float64) if out.dtype.kind == "f" else out
    if ndim is not None and out.ndim != ndim:
        raise ValueError(
            f"{name} has shape {out.shape}; it must have {ndim} dimension{'s' if ndim > 1 else ''}"
        )
    return out
