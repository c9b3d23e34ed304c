"""The layer bench: one MoE layer against Hugging Face's block and a dense MLP.

All contestants take turns in one process, in a drawn order every round, so that they meet the same
machine; the median over the rounds counts, and what is compared are ratios. The dense MLP works on
T*K rows: the same multiplications without any routing. It is the floor.

Memory is the most that was alive at once during a step, weights excluded, gradients included. The
rate counts the multiplications of the experts alone (3 D F a row, three times that with the
backward pass); its share is that of this machine's rate for one large product of two matrices.
"""

import copy
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from moe_core.config import MoEConfig
from moe_core.experts import BACKENDS, FeedForward
from moe_core.layer import MixtureOfExperts
from moe_core.validate import one_of, whole

from ..machine import machine
from . import _contestants as contestants
from ._peak_memory import peak_bytes
from ._repetitions import SEEDS

DENSE = "dense, T*K rows"


@dataclass(frozen=True)
class LayerShape:
    """One layer and one batch; ``forward_only`` for a decoding step."""

    T: int
    D: int
    F: int
    E: int
    K: int
    forward_only: bool = False

    @property
    def flops(self) -> int:
        """Of the experts in one step: 2 a multiplication, twice as many again backward."""
        return (1 if self.forward_only else 3) * 6 * self.T * self.K * self.D * self.F

    def __str__(self) -> str:
        return f"T={self.T} D={self.D} F={self.F} E={self.E} K={self.K}" + (
            ", forward" if self.forward_only else ""
        )


LAYER_SHAPES = (
    LayerShape(2048, 256, 512, 8, 2),
    LayerShape(4096, 256, 512, 16, 2),
    LayerShape(4096, 512, 256, 64, 8),
    LayerShape(2048, 512, 1024, 8, 2),
    LayerShape(1024, 128, 128, 128, 4),
    LayerShape(256, 512, 1024, 8, 2),
    LayerShape(4, 512, 1024, 64, 8, forward_only=True),
)
GPU_SHAPES = (
    LayerShape(16384, 2048, 1024, 64, 8),
    LayerShape(16384, 4096, 14336, 8, 2),
    LayerShape(8192, 2048, 768, 128, 8),
    LayerShape(64, 2048, 768, 128, 8, forward_only=True),
)
LARGER_T = tuple(LayerShape(T, 256, 512, 8, 2) for T in (256, 512, 1024, 2048, 4096, 8192))
LARGER_E = tuple(LayerShape(4096, 256, 256, E, 2) for E in (4, 8, 16, 32, 64, 128))


