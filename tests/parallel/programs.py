"""What the ranks of a Gang run. Each program is given its rank and one argument, and returns plain tensors and numbers."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_core import Experts, MixtureOfExperts, MoEConfig, TopKRouter
from moe_core.parallel import ExpertShard, Placement, TorchExchange
from moe_tools.pretrain import PretrainConfig, Trainer, checkpoint, pretrain


class LayerCase(NamedTuple):
    """One MoE layer on R ranks: config, seed of its weights, placement, and each rank's tokens (B, N, D) and output gradient."""

    config: MoEConfig
    seed: int
    placement: Placement
    xs: list[Tensor]
    grads: list[Tensor]


def whole_layer(case: LayerCase, exchange=None, rank: int = 0) -> MixtureOfExperts:
    """The layer of a case, with all its experts, or one rank's part of it."""
    shard = None if exchange is None else ExpertShard(case.placement, rank, exchange)
    torch.manual_seed(case.seed)
    return MixtureOfExperts(case.config, shard).to(case.xs[0].dtype)


def run_layers(rank: int, cases: list[LayerCase]) -> list[dict]:
    """This rank's part of each case: output, and the gradients of its tokens and parameters; the replicated ones summed over ranks."""
    results = []
    for case in cases:
        layer = whole_layer(case, TorchExchange(), rank)
        x = case.xs[rank].clone().requires_grad_()
        y, routing = layer(x)
        y.backward(case.grads[rank])
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        for name, grad in gradients.items():
            if grad is not None and not name.startswith("experts."):
                dist.all_reduce(grad)
        results.append(
            {
                "y": y.detach(),
                "x": x.grad,
                "owned": layer.experts.owned,
                "shapes": {n: p.shape for n, p in layer.experts.named_parameters()},
                **gradients,
            }
        )
    return results


def mismatch(rank: int, kind: str) -> str:
    """Rank 1 sends rows of another width or dtype. Returns the message each rank's error has."""
    from moe_core.parallel import contiguous, run_rows

    exchange = TorchExchange()
    rows = torch.zeros(
        exchange.n_ranks,
        6 if kind == "width" and rank == 1 else 4,
        dtype=torch.float64 if kind == "dtype" and rank == 1 else torch.float32,
    )
    counts = torch.ones(exchange.n_ranks, dtype=torch.int64)
    try:
        run_rows(
            [rows],
            [counts],
            [lambda r, c: r],
            exchange,
            contiguous(exchange.n_ranks, exchange.n_ranks),
        )
    except ValueError as error:
        return str(error)
    return "no error"


def train(rank: int, argument: tuple) -> dict:
    """Three (or more) steps of a Trainer; losses, MaxVio, held-out loss, and what lies on this rank."""
    config, steps = argument
    trainer = Trainer(config)
    return _history(trainer, steps)


def _history(trainer: Trainer, steps: int) -> dict:
    records = [trainer.train_step() for _ in range(steps)]
    expert_bytes = state_bytes = 0
    for block in trainer.model.blocks:
        for parameter in block.feed_forward.experts.parameters():
            expert_bytes += parameter.nbytes
            state_bytes += sum(
                trainer.optimizer.state[parameter][moment].nbytes
                for moment in ("exp_avg", "exp_avg_sq")
            )
    biases = [
        router.expert_bias.clone()
        for router in (block.feed_forward.router for block in trainer.model.blocks)
        if getattr(router, "expert_bias", None) is not None
    ]
    return {
        "records": records,
        "valid_loss": trainer.evaluate(),
        "biases": biases,
        "expert_bytes": expert_bytes,
        "state_bytes": state_bytes,
    }


def run_pretrain(rank: int, argument: tuple) -> None:
    """The whole of a run, as the command line starts it."""
    config, resume = argument
    pretrain(config, resume=resume)


def loaded_state(rank: int, config: PretrainConfig) -> dict[str, Tensor]:
    """What a fresh Trainer of this arrangement holds after loading the newest checkpoint of config.out: whole tensors, owned experts."""
    trainer = Trainer(config)
    record = checkpoint.load(
        checkpoint.newest(f"{config.out}/checkpoints"), trainer.model, trainer.optimizer
    )
    state = checkpoint.tensors(trainer.model, trainer.optimizer)
    whole = {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()
        for name, tensor in state.items()
    }
    return whole | {"step": torch.tensor(record["step"])}


def plain_experts(rank: int, x: Tensor) -> tuple[Tensor, int]:
    """Experts(..., ep_size=R) as it stands, with nothing said about ranks: this rank's output, and the experts it holds."""
    torch.manual_seed(0)
    router = TopKRouter(d_model=8, n_experts=4, top_k=2)
    experts = Experts(d_model=8, d_ff=8, n_experts=4, ep_size=dist.get_world_size())
    return experts(x[rank], router(x[rank])).detach(), len(experts.gate_up_proj)
