"""Reproductions: each claim has a source, and each stored verdict follows from the stored numbers."""

import importlib.util
import re

import pytest

from moe_book import runs
from tools import repo

SCRIPTS = [
    path
    for path in sorted(runs.FOLDER.glob("*.py"))
    if re.search(r"^CLAIMS\b", path.read_text(), re.M)
]
KEYS = set(re.findall(r"^@\w+\{([^,\s]+)", (repo.ROOT / "book/references.bib").read_text(), re.M))
VERDICTS = {"reproduced", "partly", "not at this scale"}
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def module(script):
    spec = importlib.util.spec_from_file_location(f"stored_run_{script.stem}", script)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def stored(script) -> dict:
    if not script.with_suffix(".json").exists():
        pytest.skip(f"{script.stem} has not been run yet")
    return runs.load(script.stem)


@each_script
def test_each_claim_has_a_source_in_the_bibliography(script):
    claims = module(script).CLAIMS
    assert claims
    for name, claim in claims.items():
        assert set(claim) == {"claim", "source"} and claim["claim"].strip(), name
        assert claim["source"] in KEYS, f"{name}: {claim['source']} is not in references.bib"


@each_script
def test_the_claims_stored_are_those_of_the_script(script):
    assert stored(script)["config"]["claims"] == module(script).CLAIMS


@each_script
def test_the_stored_verdicts_follow_from_the_stored_numbers(script):
    results = stored(script)["results"]
    again = module(script).verdicts(
        {key: value for key, value in results.items() if key != "verdicts"}
    )
    assert {name: said["verdict"] for name, said in again.items()} == {
        name: said["verdict"] for name, said in results["verdicts"].items()
    }
    for said in results["verdicts"].values():
        assert said["verdict"] in VERDICTS and re.search(r"\d", said["because"]), said


def test_reproductions_gathers_every_claim_of_every_stored_run():
    gathered = runs.reproductions()
    there = [script for script in SCRIPTS if script.with_suffix(".json").exists()]
    assert {(found["run"], found["id"]) for found in gathered} == {
        (s.stem, name) for s in there for name in module(s).CLAIMS
    }
    assert all(set(found) >= {"claim", "source", "verdict", "because"} for found in gathered)
