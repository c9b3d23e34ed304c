"""Stored runs: what is written is what is read."""

import json

import pytest

from moe_book import runs


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "FOLDER", tmp_path)
    return tmp_path


def test_a_run_is_read_as_it_was_written():
    runs.save("a", config={"steps": 3}, seeds=[0, 1, 2], results={"loss": [1.5, 2]})
    record = runs.load("a")
    assert (record["name"], record["config"], record["seeds"]) == ("a", {"steps": 3}, [0, 1, 2])
    assert record["results"] == {"loss": [1.5, 2]}


def test_a_run_says_when_with_what_and_on_which_machine_it_was_made():
    runs.save("a", config={}, seeds=[0, 1, 2], results={})
    record = runs.load("a")
    assert set(record["versions"]) == {"python", "torch"} and "+" not in record["versions"]["torch"]
    assert set(record["machine"]) == {"processor", "cores", "threads", "gpu"} and len(record["date"]) == 10


def test_floats_keep_five_significant_digits_and_all_else_stays():
    runs.save("a", config={}, seeds=[0, 1, 2], results={"x": [3.14159265, 1.23456789e-7, 123456.789], "n": 1234567, "t": (True, None, "s")})
    assert runs.load("a")["results"] == {"x": [3.1416, 1.2346e-7, 123460.0], "n": 1234567, "t": [True, None, "s"]}


def test_a_list_of_words_keeps_the_blanks_after_their_commas():
    runs.save("a", config={"names": ["top-1, learned", "top-1, frozen"]}, seeds=[0, 1, 2], results={})
    assert runs.load("a")["config"]["names"] == ["top-1, learned", "top-1, frozen"]


def test_writing_the_same_results_again_gives_the_same_file(folder):
    first = runs.save("a", config={"b": 1, "a": 2}, seeds=[0, 1, 2], results={"x": 1.0}).read_text()
    assert runs.save("a", config={"a": 2, "b": 1}, seeds=[0, 1, 2], results={"x": 1.0}).read_text() == first
    assert first.endswith("\n") and json.loads(first)["name"] == "a" and [file.name for file in folder.iterdir()] == ["a.json"]


def test_fewer_than_three_seeds_are_refused():
    with pytest.raises(ValueError, match=r"seeds=\[0, 1\] must hold at least 3 seeds"):
        runs.save("a", config={}, seeds=[0, 1], results={})


def test_a_run_that_does_not_exist_is_refused_and_the_others_are_named():
    runs.save("there", config={}, seeds=[0, 1, 2], results={})
    with pytest.raises(FileNotFoundError, match=r"no stored run 'here'; there are \['there'\]"):
        runs.load("here")
