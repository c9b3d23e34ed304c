"""Find a Chromium for the browser tests, and install one where none is: `python browser.py`.

The order: what MOE_BOOK_BROWSER names, what the system has, what Playwright brought. A browser counts only when it starts: Ubuntu's
package `chromium-browser` is a pointer to snap, which many machines (containers among them) cannot run.
"""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.apt import apt_install, apt_prefix

NAMES = [
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "msedge",
]
MAC = [
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
]
NONE = """\
No Chromium was found, and none could be installed: apt-get may not be used here, and Playwright could not bring its own.
Install Chromium or Chrome yourself, or name one: MOE_BOOK_BROWSER=/path/to/chromium make test"""


def starts(path: str) -> bool:
    """True when the browser at path runs headless and returns a page."""
    command = [
        path,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        "data:text/html,<p>ready",
    ]
    try:
        return (
            "ready"
            in subprocess.run(
                command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
            ).stdout
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


def playwrights_own() -> str | None:
    """Where Playwright keeps its Chromium, whether or not it is there."""
    code = "from playwright.sync_api import sync_playwright as s\nwith s() as p: print(p.chromium.executable_path)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    return found.stdout.strip() or None


@cache
def find() -> str | None:
    """Path of a Chromium that starts, or None."""
    named = os.environ.get("MOE_BOOK_BROWSER")
    if named:
        return named if starts(named) else None
    for path in [*map(shutil.which, NAMES), *MAC, playwrights_own()]:
        if path and Path(path).exists() and starts(path):
            return path
    return None


def install() -> str | None:
    """Find a browser, else install one: apt-get where it may be used, else Playwright's own."""
    for attempt in (lambda: True, lambda: apt_install("chromium"), playwright_install):
        if attempt():
            find.cache_clear()
            if path := find():
                return path
    return None


def playwright_install() -> bool:
    """Playwright's own Chromium, with the system libraries it needs where apt-get may be used."""
    print("Installing Playwright's own Chromium", file=sys.stderr)
    words = ["--with-deps"] if apt_prefix() is not None else []
    return (
        subprocess.run(
            [sys.executable, "-m", "playwright", "install", *words, "chromium"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        ).returncode
        == 0
    )


if __name__ == "__main__":
    if not install():
        print(NONE, file=sys.stderr)
        # On a forge a missing browser must not pass for a green run; at home the other tests are still worth running.
        sys.exit(1 if os.environ.get("CI") else 0)
