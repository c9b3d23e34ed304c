"""What a design starts from: a budget, and the error for one that nothing fits."""

import re
from dataclasses import dataclass

from moe_core.validate import at_least, boolean, one_of, whole

from ..accounting import ACCELERATORS, Accelerator

DESIGN_ROUTERS = ("loss_free", "topk", "expert_threshold")
RESERVE = 0.1  # of a GPU's memory, left to kernels, buffers and fragmentation: a rule of thumb
SUFFIXES = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


class Impossible(ValueError):
    """No design fits the budget.

    Attributes:
        reason: why. nearest: what would have to change, each with the number from which on it fits.
    """

    def __init__(self, reason: str, *nearest: str):
        self.reason, self.nearest = reason, nearest
        super().__init__(
            f"{reason}. Nearest: {', or '.join(nearest)}." if nearest else f"{reason}."
        )


def number(text: str) -> float:
    """1.5B, 200b, 640, 3e21: a number with a suffix K, M, B (or G) or T.

    Raises ValueError for anything else.
    """
    found = re.fullmatch(
        r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\s*([KMBGT]?)", text.strip(), re.IGNORECASE
    )
    if not found:
        raise ValueError(f"{text!r} must be a number such as 1.5B, 200B, 3e21 or 640")
    return float(found[1]) * SUFFIXES[found[2].upper()]


@dataclass(frozen=True)
class DesignBudget:
    """A budget for one training run.

    Attributes:
        tokens: training tokens.
        gpus, gpu: how many, and a name among ``accounting.ACCELERATORS``.
        ranks_per_node: GPUs of a node; None: 8, or all if there are fewer.
        active, flops: give one: active parameters (A_all, embedding and head included) or FLOPs of
            the whole training.
        total: total parameters; None leaves the number of experts to the rules.
        seq_len, vocab_size: tokens of a sequence; V.
        memory_limit: bytes a GPU may fill; None: nine tenths of what it has.
        utilisation: share of the peak that computing reaches, exchange apart. An assumption:
            measure yours.
        batch_tokens: tokens of an optimiser step; None leaves them to the rules.
        router: one of ``DESIGN_ROUTERS``; None: "loss_free", or "expert_threshold" if streaming.
        streaming: a token's experts may hang on nothing but that token, in training's last phase as
            when it is served.
        top_k: experts per token; None leaves them to the rules.
        fp8_dispatch: rows go to the experts in one byte per number (and come back in two).

    Raises:
        ValueError: a value is out of its range; the message names it.
        Impossible: no design can fit, whatever its shape.
    """

    tokens: float
    gpus: int
    gpu: str = "h100"
    active: float | None = None
    flops: float | None = None
    total: float | None = None
    seq_len: int = 4096
    vocab_size: int = 50304
    ranks_per_node: int | None = None
    memory_limit: float | None = None
    utilisation: float = 0.4
    batch_tokens: float | None = None
    router: str | None = None
    streaming: bool = False
    top_k: int | None = None
    fp8_dispatch: bool = False

    def __post_init__(self):
        whole(1, gpus=self.gpus, seq_len=self.seq_len, vocab_size=self.vocab_size)
        one_of(ACCELERATORS, gpu=self.gpu)
        if (self.active is None) == (self.flops is None):
            raise ValueError(f"give exactly one of active={self.active!r} and flops={self.flops!r}")
        for name in ("tokens", "active", "flops", "total", "memory_limit", "batch_tokens"):
            if getattr(self, name) is not None:
                at_least(1, **{name: getattr(self, name)})
        if self.memory_limit is not None and self.memory_limit > self.accelerator.memory:
            raise ValueError(
                f"memory_limit={self.memory_limit:.4g} must be at most the "
                f"{self.accelerator.memory:.4g} bytes of gpu={self.gpu!r}"
            )
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation={self.utilisation!r} must be above 0 and at most 1")
        boolean(streaming=self.streaming, fp8_dispatch=self.fp8_dispatch)
        whole(1, top_k=1 if self.top_k is None else self.top_k)
        whole(1, ranks_per_node=self.gpus_per_node)
        one_of(DESIGN_ROUTERS, router=self.router_name)
        if self.streaming and self.router_name != "expert_threshold":
            raise ValueError(
                f"router={self.router!r} must be 'expert_threshold' where streaming=True"
            )
        self._check_possible()

    def _check_possible(self) -> None:
        m = self.gpus_per_node
        if self.gpus % m:
            below, above = self.gpus // m * m, -(-self.gpus // m) * m
            fits = " or ".join(f"gpus={n}" for n in (below, above) if n)
            raise Impossible(
                f"gpus={self.gpus} do not fill whole nodes of ranks_per_node={m}", fits
            )
        if self.tokens < self.gpus * self.seq_len:
            fewer = int(self.tokens // self.seq_len)
            fewer -= fewer % m if fewer > m else 0
            raise Impossible(
                f"tokens={self.tokens:.4g} are fewer than a sequence of seq_len={self.seq_len} for "
                f"each of gpus={self.gpus}",
                f"tokens={self.gpus * self.seq_len}",
                f"gpus={fewer}" if fewer else f"seq_len={int(self.tokens)} on 1 GPU",
            )
        if self.total is not None and self.active is not None and self.total < self.active:
            raise Impossible(
                f"total={self.total:.4g} is less than active={self.active:.4g}",
                f"total={self.active:.4g} (a dense model)",
            )

    @property
    def gpus_per_node(self) -> int:
        """m: as asked, or 8, or all if there are fewer."""
        return min(8, self.gpus) if self.ranks_per_node is None else self.ranks_per_node

    @property
    def router_name(self) -> str:
        """As asked, or by ``streaming``."""
        return self.router or ("expert_threshold" if self.streaming else "loss_free")

    @property
    def accelerator(self) -> Accelerator:
        """The GPU's limits."""
        return ACCELERATORS[self.gpu]

    @property
    def usable_memory(self) -> float:
        """Bytes a GPU may fill."""
        return self.memory_limit or (1 - RESERVE) * self.accelerator.memory

    @property
    def sequences_per_step(self) -> int:
        """Sequences of a GPU in one optimiser step: a power of two, at least 1.

        Without ``batch_tokens``: 2^22 tokens, or as many as leave 20 000 steps if those are fewer.
        """
        wanted = self.batch_tokens or min(2**22, self.tokens / 20_000)
        return 2 ** (max(1, int(wanted // (self.gpus * self.seq_len))).bit_length() - 1)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimiser step on all GPUs."""
        return self.sequences_per_step * self.gpus * self.seq_len

    @property
    def steps(self) -> int:
        """Optimiser steps, the last one begun included."""
        return -int(-self.tokens // self.tokens_per_step)