def bench(
    shapes: Iterable[LayerShape] | None = None,
    *,
    backends: Iterable[str] = ("auto",),
    seeds: Iterable[int] = SEEDS,
    rounds: int = 7,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    scaling: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> dict:
    """Run the bench.

    Args:
        shapes: None: ``LAYER_SHAPES``, or ``GPU_SHAPES`` on any device but the CPU.
        backends: those of ``Experts`` that take part.
        seeds: of weights and tokens; each seed is one repetition of the whole.
        rounds: measurements of each contestant in a repetition.
        scaling: also measure how the time grows with T, and with E at a fixed T*K.
        progress: called with one line of text after each shape.

    Returns:
        ``{"machine", "config", "seeds", "results"}`` of plain values; results holds, by shape and
        contestant, lists with one entry per seed.

    Raises:
        ValueError: an unknown backend, or a number that is not positive.
    """
    backends, seeds = list(backends), list(seeds)
    for backend in backends:
        one_of(BACKENDS, backend=backend)
    whole(1, rounds=rounds, n_seeds=len(seeds), n_backends=len(backends))
    shapes = list(shapes or (LAYER_SHAPES if device == "cpu" else GPU_SHAPES))
    results = []
    for shape in shapes:
        runs = [_run(shape, backends, seed, rounds, device, dtype) for seed in seeds]
        results.append(
            {
                "shape": asdict(shape),
                "name": str(shape),
                "flops": shape.flops,
                "backend": runs[0]["backend"],
                "contestants": {
                    name: {
                        key: [run["measured"][name][key] for run in runs]
                        for key in ("ms", "peak_mb")
                    }
                    for name in runs[0]["measured"]
                },
            }
        )
        progress(f"{shape}: auto runs {runs[0]['backend']}")
    curves = {}
    for name, line in (("T", LARGER_T), ("E", LARGER_E)) if scaling else ():
        curves[name] = [
            {
                "shape": asdict(shape),
                "ms": [
                    _clock(
                        {"moe": _layer(shape, backends[0], seed, device, dtype)},
                        shape,
                        seed,
                        rounds,
                        device,
                        dtype,
                    )["moe"]
                    for seed in seeds
                ],
            }
            for shape in line
        ]
        progress(f"growth with {name} measured")
    return {
        "machine": machine(device) | {"torch": torch.__version__.split("+")[0]},
        "config": {
            "rounds": rounds,
            "dtype": str(dtype).removeprefix("torch."),
            "backends": backends,
        },
        "seeds": seeds,
        "results": {
            "shapes": results,
            "growth": curves,
            "matmul_gflops": _matmul_rate(device, dtype),
        },
    }


def _layer(
    shape: LayerShape, backend: str, seed: int, device: str, dtype: torch.dtype
) -> MixtureOfExperts:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        moe = MixtureOfExperts(MoEConfig(shape.D, shape.F, shape.E, shape.K, backend=backend))
    return moe.to(device, dtype)


def _run(
    shape: LayerShape, backends: list[str], seed: int, rounds: int, device: str, dtype: torch.dtype
) -> dict:
    """One repetition of one shape: median milliseconds and peak memory in MB."""
    ours = _layer(shape, "auto", seed, device, dtype)
    modules = {DENSE: FeedForward(shape.D, shape.F).to(device, dtype)}
    for backend in backends:
        modules[f"moe_core {backend}"] = copy.deepcopy(ours)
        modules[f"moe_core {backend}"].experts.backend = backend
    modules |= contestants.others(ours)
    times = _clock(modules, shape, seed, rounds, device, dtype)
    peak = {
        name: (
            peak_bytes(
                lambda: _step(module, _input(name, shape, seed, device, dtype), shape), device
            )
            / 1e6
        )
        for name, module in modules.items()
    }
    rows = torch.empty(shape.T * shape.K, shape.D, dtype=dtype, device=device)
    return {
        "backend": ours.experts.choose_backend(rows)[0],
        "measured": {name: {"ms": times[name], "peak_mb": peak[name]} for name in modules},
    }


def _clock(
    modules: dict[str, nn.Module],
    shape: LayerShape,
    seed: int,
    rounds: int,
    device: str,
    dtype: torch.dtype,
) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in modules}
    order, draw = list(modules), random.Random(seed)
    for turn in range(rounds + 2):  # two to warm up
        draw.shuffle(order)
        for name in order:
            x = _input(name, shape, seed, device, dtype)
            _wait(device)
            start = time.perf_counter()
            _step(modules[name], x, shape)
            _wait(device)
            if turn > 1:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _input(name: str, shape: LayerShape, seed: int, device: str, dtype: torch.dtype) -> Tensor:
    tokens = shape.T * (shape.K if name == DENSE else 1)
    x = torch.randn(1, tokens, shape.D, generator=torch.Generator().manual_seed(seed)).to(
        device, dtype
    )
    return x.requires_grad_(not shape.forward_only)


def _step(module: nn.Module, x: Tensor, shape: LayerShape) -> None:
    """What is timed: forward and backward of one layer, gradients made afresh."""
    with torch.set_grad_enabled(not shape.forward_only):
        y = module(x)
        y = y[0] if isinstance(y, tuple) else y
    if not shape.forward_only:
        y.backward(torch.ones_like(y))
        module.zero_grad(set_to_none=True)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def _matmul_rate(device: str, dtype: torch.dtype) -> float:
    """GFLOP/s of one large product, the best of several."""
    n = 2048 if device == "cpu" else 8192
    a, b, seconds = (
        torch.randn(n, n, device=device, dtype=dtype),
        torch.randn(n, n, device=device, dtype=dtype),
        [],
    )
    for _ in range(8):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds) / 1e9
