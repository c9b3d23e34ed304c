"""What a step of ``pretrain`` takes, as far as it can be told without changing the step."""

import time
from collections.abc import Sequence

import torch

from moe_core.parallel.exchange import TorchExchange
from moe_core.parallel.expert_parallel import ExpertShard
from moe_core.parallel.placement import Placement

from ..diagnosis.log_records import StepCosts


class ClockedExchange(TorchExchange):
    """Adds up the ``seconds`` spent in ``move``, waiting for other ranks included."""

    seconds = 0.0

    def move(self, rows, send, receive, what="rows"):
        """See ``Exchange.move``."""
        start = time.perf_counter()
        got = super().move(rows, send, receive, what)
        self.seconds += time.perf_counter() - start
        return got


def rank_rows(placements: Sequence[Placement], kept_LE: Sequence[Sequence[int]]) -> list[float]:
    """(R,) rows of each rank's experts, over all layers; copies share rows alike."""
    rows_R = [0.0] * placements[0].n_ranks
    for placement, kept_E in zip(placements, kept_LE):
        for rank, experts in enumerate(placement.experts_of_rank):
            for expert in experts:
                rows_R[rank] += kept_E[expert] / len(placement.places_of_expert[expert])
    return rows_R


def step_costs(
    step_seconds: float,
    shards: Sequence[ExpertShard],
    kept_LE: Sequence[Sequence[int]],
    device: torch.device,
) -> StepCosts:
    """The costs of the step since ``reset``.

    A GPU works on while the host goes ahead, so there the clock of an exchange tells nothing; on a
    CPU memory is not one process's alone.
    """
    on_gpu, costs = device.type == "cuda", StepCosts(step_seconds=step_seconds)
    if shards and shards[0].placement.n_ranks > 1:
        costs.rank_rows = rank_rows([shard.placement for shard in shards], kept_LE)
        if not on_gpu:
            costs.all_to_all_seconds = sum(shard.exchange.seconds for shard in shards)
    if on_gpu:
        total = torch.cuda.get_device_properties(device).total_memory
        costs.memory_share = torch.cuda.max_memory_allocated(device) / total
    return costs


def reset(shards: Sequence[ExpertShard], device: torch.device) -> None:
    """Start to count a step."""
    for shard in shards:
        shard.exchange.seconds = 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
