"""Four ways to run rows that are sorted by expert through a bank of experts; all give the same numbers.

Each takes ``(rows_AD, counts_E, bank, keep_AF, capacity)`` and returns (A, D). ``keep_AF`` is what dropout multiplies the hidden values with,
or None; ``capacity`` is the most rows an expert can have, or None where the routing does not say.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activations import Activation
from .fused import fused


class Bank(NamedTuple):
    """The weights of E experts: (E, 2F, D) or (E, F, D), (E, D, F), the biases (E, 2F) or (E, F) and (E, D) or None, and the activation."""

    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: Activation


def loop(
    rows_AD: Tensor,
    counts_E: Tensor,
    bank: Bank,
    keep_AF: Tensor | None = None,
    capacity: int | None = None,
) -> Tensor:
    """One expert after the other: the reference. Any device and dtype."""
    counts = counts_E.tolist()
    # unbind once: indexing the bank inside the loop would build a zero gradient of the whole bank for every expert.
    # No expert is skipped: one without rows then has a gradient of zeros and not None.
    groups = zip(rows_AD.split(counts), bank.gate_up_proj.unbind(0), bank.down_proj.unbind(0))
    keeps = keep_AF.split(counts) if keep_AF is not None else None
    biases = (
        (bank.gate_up_bias.unbind(0), bank.down_bias.unbind(0))
        if bank.gate_up_bias is not None
        else None
    )
    outputs = []
    for e, (rows, gate_up, down) in enumerate(groups):
        hidden = bank.activation(F.linear(rows, gate_up, biases[0][e] if biases else None))
        if keeps is not None:
            hidden = hidden * keeps[e]
        outputs.append(F.linear(hidden, down, biases[1][e] if biases else None))
    return torch.cat(outputs)


def padded(
    rows_AD: Tensor,
    counts_E: Tensor,
    bank: Bank,
    keep_AF: Tensor | None = None,
    capacity: int | None = None,
) -> Tensor:
    """A table of E x C places, C the most rows of an expert, and one batched matrix product: good for many small, even groups.

    Without a capacity C is the largest count, a value that has to be read. Rows beyond the capacity (a static plan has such) come back as zeros.
    """
    A, E = len(rows_AD), len(counts_E)
    C = max(1, int(counts_E.max()) if capacity is None else min(capacity, A))
    expert_A = torch.repeat_interleave(
        torch.arange(E, device=rows_AD.device), counts_E, output_size=A
    )
    place_A = torch.arange(A, device=rows_AD.device) - (counts_E.cumsum(0) - counts_E)[expert_A]
    place_A = torch.where(place_A < C, expert_A * C + place_A, E * C)

    def table(
        values: Tensor,
    ) -> Tensor:  # (A, X) -> (E, C, X); what has no place falls on a last line, which is cut off
        return (
            values.new_zeros(E * C + 1, values.shape[-1])
            .index_copy(0, place_A, values)[:-1]
            .view(E, C, -1)
        )

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
    """x W^T, batched. Torch's own backward gives the gradient of W^T, which would have to be copied into the order in which W lies."""

    @staticmethod
    def forward(ctx, x_ECI: Tensor, weight_EOI: Tensor) -> Tensor:
        ctx.save_for_backward(x_ECI, weight_EOI)
        return torch.bmm(x_ECI, weight_EOI.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ECO: Tensor):
        x_ECI, weight_EOI = ctx.saved_tensors
        return torch.bmm(grad_ECO, weight_EOI), torch.bmm(grad_ECO.mT, x_ECI)


def grouped(
    rows_AD: Tensor,
    counts_E: Tensor,
    bank: Bank,
    keep_AF: Tensor | None = None,
    capacity: int | None = None,
) -> Tensor:
    """torch.nn.functional.grouped_mm: float32, float16 and bfloat16, and every row a multiple of 16 bytes. Nothing waits for a GPU."""
    ends_E = counts_E.cumsum(0).to(torch.int32)
    expert_A = None
    if bank.gate_up_bias is not None:  # grouped_mm refuses a bias, though its signature has one
        expert_A = torch.repeat_interleave(
            torch.arange(len(counts_E), device=rows_AD.device), counts_E, output_size=len(rows_AD)
        )
    projected = F.grouped_mm(rows_AD, bank.gate_up_proj.mT, offs=ends_E)
    if expert_A is not None:
        projected = projected + bank.gate_up_bias.index_select(0, expert_A)
    hidden = bank.activation(projected)
    if keep_AF is not None:
        hidden = hidden * keep_AF
    out = F.grouped_mm(hidden, bank.down_proj.mT, offs=ends_E)
    return out if expert_A is None else out + bank.down_bias.index_select(0, expert_A)


def fused_bank(
    rows_AD: Tensor,
    counts_E: Tensor,
    bank: Bank,
    keep_AF: Tensor | None = None,
    capacity: int | None = None,
) -> Tensor:
    """One operation for the whole bank, see ``fused``: the fastest on a processor, except for many tiny groups."""
    return fused(rows_AD, counts_E, *bank[:4], keep_AF, bank.activation)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "loop": loop,
    "padded": padded,
    "grouped": grouped,
    "fused": fused_bank,
}


def choose(rows_AD: Tensor, n_experts: int, d_ff: int, capacity: int | None) -> tuple[str, str]:
    """The backend that "auto" takes for these rows, and why; read from device, dtype and sizes, never from values."""
    A, D, size = *rows_AD.shape, rows_AD.element_size()
    known, aligned = (
        rows_AD.dtype in (torch.float32, torch.float16, torch.bfloat16),
        D * size % 16 == d_ff * size % 16 == 0,
    )
    if rows_AD.device.type == "cpu":
        # The loop inside grouped_mm costs less than one in Python; what fused gains elsewhere outweighs it. Measured, time of grouped over
        # fused on one thread, float32, by rows an expert: D 512, F 1024: 1.4 to 1.5 at 0.5 (forward only), 1.0 at 2 and 4, 0.8 to 0.9
        # from 8 to 32, 1.0 at 64. D = F = 128: 0.5 to 0.7 below 8 (fused is taken all the same), 0.6 to 0.9 from 8 to 32, 0.9 to 1.0 at 64.
        if (
            known
            and aligned
            and 8 * n_experts <= A <= 64 * n_experts
            and not torch.compiler.is_compiling()
        ):
            return (
                "grouped",
                f"on a CPU with only {A // n_experts} rows an expert, one call is faster than {n_experts} small ones",
            )
        return "fused", "on a CPU, one expert after the other in one operation is the fastest"
    if known and aligned:
        return (
            "grouped",
            f"grouped_mm knows {rows_AD.dtype} and rows of {D} and {d_ff} numbers, and nothing waits for the device",
        )
    why = (
        f"grouped_mm wants rows of {D} and {d_ff} numbers in multiples of 16 bytes"
        if known
        else f"grouped_mm does not know {rows_AD.dtype}"
    )
    return (
        ("padded", why + "; the capacity bounds the table")
        if capacity is not None
        else ("loop", why + ", and no capacity bounds a table")
    )
