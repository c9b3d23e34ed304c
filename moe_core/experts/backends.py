"""Four ways to run rows that are sorted by expert through a bank; all give the same numbers.

Each returns (A, D). ``keep_AF`` is what dropout multiplies the hidden values with, or None;
``places`` is the most rows an expert can have, or None where the routing does not say.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import Activation
from .fused import fused


class Bank(NamedTuple):
    """The weights of E experts, as ``Experts`` keeps them, and the activation."""

    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: Activation


def loop(rows_AD, counts_E, bank: Bank, keep_AF=None, places=None) -> Tensor:
    """One expert after the other: the reference. Any device and dtype."""
    counts, E = counts_E.tolist(), len(counts_E)
    # Unbind once: indexing the bank would build a zero gradient of all of it for every expert.
    bias = bank.gate_up_bias is not None
    gate_up_bias = bank.gate_up_bias.unbind(0) if bias else [None] * E
    down_bias = bank.down_bias.unbind(0) if bias else [None] * E
    keeps = keep_AF.split(counts) if keep_AF is not None else None
    outputs = []
    # No expert is skipped: one without rows then has a gradient of zeros and not None.
    groups = zip(rows_AD.split(counts), bank.gate_up_proj.unbind(0), bank.down_proj.unbind(0))
    for e, (rows, gate_up, down) in enumerate(groups):
        hidden = bank.activation(F.linear(rows, gate_up, gate_up_bias[e]))
        if keeps is not None:
            hidden = hidden * keeps[e]
        outputs.append(F.linear(hidden, down, down_bias[e]))
    return torch.cat(outputs)


def padded(rows_AD, counts_E, bank: Bank, keep_AF=None, places=None) -> Tensor:
    """A table of E x C rows, C the most of an expert, and one batched matrix product.

    Good for many small, even groups.
    """
    A, E = rows_AD.shape[0], len(counts_E)
    # Without a capacity the largest count has to be read, which synchronises with a GPU.
    C = max(1, int(counts_E.max()) if places is None else min(places, A))
    row_A, expert_E = (torch.arange(n, device=rows_AD.device) for n in (A, E))
    expert_A = torch.repeat_interleave(expert_E, counts_E, output_size=A)
    place_A = row_A - (counts_E.cumsum(0) - counts_E)[expert_A]
    # Rows beyond C (a static plan has such) fall on a last line: zeros on the way back.
    place_A = torch.where(place_A < C, expert_A * C + place_A, E * C)

    def table(values: Tensor) -> Tensor:
        lines = values.new_zeros(E * C + 1, values.shape[-1]).index_copy(0, place_A, values)
        return lines[:-1].view(E, C, -1)

    projected = _BatchedLinear.apply(table(rows_AD), bank.gate_up_proj)
    if bank.gate_up_bias is not None:
        projected = projected + bank.gate_up_bias.unsqueeze(1)
    hidden = bank.activation(projected)
    if keep_AF is not None:
        hidden = hidden * table(keep_AF)
    out = _BatchedLinear.apply(hidden, bank.down_proj)
    if bank.down_bias is not None:
        out = out + bank.down_bias.unsqueeze(1)
    return F.pad(out.flatten(0, 1), (0, 0, 0, 1)).index_select(0, place_A)


class _BatchedLinear(torch.autograd.Function):
    """x W^T, batched; torch's own gradient is that of W^T, to be copied into W's order."""

    @staticmethod
    def forward(ctx, x_ECI: Tensor, weight_EOI: Tensor) -> Tensor:
        ctx.save_for_backward(x_ECI, weight_EOI)
        return torch.bmm(x_ECI, weight_EOI.mT)

    @staticmethod
    def backward(ctx, grad_ECO: Tensor):
        x_ECI, weight_EOI = ctx.saved_tensors
        return torch.bmm(grad_ECO, weight_EOI), torch.bmm(grad_ECO.mT, x_ECI)


def grouped(rows_AD, counts_E, bank: Bank, keep_AF=None, places=None) -> Tensor:
    """torch's grouped_mm: every row a multiple of 16 bytes. Nothing synchronises with a GPU."""
    ends_E = counts_E.cumsum(0).to(torch.int32)
    expert_A = None
    if bank.gate_up_bias is not None:  # grouped_mm refuses a bias, though its signature has one
        expert_E = torch.arange(len(counts_E), device=rows_AD.device)
        expert_A = torch.repeat_interleave(expert_E, counts_E, output_size=rows_AD.shape[0])
    projected = F.grouped_mm(rows_AD, bank.gate_up_proj.mT, offs=ends_E)
    if expert_A is not None:
        projected = projected + bank.gate_up_bias.index_select(0, expert_A)
    hidden = bank.activation(projected)
    if keep_AF is not None:
        hidden = hidden * keep_AF
    out = F.grouped_mm(hidden, bank.down_proj.mT, offs=ends_E)
    return out if expert_A is None else out + bank.down_bias.index_select(0, expert_A)


def fused_bank(rows_AD, counts_E, bank: Bank, keep_AF=None, places=None) -> Tensor:
    """One operation for the whole bank: the fastest on a CPU, except for many tiny groups."""
    return fused(rows_AD, counts_E, *bank[:4], keep_AF, bank.activation)


BACKENDS: dict[str, Callable[..., Tensor]] = {"loop": loop, "padded": padded, "grouped": grouped}
BACKENDS["fused"] = fused_bank


def run(backend: str, rows_AD, counts_E, bank: Bank, keep_AF=None, places=None) -> Tensor:
    """The rows through the backend of this name; "auto" lets ``choose`` decide."""
    if backend == "auto":
        backend, _why = choose(rows_AD, len(counts_E), bank.down_proj.shape[-1], places)
    return BACKENDS[backend](rows_AD, counts_E, bank, keep_AF, places)


def choose(rows_AD: Tensor, n_experts: int, d_ff: int, places: int | None) -> tuple[str, str]:
    """The backend that "auto" takes for these rows, and why; reads sizes, never values."""
    A, D, size = *rows_AD.shape, rows_AD.element_size()
    known = rows_AD.dtype in (torch.float32, torch.float16, torch.bfloat16)
    aligned = D * size % 16 == d_ff * size % 16 == 0
    if rows_AD.device.type == "cpu":
        # Time of grouped over fused, one thread, float32, by rows an expert. D 512, F 1024: 1.4 to
        # 1.5 at 0.5 (forward only), 1.0 at 2 and 4, 0.8 to 0.9 from 8 to 32, 1.0 at 64. D = F =
        # 128: 0.5 to 0.7 below 8 (fused all the same), 0.6 to 0.9 from 8 to 32, 0.9 to 1.0 at 64.
        few = 8 * n_experts <= A <= 64 * n_experts
        if known and aligned and few and not torch.compiler.is_compiling():
            why = f"on a CPU with only {A // n_experts} rows an expert, "
            return "grouped", why + f"one call is faster than {n_experts} small ones"
        return "fused", "on a CPU, one expert after the other in one operation is the fastest"
    rows = f"rows of {D} and {d_ff} numbers"
    if known and aligned:
        return "grouped", f"grouped_mm knows {rows_AD.dtype} and {rows}, and nothing synchronises"
    why = f"grouped_mm wants {rows} in multiples of 16 bytes"
    if not known:
        why = f"grouped_mm does not know {rows_AD.dtype}"
    if places is not None:
        return "padded", why + "; the capacity bounds the table"
    return "loop", why + ", and no capacity bounds a table"
