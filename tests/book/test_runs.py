"""Stored runs: what is written is what is read."""

import json

import pytest
import torch

from moe_book import runs
from moe_book.corpus import from_texts

STORED = runs.FOLDER


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
    assert (
        set(record["machine"]) == {"processor", "cores", "threads", "gpu"}
        and len(record["date"]) == 10
    )


def test_floats_keep_five_significant_digits_and_all_else_stays():
    runs.save(
        "a",
        config={},
        seeds=[0, 1, 2],
        results={
            "x": [3.14159265, 1.23456789e-7, 123456.789],
            "n": 1234567,
            "t": (True, None, "s"),
        },
    )
    assert runs.load("a")["results"] == {
        "x": [3.1416, 1.2346e-7, 123460.0],
        "n": 1234567,
        "t": [True, None, "s"],
    }


def test_a_list_of_words_keeps_the_blanks_after_their_commas():
    runs.save(
        "a", config={"names": ["top-1, learned", "top-1, frozen"]}, seeds=[0, 1, 2], results={}
    )
    assert runs.load("a")["config"]["names"] == ["top-1, learned", "top-1, frozen"]


def test_writing_the_same_results_again_gives_the_same_file(folder):
    first = runs.save("a", config={"b": 1, "a": 2}, seeds=[0, 1, 2], results={"x": 1.0}).read_text()
    assert (
        runs.save("a", config={"a": 2, "b": 1}, seeds=[0, 1, 2], results={"x": 1.0}).read_text()
        == first
    )
    assert (
        first.endswith("\n")
        and json.loads(first)["name"] == "a"
        and [file.name for file in folder.iterdir()] == ["a.json"]
    )


def test_fewer_than_three_seeds_are_refused():
    with pytest.raises(ValueError, match=r"seeds=\[0, 1\] must hold at least 3 seeds"):
        runs.save("a", config={}, seeds=[0, 1], results={})


@pytest.mark.parametrize("v", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_wherever_it_stands(v, folder):
    with pytest.raises(ValueError, match=rf"results\['loss'\]\[1\]\[0\]={v} must be finite"):
        runs.save("a", config={}, seeds=[0, 1, 2], results={"loss": [1.0, (v, 2)]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        runs.save("a", config={"lr": v}, seeds=[0, 1, 2], results={})
    assert not list(folder.iterdir())


def test_a_sweep_runs_every_arm_with_every_seed_in_turns_on_one_thread():
    seen, before = [], torch.get_num_threads()

    def run(arm, seed, text):
        seen.append((seed, arm))
        return f"{text} {arm} {seed} {torch.get_num_threads()}"

    try:
        torch.set_num_threads(2)
        assert runs.sweep(run, ("a", "b"), [5, 7], "x") == {
            "a": ["x a 5 1", "x a 7 1"],
            "b": ["x b 5 1", "x b 7 1"],
        }
    finally:
        torch.set_num_threads(before)
    assert seen == [(5, "a"), (5, "b"), (7, "a"), (7, "b")]


def test_a_run_that_does_not_exist_is_refused_and_the_others_are_named():
    runs.save("there", config={}, seeds=[0, 1, 2], results={})
    with pytest.raises(FileNotFoundError, match=r"no stored run 'here'; there are \['there'\]"):
        runs.load("here")


def test_a_run_keeps_the_hash_and_the_size_of_its_text():
    text = from_texts({"a": bytes(2000)})
    runs.save("a", config={}, seeds=[0, 1, 2], results={}, text=text)
    assert runs.load("a")["text"] == {"sha256": text.sha256[:16], "bytes": {"a": 1620}}
    assert runs.same_text(text, "a") and not runs.same_text(from_texts({"a": bytes(2001)}), "a")
    runs.save("a", config={}, seeds=[0, 1, 2], results={})
    assert runs.load("a")["text"] is None and not runs.same_text(text, "a")


def test_all_stored_runs_with_text_had_the_same():
    records = [json.loads(path.read_text()) for path in STORED.glob("*.json")]
    texts = {record["name"]: record["text"] for record in records if record.get("text")}
    assert len(texts) > 15 and len({str(text) for text in texts.values()}) == 1
