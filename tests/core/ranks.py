"""Run a function in several real processes joined by torch.distributed (gloo), and end them whatever happens."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def on_ranks(function: str, tmp_path: Path, n_ranks: int = 2, timeout: float = 120) -> list:
    """[function(rank) for each rank], where function is "package.module:name" and what it returns can be saved by torch.

    The ranks meet at a file, so no port has to be free; they talk over the loopback interface.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                   "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
    processes, logs = [], [open(tmp_path / f"{rank}.log", "w+") for rank in range(n_ranks)]
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, "-m", "tests.core.ranks", function, str(rank), str(n_ranks), str(tmp_path)]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
        end, running = time.monotonic() + timeout, True
        while running and time.monotonic() < end and not any(process.poll() for process in processes):  # a failure ends the wait
            running = any(_runs(process) for process in processes)
    finally:
        for process in processes:
            process.kill()  # does nothing to one that has ended
            process.wait()
        for log in logs:
            log.close()
    codes = [process.returncode for process in processes]  # -9: this rank had to be ended
    assert codes == [0] * n_ranks, "\n".join([f"exit codes {codes}", *(Path(log.name).read_text() for log in logs)])
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(n_ranks)]


def _runs(process: subprocess.Popen) -> bool:
    try:
        process.wait(0.1)
    except subprocess.TimeoutExpired:
        return True
    return False


def main(function: str, rank: str, n_ranks: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(rank), world_size=int(n_ranks))
    module, name = function.split(":")
    torch.save(getattr(importlib.import_module(module), name)(int(rank)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
