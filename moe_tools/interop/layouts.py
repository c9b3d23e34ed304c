"""How one of our weights lies in somebody else's block, there and back.

The layout of a weight is declared, never guessed: (E, D, 2F) and (E, 2F, D) have the same shape
when D = 2F, and a guess from the shape then transposes silently (transformers issue 47031,
unsloth-zoo issue 849). Shapes are only checked against the declaration.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """One weight of ours in their names.

    Use ``same``, ``transposed``, ``interleaved``, ``concatenated`` or ``stacked``.

    Attributes:
        names: the tensors that hold it; "{e}" stands for an expert's number, and the name then for
            E tensors.
        read: their tensors -> ours. write: the inverse. Both are views wherever they can be.
    """

    names: tuple[str, ...]
    read: Callable[[Sequence[Tensor]], Tensor]
    write: Callable[[Tensor], Sequence[Tensor]]

    def names_for(self, n_experts: int) -> list[str]:
        """The names with every expert's number filled in."""
        return [
            name.format(e=e)
            for name in self.names
            for e in range(n_experts if "{e}" in name else 1)
        ]


def same(name: str) -> Layout:
    """It lies there as here."""
    return Layout((name,), lambda theirs: theirs[0], lambda ours: [ours])


def transposed(name: str) -> Layout:
    """(..., in, out) there, (..., out, in) here."""
    return Layout((name,), lambda theirs: theirs[0].mT, lambda ours: [ours.mT])


def interleaved(name: str) -> Layout:
    """(E, 2F) there as gate, up, gate, up, ...; [gate; up] here."""
    return Layout((name,), lambda theirs: _apart(theirs[0]), lambda ours: [_together(ours)])


def interleaved_and_transposed(name: str) -> Layout:
    """(E, D, 2F) there with columns gate, up, gate, up, ...; (E, 2F, D) as [gate; up] here."""
    return Layout((name,), lambda theirs: _apart(theirs[0]).mT, lambda ours: [_together(ours.mT)])


def concatenated(*names: str) -> Layout:
    """Several matrices there, one under the other here: (F, D) and (F, D) -> (2F, D)."""
    return Layout(
        names, lambda theirs: torch.cat(list(theirs)), lambda ours: ours.chunk(len(names))
    )


def stacked(name: str) -> Layout:
    """One matrix per expert there, (F, D) each; one bank (E, F, D) here. The name holds "{e}"."""
    return Layout((name,), lambda theirs: torch.stack(list(theirs)), lambda ours: ours.unbind(0))


def _apart(weight: Tensor) -> Tensor:
    """(..., 2F) as gate, up, gate, up, ... -> [gate; up]"""
    return weight.unflatten(-1, (-1, 2)).mT.flatten(-2)


def _together(weight: Tensor) -> Tensor:
    """(..., 2F) as [gate; up] -> gate, up, gate, up, ..."""
    return weight.unflatten(-1, (2, -1)).mT.flatten(-2)
