"""The parallel bench: one MoE layer spread over R processes of this machine.

Three questions. How much of a step is the all-to-all? What is won by a second process: with as many
tokens in all, and with as many tokens in each? And does the alpha-beta model of
``accounting.network`` say how long an all-to-all takes? Its two numbers are fitted to all-to-alls
of several sizes, measured in the same run, and then asked about the bytes that the layer sends.

gloo, one thread each. All contestants take turns in the same processes, from a barrier on, in a
drawn order every round; the slowest rank of a round counts, and the median over rounds. R processes
that exchange nothing are in, too: what they lose against one is the machine's doing.
"""

import math
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import wait

import torch

from moe_core.validate import whole

from ..accounting.network import Network
from ..machine import machine
from . import _parallel_rank
from ._parallel_rank import ALONE, APART, SAME_EACH, SAME_TOKENS, SPREAD
from ._repetitions import SEEDS
from .layer_speed import LayerShape

__all__ = ["ALONE", "APART", "SAME_EACH", "SAME_TOKENS", "SEEDS", "PARALLEL_SHAPES", "bench", "fit"]

PARALLEL_SHAPES = (
    LayerShape(4096, 256, 512, 16, 2),
    LayerShape(2048, 512, 256, 64, 8),
    LayerShape(2048, 512, 1024, 8, 2),
    LayerShape(64, 512, 1024, 8, 2),
)
MESSAGE_SIZES = tuple(4**n for n in range(4, 13))  # 256 bytes to 16 MiB to each other rank


def bench(
    shapes: Iterable[LayerShape] | None = None,
    *,
    n_ranks: int = 2,
    seeds: Iterable[int] = SEEDS,
    rounds: int = 7,
    sizes: Iterable[int] = MESSAGE_SIZES,
    progress: Callable[[str], None] = lambda line: None,
) -> dict:
    """Start the processes, measure, end them.

    Args:
        shapes: None: ``PARALLEL_SHAPES``. T is the number of tokens in all, or in each process.
        n_ranks: R, processes; as many processor cores should be free.
        seeds: of weights and tokens; each seed is one repetition of the whole.
        rounds: measurements of each contestant and each all-to-all in a repetition.
        sizes: bytes from each rank to each other one, of the all-to-alls to which the model is
            fitted; at least two.
        progress: called with one line of text after each shape and seed.

    Returns:
        ``{"machine", "config", "seeds", "results"}`` of plain values; results holds for every shape
        lists with one entry per seed.

    Raises:
        ValueError: a number is out of range, or R does not divide T or E.
        RuntimeError: a process ended before it had measured everything.
    """
    shapes, seeds, sizes = list(shapes or PARALLEL_SHAPES), list(seeds), sorted(set(sizes))
    whole(2, n_ranks=n_ranks, n_sizes=len(sizes))
    whole(1, rounds=rounds, n_seeds=len(seeds), smallest_size=sizes[0])
    for shape in shapes:
        if shape.T % n_ranks or shape.E % n_ranks:
            raise ValueError(f"n_ranks={n_ranks} must divide T={shape.T} and E={shape.E}")
    jobs = [(shape, seed, rounds, sizes) for shape in shapes for seed in seeds]
    found = []
    for (shape, seed, *_), ranks in zip(jobs, _on_ranks(jobs, n_ranks)):
        found.append(_evaluate(ranks))
        progress(f"{shape}, seed {seed}: measured")
    results = []
    for i, shape in enumerate(shapes):
        runs = found[i * len(seeds) : (i + 1) * len(seeds)]
        results.append(
            {
                "shape": asdict(shape),
                "name": str(shape),
                **{key: [run[key] for run in runs] for key in runs[0]},
            }
        )
    config = {"n_ranks": n_ranks, "rounds": rounds, "backend": "gloo", "dtype": "float32"}
    return {
        "machine": machine("cpu") | {"threads": 1, "torch": torch.__version__.split("+")[0]},
        "config": config,
        "seeds": seeds,
        "results": results,
    }


