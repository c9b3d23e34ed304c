"""The command line: ``python -m moe_core.bench routers``."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from . import routers


def main(arguments: list[str] | None = None) -> None:
    """Run a bench, write its JSON, print its table."""
    parser = argparse.ArgumentParser(prog="python -m moe_core.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("routers", help="every router on the same text, model and budget")
    command.add_argument("--seeds", type=int, nargs="+", default=list(routers.SEEDS), help="one run per router and seed")
    command.add_argument("--steps", type=int, default=routers.Budget.steps, help="optimiser steps of a run")
    command.add_argument("--only", nargs="+", metavar="ROUTER", help=f"some of: {', '.join(routers.ROWS)}")
    command.add_argument("--workers", type=int, default=2, help="processes, each with one thread")
    command.add_argument("--out", type=Path, default=Path("router_bench.json"), help="where to write the numbers")
    asked = parser.parse_args(arguments)
    try:
        budget = replace(routers.Budget(), steps=asked.steps)
        record = routers.bench(asked.only, seeds=asked.seeds, budget=budget, workers=asked.workers,
                               progress=lambda line: print(line, file=sys.stderr, flush=True))
    except ValueError as error:
        parser.error(str(error))
    asked.out.write_text(json.dumps(record, indent=1) + "\n")
    print(routers.table(record))


if __name__ == "__main__":
    main()
