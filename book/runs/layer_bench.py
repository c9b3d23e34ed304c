"""How fast is the layer? `python -m moe_tools.bench layer`, three repetitions, on a quiet machine; every shape in a process of its own.

Run it with `python book/runs/layer_bench.py` (about six minutes on two processor cores); the README shows layer_bench.json.
"""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[i]) for i in (1, 2)
]  # moe_book and moe_core, installed or not

from moe_book import runs
from moe_tools.bench import layer_speed

SEEDS, ROUNDS, GROWTH_ROUNDS = [0, 1, 2], 5, 3


def gathered(records: list[dict]) -> dict:
    """One record from those of single shapes; the rate of a large product is the best that any of them saw."""
    results = [record["results"] for record in records]
    return {
        "shapes": [shape for found in results for shape in found["shapes"]],
        "growth": results[-1]["growth"],
        "matmul_gflops": max(found["matmul_gflops"] for found in results),
    }


def main() -> None:
    tiny = layer_speed.LayerShape(8, 8, 16, 4, 2)
    jobs = [
        dict(shapes=[shape], seeds=SEEDS, rounds=ROUNDS, scaling=False)
        for shape in layer_speed.LAYER_SHAPES
    ]
    jobs.append(dict(shapes=[tiny], seeds=SEEDS, rounds=GROWTH_ROUNDS, scaling=True))
    records = []
    for job in jobs:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
            records.append(alone.submit(layer_speed.bench, **job).result())
        print(records[-1]["results"]["shapes"][0]["name"], flush=True)
    records[-1]["results"]["shapes"] = []
    save(records)


def save(records: list[dict]) -> None:
    """Store what the shapes' records say together."""
    config = {
        **records[0]["config"],
        "growth_rounds": GROWTH_ROUNDS,
        "machine": records[0]["machine"],
    }
    print(runs.save("layer_bench", config=config, seeds=SEEDS, results=gathered(records)))


if __name__ == "__main__":
    main()
