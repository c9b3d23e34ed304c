"""The stored notebooks: their form, their size, and what a reader may count on in each."""

import json
import re
import statistics
import sys
from pathlib import Path

import nbformat
import pytest

from tools import chapters, repo

ROOT = repo.ROOT
CHAPTERS = sorted((ROOT / "book/chapters").glob("*.ipynb"))
NOTEBOOKS = chapters.notebooks()
COLUMNS = 76  # what fits in the book's column at a window of 1280 pixels
MACHINE = re.compile(
    r"(?:/home|/Users|/tmp|/private|\\Users)[/\\]\w|(?:site|dist)-packages|ipykernel_\d|0x[0-9a-f]{8,}"
)


def each(paths):
    return pytest.mark.parametrize(
        "path", paths, ids=lambda path: path.relative_to(ROOT / "book").as_posix()
    )


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def texts_of(output) -> str:
    """Everything a reader sees of an output."""
    return "\n".join(
        [
            output.get("text", ""),
            *(
                value if isinstance(value, str) else json.dumps(value)
                for value in output.get("data", {}).values()
            ),
        ]
    )


def test_there_are_chapters_and_each_has_its_solutions():
    assert CHAPTERS
    assert {path.name for path in CHAPTERS} == {
        path.name for path in (ROOT / "book/solutions").glob("*.ipynb")
    }


def test_every_chapter_is_in_the_table_of_contents():
    named = set(
        re.findall(r"book/chapters/([\w-]+)", (ROOT / "_toc.yml").read_text(encoding="utf-8"))
    )
    assert named == {path.stem for path in CHAPTERS}


@each(NOTEBOOKS)
def test_is_in_its_stored_form(path):
    assert path.read_text(encoding="utf-8") == chapters.normalise(
        nbformat.read(path, as_version=4)
    ), "run: make chapters"


@each(NOTEBOOKS)
def test_is_small_enough(path):
    assert path.stat().st_size <= chapters.MAX_BYTES


@each(NOTEBOOKS)
def test_was_executed_and_nothing_failed(path):
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    assert outputs, "no outputs are stored; run: make chapters"
    assert not [output.ename for output in outputs if output.output_type == "error"]


@each(NOTEBOOKS)
def test_no_cell_is_skipped_or_may_fail(path):
    forbidden = {"nbval-skip", "nbval-raises-exception", "raises-exception", "skip-execution"}
    for cell in code_cells(path):
        assert not forbidden & set(cell.metadata.get("tags", [])), cell.source
        assert not re.search(r"NBVAL_(SKIP|RAISES)|PYTEST_VALIDATE_IGNORE", cell.source), (
            cell.source
        )


@each(NOTEBOOKS)
def test_an_output_that_is_not_compared_has_its_claim_asserted_there_or_next_to_it(path):
    sources = [""] + [cell.source for cell in code_cells(path)] + [""]
    for at, cell in enumerate(code_cells(path), start=1):
        if (
            "nbval-ignore-output" in cell.metadata.get("tags", [])
            or "NBVAL_IGNORE_OUTPUT" in cell.source
        ):
            assert any(
                re.search(r"^\s*assert\b", source, re.M) for source in sources[at - 1 : at + 2]
            ), cell.source


@each(NOTEBOOKS)
def test_outputs_name_nothing_of_the_machine_that_made_them(path):
    for cell in code_cells(path):
        for output in map(texts_of, cell.outputs):
            found = MACHINE.search(output)
            assert not found, f"{found.group()} in an output of: {cell.source}"
            assert not [
                place
                for place in (ROOT, Path.home(), Path(sys.prefix))
                if re.search(re.escape(f"{place}") + r"\b[/\\]", output)
            ], cell.source


@each(NOTEBOOKS)
def test_code_cells_are_short(path):
    lines = [len(cell.source.splitlines()) for cell in code_cells(path)]
    assert max(lines) <= 25
    assert statistics.median(lines) <= 8


@each(NOTEBOOKS)
def test_no_line_of_code_is_cut_off_on_the_page(path):
    cells = code_cells(path)[1:]  # the first is repo.FIRST_CELL, as wide as the fork's address
    wide = [line for cell in cells for line in cell.source.splitlines() if len(line) > COLUMNS]
    assert wide == []


@each(NOTEBOOKS)
def test_most_outputs_are_compared(path):
    tags = [cell.metadata.get("tags", []) for cell in code_cells(path)]
    assert sum("nbval-ignore-output" in of for of in tags) < 0.35 * len(tags)


@pytest.mark.parametrize(
    "text",
    [
        "see /home/ada/book",
        "C:\\Users\\ada",
        ".venv/lib/python3.11/site-packages/torch",
        "<object at 0x7f1c22334455>",
    ],
)
def test_a_trace_of_a_machine_is_recognised(text):
    assert MACHINE.search(text)
