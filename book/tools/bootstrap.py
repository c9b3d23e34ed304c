"""Make the virtual environment: `python bootstrap.py .venv`. Standard library only, for nothing is installed yet.

Quiet by design: one line that counts what pip is doing; its whole output goes to pip.log in the environment and is shown when it fails.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book"))

from tools.apt import apt_install

NO_VENV = """\
{python} (Python {version}) cannot make a virtual environment: its parts venv and ensurepip are missing.
Debian and Ubuntu keep them in a package of their own. Install it and run the command again:
    apt-get install python3-venv        (or python{version}-venv)
Or name another Python: make book PYTHON=/path/to/python3"""


def can_make_venv() -> bool:
    """True when this Python has venv and ensurepip; asked in a new process, because an import that failed is remembered."""
    return (
        subprocess.run(
            [sys.executable, "-c", "import venv, ensurepip"], capture_output=True
        ).returncode
        == 0
    )


def create(venv: Path) -> Path:
    """Create the environment unless a working one is there; return its python."""
    python = venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if (
        python.exists()
        and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
    ):
        return python
    version = "{}.{}".format(*sys.version_info)
    if not can_make_venv() and not (apt_install(f"python{version}-venv") and can_make_venv()):
        sys.exit(NO_VENV.format(python=sys.executable, version=version))
    if venv.exists() and not (venv / "pyvenv.cfg").exists():
        sys.exit(
            f"{venv} exists and is not a virtual environment; move it away, or choose another: VENV=..."
        )
    shutil.rmtree(venv, ignore_errors=True)  # half made, or its Python is gone
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    return python


def pip_install(python: Path, log: Path, what: str, *args: str) -> None:
    """Run pip install with one progress line on a terminal; exit with the end of its output when it fails."""
    start, seen, terminal = time.monotonic(), 0, sys.stderr.isatty()
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
        *args,
    ]
    with open(log, "a") as out:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )
        for line in process.stdout:
            out.write(line)
            word, _, rest = line.strip().partition(" ")
            seen += word == "Collecting"
            if terminal and word in ("Collecting", "Downloading", "Installing"):
                doing = f"{seen} {word.lower()} {rest[:50]}"
                print(f"\r  {what}: {doing:<70}", end="", file=sys.stderr, flush=True)
    if terminal:
        print("\r" + " " * 110 + "\r", end="", file=sys.stderr)
    if process.wait():
        print("".join(log.read_text().splitlines(keepends=True)[-25:]), file=sys.stderr)
        sys.exit(f"pip could not install {what}; all it said is in {log}")
    print(f"  {what}: {time.monotonic() - start:.0f} s")


def main(venv: Path) -> None:
    fresh = not venv.exists()
    print(
        f"Preparing {venv} with Python {sys.version.split()[0]}"
        + (" (once; a few minutes)" if fresh else " (what is needed changed)")
    )
    python = create(venv)
    log = venv / "pip.log"
    log.write_text("")
    pip_install(python, log, "packages", "-r", "requirements.txt")
    # No isolation: setuptools is pinned in requirements.txt, so nothing is fetched a second time.
    pip_install(python, log, "this project", "--no-deps", "--no-build-isolation", "-e", ".")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
