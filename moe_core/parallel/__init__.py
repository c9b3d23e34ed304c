"""Expert parallelism: experts spread over ranks, simulated in one process or real between many."""

from .exchange import Exchange, SimulatedExchange, TorchExchange, Transfer
from .expert_parallel import ExpertShard, run_rows
from .placement import Placement, by_load, contiguous, round_robin
from .simulate import Simulation, Traffic, simulate
