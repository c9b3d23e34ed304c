"""The built book in a real browser, over file:// and with the network off.

The book is built when it is missing or older than its sources; MOE_BOOK_HTML names one that is built already. A machine without a
Chromium skips these tests, except in continuous integration, where they fail.
"""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300_000  # milliseconds: a limit for what hangs, not a measure of speed
IGNORED = {"vendor", "__pycache__", ".ipynb_checkpoints", "runs"}


def toc_pages() -> list[str]:
    """Every page of the table of contents, in order."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))
    return [
        toc["root"],
        *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"]),
    ]


def source(page: str) -> str:
    """What the author wrote on a page."""
    if (notebook := ROOT / f"{page}.ipynb").exists():
        return "".join(
            line
            for cell in json.loads(notebook.read_text("utf8"))["cells"]
            for line in [*cell["source"], "\n"]
        )
    return (ROOT / f"{page}.md").read_text("utf8")


def pytest_configure(config):
    for line in (
        "pages_with(text): run on those pages only whose source holds the text",
        "first_page_with(text): run on the first of them only: what is tested is the same on all",
    ):
        config.addinivalue_line("markers", line)


def pytest_generate_tests(metafunc):
    if "page_name" in metafunc.fixturenames:
        one = metafunc.definition.get_closest_marker("first_page_with")
        marker = one or metafunc.definition.get_closest_marker("pages_with")
        pages = [page for page in toc_pages() if marker is None or marker.args[0] in source(page)]
        assert pages, f"no page holds {marker.args[0]!r}"
        pages = pages[:1] if one else pages
        # The tests of a page run on one worker, which keeps it open for those that only look.
        metafunc.parametrize(
            "page_name",
            [pytest.param(page, marks=pytest.mark.xdist_group(page)) for page in pages],
            ids=[page.removeprefix("book/").removeprefix("chapters/") for page in pages],
        )


def _is_stale(built: Path) -> bool:
    sources = [ROOT / "_config.yml", ROOT / "_toc.yml", *(ROOT / "book").rglob("*")]
    kept = [path for path in sources if path.is_file() and not IGNORED & set(path.parts)]
    return not built.exists() or built.stat().st_mtime < max(path.stat().st_mtime for path in kept)


@pytest.fixture(scope="session")
def site() -> Path:
    """The folder of the built pages."""
    if given := os.environ.get("MOE_BOOK_HTML"):
        return Path(given).resolve()
    html = ROOT / "_build/html"
    html.parent.mkdir(exist_ok=True)
    with open(html.parent / "tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other worker waits, and finds it built
        if _is_stale(html / "index.html"):
            command = "-m jupyter_book.cli.main build . -n -W --keep-going -q"
            done = subprocess.run(
                [sys.executable, *command.split()],
                cwd=ROOT,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
            )
            assert done.returncode == 0, f"the book did not build:\n{done.stdout}{done.stderr}"
    return html


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    from tools.browser import NONE, find

    path = find()
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(NONE)
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        running = playwright.chromium.launch(executable_path=path, args=flags)
        yield running
        running.close()


class Visit:
    """One page open in a browser, and what it said and asked for: `errors` and `outside`, lists of strings."""

    def __init__(self, context, path: Path):
        self.errors, self.outside, self.url = [], [], path.as_uri()
        self.page = context.new_page()
        self.page.on(
            "console", lambda message: message.type == "error" and self.errors.append(message.text)
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "request",
            lambda request: (
                request.url.startswith(("file:", "data:", "blob:"))
                or self.outside.append(request.url)
            ),
        )
        self.page.goto(self.url)

    def explorers(self) -> list:
        """The page's figures, each scrolled to and drawn."""
        found = self.page.locator(".moe-explorer").all()
        for explorer in found:
            self.page.wait_for_function(
                "() => window.MathJax?.startup?.promise ?? true"
            )  # formulas that arrive late move what is below
            explorer.locator("figcaption").scroll_into_view_if_needed()
            explorer.locator(".moe-drawn[data-frame]").wait_for()
        return found


def _visit(browser, site, page_name, still_clock=False, **options) -> Visit:
    path = site / f"{page_name}.html"
    assert path.exists(), f"{page_name} is in the table of contents, but not in the built book"
    options = {"viewport": {"width": 1280, "height": 900}, "offline": True, **options}
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE)
    if still_clock:
        context.clock.install()
    return Visit(context, path)


@pytest.fixture
def visit(browser, site, page_name):
    """visit(**context options) opens the page under test and returns a Visit.

    still_clock=True gives the page a clock that stands: its timers go off when ``page.clock.run_for(milliseconds)`` says so.
    """
    contexts = []

    def go(still_clock=False, **options) -> Visit:
        seen = _visit(browser, site, page_name, still_clock, **options)
        contexts.append(seen.page.context)
        if still_clock:
            seen.explorers()  # drawn while time passes
            seen.page.clock.pause_at(seen.page.evaluate("Date.now() / 1000 + 1"))
        return seen

    yield go
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def _opened():
    opened = {}
    yield opened
    for seen in opened.values():
        seen.page.context.close()


@pytest.fixture
def seen(browser, site, page_name, _opened) -> Visit:
    """The page under test, opened once for the tests that look at it; they leave it as it was, in light colours."""
    if page_name not in _opened:
        for seen in _opened.values():
            seen.page.context.close()
        _opened.clear()
        _opened[page_name] = _visit(browser, site, page_name)
        _opened[page_name].explorers()
    return _opened[page_name]


@pytest.fixture
def record_step(record_property):
    """record_step(name, milliseconds) keeps a measured time for the summary at the end."""
    return lambda name, milliseconds: record_property("step", (name, milliseconds))
