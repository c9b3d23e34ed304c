"""Execute the notebooks and give them their one stored form: `python chapters.py [--check | --no-execute] [02 ...]`.

Stored outputs are what the book is built from, so they must not change unless a result does: no timings, widget state, progress bars or
traces of where a notebook was last opened.
"""

import argparse
import asyncio
import hashlib
import os
import re
import sys
import time
from pathlib import Path

# Sums in another order round otherwise: the stored digits are those of one thread, here and in the tests (book/conftest.py).
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import ipykernel.kernelspec as native
import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from tqdm import tqdm

BOOK = Path(__file__).resolve().parents[1]
MAX_BYTES = 400_000
CELL_SECONDS = 120
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
# The first two cells of code are folded on the page: a reader comes for what follows.
FOLDED = ("Set up: on Colab this brings the book's packages", "What this page imports")
WIDGET = "application/vnd.jupyter.widget-view+json"


class ThisEnvironment(AsyncKernelManager):
    """Starts the kernel of the Python that runs this file, whatever kernels called python3 a user has installed."""

    @property
    def kernel_spec(self):
        return KernelSpec(resource_dir=native.RESOURCES, **native.get_kernel_dict())


def notebooks(only: list[str] = (), book: Path = BOOK) -> list[Path]:
    """Chapters, then solutions; with numbers, those whose name begins with one of them."""
    every = [
        *sorted((book / "chapters").glob("*.ipynb")),
        *sorted((book / "solutions").glob("*.ipynb")),
    ]
    return [path for path in every if not only or path.name.startswith(tuple(only))]


def execute(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in its own directory and return it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_manager_class=ThisEnvironment,
        resources={"metadata": {"path": str(path.parent)}},
    )
    return client.execute()


def clean_outputs(outputs: list) -> list:
    """Outputs without stderr (progress bars) and widget views; neighbouring pieces of stdout joined, for where they break is chance."""
    kept = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        elif "data" in output:
            if output.data.pop(WIDGET, None) and "text/html" not in output.data:
                continue  # a progress bar; a figure has its HTML beside the widget
            output.metadata = {
                key: value for key, value in output.metadata.items() if key in output.data
            }
            if not output.data:
                continue
        kept.append(output)
    return kept


def normalise(notebook: nbformat.NotebookNode) -> str:
    """The text a notebook is stored as. Changes the notebook; doing it twice changes nothing more."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    kept = {key: value for key, value in notebook.metadata.items() if key == "mystnb"}
    notebook.metadata = nbformat.from_dict(
        {**kept, "kernelspec": KERNEL, "language_info": {"name": "python"}}
    )
    count, ids = 0, set()
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {key: value for key, value in cell.metadata.items() if key in ("tags", "mystnb")}
        )
        cell["id"] = cell_id(cell, ids)
        ids.add(cell["id"])
        if cell.cell_type == "code":
            if count < len(FOLDED) and re.match(r"(try:\n +)?(import|from) ", cell.source):
                fold(cell, FOLDED[count])
            count += 1
            cell.execution_count = count
            cell.outputs = clean_outputs(cell.outputs)
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count
    nbformat.validate(notebook)
    return nbformat.writes(notebook, version=nbformat.NO_CONVERT).rstrip("\n") + "\n"


def fold(cell: nbformat.NotebookNode, prompt: str) -> None:
    """Hide a cell's code behind a line that says what it is."""
    cell.metadata["tags"] = sorted({*cell.metadata.get("tags", []), "hide-input"})
    cell.metadata["mystnb"] = {"code_prompt_show": prompt, "code_prompt_hide": prompt}


def cell_id(cell: nbformat.NotebookNode, taken: set[str]) -> str:
    """The cell's own id when it is valid and not taken, else one that depends on its source alone."""
    own = cell.get("id", "")
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", own) and own not in taken:
        return own
    for again in range(len(taken) + 1):
        new = hashlib.sha256(f"{again}{cell.source}".encode()).hexdigest()[:8]
        if new not in taken:
            return new
    raise AssertionError("fewer ids than cells")


def store(path: Path, text: str) -> None:
    """Write text when it differs (the build goes by the file's time) and is not too large."""
    size = len(text.encode("utf-8"))
    if size > MAX_BYTES:
        raise ValueError(
            f"{size:,} bytes; at most {MAX_BYTES:,} are stored. Thin out its figures' frames or outputs."
        )
    if path.read_bytes() != text.encode("utf-8"):
        path.write_bytes(text.encode("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="*", help="numbers of chapters, such as 02; without, all")
    parser.add_argument("--no-execute", action="store_true", help="only normalise what is stored")
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing; fail when a notebook is not in its stored form",
    )
    options = parser.parse_args()
    paths, failed = notebooks(options.only), 0
    if not paths:
        sys.exit(f"No notebook matches {' '.join(options.only) or 'book/chapters/*.ipynb'}")
    bar = tqdm(paths, unit="notebook", disable=not sys.stderr.isatty())
    for path in bar:
        name, start = path.relative_to(BOOK), time.monotonic()
        bar.set_description(str(name))
        try:
            if options.check or options.no_execute:
                text = normalise(nbformat.read(path, as_version=4))
            else:
                text = normalise(execute(path))
            if options.check and text != path.read_text(encoding="utf-8"):
                raise ValueError("not in its stored form; `make chapters` gives it that")
            if not options.check:
                store(path, text)
            tqdm.write(f"{time.monotonic() - start:6.1f} s  {name}")
        except (
            CellExecutionError,
            CellTimeoutError,
            DeadKernelError,
            ValueError,
            nbformat.ValidationError,
        ) as error:
            failed += 1
            tqdm.write(f"  FAILED  {name}: {error}")
    if failed:
        sys.exit(f"{failed} of {len(paths)} notebooks failed; they were left as they were.")


if __name__ == "__main__":
    if sys.platform == "win32":  # pyzmq needs it; the default loop there cannot watch sockets
        asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())
    main()
