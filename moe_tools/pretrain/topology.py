"""Data parallel x expert parallel over a DeviceMesh, and what parameters become on it.

Every rank reads its own tokens. R = ep_size neighbouring ranks hold the experts once between them;
world / R such groups hold the same. What is not an expert is needed by all: FSDP2 keeps one
world-th of it on each rank and gathers it where it is used.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from moe_core.experts import Experts
from moe_core.parallel.expert_parallel import ExpertShard
from moe_core.parallel.placement import Placement
from moe_core.validate import whole

from .step_costs import ClockedExchange


@dataclass(frozen=True)
class Topology:
    """Who is who. Made by ``Topology.make``.

    Attributes:
        mesh: (world / ep_size, ep_size) ranks, dims "dp" and "ep"; neighbours share a node, so they
            are the expert-parallel ones.
        world_mesh: all ranks in one dim, over which FSDP2 shards what is replicated.
    """

    mesh: DeviceMesh
    world_mesh: DeviceMesh

    @classmethod
    def make(
        cls, ep_size: int, device_type: str = "cpu", *, timeout: float | None = None
    ) -> "Topology":
        """Every rank calls it, after init_process_group.

        Args:
            ep_size: R. device_type: "cpu" or "cuda".
            timeout: seconds after which a collective gives up; None leaves it as it is.

        Raises:
            ValueError: ep_size does not divide the number of processes.
            RuntimeError: torch.distributed has not been initialised.
        """
        if not dist.is_initialized():
            raise RuntimeError(
                "a Topology needs torch.distributed: start under torchrun, or call "
                "init_process_group first"
            )
        whole(1, ep_size=ep_size)
        world = dist.get_world_size()
        if world % ep_size:
            raise ValueError(f"ep_size={ep_size} must divide the {world} processes")
        made = cls(
            init_device_mesh(device_type, (world // ep_size, ep_size), mesh_dim_names=("dp", "ep")),
            init_device_mesh(device_type, (world,), mesh_dim_names=("world",)),
        )
        if timeout is not None:
            for group in {
                dist.group.WORLD,
                made.world_mesh.get_group(),
                made.mesh.get_group("dp"),
                made.mesh.get_group("ep"),
            }:
                group.set_timeout(timedelta(seconds=timeout))
        return made

    @property
    def world_size(self) -> int:
        """All ranks; each has tokens of its own."""
        return self.world_mesh.size()

    def shard(self, placement: Placement) -> ExpertShard:
        """This rank's part of the experts.

        Raises ValueError where the placement is for another number of ranks.
        """
        exchange = ClockedExchange(self.mesh.get_group("ep"))
        if placement.n_ranks != exchange.n_ranks:
            raise ValueError(
                f"the placement is for {placement.n_ranks} ranks, must be for "
                f"ep_size={exchange.n_ranks}"
            )
        return ExpertShard(placement, exchange.rank, exchange)


def expert_parameters(model: nn.Module) -> list[tuple[nn.Parameter, ExpertShard]]:
    """The parameters of which this rank holds its own experts only."""
    return [
        (parameter, bank.shard)
        for bank in model.modules()
        if isinstance(bank, Experts) and bank.shard is not None
        for parameter in bank.parameters()
    ]


def shard_replicated(model: nn.Module, topology: Topology) -> nn.Module:
    """FSDP2's ``fully_shard`` on every block and on the rest, all but the experts.

    Changes the model and returns it.
    """
    experts = {parameter for parameter, _ in expert_parameters(model)}
    for block in model.blocks:
        fully_shard(block, mesh=topology.world_mesh, ignored_params=experts)
    return fully_shard(model, mesh=topology.world_mesh, ignored_params=experts)
