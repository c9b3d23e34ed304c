"""How nbval compares the notebooks: every text output strictly, figures by their digest.

A figure's text/plain is a digest of its frames, so a stale one is noticed; its HTML is hundreds of kilobytes of the same numbers, and
comparing that takes minutes. stderr holds progress bars.
"""

import os

import pytest

# As when the outputs were stored (book/tools/chapters.py): sums in another order round otherwise.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):  # an nbval notebook
        collector.skip_compare += ("text/html", "stderr")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    """The cells of a notebook run in order in one kernel: with ``--dist loadgroup`` on one worker."""
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(
                pytest.mark.xdist_group(item.path.relative_to(item.config.rootpath).as_posix())
            )
