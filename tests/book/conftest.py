"""A copy of the project, for tests that change it or install from it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tools import repo


@pytest.fixture
def project(tmp_path) -> Path:
    """The files that git knows or would take, as they are now, in a folder of their own."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repo.ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    copy = tmp_path / "project"
    for name in filter(None, names.split("\0")):
        if (repo.ROOT / name).is_file():  # not one deleted but not yet committed
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repo.ROOT / name, copy / name)
    return copy
