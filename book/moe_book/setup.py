"""The second line of every chapter: seeds, device, scale."""

import os
import random
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Book:
    """Where this chapter runs.

    Attributes:
        device: "cuda" when there is a GPU, else "cpu".
        scale: "gpu" or "cpu": which preset ``pick`` returns.
        seed: the seed set for random, numpy and torch.
    """

    device: str
    scale: str
    seed: int

    def pick(self, *, cpu, gpu):
        """The value for this machine's scale, e.g. ``steps = book.pick(cpu=100, gpu=1000)``."""
        return gpu if self.scale == "gpu" else cpu


def setup(seed: int = 0) -> Book:
    """Fix seeds, use one processor thread, pick the device and the scale, and return the choices.

    The environment variable MOE_BOOK_SCALE ("cpu" or "gpu") overrides the scale, so that CI and a laptop with a GPU can run
    the small preset.

    Raises:
        ValueError: MOE_BOOK_SCALE is neither "cpu" nor "gpu".
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_printoptions(precision=4, sci_mode=False, linewidth=110)
    # The small preset's matrices gain little from a second thread, and beside any other busy program two threads that wait for
    # each other are ten times slower than one.
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scale = os.environ.get("MOE_BOOK_SCALE", "gpu" if device == "cuda" else "cpu")
    if scale not in ("cpu", "gpu"):
        raise ValueError(f"MOE_BOOK_SCALE={scale!r} must be 'cpu' or 'gpu'")
    return Book(device=device, scale=scale, seed=seed)
