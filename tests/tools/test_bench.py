"""The router bench: every router has a row, runs are paired and reproducible, and what it writes can be read back."""

import json
from dataclasses import replace

import pytest
import torch

from moe_core.lm import LanguageModel
from moe_core.routers import ROUTERS
from moe_tools.bench import __main__ as command_line
from moe_tools.bench import _router_run, routers

TINY = routers.Budget(
    steps=2,
    batch_size=2,
    seq_len=6,
    d_model=8,
    n_layers=1,
    n_heads=1,
    n_experts=4,
    d_ff=4,
    eval_batches=1,
    alone_windows=2,
)


@pytest.fixture(scope="module")
def record():
    lines = []
    found = routers.bench(
        ["topk", "expert_choice"], seeds=[0, 5], budget=TINY, progress=lines.append
    )
    return found | {"lines": lines}


def without_times(value):
    if not isinstance(value, dict):
        return value
    return {
        key: without_times(item)
        for key, item in value.items()
        if key not in ("step_ms", "run_seconds", "time_to_topk")
    }


def test_every_router_has_a_row_and_a_model():
    assert set(routers.ROWS) == set(ROUTERS)
    for name in routers.ROWS:
        moe = routers.config(name, routers.Budget()).moe
        assert (moe.router, moe.d_model, moe.n_experts) == (name, 64, 8)


def test_every_router_computes_as_much_as_any_other():
    mean_experts = {
        "zero_computation": 3 * 0.75 * 8 / (0.75 * 8 + 3)
    }  # K slots, shared out as its balance loss asks
    for name in routers.ROWS:
        moe = routers.config(name, routers.Budget()).moe
        assert mean_experts.get(name, moe.top_k) * moe.d_ff == 2 * 64


def test_routers_start_from_the_same_weights_but_for_what_they_prescribe():
    topk, hashed, base, again, other = (
        dict(_router_run.build(name, seed, TINY).named_parameters())
        for name, seed in [("topk", 3), ("hash", 3), ("base", 3), ("topk", 3), ("topk", 4)]
    )
    router = "blocks.0.feed_forward.router.weight"
    assert set(topk) - set(hashed) == {router}
    assert all(torch.equal(hashed[key], topk[key]) for key in hashed)
    assert not torch.equal(base[router], topk[router])
    assert (base[router] @ base[router].T).allclose(
        0.01 * torch.eye(4), atol=1e-6
    )  # still orthogonal
    assert torch.equal(base["embedding.weight"], topk["embedding.weight"])
    assert all(torch.equal(topk[key], again[key]) for key in topk)
    assert not torch.equal(topk["embedding.weight"], other["embedding.weight"])


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(record):
    torch.manual_seed(99)  # whatever state the generator is in, and it stays in that state
    state = torch.get_rng_state()
    again = routers.bench(["topk", "expert_choice"], seeds=[5], budget=TINY)["results"]
    assert torch.equal(torch.get_rng_state(), state)
    for name, found in again.items():
        first = record["results"][name]
        assert found["held_out"] == first["held_out"][1:] != first["held_out"][:1]
        assert (
            found["training_loss"] == first["training_loss"][1:]
            and found["curve"]["loss"] == first["curve"]["loss"][1:]
        )
        assert without_times(found["eval"]) == {
            key: values[1:] for key, values in first["eval"].items()
        }


@pytest.mark.own_bits
def test_several_processes_find_what_one_finds(record):
    lines = []
    results = routers.bench(
        ["expert_choice"], seeds=[5, 0], budget=TINY, workers=2, progress=lines.append
    )["results"]
    assert (
        results["expert_choice"]["held_out"] == record["results"]["expert_choice"]["held_out"][::-1]
        and len(lines) == 2
    )


def test_training_is_measured_in_training_mode_and_the_rest_in_eval():
    found = routers.run(
        "base", 0, TINY
    )  # 12 tokens and 4 experts: 3 tokens each in training, the best expert in eval
    assert found["training"]["max_violation"] == 0 < found["eval"]["max_violation"]
    assert found["causal"] and not found["causal_in_training"]


def test_routers_are_updated_once_a_step():
    model = LanguageModel(routers.config("expert_threshold", TINY))
    _router_run._train(model, 0, TINY)
    assert model.blocks[0].feed_forward.router.steps == 2


def test_a_routers_own_noise_comes_from_the_seed_alone():
    losses = []
    for state in (1, 2):
        model = _router_run.build("noisy_topk", 0, TINY)
        torch.manual_seed(state)
        losses.append(_router_run._train(model, 0, TINY)["curve"])
    assert losses[0] == losses[1]


