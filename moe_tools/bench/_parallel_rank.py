"""What every rank of the parallel bench does.

Nothing is compared here: a rank only says how long things took, turn by turn.
"""

import os
import random
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_core.config import MoEConfig
from moe_core.layer import MixtureOfExperts
from moe_core.parallel import ExpertShard, TorchExchange, contiguous

from .layer_speed import LayerShape

ALONE = "1 process"
APART = "R processes, nothing exchanged"
SAME_TOKENS = "R processes, as many tokens in all"
SAME_EACH = "R processes, as many tokens each"
SPREAD = (SAME_TOKENS, SAME_EACH)
WARM_UP = 2  # turns that do not count


class TimedExchange(TorchExchange):
    """Notes every all-to-all: name, rows, splits, and seconds with the waiting."""

    def __init__(self):
        super().__init__()
        self.notes: list[dict] = []

    def move(self, rows, send, receive, what="rows"):
        """See ``Exchange.move``."""
        start = time.perf_counter()
        got = super().move(rows, send, receive, what)
        self.notes.append(
            {
                "what": what,
                "seconds": time.perf_counter() - start,
                "rows": rows[0].detach(),
                "send": list(send[0]),
                "receive": list(receive[0]),
            }
        )
        return got


def serve(rank: int, n_ranks: int, folder: str, jobs: list[tuple], pipe) -> None:
    """One process: join the others, measure job after job, send what was found.

    A job is (shape, seed, rounds, sizes).
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", n_ranks),
        rank=rank,
        world_size=n_ranks,
        timeout=timedelta(minutes=10),
    )
    for job in jobs:
        pipe.send(measure(*job))
    pipe.recv()  # the others may still need this one
    dist.destroy_process_group()


def measure(shape: LayerShape, seed: int, rounds: int, sizes: list[int]) -> dict:
    """This rank's seconds of every contestant and all-to-all; every rank calls it.

    Args:
        sizes: bytes to each other rank, of the all-to-alls that show what the links are like.

    Returns:
        {"steps": {contestant: seconds}, "moves": {contestant: its all-to-alls in order, each with
        "what", "bytes" to every rank, "in_step" and "by_itself" seconds}, "even": {size: seconds}}.
    """
    rank, R = dist.get_rank(), dist.get_world_size()
    exchange = TimedExchange()
    whole, part = (
        _layer(shape, seed, None),
        _layer(shape, seed, ExpertShard(contiguous(shape.E, R), rank, exchange)),
    )
    x, first = _tokens(shape, seed + rank), _tokens(shape, seed)
    run = {
        ALONE: lambda: _step(whole, first) if rank == 0 else None,
        APART: lambda: _step(whole, x),
        SAME_TOKENS: lambda: _step(part, first.chunk(R, dim=1)[rank]),
        SAME_EACH: lambda: _step(part, x),
    }
    steps, log = {name: [] for name in run}, {name: [] for name in SPREAD}

    def step(name: str) -> None:
        """One step of a contestant, and what it exchanged."""
        exchange.notes.clear()
        steps[name].append(_clock(run[name]))
        if name in SPREAD:
            log[name].append(list(exchange.notes))

    _in_turns(list(run), step, rounds, seed)
    probes = {("even", size): _even(size, R) for size in sizes}
    probes |= {
        (name, i): (note["rows"], note["send"], note["receive"])
        for name in SPREAD
        for i, note in enumerate(log[name][-1])
    }
    times = {key: [] for key in probes}
    plain = TorchExchange()

    def probe(key) -> None:
        """The same all-to-all by itself."""
        rows, send, receive = probes[key]
        times[key].append(_clock(lambda: plain.move([rows], [send], [receive])))

    _in_turns(list(probes), probe, rounds, seed)
    moves = {
        name: [
            {
                "what": note["what"],
                "bytes": [
                    n * note["rows"][0].nbytes if len(note["rows"]) else 0 for n in note["send"]
                ],
                "in_step": [turn[i]["seconds"] for turn in log[name][WARM_UP:]],
                "by_itself": times[name, i][WARM_UP:],
            }
            for i, note in enumerate(log[name][-1])
        ]
        for name in SPREAD
    }
    return {
        "steps": {name: seconds[WARM_UP:] for name, seconds in steps.items()},
        "moves": moves,
        "even": {size: times["even", size][WARM_UP:] for size in sizes},
    }


def _layer(shape: LayerShape, seed: int, shard: ExpertShard | None) -> MixtureOfExperts:
    torch.manual_seed(seed)
    return MixtureOfExperts(MoEConfig(shape.D, shape.F, shape.E, shape.K), shard)


def _tokens(shape: LayerShape, seed: int) -> Tensor:
    return torch.randn(1, shape.T, shape.D, generator=torch.Generator().manual_seed(seed))


def _step(moe: nn.Module, x: Tensor) -> None:
    """Forward and backward of one layer, gradients made afresh."""
    y, _routing = moe(x.detach().requires_grad_())
    y.backward(torch.ones_like(y))
    moe.zero_grad(set_to_none=True)


def _even(size: int, n_ranks: int) -> tuple[Tensor, list[int], list[int]]:
    return torch.zeros(n_ranks * size, dtype=torch.uint8), [size] * n_ranks, [size] * n_ranks


def _in_turns(names: list, do: Callable, rounds: int, seed: int) -> None:
    """Everything once a round, in a drawn order that is the same on all ranks."""
    draw = random.Random(seed)
    for _ in range(rounds + WARM_UP):
        draw.shuffle(names)
        for name in names:
            do(name)


def _clock(run: Callable[[], None]) -> float:
    dist.barrier()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
