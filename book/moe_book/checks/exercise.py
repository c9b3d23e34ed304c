"""What an exercise is: cases, the right answer, and the wrong ideas that people really have."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import torch

from .answers import (
    call,
    copies,
    differ,
    gradient_stops,
    is_nothing,
    same,
    show,
    show_case,
    show_error,
)

_UNKNOWN = "The checker does not recognise the idea behind it; the hints may help."


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
        accepts: accepts(output, *case) decides instead of comparing with ``right``, where many answers are right: True, False, or a
            text that says what is wrong.
        unordered: the order along the last dimension does not count.
        differentiable: name of the argument a gradient should flow back to. A right value that passes none is right, with a remark.
        reads: turns what was handed in into what is compared, where it may be written in several ways; None for what it cannot read.
        asks: what to hand in, said to those whose answer ``reads`` cannot read.
    """

    number: str
    right: Any
    ideas: tuple[Idea, ...]
    praise: str
    cases: tuple[tuple, ...] = ((),)
    tolerance: float = 1e-4
    accepts: Callable[..., bool | str] | None = None
    unordered: bool = False
    differentiable: str | None = None
    reads: Callable[[Any], Any] | None = None
    asks: str = ""

    def check(self, answer: Any) -> Verdict:
        """Judge an answer; never raises for anything the answer does."""
        if is_nothing(answer):
            return self._not_attempted()
        if callable(self.right) and not callable(answer):
            return self._wrong(
                f"You handed in {show(answer)}. Hand in the function itself: its name, without brackets behind it."
            )
        outputs = []
        for case in self.cases:
            try:
                outputs.append(call(answer, case))
            except NotImplementedError:
                return self._not_attempted()
            except (Exception, SystemExit) as error:  # news for the reader, not for us
                return self._wrong(f"{show_error(error, answer)}.{self._place(answer, case)}")
        if all(is_nothing(output) for output in outputs):
            return self._not_attempted()
        if self.reads is not None:
            outputs = [self._read(output) for output in outputs]
            if None in outputs:
                return self._wrong(self.asks)
        found = [self._accepted(output, case) for output, case in zip(outputs, self.cases)]
        if all(one is True for one in found):
            return Verdict(self.number, "right", self.praise + self._remark(answer))
        for idea in self.ideas:
            if all(
                same(output, call(idea.answer, case), self.tolerance, self.unordered)
                for output, case in zip(outputs, self.cases)
            ):
                return Verdict(self.number, "wrong", idea.says, idea.name)
        first = next(i for i, one in enumerate(found) if one is not True)
        return self._wrong(self._unknown(answer, outputs[first], self.cases[first], found[first]))

    def _accepted(self, output: Any, case: tuple) -> bool | str:
        if self.accepts is None:
            return same(output, call(self.right, case), self.tolerance, self.unordered)
        try:
            if is_nothing(output):
                return False
            found = self.accepts(output, *copies(case))
            return found if isinstance(found, str) else bool(found)
        except Exception:  # an output of the wrong kind altogether
            return False

    def _read(self, output: Any) -> Any:
        try:
            return self.reads(output)
        except Exception:  # a thing of another kind
            return None

    def _unknown(self, answer: Any, output: Any, case: tuple, found: bool | str) -> str:
        place = self._place(answer, case)
        if isinstance(found, str):
            return f"{found}{place} gave {show(output)}." if place else found
        if not case:  # what is expected would be the solution
            return f"{show(output)} is not right. {_UNKNOWN}"
        if self.accepts is not None:
            return f"{place.strip()} gave {show(output)}, which is not right. {_UNKNOWN}"
        got, expected, remark = differ(output, call(self.right, case))
        remark = remark and f" {remark}"
        return f"{place.strip()} gave {got}, expected {expected}.{remark} {_UNKNOWN}"

    def _place(self, answer: Any, case: tuple) -> str:
        """Which case, and with which inputs; a text that begins with a blank, or nothing for a value."""
        if not case:
            return ""
        number = next(i for i, one in enumerate(self.cases) if one is case) + 1
        return f" Case {number} of {len(self.cases)}: {show_case(self.right, answer, case)}"

    def _remark(self, answer: Any) -> str:
        if self.differentiable is None:
            return ""
        at = list(inspect.signature(self.right).parameters).index(self.differentiable)
        for case in self.cases:
            if isinstance(case[at], torch.Tensor) and case[at].is_floating_point():
                why = gradient_stops(answer, self.right, case, at, self.tolerance)
                if why is not None:
                    return (
                        f" One remark: the value is right, but {why} to {self.differentiable}, so what comes before it would not "
                        "learn as it should. Stay with torch operations from the argument to the result: no .item(), .detach(), numpy or no_grad."
                    )
        return ""

    def _wrong(self, message: str) -> Verdict:
        return Verdict(self.number, "wrong", message)

    def _not_attempted(self) -> Verdict:
        return Verdict(
            self.number,
            "not attempted",
            "Nothing came back: write your answer in place of the ... (and end it with a return).",
        )


# Kinds of exercises whose answer is not a function


