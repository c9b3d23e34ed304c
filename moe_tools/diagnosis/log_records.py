"""What is written down of a routing and of a step, in small plain numbers."""

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from moe_core import metrics
from moe_core.routing import Routing

_SAMPLE = 4096  # values of a tensor that are looked at to tell its precision


@dataclass
class LayerRecord:
    """One layer at one step. None stands for what was not there to be seen.

    Attributes:
        asked, kept: (E,) slots of each expert before and after capacity.
        asked_next: (E,) the same as asked, one step later; None where that step was not logged.
        tokens: tokens that the router took for real.
        padding_slots: slots asked for by tokens that are padding.
        entropy: ``metrics.router_entropy``, nats. logsumexp: root of the mean over tokens of
            (logsumexp_e h)^2.
        largest_logit, largest_score: mean over tokens of max_e |h_e| and of max_e s_e.
        bf16_logits, bf16_weights: share of the values that bfloat16 holds exactly, powers of two
            and zeros left out: nearly 0 in float32, 1 for what was computed in bfloat16, whatever
            its dtype is now.
        capacity: the most slots an expert may keep in this batch; None when dropless.
        losses: the weighted auxiliary losses by name.
        aim: (E,) share of the tokens that the router means each expert to get; sums to K, or to the
            mean number of experts a token is meant to take. Uniform but for zero-computation
            routers.
        bias, thresholds: (E,) what the router learned outside the gradient, as it is after this
            step.
        shared_gate: mean over tokens of the shared expert's gate.
        route_flips: as the caller measured it, say between this router in float32 and in bfloat16.
    """

    asked: list[int]
    kept: list[int]
    tokens: int
    padding_slots: int | None
    entropy: float
    logsumexp: float
    largest_logit: float
    largest_score: float
    bf16_logits: float | None
    bf16_weights: float | None
    capacity: int | None
    losses: dict[str, float]
    aim: list[float]
    asked_next: list[int] | None = None
    bias: list[float] | None = None
    thresholds: list[float] | None = None
    shared_gate: float | None = None
    route_flips: float | None = None


@dataclass
class StepCosts:
    """What a step took, as far as the caller measured or modelled it. None: not known.

    Attributes:
        step_seconds: of the whole step. all_to_all_seconds: of it, waiting for rows to be
            exchanged.
        rank_rows: (R,) rows the experts of each rank computed. rank_seconds: (R,) time each rank
            took for them.
        memory_share: peak memory over the device's memory.
    """

    step_seconds: float | None = None
    all_to_all_seconds: float | None = None
    rank_rows: list[float] | None = None
    rank_seconds: list[float] | None = None
    memory_share: float | None = None


@dataclass
class StepRecord:
    """One logged step; its loss is without the auxiliary ones, in nats."""

    step: int
    layers: list[LayerRecord]
    loss: float | None = None
    padding_share: float | None = None
    costs: StepCosts = field(default_factory=StepCosts)


@torch.no_grad()
def layer_record(routing: Routing, padding_mask: Tensor | None = None) -> LayerRecord:
    """What one routing alone tells; one host-device sync."""
    real_BN, E = routing.real_tokens, routing.n_experts
    n_real = real_BN.sum()
    mean = lambda values_BN: values_BN.double().masked_fill(~real_BN, 0).sum() / n_real.clamp(min=1)
    logits_BNE = routing.logits
    padding = (
        routing.selected_mask[~padding_mask].sum()
        if padding_mask is not None
        else n_real.new_zeros(())
    )
    numbers = torch.cat(
        [
            routing.slots_per_expert(),
            routing.tokens_per_expert,
            torch.stack(
                [
                    n_real,
                    padding,
                    metrics.router_entropy(routing),
                    mean(logits_BNE.logsumexp(-1).square()).sqrt(),
                    mean(logits_BNE.abs().amax(-1)),
                    mean(routing.scores.amax(-1)),
                    *_held_by_bf16(logits_BNE),
                    *_held_by_bf16(routing.expert_weights),
                    *routing.losses.values(),
                ]
            ),
        ]
    ).tolist()  # the one host-device sync
    asked, kept, rest = numbers[:E], numbers[E : 2 * E], numbers[2 * E :]
    tokens, padding_slots, entropy, logsumexp, largest_logit, largest_score, *rest = rest
    logits_held, logits_seen, weights_held, weights_seen, *losses = rest
    return LayerRecord(
        asked=[int(n) for n in asked],
        kept=[int(n) for n in kept],
        tokens=int(tokens),
        padding_slots=None if padding_mask is None else int(padding_slots),
        entropy=entropy,
        logsumexp=logsumexp,
        largest_logit=largest_logit,
        largest_score=largest_score,
        bf16_logits=logits_held / logits_seen if logits_seen else None,
        bf16_weights=weights_held / weights_seen if weights_seen else None,
        capacity=_places(routing),
        losses=dict(zip(routing.losses, losses)),
        aim=[routing.top_k / E] * E,
    )


def _places(routing: Routing) -> int | None:
    if routing.capacity is None or routing.capacity_scope == "batch":
        return routing.capacity
    return routing.capacity * routing.scores.shape[0]  # counted for each sequence


def _held_by_bf16(values: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the first values bfloat16 holds exactly, and how many there are.

    A power of two says nothing: 1/K is one.
    """
    values = values.flatten()[:_SAMPLE]
    telling = (values != 0) & (values.frexp().mantissa.abs() != 0.5)
    held = telling & (values.bfloat16().to(values.dtype) == values)
    return held.sum(), telling.sum()


def step_record(values: dict) -> StepRecord:
    """The inverse of ``asdict``. Raises ValueError for a key that is unknown or missing."""
    exactly(values, {f.name for f in fields(StepRecord)}, "StepRecord")
    for layer in values["layers"]:
        exactly(layer, {f.name for f in fields(LayerRecord)}, "LayerRecord")
    exactly(values["costs"], {f.name for f in fields(StepCosts)}, "StepCosts")
    return StepRecord(
        **{
            **values,
            "layers": [LayerRecord(**layer) for layer in values["layers"]],
            "costs": StepCosts(**values["costs"]),
        }
    )


def exactly(values: dict, names: set[str], what: str) -> None:
    """Raise ValueError unless these are the keys."""
    if set(values) != names:
        raise ValueError(
            f"{what} has the keys {', '.join(sorted(values))}, must have {', '.join(sorted(names))}"
        )
