"""book/tools/chapters.py: one stored form, whatever editor a notebook comes from."""

import json

import nbformat
import pytest
from nbformat import v4

from tools import chapters


def code(source, outputs=(), **metadata):
    return v4.new_code_cell(source, outputs=list(outputs), metadata=metadata)


def from_colab():
    """A notebook with everything that the stored form leaves out."""
    notebook = v4.new_notebook(
        metadata={
            "colab": {"provenance": []},
            "accelerator": "GPU",
            "widgets": {"state": {}},
            "kernelspec": {"name": "my-env", "display_name": "Mine"},
        }
    )
    progress = v4.new_output("stream", name="stderr", text="100%|####| 3/3 [00:01<00:00]")
    pieces = [
        v4.new_output("stream", name="stdout", text="a\n"),
        progress,
        v4.new_output("stream", name="stdout", text="b\n"),
    ]
    view = v4.new_output("display_data", data={chapters.WIDGET: {"model_id": "5f"}}, metadata={})
    figure = v4.new_output(
        "execute_result",
        data={"text/plain": "Explorer(1)", "text/html": "<p>", chapters.WIDGET: {"model_id": "5e"}},
        execution_count=88,
    )
    notebook.cells = [
        v4.new_markdown_cell("# A"),
        code("1", pieces, execution={"iopub.status.busy": "12:00"}, tags=["hide-input"]),
        code("2", [view, figure], colab={"base_uri": "x"}),
    ]
    for cell in notebook.cells:
        cell["id"] = "same"
    notebook.cells[1].execution_count = 87
    return notebook


@pytest.fixture
def stored():
    return json.loads(chapters.normalise(from_colab()))


def test_normalising_twice_changes_nothing_more():
    once = chapters.normalise(from_colab())
    assert chapters.normalise(nbformat.reads(once, as_version=4)) == once
    assert once.endswith("}\n")


def test_the_kernel_is_the_same_for_all(stored):
    assert stored["metadata"] == {
        "kernelspec": chapters.KERNEL,
        "language_info": {"name": "python"},
    }


def test_only_tags_remain_of_a_cells_metadata(stored):
    assert [cell["metadata"] for cell in stored["cells"]] == [{}, {"tags": ["hide-input"]}, {}]


def test_what_sets_up_and_what_imports_is_folded_and_nothing_else():
    notebook = v4.new_notebook(
        cells=[code("try:\n    import x"), code("import y"), code("import z")]
    )
    chapters.normalise(notebook)
    assert [cell.metadata.get("tags") for cell in notebook.cells] == [["hide-input"]] * 2 + [None]
    shown = [cell.metadata["mystnb"]["code_prompt_show"] for cell in notebook.cells[:2]]
    assert shown == list(chapters.FOLDED)


def test_progress_bars_go_and_stdout_becomes_one_piece(stored):
    assert [output["text"] for output in stored["cells"][1]["outputs"]] == [["a\n", "b\n"]]


def test_widget_views_go_and_what_needs_no_widget_stays(stored):
    assert [sorted(output["data"]) for output in stored["cells"][2]["outputs"]] == [
        ["text/html", "text/plain"]
    ]


def test_cells_are_counted_from_one(stored):
    assert [cell.get("execution_count") for cell in stored["cells"]] == [None, 1, 2]
    assert stored["cells"][2]["outputs"][0]["execution_count"] == 2


def test_a_valid_id_stays_and_a_repeated_one_is_replaced_always_by_the_same():
    ids = [cell["id"] for cell in json.loads(chapters.normalise(from_colab()))["cells"]]
    assert ids[0] == "same" and len(set(ids)) == 3
    assert ids == [cell["id"] for cell in json.loads(chapters.normalise(from_colab()))["cells"]]


def test_a_notebook_over_the_limit_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "big.ipynb"
    path.write_text("small")
    with pytest.raises(ValueError, match="at most 400,000"):
        chapters.store(path, "x" * 400_001)
    assert path.read_text() == "small"


def test_a_notebook_runs_in_its_own_directory_and_its_errors_are_not_stored(tmp_path):
    path = tmp_path / "one.ipynb"
    nbformat.write(
        v4.new_notebook(
            cells=[code("import os, sys\nprint(os.path.basename(os.getcwd()))\nsys.prefix")]
        ),
        path,
    )
    outputs = chapters.execute(path).cells[0].outputs
    assert outputs[0].text == f"{tmp_path.name}\n"
    assert outputs[1].data["text/plain"] == repr(chapters.sys.prefix)
    nbformat.write(v4.new_notebook(cells=[code("1 / 0")]), path)
    with pytest.raises(chapters.CellExecutionError, match="ZeroDivisionError"):
        chapters.execute(path)
