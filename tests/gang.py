"""Real processes for tests: R ranks of a gloo group on loopback that run one program after another and are always ended."""

import os
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

# Seconds until a program that does not come back is given up, and after another rank failed: limits for what hangs, not measures of speed.
PATIENCE, GRACE = 600, 5
NAME = "gang"  # of these processes, which live as long as the tests


class Gang:
    """``gang.run(program, argument)`` runs program(rank, argument) on every rank and returns the list of what they returned.

    program must be importable by name, and argument and results picklable. Programs that end with an error raise it here.
    """

    def __init__(self, n_ranks: int, timeout: float = 300.0):
        self.n_ranks = n_ranks
        self.closed = False
        self._folder = tempfile.TemporaryDirectory()
        context, threads = get_context("spawn"), torch.get_num_threads()
        self._pipes, self._processes = [], []
        for rank in range(n_ranks):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                name=f"{NAME} {rank}",
                args=(
                    rank,
                    n_ranks,
                    str(Path(self._folder.name) / "store"),
                    timeout,
                    there,
                    threads,
                ),
                daemon=True,
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def run(self, program, argument=None) -> list:
        outcomes = self.outcomes(program, argument)
        failures = [
            f"rank {rank} of {self.n_ranks}:\n{value}"
            for rank, (ok, value) in enumerate(outcomes)
            if not ok
        ]
        assert not failures, "\n".join(failures)
        return [value for _, value in outcomes]

    def outcomes(self, program, argument=None) -> list[tuple[bool, object]]:
        """For each rank (True, what it returned), or (False, why not). After an error the others get GRACE seconds to come back;
        where one does not (it may wait for the one that failed), the gang is ended."""
        for pipe in self._pipes:
            pipe.send((program, argument))
        waiting, outcomes = (
            dict(zip(self._pipes, range(self.n_ranks))),
            [(False, "no answer")] * self.n_ranks,
        )
        end = time.monotonic() + PATIENCE
        while waiting and time.monotonic() < end:
            for pipe in wait(list(waiting), timeout=max(0.0, end - time.monotonic())):
                rank = waiting.pop(pipe)
                try:
                    outcomes[rank] = pipe.recv()
                except EOFError:
                    outcomes[rank] = (False, "the process is gone")
                if not outcomes[rank][0]:
                    end = min(end, time.monotonic() + GRACE)
        if waiting:
            self.close()
        return outcomes

    def close(self) -> None:
        self.closed = True
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, n_ranks: int, store: str, timeout: float, pipe, threads: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    torch.set_num_threads(
        threads
    )  # as many as the test has: sums over threads are in another order
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, n_ranks),
        rank=rank,
        world_size=n_ranks,
        timeout=timedelta(seconds=timeout),
    )
    while True:
        program, argument = pipe.recv()  # ends with EOFError when the test process is gone
        try:
            pipe.send((True, program(rank, argument)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
