"""What an exercise is: cases, the right answer, and the wrong ideas that people really have."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from html import escape
from typing import Any

import torch

_NOTHING = (None, Ellipsis)


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check; shows itself in a notebook.

    Attributes:
        number: of the exercise. status: "right", "wrong" or "not attempted".
        message: what the checker has to say. idea: name of the recognised wrong idea, or None.
    """

    number: str
    status: str
    message: str
    idea: str | None = None

    @property
    def right(self) -> bool:
        """True when the answer was accepted."""
        return self.status == "right"

    def __repr__(self) -> str:
        return f"Exercise {self.number}: {self.status}. {self.message}"

    def _repr_html_(self) -> str:
        css = self.status.replace(" ", "-")
        return (
            f'<div class="moe-check {css}" role="status"><strong>Exercise {escape(self.number)}: {escape(self.status)}.</strong> '
            f"{escape(self.message)}</div>"
        )


@dataclass(frozen=True)
class Idea:
    """A wrong idea, recognised by what it produces.

    Attributes:
        name: short, for tests. answer: the function (or value) a reader with this idea writes.
        says: what the idea is, why it fails, and where to reread.
    """

    name: str
    answer: Any
    says: str


@dataclass(frozen=True)
class Exercise:
    """One exercise with its checker.

    Attributes:
        number: "2.3". right: a right answer, function or value.
        ideas: the wrong ideas to recognise. Where two look alike on every case, the first is named.
        cases: argument tuples the answer is called with; one empty tuple for an answer that is a value.
        praise: said when the answer is right: what it shows.
        tolerance: absolute and relative, for numbers.
        accepts: accepts(output, *case) -> bool decides instead of comparing with ``right``, where many answers are right.
    """

    number: str
    right: Any
    ideas: tuple[Idea, ...]
    praise: str
    cases: tuple[tuple, ...] = ((),)
    tolerance: float = 1e-4
    accepts: Callable[..., bool] | None = None

    def check(self, answer: Any) -> Verdict:
        """Judge an answer; never raises for anything the answer does."""
        try:
            outputs = [_call(answer, case) for case in self.cases]
        except NotImplementedError:
            return self._not_attempted()
        except (
            Exception
        ) as error:  # whatever a reader's code raises is news for the reader, not for us
            return Verdict(
                self.number, "wrong", f"Your code raised {type(error).__name__}: {error}"
            )
        if all(_is_nothing(output) for output in outputs):
            return self._not_attempted()
        verdicts = [self._accepted(output, case) for output, case in zip(outputs, self.cases)]
        if all(verdicts):
            return Verdict(self.number, "right", self.praise)
        for idea in self.ideas:
            if all(
                _same(output, _call(idea.answer, case), self.tolerance)
                for output, case in zip(outputs, self.cases)
            ):
                return Verdict(self.number, "wrong", idea.says, idea.name)
        first = verdicts.index(False)
        message = f"Case {first + 1} of {len(self.cases)}: got {_show(outputs[first])}"
        if self.accepts is None:
            message += f", expected {_show(_call(self.right, self.cases[first]))}"
        return Verdict(
            self.number,
            "wrong",
            message + ". The checker does not recognise the idea behind it; the hints may help.",
        )

    def _accepted(self, output: Any, case: tuple) -> bool:
        if self.accepts is None:
            return _same(output, _call(self.right, case), self.tolerance)
        try:
            return not _is_nothing(output) and bool(self.accepts(output, *_copies(case)))
        except Exception:  # an output of the wrong kind altogether
            return False

    def _not_attempted(self) -> Verdict:
        return Verdict(
            self.number,
            "not attempted",
            "Nothing came back: write your answer in place of the ... (and end it with a return).",
        )


def flipped(statements: str) -> list[str]:
    """Answers to true-or-false statements, such as "TFF", each with one place wrong: "FFF", "TTF", "TFT"."""
    other = {"T": "F", "F": "T"}
    return [statements[:i] + other[said] + statements[i + 1 :] for i, said in enumerate(statements)]


def _call(answer: Any, case: tuple) -> Any:
    return answer(*_copies(case)) if callable(answer) else answer


def _copies(case: tuple) -> list:
    """Fresh arguments for every call, so that an answer that writes into its input harms nobody."""
    return [
        item.detach().clone() if isinstance(item, torch.Tensor) else deepcopy(item) for item in case
    ]


def _is_nothing(output: Any) -> bool:
    return any(output is nothing for nothing in _NOTHING)


def _same(a: Any, b: Any, tolerance: float) -> bool:
    """Equal as text, or as numbers of the same shape within the tolerance; tuples and dicts item by item."""
    try:
        return _equal(a, b, tolerance)
    except (
        Exception
    ):  # not comparable at all, such as a meta tensor or an object of the reader's own
        return False


def _equal(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return (
            isinstance(a, str)
            and isinstance(b, str)
            and a.strip().casefold() == b.strip().casefold()
        )
    if isinstance(b, dict):
        return (
            isinstance(a, dict)
            and a.keys() == b.keys()
            and all(_equal(a[key], b[key], tolerance) for key in b)
        )
    if isinstance(b, tuple):
        a = (
            a.tolist() if isinstance(a, torch.Tensor) and a.ndim else a
        )  # several numbers may come as one tensor
        return (
            isinstance(a, (tuple, list))
            and len(a) == len(b)
            and all(_equal(x, y, tolerance) for x, y in zip(a, b))
        )
    a, b = torch.as_tensor(a).detach().cpu().double(), torch.as_tensor(b).detach().cpu().double()
    return a.shape == b.shape and torch.allclose(
        a, b, rtol=tolerance, atol=tolerance, equal_nan=True
    )


def _show(output: Any) -> str:
    """Short and the same on every machine: numbers to three digits; never raises, whatever the output is."""
    try:
        text = _text(output)
    except Exception:  # a meta tensor, a list that holds itself, a __repr__ that fails
        text = f"a {type(output).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _text(output: Any) -> str:
    if isinstance(output, torch.Tensor):
        output = output.detach().tolist()
    if isinstance(output, float):
        return f"{output:.3g}"
    if isinstance(output, (list, tuple)):
        return "[" + ", ".join(map(_text, output)) + "]"
    return str(output)
