"""The patients: for every router a run in which all is well, and for every illness a run in which one thing is done wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from moe_core import CapacityRule, TopKRouter, metrics
from moe_tools.corpus import VOCAB_SIZE
from moe_tools.diagnosis.log_records import StepCosts
from moe_tools.diagnosis.routing_log import RoutingLog

from .ward import EVERY, STEPS, TRUNK, layers, newborn, patient, text, train

# How a run of each router stays healthy: MoEConfig's fields. What differs from the router bench: 60 steps are few, so a balance loss
# that has to work in them is up to 5 times as strong, thresholds forget faster, and ReLU's penalty starts where it bites.
# How a router is well set up for these patients, where its own defaults are not enough.
HEALTHY = {
    "topk": dict(aux_loss_weight=0.01),
    "switch": dict(
        top_k=1,
        aux_loss_weight=0.1,
        capacity_factor=CapacityRule(factor=1.5, eval_factor=2.0),
        jitter_noise=0.01,
    ),
    "gshard": dict(aux_loss_weight=0.01, capacity_factor=1.25),
    "loss_free": dict(router_options=dict(bias_update_rate=0.005)),
    "hash": dict(router_options=dict(vocab_size=VOCAB_SIZE)),
    "expert_threshold": dict(router_options=dict(ema_decay=0.9, warmup_steps=STEPS // 4)),
    "base": dict(top_k=1),
    "relu": dict(router_options=dict(l1_weight=1e-3)),
    "zero_computation": dict(top_k=3, aux_loss_weight=0.05, router_options=dict(ffn_ratio=0.75)),
}


@cache
def healthy(name: str, seed: int) -> RoutingLog:
    """A run of this router as it should be."""
    fields = dict(HEALTHY.get(name, {}))
    if name == "hash":  # a table that knows how often each byte occurs
        counts = (
            torch.cat([pieces.flatten() for pieces in text().train.values()])
            .bincount(minlength=VOCAB_SIZE)
            .tolist()
        )
        fields["router_options"] = fields["router_options"] | dict(frequencies=counts)
    return train(patient(seed, router=name, **fields), seed=seed)


@dataclass(frozen=True)
class Patient:
    """An illness, planted.

    Attributes:
        name: of the illness.
        wrong: what is done wrong, in words.
        run: seed -> the log of the run.
        brings: other illnesses that come with it.
        twin: seed -> the log of a run that differs in nothing else and is well; None where that is a healthy run of the router.
    """

    name: str
    wrong: str
    run: Callable[[int], RoutingLog]
    brings: tuple[str, ...] = ()
    twin: Callable[[int], RoutingLog] | None = None


def _with_bias(seed: int, expert: int, bias: float, **fields):
    """A router that starts with a bias for or against one expert, in every layer."""
    model = patient(seed, router_options=dict(bias=True), **fields)
    for layer in layers(model):
        with torch.no_grad():
            layer.router.bias[expert] = bias
    return model


class Bf16Router(TopKRouter):
    """Logits as a cast of the whole model to bfloat16 gives them."""

    def logits(self, x):
        return F.linear(x.bfloat16(), self.weight.bfloat16()).float()


def _bf16(seed: int) -> RoutingLog:
    model, inputs = patient(seed, aux_loss_weight=0.01), {}
    for index, layer in enumerate(layers(model)):
        layer.router.__class__ = Bf16Router
        layer.router.register_forward_pre_hook(
            lambda router, args, index=index: inputs.update({index: args[0].detach()})
        )

    @torch.no_grad()
    def flips(model, tokens, routings):
        found = []
        for index, layer in enumerate(layers(model)):
            x, in_bf16 = inputs[index], layer.router(inputs[index])
            layer.router.__class__ = TopKRouter
            found.append(float(metrics.route_flips(in_bf16, layer.router(x))))
            layer.router.__class__ = Bf16Router
        return dict(route_flips=found)

    return train(model, seed=seed, measure=flips)


def _shut_gate(seed: int, shut: bool) -> RoutingLog:
    model = patient(seed, aux_loss_weight=0.01, n_shared_experts=1, shared_gate=True)
    for layer in layers(model) if shut else ():
        gate = layer.shared_experts.gate
        gate.bias = torch.nn.Parameter(torch.tensor([-8.0]))
    return train(model, seed=seed)


def _ranks(slow_rank: int | None = None, bytes_per_second: float = 1e9):
    """Costs of four ranks with two experts each: simulated from the run's own loads, at a microsecond a row."""

    def measure(model, tokens, routings):
        load_E = torch.stack([routing.tokens_per_expert for routing in routings]).sum(0)
        rows = load_E.view(4, -1).sum(1).tolist()
        seconds = [1e-6 * r * (4 if rank == slow_rank else 1) for rank, r in enumerate(rows)]
        moved = (
            4 * max(rows) * 3 / 4 * TRUNK["d_model"] * 4
        )  # dispatch and combine, forward and backward, 3/4 of float32 rows leave
        all_to_all = moved / bytes_per_second
        return dict(
            costs=StepCosts(
                step_seconds=3 * max(seconds) + all_to_all,
                all_to_all_seconds=all_to_all,
                rank_rows=rows,
                rank_seconds=seconds,
            )
        )

    return measure


