"""The layer bench: it measures what it says, on the same weights, and its text can be computed from its numbers."""

import json

import pytest
import torch

from moe_tools.bench import __main__ as command_line
from moe_tools.bench import _contestants, _layer_table, _peak_memory, layer_speed

from ..core.helpers import close

TINY = layer_speed.LayerShape(8, 8, 16, 4, 2)


@pytest.fixture(scope="module")
def record():
    return layer_speed.bench(
        [TINY, layer_speed.LayerShape(4, 8, 16, 4, 2, forward_only=True)],
        backends=["auto", "loop"],
        seeds=[0, 1],
        rounds=2,
        scaling=False,
    )


def test_every_contestant_is_measured_once_a_repetition(record):
    for found in record["results"]["shapes"]:
        assert {
            "dense, T*K rows",
            "moe_core auto",
            "moe_core loop",
            "Hugging Face eager",
            "Hugging Face grouped_mm",
        } <= set(found["contestants"])
        for its in found["contestants"].values():
            assert (
                len(its["ms"]) == len(its["peak_mb"]) == 2
                and min(its["ms"]) > 0
                and min(its["peak_mb"]) > 0
            )
    assert record["results"]["matmul_gflops"] > 0


def test_what_auto_runs_is_said_whichever_backend_is_asked_for_first(record):
    other = layer_speed.bench([TINY], backends=["loop", "auto"], seeds=[0], rounds=1, scaling=False)
    assert (
        other["results"]["shapes"][0]["backend"]
        == record["results"]["shapes"][0]["backend"]
        != "loop"
    )


def test_all_contestants_but_st_moe_compute_the_same(record):
    ours, x = layer_speed._layer(TINY, "auto", 0, "cpu", torch.float32), torch.randn(1, 8, 8)
    for name, block in _contestants.others(ours).items():
        if name.startswith("Hugging Face"):
            assert close(block(x), ours(x)[0])


def test_the_work_is_that_of_the_matrices():
    assert TINY.flops == 3 * 2 * (8 * 2) * (
        8 * 32 + 16 * 8
    )  # rows times the numbers of both matrices, forward and twice backward
    assert 3 * layer_speed.LayerShape(8, 8, 16, 4, 2, forward_only=True).flops == TINY.flops


def test_the_peak_is_what_was_alive_at_once():
    def one_after_the_other():
        for _ in range(3):
            torch.empty(250_000).fill_(1)

    def at_once():
        kept = [torch.empty(250_000).fill_(1) for _ in range(3)]
        return len(kept)

    assert _peak_memory.peak_bytes(one_after_the_other) == pytest.approx(1e6, rel=0.02)
    assert _peak_memory.peak_bytes(at_once) == pytest.approx(3e6, rel=0.02)


def test_a_step_leaves_no_gradient_behind_and_a_decoding_step_makes_none():
    moe = layer_speed._layer(TINY, "auto", 0, "cpu", torch.float32)
    layer_speed._step(moe, layer_speed._input("moe", TINY, 0, "cpu", torch.float32), TINY)
    assert all(p.grad is None for p in moe.parameters())
    decode = layer_speed.LayerShape(4, 8, 16, 4, 2, forward_only=True)
    assert not layer_speed._input("moe", decode, 0, "cpu", torch.float32).requires_grad


def test_the_report_names_every_shape_and_ratio(record):
    text = _layer_table.report(record)
    for found in record["results"]["shapes"]:
        assert text.count(found["name"] + " ") >= 6
    found = {
        "shape": {"T": 8, "K": 2, "E": 4},
        "name": "S",
        "flops": 1,
        "backend": "fused",
        "contestants": {
            "dense, T*K rows": {"ms": [1.0, 1.0], "peak_mb": [1.0, 1.0]},
            "moe_core auto": {"ms": [1.5, 1.7], "peak_mb": [2.0, 2.0]},
            "Hugging Face eager": {"ms": [4.0, 4.0], "peak_mb": [9.0, 9.0]},
            "Hugging Face grouped_mm": {"ms": [2.0, 2.0], "peak_mb": [4.0, 4.0]},
        },
    }
    made = {**record, "results": {**record["results"], "shapes": [found]}}
    line = next(line for line in _layer_table.summary(made).splitlines() if line.startswith("| S"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "S",
        "4",
        "0.80",
        "1.60",
        "0.500",
    ]


def test_growth_is_drawn_in_proportion(record):
    points = [
        {"shape": {"T": T, "D": 1, "F": 1, "E": 1, "K": 1, "forward_only": False}, "ms": [T * 1.0]}
        for T in (1, 2, 4)
    ]
    made = {**record, "results": {**record["results"], "growth": {"T": points}}}
    assert [line.count("█") for line in _layer_table.growth(made, "T").splitlines()[1:]] == [
        12,
        24,
        48,
    ]


def test_the_command_writes_json_and_prints_the_table(tmp_path, capsys):
    out = tmp_path / "bench.json"
    command_line.main(
        [
            "layer",
            "--shape",
            "8",
            "8",
            "16",
            "4",
            "2",
            "--rounds",
            "1",
            "--seeds",
            "0",
            "--no-growth",
            "--device",
            "cpu",
            "--out",
            str(out),
        ]
    )
    assert json.loads(out.read_text())["results"]["shapes"][0]["name"] == str(TINY)
    assert "geometric mean" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"backends": ["triton"]}, {"seeds": []}])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match="rounds=0|backend='triton'|n_seeds=0"):
        layer_speed.bench([TINY], scaling=False, **wrong)