def test_experts_per_token_are_those_that_compute_and_were_not_full():
    cheap, full = (routers.run(name, 0, TINY) for name in ("zero_computation", "switch"))
    assert (
        0 < cheap["eval"]["experts_per_token"] < 3
    )  # K = 3, of 4 feed-forward experts and 3 without computation
    assert (
        full["training"]["experts_per_token"]
        == pytest.approx(1 - full["training"]["drop_rate"])
        != 1
    )


def test_the_record_is_plain_values_with_one_number_per_seed(record):
    assert record["seeds"] == [0, 5] and record["config"]["steps"] == 2
    for found in record["results"].values():
        assert (
            len(found["held_out"])
            == len(found["step_ms"])
            == len(found["training"]["max_violation"])
            == 2
        )
        assert [len(curve) for curve in found["curve"]["loss"]] == [2, 2]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["results"]["topk"]["time_to_topk"] == [1, 1]


def test_the_probe_tells_the_causal_router_from_the_other(record):
    topk, expert_choice = record["results"]["topk"], record["results"]["expert_choice"]
    assert (
        topk["causal"]
        and topk["causal_in_training"]
        and topk["batch_invariant"]
        and topk["streams"]
    )
    assert not (
        expert_choice["causal"]
        or expert_choice["causal_in_training"]
        or expert_choice["batch_invariant"]
    )


def test_a_causal_router_loses_nothing_when_it_reads_alone_and_expert_choice_is_another_model(
    record,
):
    topk, expert_choice = record["results"]["topk"], record["results"]["expert_choice"]
    assert topk["alone"] == pytest.approx(topk["not_alone"], abs=1e-5)
    assert expert_choice["alone"] != pytest.approx(expert_choice["not_alone"], abs=1e-5)


def test_prefix_by_prefix_is_the_whole_sequence_for_a_causal_model():
    model = LanguageModel(routers.config("topk", TINY)).double().eval()
    tokens = torch.tensor([5, 200, 13, 13, 0, 90])
    with torch.no_grad():
        assert _router_run._prefix_by_prefix(model, tokens).allclose(
            model(tokens[None])[0], atol=1e-10
        )


def test_the_table_has_a_row_per_router_in_aligned_columns(record):
    head, rule, *rows = routers.table(record).splitlines()
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    bars = [[i for i, sign in enumerate(line) if sign == "|"] for line in (head, rule, *rows)]
    assert bars == bars[:1] * 4
    assert {row.split("|")[1].strip() for row in rows} == {"topk", "expert_choice"}
    losses = [float(row.split("|")[2].split("±")[0]) for row in rows]
    assert losses == sorted(losses)
    its_own = next(row for row in rows if row.startswith("| topk "))
    assert " +0.000 ± 0.000 |" in its_own and "1.00x" in its_own and "yes (yes)" in its_own


def test_progress_is_one_line_per_run(record):
    assert [line.split()[0] for line in record["lines"]] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"only": ["topk", "top_k"]}, "router='top_k' must be one of topk, noisy_topk"),
        ({"only": []}, "n_routers=0 must be a whole number, at least 1"),
        ({"seeds": []}, "n_seeds=0 must be a whole number, at least 1"),
        ({"workers": 0}, "workers=0 must be a whole number, at least 1"),
    ],
)
def test_a_bench_that_cannot_run_is_refused_before_it_trains(arguments, message, monkeypatch):
    monkeypatch.setattr(routers, "run", lambda *job: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        routers.bench(**{"only": ["topk"], "budget": TINY, **arguments})


def test_a_budget_out_of_range_is_refused():
    with pytest.raises(ValueError, match="steps=0 must be a whole number, at least 1"):
        replace(TINY, steps=0)


def test_the_command_writes_the_json_and_prints_the_table(tmp_path, monkeypatch, capsys):
    asked = {}

    def bench(only, **options):
        asked.update(only=only, **options)
        return routers.bench(only, **{**options, "budget": TINY})

    monkeypatch.setattr(
        command_line, "routers", type("Bench", (), {**vars(routers), "bench": staticmethod(bench)})
    )
    out = tmp_path / "found.json"
    command_line.main(
        [
            "routers",
            "--only",
            "hash",
            "--seeds",
            "3",
            "--steps",
            "7",
            "--workers",
            "1",
            "--out",
            str(out),
        ]
    )
    assert asked["only"] == ["hash"] and asked["seeds"] == [3] and asked["budget"].steps == 7
    found, printed = json.loads(out.read_text()), capsys.readouterr()
    assert (
        found["seeds"] == [3]
        and list(found["results"]) == ["hash"]
        and found["results"]["hash"]["time_to_topk"] is None
    )
    assert routers.table(found) in printed.out and "[1/1] hash, seed 3" in printed.err


def test_the_command_refuses_an_unknown_router_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command_line.main(["routers", "--only", "nearest", "--out", str(tmp_path / "found.json")])
    assert "error: router='nearest' must be one of topk" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
