"""Gradients and optimiser state when every rank owns a part of the model.

A rank's loss is the mean over its own tokens; the loss of the step is the mean over ranks. FSDP2
averages the gradients of what it shards. An expert's gradient needs more care: through the exchange
it holds the sum over the ranks of its expert-parallel group already, so it is summed over the other
groups only, and divided by all ranks, not by the number of groups (torchtitan #1551).
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .topology import Topology, expert_parameters


@torch.no_grad()
def finish_expert_gradients(model: nn.Module, topology: Topology) -> None:
    """From what backward left to the gradient of the mean loss; every rank calls it once."""
    dp_group, ep_group = topology.mesh.get_group("dp"), topology.mesh.get_group("ep")
    for parameter, shard in expert_parameters(model):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        for expert in shard.placement.replicated:  # each copy saw a part of the rows
            mine = shard.owned.index(expert) if expert in shard.owned else None
            total = (
                torch.zeros_like(parameter.grad[0])
                if mine is None
                else parameter.grad[mine].clone()
            )
            dist.all_reduce(total, group=ep_group)
            if mine is not None:
                parameter.grad[mine] = total
        dist.all_reduce(parameter.grad, group=dp_group)
        parameter.grad /= topology.world_size


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float, topology: Topology | None = None) -> Tensor:
    """Scale all gradients so that their norm over all ranks is at most ``max_norm``.

    Returns the norm before, a scalar, the same on every rank. As torch.nn.utils.clip_grad_norm_,
    which knows one mesh at a time.
    """
    if topology is None:
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    owned = {id(parameter): shard for parameter, shard in expert_parameters(model)}
    first = next(model.parameters())
    squares = torch.zeros(
        2, dtype=torch.float64, device=local(first).device
    )  # of what is sharded over all ranks, of the experts
    gradients = [(p, local(p.grad)) for p in model.parameters() if p.grad is not None]
    for parameter, grad in gradients:
        if id(parameter) not in owned:
            squares[0] += grad.double().square().sum()
        else:
            placement, rank = owned[id(parameter)].placement, owned[id(parameter)].rank
            for place, expert in enumerate(placement.experts_of_rank[rank]):  # a copy counts once
                if (
                    placement.places_of_expert[expert][0]
                    == rank * placement.places_per_rank + place
                ):
                    squares[1] += grad[place].double().square().sum()
    dist.all_reduce(squares[:1], group=topology.world_mesh.get_group())
    dist.all_reduce(squares[1:], group=topology.mesh.get_group("ep"))
    norm = squares.sum().sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for _, grad in gradients:
        grad *= factor.to(grad.dtype)
    return norm.float()


def adamw(
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1,
) -> torch.optim.AdamW:
    """AdamW whose state lies where the parameters lie."""
    experts = {id(parameter) for parameter, _ in expert_parameters(model)}
    groups = [
        [p for p in model.parameters() if (id(p) in experts) == owned] for owned in (False, True)
    ]
    return torch.optim.AdamW(
        [{"params": group} for group in groups if group],
        lr=lr,
        betas=betas,
        weight_decay=weight_decay,
    )


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that FSDP2 may have sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
