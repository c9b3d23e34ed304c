"""One rank's part of a training run: the model, a step, the held-out loss."""

import json
import math
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moe_core import losses, metrics
from moe_core.lm import LanguageModel, next_token_loss
from moe_core.parallel import Placement, by_load, contiguous, round_robin
from moe_core.ranks import mean_over_ranks, sum_over_ranks
from moe_core.routing import Routing

from .. import corpus
from ..diagnosis.routing_log import RoutingLog
from . import step_costs
from .pretrain_config import PretrainConfig
from .sharded_optimizer import adamw, clip_gradients, finish_expert_gradients, local
from .topology import Topology, shard_replicated

EVAL_BATCHES = 8


class Diverged(ArithmeticError):
    """A loss, a gradient or a weight is NaN or infinite; the message says at which step."""


class Trainer:
    """What a run consists of, on this rank.

    Args:
        config: the run. The process group, if there is to be one, exists already.

    Attributes:
        model, optimizer: this rank's part. step: optimiser steps done.
        routing_log: of this rank's first micro-batches, each in training and in eval mode.
        topology: None in one process. shards: for each layer which experts live here; empty in one
            process.

    Raises:
        ValueError: the config does not fit the number of processes, or the ranks were given
            different configs.
    """

    def __init__(self, config: PretrainConfig):
        self.config, self.step, self.topology = config, 0, None
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
        self.world, self.rank = (
            (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        )
        self.n_micro, self.micro_size = config.micro_batches(self.world)
        self.shards = []
        if dist.is_initialized():
            _same_everywhere(config)
            self.topology = Topology.make(config.ep_size, self.device.type, timeout=config.timeout)
            self.shards = [self.topology.shard(placement) for placement in placements(config)]
        elif config.ep_size > 1:
            raise ValueError(
                f"ep_size={config.ep_size} needs {config.ep_size} processes: torchrun --standalone "
                f"--nproc-per-node {config.ep_size} -m moe_tools.pretrain --ep-size "
                f"{config.ep_size} ..."
            )
        self.text = corpus.load(config.text)
        torch.manual_seed(config.seed)
        self.model = LanguageModel(config.model(), self.shards or None).to(self.device)
        if self.topology is not None:
            shard_replicated(self.model, self.topology)
        self.optimizer = adamw(self.model, lr=config.lr, weight_decay=config.weight_decay)
        self.routing_log = RoutingLog(self.model)

    def train_step(self) -> dict:
        """One optimiser step; returns what is logged of it, the same numbers on every rank.

        Raises Diverged, on every rank, where the loss or the gradient is not finite; the weights
        are then those of the step before.
        """
        self.step += 1
        config, logged = self.config, self.step % self.routing_log.every == 0
        if logged:
            self._log_eval_mode()
            step_costs.reset(self.shards, self.device)
        started = time.perf_counter()
        lr = learning_rate(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        # Noise depends on the step and the rank alone, so a run that goes on from a checkpoint
        # draws what it would have drawn.
        torch.manual_seed(_seed(config.seed, self.step, self.rank))
        self.optimizer.zero_grad(set_to_none=True)
        means, first_loss, routings = self._backward(self._batch("train", self.step))
        if self.topology is not None:
            finish_expert_gradients(self.model, self.topology)
        norm = float(clip_gradients(self.model, config.max_grad_norm, self.topology))
        loss, aux_loss = mean_over_ranks(means).tolist()
        self._require_finite(loss=loss, aux_loss=aux_loss, grad_norm=norm)
        self.optimizer.step()
        self.model.update_routers(routings)
        asked_LE, kept_LE = self._loads(routings)
        seconds = time.perf_counter() - started
        self.routing_log.add(
            self.step,
            routings[0],
            loss=first_loss,
            padding_mask=torch.ones_like(routings[0][0].real_tokens),  # text has no padding
            costs=(
                step_costs.step_costs(seconds, self.shards, kept_LE.tolist(), self.device)
                if logged
                else None
            ),
        )
        return {
            "step": self.step,
            "loss": loss,
            "aux_loss": aux_loss,
            "lr": lr,
            "grad_norm": norm,
            **_balance(asked_LE, kept_LE),
            "tokens": config.batch_size * config.seq_len,
            "seconds": seconds,
        }

    @torch.no_grad()
    def evaluate(self) -> float:
        """Held-out loss in nats per byte, over the same windows, shared out over the ranks.

        Raises Diverged where it is not finite.
        """
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index in range(EVAL_BATCHES):
            for tokens in self._batch("valid", index):
                total += next_token_loss(self._forward(tokens)[0], tokens) / (
                    EVAL_BATCHES * self.n_micro
                )
        loss = float(mean_over_ranks(total))
        self._require_finite(valid_loss=loss)
        return loss

    def require_finite_weights(self) -> None:
        """Raise Diverged, on every rank, where a weight is not finite on one."""
        weights = [local(parameter) for parameter in self.model.parameters()]
        if self.any_rank(not all(weight.isfinite().all() for weight in weights)):
            raise Diverged(f"step {self.step}: a weight is NaN or infinite")

    def _require_finite(self, **numbers: float) -> None:
        bad = [f"{name}={value}" for name, value in numbers.items() if not math.isfinite(value)]
        if bad:
            raise Diverged(f"step {self.step}: {', '.join(bad)}")

    @torch.no_grad()
    def _log_eval_mode(self) -> None:
        """Log the batch that comes in eval mode: where the loss differs, the mode does."""
        self.model.eval()
        tokens = next(self._batch("train", self.step))
        logits, routings = self._forward(tokens)
        self.routing_log.add_evaluation(self.step, routings, loss=next_token_loss(logits, tokens))

    def any_rank(self, flag: bool) -> bool:
        """True on every rank where it is true on one."""
        return bool(sum_over_ranks(torch.tensor(int(flag), device=self.device)))

    def _batch(self, split: str, index: int) -> Iterator[Tensor]:
        """This rank's micro-batches (B, N); they depend on the seed and the step alone."""
        seed = _seed(self.config.seed, index) if split == "train" else _seed("held-out", index)
        generator = torch.Generator().manual_seed(seed)
        tokens, _ = self.text.batch(
            self.config.batch_size, self.config.seq_len, generator=generator, split=split
        )
        mine = tokens.view(self.n_micro, self.world, self.micro_size, -1)[:, self.rank]
        return iter(mine.to(self.device))

    def _forward(self, tokens: Tensor) -> tuple[Tensor, list[Routing]]:
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"
        ):
            return self.model(tokens)

    def _backward(self, micro_batches) -> tuple[Tensor, Tensor, list[list[Routing]]]:
        """Gradients of this rank's mean loss.

        Returns [cross-entropy, auxiliary losses], the first micro-batch's cross-entropy, and
        routings[micro-batch][layer].
        """
        means, routings, parts = torch.zeros(2, device=self.device), [], []
        for tokens in micro_batches:
            logits, layers = self._forward(tokens)
            cross_entropy = next_token_loss(logits, tokens) / self.n_micro
            if not routings:
                first_loss = cross_entropy.detach() * self.n_micro
            weighted = [
                loss
                for routing in layers
                for name, loss in routing.losses.items()
                if not self._is_global(name)
            ]
            aux = sum(weighted, start=torch.zeros((), device=self.device)) / self.n_micro
            means += torch.stack([cross_entropy.detach(), aux.detach()])
            routings.append(layers)
            parts.append(cross_entropy + aux)
            if (
                not self.config.global_balance
            ):  # nothing ties micro-batches together: free each before the next
                parts.pop().backward()
        if self.config.global_balance:
            weight = self.config.model().moe.aux_loss_weight
            balance = sum(weight * losses.global_balance(layer) for layer in zip(*routings))
            means[1] += balance.detach()
            (sum(parts) + balance).backward()
        return means, first_loss, routings

    def _is_global(self, name: str) -> bool:
        return self.config.global_balance and name == "load_balance"

    def _loads(self, routings: list[list[Routing]]) -> tuple[Tensor, Tensor]:
        """Slots of each expert before and after capacity, over all micro-batches and ranks."""
        layers = [list(layer) for layer in zip(*routings)]
        asked_LE = sum_over_ranks(torch.stack([metrics.load(layer) for layer in layers]))
        kept_LE = sum_over_ranks(
            torch.stack([sum(r.tokens_per_expert for r in layer) for layer in layers])
        )
        return asked_LE, kept_LE


def _balance(asked_LE: Tensor, kept_LE: Tensor) -> dict:
    """Load, MaxVio and drop rate of each layer."""
    total_L = asked_LE.sum(-1).clamp(min=1)
    worst_L = asked_LE.max(-1).values * asked_LE.shape[-1] / total_L - 1
    return {
        "load": asked_LE.tolist(),
        "max_violation": worst_L.clamp(min=0).tolist(),
        "drop_rate": (1 - kept_LE.sum(-1) / total_L).tolist(),
    }


def placements(config: PretrainConfig) -> list[Placement]:
    """For each layer who holds which expert.

    Raises:
        ValueError: placement is "by_load", and the run has logged none.
    """
    if config.placement != "by_load":
        place = {"contiguous": contiguous, "round_robin": round_robin}[config.placement]
        return [place(config.n_experts, config.ep_size)] * config.n_layers
    log = Path(config.out) / "log.jsonl"
    if not log.is_file():
        raise ValueError(f"placement='by_load' needs a run to resume: there is no {log}")
    loads = torch.tensor(
        [json.loads(line)["load"] for line in log.read_text().splitlines()[-20:]]
    ).sum(0)
    return [by_load(load_E.tolist(), config.ep_size, replicas=config.replicas) for load_E in loads]


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Linear over the first twentieth of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, config.steps // 20)
    if step <= warmup:
        return config.lr * step / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


def _seed(*parts) -> int:
    return zlib.crc32(repr(parts).encode())


def _same_everywhere(config: PretrainConfig) -> None:
    """Raise ValueError where ranks were given different configs: some would wait forever."""
    mine = torch.tensor(
        _seed({**config.to_dict(), "out": None}),
        device="cuda" if dist.get_backend() == "nccl" else "cpu",
    )
    everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    other = [rank for rank, value in enumerate(everyone) if not torch.equal(value, everyone[0])]
    if other:
        raise ValueError(f"ranks {other} were started with other options than rank 0")
