"""Who is still there: every rank counts up in a store that all can read.

torch names the wrong rank or none (tried with 2.13, gloo, three ranks). After a collective failed,
monitored_barrier fails on the same connections; on a group of its own, rank 0 names a rank that
hangs, but not one that was killed, and the other ranks send the reader to rank 0. torchrun calls
the first process that ended with an error the root cause: mostly a bystander.
"""

import threading
import time

import torch.distributed as dist


class Heartbeat:
    """A thread that beats once a second until ``leave``.

    A rank that waits for others in a collective still beats; one that died or hangs does not.

    Args:
        store: by which the process group met.
        rank, n_ranks: this rank, and all.
    """

    EVERY = 1.0

    def __init__(self, store: dist.Store, rank: int, n_ranks: int):
        self._store, self.rank, self.n_ranks = (
            store.clone(),
            rank,
            n_ranks,
        )  # a connection of its own: the other may be waiting
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        try:
            while not self._done.is_set():
                self._store.add(f"beat/{self.rank}", 1)
                self._done.wait(self.EVERY)
        except RuntimeError:
            pass  # the store is gone; who asks for missing ranks is told so

    def missing(self) -> list[int]:
        """The ranks that do not beat during three seconds and have not left.

        Raises:
            RuntimeError: the store cannot be reached; it lives in the process of rank 0, or of
                torchrun.
        """
        before = self._beats()
        time.sleep(3 * self.EVERY)
        after = self._beats()
        still = [
            rank
            for rank in range(self.n_ranks)
            if rank != self.rank and after[rank] == before[rank]
        ]
        return [rank for rank in still if rank not in self.left()]

    def left(self) -> list[int]:
        """The other ranks that have said goodbye. Raises RuntimeError as ``missing``."""
        return [
            rank
            for rank in range(self.n_ranks)
            if rank != self.rank and self._store.check([f"left/{rank}"])
        ]

    def leave(self) -> None:
        """Say goodbye and stop."""
        self._done.set()
        try:
            self._store.set(f"left/{self.rank}", "1")
        except RuntimeError:
            pass

    def _beats(self) -> list[int]:
        return [self._store.add(f"beat/{rank}", 0) for rank in range(self.n_ranks)]