@cache
def _fair_ranks(seed: int) -> RoutingLog:
    return train(patient(seed, aux_loss_weight=0.01), seed=seed, measure=_ranks())


def _poisoned(seed: int) -> RoutingLog:
    """What one bad step does: from there on a weight is NaN."""

    @torch.no_grad()
    def spoil(model, tokens, routings):
        if next(step) == 3 * STEPS // EVERY // 4:
            model.blocks[0].attention.qkv_proj.weight[0, 0] = torch.nan
        return {}

    step = iter(range(STEPS))
    return train(patient(seed, aux_loss_weight=0.01), seed=seed, measure=spoil)


PATIENTS = [
    Patient("diverged", "after three quarters of the run a weight is NaN", _poisoned),
    Patient(
        "collapse",
        "no balance loss, and a router that starts with a liking for expert 0",
        lambda seed: train(_with_bias(seed, 0, 2.0), seed=seed),
        ("starvation",),
    ),
    Patient(
        "starvation",
        "the router starts with a dislike of expert 3 that a balance loss of 0.01 does not get over",
        lambda seed: train(_with_bias(seed, 3, -3.0, aux_loss_weight=0.01), seed=seed),
    ),
    Patient(
        "load imbalance",
        "one of 64 experts per token, no balance loss, and a liking for expert 5 that is not enough for a collapse",
        lambda seed: train(_with_bias(seed, 5, 0.4, n_experts=64, top_k=1), seed=seed),
        ("starvation",),
    ),
    Patient(
        "oscillating bias",
        "bias_update_rate is 0.065, 65 times the paper's",
        lambda seed: train(
            patient(seed, router="loss_free", router_options=dict(bias_update_rate=0.065)),
            seed=seed,
        ),
    ),
    Patient(
        "drop storm",
        "the capacity factor is 0.5",
        lambda seed: train(patient(seed, aux_loss_weight=0.01, capacity_factor=0.5), seed=seed),
        ("starvation",),
    ),
    Patient(
        "threshold cold start",
        "no warm-up, and a model that starts from nothing",
        lambda seed: train(
            newborn(
                seed, router="expert_threshold", router_options=dict(ema_decay=0.99, warmup_steps=0)
            ),
            seed=seed,
            lr=1e-2,
        ),
    ),
    Patient(
        "logit drift",
        "the router learns 200 times as fast, and there is no z-loss",
        lambda seed: train(patient(seed, aux_loss_weight=0.05), seed=seed, router_lr=200),
        ("starvation",),
    ),
    Patient("bf16 router", "the router computes in bfloat16", _bf16),
    Patient(
        "over-strong balance loss",
        "the balance coefficient is 10",
        lambda seed: train(patient(seed, aux_loss_weight=10.0), seed=seed, router_lr=10),
        (),
        lambda seed: train(patient(seed, aux_loss_weight=0.01), seed=seed, router_lr=10),
    ),
    Patient(
        "padding counted",
        "the batch has padding and the model is not told",
        lambda seed: train(
            patient(seed, aux_loss_weight=0.01), seed=seed, pad=True, tell_padding=False
        ),
        (),
        lambda seed: train(patient(seed, aux_loss_weight=0.01), seed=seed, pad=True),
    ),
    Patient(
        "dead shared gate",
        "the gate starts with a bias of -8",
        lambda seed: _shut_gate(seed, True),
        (),
        lambda seed: _shut_gate(seed, False),
    ),
    Patient(
        "train-eval gap",
        "eval has an eighth of the room that training has",
        lambda seed: train(
            patient(
                seed,
                aux_loss_weight=0.01,
                capacity_factor=CapacityRule(factor=2.0, eval_factor=0.25),
            ),
            seed=seed,
        ),
    ),
    Patient(
        "straggler rank",
        "rank 2 is 4 times as slow (simulated)",
        lambda seed: train(
            patient(seed, aux_loss_weight=0.01), seed=seed, measure=_ranks(slow_rank=2)
        ),
        (),
        _fair_ranks,
    ),
    Patient(
        "slow all-to-all",
        "the link moves 100 MB a second instead of 1 GB (simulated)",
        lambda seed: train(
            patient(seed, aux_loss_weight=0.01), seed=seed, measure=_ranks(bytes_per_second=1e8)
        ),
        (),
        _fair_ranks,
    ),
]
