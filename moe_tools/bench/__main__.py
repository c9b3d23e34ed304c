"""The command line: ``python -m moe_tools.bench routers``, ``layer`` and ``parallel``."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from moe_core.experts import BACKENDS

from . import _layer_table, _parallel_table, layer_speed, parallel, routers


def main(arguments: list[str] | None = None) -> None:
    """Run a bench, write its JSON, print its table."""
    parser = argparse.ArgumentParser(prog="python -m moe_tools.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _router_arguments(
        commands.add_parser("routers", help="every router on the same text, model and budget")
    )
    _layer_arguments(
        commands.add_parser(
            "layer", help="one layer, forward and backward, against other libraries and a dense MLP"
        )
    )
    _parallel_arguments(
        commands.add_parser(
            "parallel",
            help="one layer over several processes: the all-to-all, scaling, the cost model",
        )
    )
    asked = parser.parse_args(arguments)
    try:
        record, text = {"routers": _routers, "layer": _layer, "parallel": _parallel}[asked.command](
            asked
        )
    except ValueError as error:
        parser.error(str(error))
    asked.out.write_text(json.dumps(record, indent=1) + "\n")
    print(text)


def _router_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=list(routers.SEEDS),
        help="one run per router and seed",
    )
    command.add_argument(
        "--steps", type=int, default=routers.Budget.steps, help="optimiser steps of a run"
    )
    command.add_argument(
        "--only", nargs="+", metavar="ROUTER", help=f"some of: {', '.join(routers.ROWS)}"
    )
    command.add_argument("--workers", type=int, default=2, help="processes, each with one thread")
    command.add_argument(
        "--out", type=Path, default=Path("router_bench.json"), help="where to write the numbers"
    )


def _routers(asked: argparse.Namespace) -> tuple[dict, str]:
    budget = replace(routers.Budget(), steps=asked.steps)
    record = routers.bench(
        asked.only, seeds=asked.seeds, budget=budget, workers=asked.workers, progress=_say
    )
    return record, routers.table(record)


def _layer_arguments(command: argparse.ArgumentParser) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument(
        "--shape",
        type=int,
        nargs=5,
        action="append",
        metavar=("T", "D", "F", "E", "K"),
        help="instead of the usual ones; may be repeated",
    )
    command.add_argument(
        "--backends", nargs="+", default=["auto"], choices=BACKENDS, help="which of ours take part"
    )
    command.add_argument(
        "--seeds", type=int, nargs="+", default=list(layer_speed.SEEDS), help="one repetition each"
    )
    command.add_argument(
        "--rounds", type=int, default=7, help="measurements of each contestant in a repetition"
    )
    command.add_argument("--device", default=device, help=f"here by default {device}")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32" if device == "cpu" else "bfloat16",
    )
    command.add_argument("--threads", type=int, help="of the CPU; by default torch's own choice")
    command.add_argument(
        "--no-growth", action="store_true", help="leave out how the time grows with T and E"
    )
    command.add_argument(
        "--out", type=Path, default=Path("layer_bench.json"), help="where to write the numbers"
    )


def _layer(asked: argparse.Namespace) -> tuple[dict, str]:
    if asked.threads:
        torch.set_num_threads(asked.threads)
    shapes = [layer_speed.LayerShape(*sizes) for sizes in asked.shape or ()] or None
    record = layer_speed.bench(
        shapes,
        backends=asked.backends,
        seeds=asked.seeds,
        rounds=asked.rounds,
        device=asked.device,
        dtype=getattr(torch, asked.dtype),
        scaling=not asked.no_growth,
        progress=_say,
    )
    return record, _layer_table.report(record)


def _parallel_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--shape",
        type=int,
        nargs=5,
        action="append",
        metavar=("T", "D", "F", "E", "K"),
        help="instead of the usual ones; may be repeated",
    )
    command.add_argument("--ranks", type=int, default=2, help="processes, each with one thread")
    command.add_argument(
        "--seeds", type=int, nargs="+", default=list(parallel.SEEDS), help="one repetition each"
    )
    command.add_argument(
        "--rounds", type=int, default=7, help="measurements of each contestant in a repetition"
    )
    command.add_argument(
        "--out", type=Path, default=Path("parallel_bench.json"), help="where to write the numbers"
    )


def _parallel(asked: argparse.Namespace) -> tuple[dict, str]:
    shapes = [layer_speed.LayerShape(*sizes) for sizes in asked.shape or ()] or None
    record = parallel.bench(
        shapes, n_ranks=asked.ranks, seeds=asked.seeds, rounds=asked.rounds, progress=_say
    )
    return record, _parallel_table.report(record)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