def _on_ranks(jobs: list[tuple], n_ranks: int) -> list[list[dict]]:
    """For every job what each rank found. The processes are ended, whatever happens."""
    context, found = get_context("spawn"), []
    pipes, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(n_ranks):
                here, there = context.Pipe()
                processes.append(
                    context.Process(
                        target=_parallel_rank.serve,
                        args=(rank, n_ranks, folder, jobs, there),
                        daemon=True,
                    )
                )
                processes[-1].start()
                there.close()
                pipes.append(here)
            for _ in jobs:
                found.append([_receive(pipe, processes) for pipe in pipes])
            for pipe in pipes:
                pipe.send(None)
            for process in processes:
                process.join(10)
        finally:
            for process in processes:
                process.kill()
                process.join()
    return found


def _receive(pipe, processes: list) -> dict:
    ready = wait([pipe, *(process.sentinel for process in processes)])
    try:
        if pipe in ready:
            return pipe.recv()
    except EOFError:  # it closed its end when it died
        pass
    raise RuntimeError(
        "a process of the bench ended before it had measured everything; its error is above"
    )


def _evaluate(ranks: list[dict]) -> dict:
    """From seconds to medians in ms, the fitted network, and what it says of the layer."""
    R = len(ranks)
    even = {size: _ms([rank["even"][size] for rank in ranks]) for size in ranks[0]["even"]}
    network = fit({size * (R - 1): ms / 1e3 for size, ms in even.items()}, R)
    links = [
        {"bytes": size, "ms": ms, "modelled_ms": 1e3 * network.flat(torch.full((R, R), size))}
        for size, ms in even.items()
    ]
    exchanged = {}
    for name in SPREAD:
        step = [max(turn) for turn in zip(*(rank["steps"][name] for rank in ranks))]
        inside = [
            statistics.fmean(turn)
            for turn in zip(
                *(
                    [
                        sum(parts)
                        for parts in zip(*(move["in_step"] for move in rank["moves"][name]))
                    ]
                    for rank in ranks
                )
            )
        ]
        moves = []
        for several in zip(*(rank["moves"][name] for rank in ranks), strict=True):
            bytes_RR = torch.tensor([move["bytes"] for move in several])
            moves.append(
                {
                    "what": several[0]["what"],
                    "bytes_RR": bytes_RR.tolist(),
                    "modelled_ms": 1e3 * network.flat(bytes_RR),
                    **{
                        f"{how}_ms": _ms([move[how] for move in several])
                        for how in ("by_itself", "in_step")
                    },
                }
            )
        exchanged[name] = {
            "share_of_step": statistics.median(part / all_ for part, all_ in zip(inside, step)),
            "in_step_ms": 1e3 * statistics.median(inside),
            "moves": moves,
        }
    return {
        "ms": (
            {
                name: _ms([rank["steps"][name] for rank in ranks])
                for name in ranks[0]["steps"]
                if name != ALONE
            }
            | {ALONE: _ms([ranks[0]["steps"][ALONE]])}
        ),
        "exchanged": exchanged,
        "links": links,
        "network": {
            "latency": network.intra_latency,
            "seconds_per_byte": 1 / network.intra_bandwidth,
        },
    }


def _ms(seconds_of_ranks: list[list[float]]) -> float:
    """The slowest rank of each round; the median over rounds, in ms."""
    return 1e3 * statistics.median(max(turn) for turn in zip(*seconds_of_ranks))


def fit(seconds: dict[float, float], n_ranks: int) -> Network:
    r"""The network whose even all-to-all takes these seconds.

    .. math:: t = (R - 1) \alpha + V / \beta

    alpha and beta with the least sum of squared relative errors, so that small sizes count as much
    as large ones; neither is below 0.

    Args:
        seconds: V, the bytes that each rank sends to others -> t.
        n_ranks: R, all on one node.
    """
    volume, time = (
        torch.tensor(list(seconds), dtype=torch.float64),
        torch.tensor(list(seconds.values()), dtype=torch.float64),
    )
    terms = torch.stack([(n_ranks - 1) / time, volume / time], 1)
    found = torch.linalg.lstsq(
        terms, torch.ones(len(time), 1, dtype=torch.float64)
    ).solution.flatten()
    if found.min() < 0:  # one of the two is 0 then, and the other alone is fitted
        found = torch.where(found < 0, 0.0, terms.sum(0) / terms.square().sum(0))
    latency, per_byte = found.tolist()
    return Network(
        n_ranks, intra_bandwidth=1 / per_byte if per_byte else math.inf, intra_latency=latency
    )
