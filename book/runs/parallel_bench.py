"""What does a second process win, and what does the all-to-all cost? `python -m moe_tools.bench parallel` on a quiet machine.

Run it with `python book/runs/parallel_bench.py` (about four minutes on two processor cores); the README shows a part of parallel_bench.json.
"""

import sys
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[i]) for i in (1, 2)
]  # moe_book and moe_core, installed or not

from moe_book import runs
from moe_tools.bench import parallel


def save(record: dict) -> None:
    """Store what the bench returned."""
    config = {**record["config"], "machine": record["machine"]}
    print(
        runs.save(
            "parallel_bench",
            config=config,
            seeds=record["seeds"],
            results={"shapes": record["results"]},
        )
    )


if __name__ == "__main__":
    save(parallel.bench(progress=print))
