"""A fork publishes its own edition: the step of the publish workflow, run on a copy."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from tools import repo

FORK = repo.Repository("https://github.com/ada-l/moe-class.2027", "published")
WORKFLOWS = repo.ROOT / ".github/workflows"


def steps(workflow: str) -> list[str]:
    """The commands a workflow runs, in order."""
    jobs = yaml.safe_load((WORKFLOWS / workflow).read_text(encoding="utf-8"))["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def targets() -> set[str]:
    return set(
        re.findall(r"^([a-z]+):", (repo.ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    )


def add_notebook(project, name="99-sample", extra=""):
    """A chapter that names the repository in the ways a chapter does."""
    here = repo.read(project)
    prose = f"[code]({here.url}/blob/{here.branch}/moe_core/layer.py), [open]({here.colab}/blob/{here.branch}/book/chapters/{name}.ipynb) {extra}"
    cells = [
        {"cell_type": "markdown", "source": [prose]},
        {"cell_type": "code", "source": here.first_cell.splitlines(keepends=True)},
    ]
    path = project / f"book/chapters/{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    return path


def test_this_repository_names_itself_consistently():
    assert repo.problems() == []


def test_the_publish_workflows_step_makes_a_consistent_edition_of_the_fork(project):
    notebook = add_notebook(project)
    stamp = next(command for command in steps("publish.yml") if command.startswith("make repo"))
    stamp = stamp.replace("${{ github.repository }}", "ada-l/moe-class.2027")
    done = subprocess.run(
        ["bash", "-euc", f"{stamp} PYTHON='{sys.executable}'"],
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert repo.read(project) == FORK
    assert repo.problems(project) == []
    assert repo.first_code_cell(notebook) == FORK.first_cell
    text = notebook.read_text(encoding="utf-8")
    assert (
        f"{FORK.url}/blob/published/moe_core" in text
        and f"{FORK.colab}/blob/published/book/chapters" in text
    )
    assert not [
        path for path in repo.texts(project) if repo.PLACEHOLDER in path.read_text(encoding="utf-8")
    ]
    config = yaml.safe_load((project / "_config.yml").read_text(encoding="utf-8"))["repository"]
    assert (config["url"], config["branch"]) == (
        FORK.url,
        FORK.branch,
    )  # what the Colab button is made of


def test_the_workflows_call_what_everyone_calls_and_publish_stamps_before_it_builds():
    assert steps("test.yml") == ["make test"]
    made = [command for command in steps("publish.yml") if command.startswith("make ")]
    assert [command.split()[1] for command in made] == ["repo", "book"]
    assert {command.split()[1] for command in made} | {"test"} <= targets()
    pushed = [command for command in steps("publish.yml") if "git push" in command]
    assert len(pushed) == 1 and pushed[0].rstrip().endswith("HEAD:refs/heads/published")


def test_stamping_again_changes_nothing_and_back_gives_the_same_bytes(project):
    add_notebook(project)
    before = {path: path.read_bytes() for path in repo.texts(project)}
    here = repo.read(project)
    assert repo.stamp(FORK, project) and not repo.stamp(FORK, project)
    repo.stamp(here, project)
    assert {path: path.read_bytes() for path in repo.texts(project)} == before


def test_another_repository_whose_name_begins_alike_is_left_alone(project):
    here = repo.read(project)
    notebook = add_notebook(project, extra=f"{here.url}-extras and {here.url}.")
    repo.stamp(FORK, project)
    assert f"{here.url}-extras and {FORK.url}." in notebook.read_text(encoding="utf-8")


def test_a_first_cell_that_installs_from_elsewhere_is_reported(project):
    notebook = add_notebook(project)
    notebook.write_text(
        notebook.read_text(encoding="utf-8").replace("@main", "@v0"), encoding="utf-8"
    )
    assert any("99-sample" in line and "@v0" in line for line in repo.problems(project))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "moe-book",
        "http://github.com/ada/moe-book",
        "https://github.com/ada/moe-book.git",
        "https://x/y z",
        "https://x/`id`",
    ],
)
def test_what_is_no_repositorys_url_is_refused(url):
    with pytest.raises(ValueError, match="URL="):
        repo.Repository(url)
