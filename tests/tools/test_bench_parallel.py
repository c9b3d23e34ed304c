"""The parallel bench: real processes, all of them measured and ended; the model is fitted to what was measured; the text to the numbers."""

import json
import multiprocessing

import pytest
import torch

from moe_tools.bench import __main__ as command_line
from moe_tools.bench import _parallel_table, parallel
from moe_tools.bench.layer_speed import LayerShape
from tests import gang

TINY, SMALL = (
    LayerShape(8, 8, 16, 4, 2),
    LayerShape(6, 8, 4, 2, 2),
)  # SMALL: K = E, so that every token sends a row to every rank


@pytest.fixture(scope="module")
def record():
    lines = []
    found = parallel.bench(
        [TINY, SMALL], seeds=[0, 1], rounds=2, sizes=[64, 4096], progress=lines.append
    )
    return found | {"lines": lines}


def test_every_contestant_and_every_all_to_all_is_measured_once_a_repetition(record):
    assert [found["name"] for found in record["results"]] == [str(TINY), str(SMALL)] and len(
        record["lines"]
    ) == 4
    for found in record["results"]:
        assert (
            len(found["ms"])
            == len(found["exchanged"])
            == len(found["links"])
            == len(found["network"])
            == 2
        )
        for ms in found["ms"]:
            assert (
                set(ms)
                == {parallel.ALONE, parallel.APART, parallel.SAME_TOKENS, parallel.SAME_EACH}
                and min(ms.values()) > 0
            )
        for exchanged in found["exchanged"]:
            for its in exchanged.values():
                assert [move["what"] for move in its["moves"]] == [
                    "counts",
                    "rows",
                    "rows",
                    "gradients",
                    "gradients",
                ]
                assert all(
                    move[key] > 0 for move in its["moves"] for key in ("by_itself_ms", "in_step_ms")
                )
                assert 0 < its["share_of_step"] < 1
        assert [[link["bytes"] for link in links] for links in found["links"]] == [[64, 4096]] * 2
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_the_bytes_are_those_of_the_layer(record):
    for exchanged in record["results"][1]["exchanged"]:
        for name, tokens in ((parallel.SAME_TOKENS, 3), (parallel.SAME_EACH, 6)):
            counts, *others = (move["bytes_RR"] for move in exchanged[name]["moves"])
            assert counts == [[8 * 3] * 2] * 2  # one expert's count, width and dtype
            assert (
                others == [[[tokens * 8 * 4] * 2] * 2] * 4
            )  # every token to both ranks, 8 float32 each
    for exchanged in record["results"][0][
        "exchanged"
    ]:  # routed: as many rows as slots, and back the way they came
        _, there, back, *_ = (
            torch.tensor(move["bytes_RR"]) for move in exchanged[parallel.SAME_EACH]["moves"]
        )
        assert there.sum(1).tolist() == [8 * 2 * 8 * 4] * 2 and torch.equal(there.T, back)


def test_another_seed_is_another_routing(record):
    first, second = (
        exchanged[parallel.SAME_EACH]["moves"][1]["bytes_RR"]
        for exchanged in record["results"][0]["exchanged"]
    )
    assert first != second


def test_the_modelled_time_is_that_of_the_fitted_network(record):
    for found in record["results"]:
        for network, links, exchanged in zip(found["network"], found["links"], found["exchanged"]):
            for link in links:
                assert link["modelled_ms"] == pytest.approx(
                    1e3 * (network["latency"] + link["bytes"] * network["seconds_per_byte"])
                )
            for move in (move for its in exchanged.values() for move in its["moves"]):
                busiest = max(move["bytes_RR"][0][1], move["bytes_RR"][1][0])
                assert move["modelled_ms"] == pytest.approx(
                    1e3 * (network["latency"] + busiest * network["seconds_per_byte"])
                )


def left() -> list:
    """Processes that the bench has not ended."""
    return [p for p in multiprocessing.active_children() if not p.name.startswith(gang.NAME)]


def test_no_process_is_left(record):
    assert left() == []


@pytest.mark.parametrize("n_ranks", [2, 5])
def test_a_network_that_follows_the_model_is_found_exactly(n_ranks):
    seconds = {volume: (n_ranks - 1) * 3e-5 + volume / 2e9 for volume in (1e3, 1e5, 1e7)}
    network = parallel.fit(seconds, n_ranks)
    assert network.intra_latency == pytest.approx(
        3e-5
    ) and network.intra_bandwidth == pytest.approx(2e9)
    assert network.ranks_per_node == n_ranks


