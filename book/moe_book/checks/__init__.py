"""Exercise checkers: one file a chapter. ``check("2.3", answer)`` speaks to the idea behind an answer, not only to the number."""

from importlib import import_module

from .exercise import Exercise, Idea, Verdict, statements, which, write_test

__all__ = ["Exercise", "Idea", "Verdict", "check", "exercises", "statements", "which", "write_test"]


def exercises(chapter: int) -> dict[str, Exercise]:
    """All exercises of a chapter by number, e.g. {"2.1": Exercise, ...}.

    Raises:
        ValueError: the chapter has no exercises.
    """
    name = f"{__name__}.ch{chapter:02d}"
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # the chapter is there and something it needs is not
            raise
        raise ValueError(f"chapter={chapter} has no exercises") from None
    return {exercise.number: exercise for exercise in module.EXERCISES}


def check(number: str, answer) -> Verdict:
    """Check an answer (a function, or a value) to exercise ``number``, such as "2.3".

    Returns:
        A ``Verdict``: it shows itself as the last line of a cell, and ``verdict.right`` tells it to a program.

    Raises:
        ValueError: there is no such exercise, or its number is no text.
    """
    if not isinstance(number, str):
        raise ValueError(f'write the number in quotes: check("{number}", ...)')
    chapter = number.split(".")[0]
    known = exercises(int(chapter)) if chapter.isdigit() else {}
    if number not in known:
        raise ValueError(
            f"exercise={number!r} must be one of {', '.join(known) or '1.1, 1.2, ...'}"
        )
    return known[number].check(answer)
