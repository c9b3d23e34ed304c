"""The first cell on a machine that holds only torch, as a hosted notebook does: it brings the book's packages and touches nothing else."""

import importlib.metadata as metadata
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools import repo


def closure(*roots: str) -> dict[str, metadata.Distribution]:
    """Installed distributions that the roots need, by normalised name."""
    found, todo = {}, list(roots)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        found[name] = metadata.distribution(name)
        for requirement in map(Requirement, found[name].requires or []):
            if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found


def link(distributions, folder: Path) -> None:
    """Make the distributions importable from folder, as links: torch is not copied, and not downloaded."""
    folder.mkdir()
    for distribution in distributions:
        for top in {Path(file).parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(
                    Path(distribution.locate_file(top)),
                    target_is_directory=Path(distribution.locate_file(top)).is_dir(),
                )


@pytest.fixture
def bare(tmp_path) -> Path:
    """The python of a new environment in which torch, IPython and pip are installed, and nothing of the book."""
    distributions = closure("torch", "ipykernel", "pip")
    link(distributions.values(), tmp_path / "preinstalled")
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env/bin/python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (Path(site) / "preinstalled.pth").write_text(f"{tmp_path / 'preinstalled'}\n")
    return python


def installed(python: Path) -> dict[str, str]:
    """What pip sees in the environment: name -> where it lies."""
    code = "import importlib.metadata as m\nfor d in m.distributions(): print(d.metadata['Name'].lower(), d.version, d.locate_file(''))"
    lines = subprocess.run(
        [python, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=python.parent,
        env=clean(),
    ).stdout.splitlines()
    return {line.split()[0]: line for line in lines}


def clean() -> dict[str, str]:
    """This process's environment without what would let the bare one see this project."""
    return {
        key: value
        for key, value in os.environ.items()
        if key not in ("PYTHONPATH", "VIRTUAL_ENV", "JUPYTER_PATH")
    }


def shipped(project: Path, site: Path) -> dict[str, Path]:
    """Every file that code imports or reads, and where it must lie once installed; the stored runs among them."""
    places = {
        "moe_core": site / "moe_core",
        "book/moe_book": site / "moe_book",
        "book/runs": site / "moe_book/stored_runs",
    }
    kinds = {
        "moe_core": {".py"},
        "book/moe_book": {".py", ".js", ".css", ".json"},
        "book/runs": {".json"},
    }
    files = [
        (source, file)
        for source in places
        for file in (project / source).rglob("*")
        if file.suffix in kinds[source]
    ]
    return {
        file.relative_to(project).as_posix(): places[source] / file.relative_to(project / source)
        for source, file in files
    }


@pytest.mark.skipif(
    sys.platform == "win32", reason="links need rights there; a hosted notebook runs Linux"
)
def test_first_cell_brings_the_book_and_leaves_torch_alone(project, bare, tmp_path):
    here = repo.read(project)
    as_author = [
        "git",
        "-c",
        "user.name=test",
        "-c",
        "user.email=test@example.invalid",
        "-c",
        "commit.gpgsign=false",
    ]
    for command in (
        ["git", "init", "-q", "-b", here.branch],
        ["git", "add", "-A"],
        [*as_author, "commit", "-qm", "copy"],
    ):
        subprocess.run(command, cwd=project, check=True, stdin=subprocess.DEVNULL)
    before = installed(bare)
    assert "torch" in before and not {"plotly", "anywidget", "ipywidgets", "moe-book"} & set(before)

    # The cell runs to the letter; git alone is told that the repository it names lies here.
    redirect = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{project.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": here.url,
    }
    check = "import moe_core, torch; print('CORE', moe_core.__file__); print('BOOK', moe_book.__file__); print('TORCH', torch.__file__)"
    script = tmp_path / "cell.ipy"
    script.write_text(f"{here.first_cell}\n{check}\n")
    environment = {**clean(), **redirect, "IPYTHONDIR": str(tmp_path / "ipython")}
    command = [bare, "-m", "IPython", "--quick", "--no-banner", "--colors=NoColor", str(script)]
    ran = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=900,
    )
    assert ran.returncode == 0 and "Traceback" not in ran.stdout, ran.stdout + ran.stderr
    where = dict(re.findall(r"^(CORE|BOOK|TORCH) (.+)$", ran.stdout, re.M))
    assert where["TORCH"].startswith(str(tmp_path / "preinstalled")), "torch was replaced"
    assert where["CORE"].startswith(str(tmp_path / "env")) and where["BOOK"].startswith(
        str(tmp_path / "env")
    )

    after = installed(bare)
    assert {name: after[name] for name in before} == before, "something that was there was replaced"
    assert "moe-book" in after and "plotly" in after
    missing = [
        file
        for file, there in shipped(project, Path(where["CORE"]).parents[1]).items()
        if not there.is_file()
    ]
    assert not missing, "in the repository, but not in what is installed from it"
    # Nothing that only builds or tests the book comes along.
    assert not {"jupyter-book", "sphinx", "pytest", "nbval", "playwright", "jupyterlab"} & set(
        after
    )
