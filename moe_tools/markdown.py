"""Markdown tables."""

from collections.abc import Iterable, Sequence


def number_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int) -> str:
    """Aligned columns: the first ``text_columns`` to the left, numbers to the right."""
    from tabulate import tabulate  # only who prints a table needs it

    align = ["left"] * text_columns + ["right"] * (len(head) - text_columns)
    return tabulate(list(rows), list(head), tablefmt="pipe", colalign=align, disable_numparse=True)


def prose_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells as long as they are: padded, sentences would make lines of hundreds of columns."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