def test_neither_latency_nor_time_per_byte_is_negative():
    steep = parallel.fit({1e3: 1e-7, 1e4: 1.2e-5}, 2)  # ten times the bytes in 120 times the time
    assert steep.intra_latency == 0 and 1e8 < steep.intra_bandwidth < 1e11
    falling = parallel.fit({1e3: 2e-5, 1e6: 1e-5}, 2)
    assert falling.intra_bandwidth == float("inf") and 1e-5 < falling.intra_latency < 2e-5


def test_a_process_that_fails_ends_the_bench_with_an_error(capfd):
    with pytest.raises(
        RuntimeError, match="a process of the bench ended before it had measured everything"
    ):
        parallel._on_ranks([(LayerShape(8, 8, 16, 4, 5), 0, 1, [64])], 2)  # K > E: no such layer
    assert left() == [] and "top_k=5 must be between 1 and n_experts=4" in capfd.readouterr().err


def test_the_report_is_computed_from_the_numbers(record):
    moves = [
        {
            "bytes_RR": [[7e6, 1e6], [2e6, 7e6]],
            "modelled_ms": 1.0,
            "by_itself_ms": 2.0,
            "in_step_ms": 9.0,
        }
    ] * 5
    exchanged = {
        name: {"share_of_step": 0.25, "in_step_ms": 12.5, "moves": moves}
        for name in (parallel.SAME_TOKENS, parallel.SAME_EACH)
    }
    found = {
        "name": "S",
        "ms": [
            {
                parallel.ALONE: 60.0,
                parallel.APART: 75.0,
                parallel.SAME_TOKENS: 40.0,
                parallel.SAME_EACH: 80.0,
            }
        ],
        "exchanged": [exchanged],
        "links": [[{"bytes": 4096, "ms": 2.0, "modelled_ms": 3.0}]],
        "network": [{"latency": 5e-5, "seconds_per_byte": 4e-10}],
    }
    text = _parallel_table.report({**record, "seeds": [0], "results": [found]})
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| S ") or line.strip("| ").startswith("4,096 ")
    ]
    assert rows == [
        ["S", "1 process", "60.00", "1.00 ± 0.00", "", ""],
        ["S", "2 processes, nothing exchanged", "75.00", "1.60 ± 0.00", "", ""],
        ["S", "2 processes, as many tokens in all", "40.00", "1.50 ± 0.00", "12.50 ms", "25%"],
        ["S", "2 processes, as many tokens each", "80.00", "1.50 ± 0.00", "12.50 ms", "25%"],
        [
            "S",
            "2 processes, as many tokens in all",
            "10.000",
            "5.00",
            "10.00",
            "0.50 ± 0.00",
            "12.50",
        ],
        [
            "S",
            "2 processes, as many tokens each",
            "10.000",
            "5.00",
            "10.00",
            "0.50 ± 0.00",
            "12.50",
        ],
        ["4,096", "2.000", "3.000", "1.50 ± 0.00"],
    ]
    assert "alpha 50 us a message, 1/beta 0.400 ns a byte" in text


def test_the_command_writes_the_json_and_prints_the_tables(tmp_path, capsys):
    out = tmp_path / "bench.json"
    command_line.main(
        [
            "parallel",
            "--shape",
            "8",
            "8",
            "16",
            "4",
            "2",
            "--rounds",
            "1",
            "--seeds",
            "3",
            "--out",
            str(out),
        ]
    )
    found = json.loads(out.read_text())
    assert (
        found["seeds"] == [3]
        and found["config"]["n_ranks"] == 2
        and [one["name"] for one in found["results"]] == [str(TINY)]
    )
    assert _parallel_table.report(found) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_ranks": 1}, "n_ranks=1 must be a whole number, at least 2"),
        ({"n_ranks": 3}, "n_ranks=3 must divide T=8 and E=4"),
        ({"rounds": 0}, "rounds=0"),
        ({"seeds": []}, "n_seeds=0"),
        ({"sizes": [64]}, "n_sizes=1 must be a whole number, at least 2"),
        ({"sizes": [0, 64]}, "smallest_size=0"),
    ],
)
def test_a_bench_that_cannot_run_is_refused_before_a_process_starts(
    arguments, message, monkeypatch
):
    monkeypatch.setattr(parallel, "_on_ranks", lambda *_: pytest.fail("started"))
    with pytest.raises(ValueError, match=message):
        parallel.bench([TINY], **arguments)
