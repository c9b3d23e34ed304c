"""Another processor, without one: ``pytest --last-bits SEED`` lets sums and transcendental functions end on other last bits.

Processors and libraries add in another order and have another exp; what they agree on is the correctly rounded rest (+, *, /, moves,
comparisons) and every result that is exact. The mode does the same. Its noise is a function of the operation, the shapes and the
result's bits, so that the same operation on the same shapes gives the same bits again, and on other shapes other ones: what torch
itself promises. A test that is red with some seed asks for more.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MATMULS = {"mm", "bmm", "addmm", "baddbmm", "mv", "dot", "_grouped_mm"}
SUMS = {"sum", "mean", "cumsum", "logsumexp"}
FUNCTIONS = set(
    "exp log sigmoid tanh silu gelu erf log1p expm1 softplus pow rsqrt log2 sin cos _softmax _log_softmax silu_backward gelu_backward "
    "_softmax_backward_data _log_softmax_backward_data native_layer_norm var std linalg_vector_norm softplus_backward".split()
)
PLAIN = (torch.Tensor, torch.nn.Parameter)  # no fake tensors
BITS = {torch.float32: (torch.int32, 12), torch.float64: (torch.int64, 27)}  # and half a mantissa


def signs(values: torch.Tensor, salt: int, by_place: bool) -> torch.Tensor:
    """-1, 0 or 1 for each value, by its bits."""
    h = values.contiguous().view(BITS[values.dtype][0]).long()
    if by_place:  # the last rows of a matrix product go through other code than the first
        h = h + torch.arange(h.numel()).view(h.shape) * 7919
    h = (h ^ (h >> 15) ^ salt) * 2654435761
    return (((h >> 17) & 0xFFFF) % 3 - 1).to(values.dtype)


def short(*tensors: torch.Tensor) -> bool:
    """Whether all values have at most half of their mantissa's bits, so that products and short sums are exact."""
    return all(
        not (t.contiguous().view(BITS[t.dtype][0]) & ((1 << BITS[t.dtype][1]) - 1)).any()
        for t in tensors
    )


class LastBits(TorchDispatchMode):
    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._schema.name.split("::")[-1]
        name = packet.rstrip("_")
        if name not in MATMULS and name not in SUMS and name not in FUNCTIONS:
            return out
        first = out[0] if isinstance(out, tuple) else out
        if type(first) not in PLAIN or first.dtype not in BITS or first.device.type != "cpu":
            return out
        tensors = [a for a in args if isinstance(a, torch.Tensor) and a.dtype in BITS]
        if not first.numel() or any(type(a) not in PLAIN for a in tensors):
            return out
        shapes = tuple(tuple(a.shape) for a in tensors)
        salt = hash((self.seed, len(name), sum(map(ord, name)), shapes)) & 0xFFFFFFF
        eps = torch.finfo(first.dtype).eps
        if name in MATMULS and len(tensors) >= 2:
            a, b = tensors[-2:]
            op = torch.matmul if name != "_grouped_mm" else None
            if op is None or short(a, b):
                noise = first.abs() if op is None else None
            else:
                count, size = op((a != 0).to(a.dtype), (b != 0).to(b.dtype)), op(a.abs(), b.abs())
                if len(tensors) == 3:
                    count, size = count + (tensors[0] != 0), size + tensors[0].abs()
                noise = torch.where(count > 1, size, 0.0)
        elif name in SUMS and packet == name and name in ("sum", "mean"):
            (a,) = tensors[:1] or (None,)
            if a is None or a.numel() == first.numel() or short(a):
                noise = None
            else:
                rest = args[1:]
                count, size = func(a.ne(0).to(first.dtype), *rest), func(a.abs(), *rest)
                per = 1.0 if name == "sum" else first.numel() / a.numel()
                noise = torch.where(count > 2.5 * per, size, 0.0)
        else:
            low = first.contiguous().view(BITS[first.dtype][0]) & (
                (1 << (BITS[first.dtype][1] - 4)) - 1
            )
            noise = torch.where((low != 0) & first.isfinite(), first.abs(), 0.0)
        if noise is not None and not first.is_inference():
            first.add_(noise.nan_to_num(0, 0, 0) * signs(first, salt, name in MATMULS), alpha=eps)
        return out
