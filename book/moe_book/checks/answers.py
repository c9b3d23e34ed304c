"""What a reader handed in: called, compared with what it should be, and shown in words."""

import inspect
import linecache
import math
import traceback
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch

_DIGITS = (3, 4, 5, 6, 8, 10, 15)


def call(answer: Any, case: tuple) -> Any:
    """What the answer, a function or a value, gives for a case."""
    return answer(*copies(case)) if callable(answer) else answer


def copies(case: tuple) -> list:
    """Fresh arguments for every call, so that an answer that writes into its input harms nobody."""
    return [
        item.detach().clone() if isinstance(item, torch.Tensor) else deepcopy(item) for item in case
    ]


def is_nothing(output: Any) -> bool:
    """The ... of an exercise nobody has answered yet."""
    return output is None or output is Ellipsis


# Comparing


def same(a: Any, b: Any, tolerance: float, unordered: bool = False) -> bool:
    """Equal as text, or as numbers of the same shape within the tolerance; tuples and dicts item by item.

    With unordered, the order along the last dimension does not count.
    """
    try:
        return _equal(a, b, tolerance, unordered)
    except Exception:  # not comparable at all: a meta tensor, an object of the reader's own
        return False


def _equal(a: Any, b: Any, tolerance: float, unordered: bool) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        both = isinstance(a, str) and isinstance(b, str)
        return both and a.strip().casefold() == b.strip().casefold()
    if isinstance(b, dict):
        return (
            isinstance(a, dict)
            and a.keys() == b.keys()
            and all(_equal(a[key], b[key], tolerance, unordered) for key in b)
        )
    if isinstance(b, tuple):
        a = a.tolist() if hasattr(a, "tolist") else a  # several numbers may come as one array
        return (
            isinstance(a, (tuple, list))
            and len(a) == len(b)
            and all(_equal(x, y, tolerance, unordered) for x, y in zip(a, b))
        )
    a, b = _numbers(a), _numbers(b)
    if unordered and a.ndim and a.shape == b.shape:
        a, b = a.sort(-1).values, b.sort(-1).values
    return a.shape == b.shape and _close(a, b, tolerance)


def _numbers(value: Any) -> torch.Tensor:
    numbers = torch.as_tensor(value).detach().cpu()
    if numbers.is_complex():
        raise TypeError("a complex number is not one of ours")
    return numbers.double()


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def gradient_stops(
    answer: Callable, right: Callable, case: tuple, at: int, tolerance: float
) -> str | None:
    """Why the answer's output passes no gradient, or another one, to argument number ``at``; None where it does."""
    gradients = []
    for function in (right, answer):
        arguments = copies(case)
        arguments[at] = arguments[at].requires_grad_()
        try:
            output = function(*arguments)
            probe = torch.linspace(1, 2, output.numel(), dtype=output.dtype).view(output.shape)
            (output * probe).sum().backward()
        except Exception:  # no tensor, no graph, or .numpy() on what needs a gradient
            return "no gradient flows back"
        if arguments[at].grad is None:
            return "no gradient flows back"
        gradients.append(arguments[at].grad.double())
    scale = float(gradients[0].abs().max())
    near = torch.allclose(*gradients, rtol=1e-3, atol=max(tolerance * scale, 1e-12))
    return None if near else "the gradient that flows back is another one than the formula's"


# Showing


def differ(got: Any, expected: Any) -> tuple[str, str, str]:
    """Both as text, with enough digits to tell them apart, and a remark on how they differ."""
    for digits in _DIGITS:
        pair = show(got, digits), show(expected, digits)
        if pair[0] != pair[1]:
            break
    try:
        remark = _remark(got, expected)
    except Exception:  # an output of another kind altogether
        remark = ""
    return *pair, remark


def _remark(got: Any, expected: Any) -> str:
    if isinstance(got, str) and not isinstance(expected, (str, tuple, dict)):
        return "That is a text, not a number."
    if isinstance(expected, dict) or isinstance(got, dict):
        return ""
    if isinstance(expected, tuple) and len({_numbers(item).shape for item in expected}) > 1:
        return ""
    if isinstance(expected, tuple):
        expected = torch.stack([_numbers(item) for item in expected])
    a, b = _numbers(got), _numbers(expected)
    if a.shape != b.shape:
        if a.numel() == b.numel() and _close(a.flatten(), b.flatten(), 1e-4):
            return f"The numbers are right, but their shape is {tuple(a.shape)} instead of {tuple(b.shape)}."
        return f"The shape is {tuple(a.shape)}, and should be {tuple(b.shape)}."
    if a.numel() < 2:
        return ""
    ratio = (a / b)[b != 0]
    if (
        len(ratio) > 1
        and (a[b == 0] == 0).all()
        and ratio.isfinite().all()
        and abs(ratio[0] - 1) > 1e-3
        and _close(ratio, ratio[:1].expand_as(ratio), 1e-5)
    ):
        return f"Everywhere yours is {_text(float(ratio[0]), 4)} times what it should be."
    if a.numel() <= 6:
        return ""
    place = (~torch.isclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)).nonzero()
    if not len(place):
        return ""
    place = tuple(place[0].tolist())
    mine, theirs, _ = differ(float(a[place]), float(b[place]))
    return f"The first difference is at {list(place)}: {mine} instead of {theirs}."


def show(output: Any, digits: int = 3, limit: int = 80) -> str:
    """Short and the same on every machine; never raises, whatever the output is."""
    try:
        text = _text(output, digits)
    except Exception:  # a meta tensor, a list that holds itself, a __repr__ that fails
        text = f"a {type(output).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _text(output: Any, digits: int) -> str:
    if hasattr(output, "tolist"):  # a tensor, an array
        output = output.tolist()
    if isinstance(output, float):
        return f"{output:.{digits}g}" if math.isfinite(output) else str(output)
    if isinstance(output, (list, tuple)):
        return "[" + ", ".join(_text(item, digits) for item in output) + "]"
    if isinstance(output, dict):
        return (
            "{" + ", ".join(f"{key}: {_text(item, digits)}" for key, item in output.items()) + "}"
        )
    if isinstance(output, str):
        return repr(output)
    return getattr(output, "__name__", None) or str(output)


def show_case(right: Any, answer: Any, case: tuple) -> str:
    """The call of a case, such as ``places(T=1000, K=1, E=8, factor=1.25)``; large arrays as their shape."""
    names = list(inspect.signature(right).parameters) if callable(right) else []
    words = []
    for i, item in enumerate(case):
        name = names[i] if i < len(names) else f"argument {i + 1}"
        size = item.numel() if isinstance(item, torch.Tensor) else 0
        value = f"{tuple(item.shape)} numbers" if size > 16 else show(item, 4, limit=120)
        words.append(f"{name}={value}")
    called = getattr(answer, "__name__", "answer")
    return f"{'answer' if called == '<lambda>' else called}({', '.join(words)})"


def show_error(error: BaseException, answer: Any) -> str:
    """What was raised, in one line, and at which line of the reader's code."""
    code = getattr(answer, "__code__", None) or getattr(type(answer).__call__, "__code__", None)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if code is not None and frame.filename == code.co_filename
    ]
    text = " ".join(str(error).split())
    message = type(error).__name__ + (
        f": {text[:160]}{'...' if len(text) > 160 else ''}" if text else ""
    )
    if not frames:
        return f"Your code raised {message}"
    line = linecache.getline(frames[-1].filename, frames[-1].lineno).strip()
    at = f"line {frames[-1].lineno}" + (f", `{line[:80]}`" if line else "")
    return f"Your code raised {message} (in {at})"