def statements(number: str, word: str, *, says: tuple[str, ...], praise: str) -> Exercise:
    """True or false: the answer is a word such as "TFF", or a list of letters or booleans.

    Args:
        word: the right letters. says: for each statement why it is what it is, and where to reread.
    """
    letters = "abcdefghijkl"[: len(word)]
    assert len(says) == len(word), (number, len(says))

    def read(answer):
        said = _letters(answer)
        return said if len(said) == len(word) and set(said) <= {"T", "F"} else None

    def first_wrong(said):
        wrong = [i for i in range(len(word)) if said[i] != word[i]]
        if not wrong:
            return True
        rest = f" ({len(wrong)} of the {len(word)} are not right yet; this is the first.)"
        return says[wrong[0]] + (rest if len(wrong) > 1 else "")

    flip = {"T": "F", "F": "T"}
    ideas = tuple(
        Idea(f"({letters[i]})", word[:i] + flip[word[i]] + word[i + 1 :], says[i])
        for i in range(len(word))
    )
    asks = f"Hand in {len(word)} letters, T or F for each of ({letters[0]}) to ({letters[-1]}), such as {('TF' * len(word))[: len(word)]!r}."
    return Exercise(number, word, ideas, praise, accepts=first_wrong, reads=read, asks=asks)


def which(number: str, *, options: str, right: str, says: dict[str, str], praise: str) -> Exercise:
    """Find the faulty ones: the answer is their letters, as a word, a list or a set, in any order.

    Args:
        options: all letters, "ABCDE". right: those that are to be found. says: for each of the others, why it is not one of them.
    """
    assert set(says) >= set(options) - set(right), (number, sorted(says))

    def read(answer):
        found = _letters(answer)
        return "".join(sorted(set(found))) if found and set(found) <= set(options) else None

    def judge(found):
        accused = sorted(set(found) - set(right))
        if accused:
            return says[accused[0]]
        return True if set(found) == set(right) else missing

    missing = f"What you named is right, and you are looking for {len(right)} in all. Try the others on an input of your own."
    ideas = tuple(
        Idea(f"{letter} named", "".join(sorted(right[1:] + letter)), says[letter])
        for letter in options
        if letter not in right
    )
    if len(right) > 1:
        ideas += (Idea("one missing", right[0], missing),)
    asks = f"Hand in letters out of {options}, such as {options[:2]!r}."
    right = "".join(sorted(right))
    return Exercise(number, right, ideas, praise, accepts=judge, reads=read, asks=asks)


def _letters(answer: Any) -> str:
    """The letters of "T F T", "t,f,t", ["T", "F"], [True, False], "true, false", {"B", "D"} in upper case."""
    if hasattr(answer, "tolist"):
        answer = answer.tolist()
    words = re.findall(r"\w+", answer) if isinstance(answer, str) else [str(w) for w in answer]
    if len(words) == 1:
        words = list(words[0])
    words = [word.strip().upper() for word in words]
    return "".join({"TRUE": "T", "FALSE": "F", "AND": ""}.get(word, word) for word in words)


def write_test(
    number: str, *, good: tuple[Callable, ...], broken: dict[str, tuple[Callable, str]], praise: str
) -> Exercise:
    """Write a test: the answer is a function of an implementation that raises or returns False when the implementation is faulty.

    Args:
        good: right implementations, which a test must let pass.
        broken: name -> (faulty implementation, what is wrong with it and how a test would see it), which it must find.
    """
    return _WriteTest(
        number,
        lambda implementation: implementation in good,
        tuple(
            Idea(name, lambda one, missed=faulty: one in good or one is missed, says)
            for name, (faulty, says) in broken.items()
        ),
        praise,
        cases=tuple((one,) for one in (*good, *(faulty for faulty, _ in broken.values()))),
    )


class _WriteTest(Exercise):
    def check(self, answer: Any) -> Verdict:
        if is_nothing(answer):
            return self._not_attempted()
        if not callable(answer):
            return self._wrong(
                f"You handed in {show(answer)}. Hand in the test itself: the function's name, without brackets behind it."
            )
        errors, outputs = [], []
        for (implementation,) in self.cases:
            try:
                outputs.append(answer(implementation))
                errors.append(None)
            except NotImplementedError:
                return self._not_attempted()
            except (Exception, SystemExit) as error:
                outputs.append(False)
                errors.append(error)
        if all(is_nothing(output) for output in outputs):
            return Verdict(
                self.number,
                "not attempted",
                "No implementation fails your test yet: let it raise (assert) or return False where one is wrong.",
            )
        try:
            passed = [is_nothing(output) or bool(output) for output in outputs]
        except Exception:  # neither true nor false
            return self._wrong("Let your test return True or False, or raise.")
        n_good = sum(bool(self.right(one)) for (one,) in self.cases)
        if not all(passed[:n_good]):
            error = errors[passed.index(False)]
            why = "It returned False" if error is None else show_error(error, answer)
            return self._wrong(f"Your test fails an implementation that is right. {why}.")
        if any(passed[n_good:]):
            idea = self.ideas[passed[n_good:].index(True)]
            return Verdict(self.number, "wrong", idea.says, idea.name)
        return Verdict(self.number, "right", self.praise)
