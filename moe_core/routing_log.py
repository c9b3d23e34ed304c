"""RoutingLog: what a training run must write down about its routings, so that one can tell later what went wrong.

    log = RoutingLog(model, every=20)
    for step in ...:
        logits, routings = model(tokens)
        ...                                             # loss, backward, optimiser step, router.update
        log.add(step, routings, loss=loss)              # call it every step; it looks at every 20th, and at the load of the next
    print(moe_core.metrics.diagnose(log))

Small plain numbers on the CPU, ready for JSON. A rank of a data-parallel run logs its own routings.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Sequence

import torch
from torch import Tensor, nn

from . import metrics
from ._validate import whole
from .layer import MixtureOfExperts
from .routers import Router, ZeroComputationRouter
from .routing import Routing

_SAMPLE = 4096  # values of a tensor that are looked at to tell its precision


@dataclass
class LayerRecord:
    """One layer at one step. None stands for what was not there to be seen.

    Attributes:
        asked, kept: (E,) slots of each expert before and after capacity.
        asked_next: (E,) the same as asked, one step later; None where that step was not logged.
        tokens: tokens that the router took for real.
        padding_slots: slots asked for by tokens that are padding.
        entropy: ``metrics.router_entropy``, nats. logsumexp: root of the mean over tokens of (logsumexp_e h)^2.
        largest_logit, largest_score: mean over tokens of max_e |h_e| and of max_e s_e.
        bf16_logits, bf16_weights: share of the values that bfloat16 holds exactly, powers of two and zeros left out: nearly 0 in
            float32, 1 for what was computed in bfloat16, whatever its dtype is now.
        capacity: the most slots an expert may keep in this batch; None when dropless.
        losses: the weighted auxiliary losses by name.
        aim: (E,) share of the tokens that the router means each expert to get; sums to K, or to the mean number of experts a token
            is meant to take. Uniform but for zero-computation routers.
        bias, thresholds: (E,) what the router learned outside the gradient, as it is after this step.
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
        step_seconds: of the whole step. all_to_all_seconds: of it, waiting for rows to be exchanged.
        rank_rows: (R,) rows the experts of each rank computed. rank_seconds: (R,) time each rank took for them.
        memory_share: peak memory over the device's memory.
    """

    step_seconds: float | None = None
    all_to_all_seconds: float | None = None
    rank_rows: list[float] | None = None
    rank_seconds: list[float] | None = None
    memory_share: float | None = None


@dataclass
class StepRecord:
    """One logged step: its layers, its loss without the auxiliary ones (nats), the share of padding in the batch, its costs."""

    step: int
    layers: list[LayerRecord]
    loss: float | None = None
    padding_share: float | None = None
    costs: StepCosts = field(default_factory=StepCosts)


class RoutingLog:
    """Records routings during training; ``metrics.diagnose`` reads it.

    Args:
        model: whose routers' biases and thresholds, and shared experts' gates, are recorded too. None: routings alone.
        every: record a step whose number is a multiple of this, and the load of the one after it.

    Attributes:
        training, evaluation: lists of ``StepRecord``, in the order they came.

    Raises:
        ValueError: every is not a whole number, at least 1.
    """

    def __init__(self, model: nn.Module | None = None, *, every: int = 20):
        whole(1, every=every)
        self.every = every
        self.training: list[StepRecord] = []
        self.evaluation: list[StepRecord] = []
        self._layers = [m for m in model.modules() if isinstance(m, MixtureOfExperts)] if model is not None else []
        self._gates: dict[int, Tensor] = {}  # layer -> what its shared gate's linear map gave last
        self._hooks = [
            layer.shared_experts.gate.register_forward_hook(
                lambda module, inputs, output, index=index: self._gates.update({index: output.detach()}))
            for index, layer in enumerate(self._layers) if layer.shared_experts is not None and layer.shared_experts.gate is not None
        ]

    def add(self, step: int, routings: Sequence[Routing], *, loss: Tensor | float | None = None, padding_mask: Tensor | None = None,
            route_flips: Sequence[float] | None = None, costs: StepCosts | None = None) -> bool:
        """Record this training step, if it is its turn; call it at every step, after ``router.update``.

        Args:
            step: its number.
            routings: one for each MoE layer, as the model returned them (of one micro-batch, if a step has several).
            loss: of the batch, in nats, without auxiliary losses.
            padding_mask: (B, N) bool, True for real tokens: what the data loader knows, whether or not the router was told.
            route_flips: one number for each layer, see ``LayerRecord``.
            costs: what the step took.

        Returns:
            Whether it was recorded in full.

        Raises:
            ValueError: there is no routing, or a number of layers, or the mask, does not fit.
        """
        self._check(routings)
        before = self.training[-1] if self.training else None
        if before is not None and step == before.step + 1:
            for layer, routing in zip(before.layers, routings):
                layer.asked_next = routing.slots_per_expert().tolist()
        if step % self.every:
            return False
        self.training.append(self._record(step, routings, loss, padding_mask, route_flips, costs))
        return True

    def add_evaluation(self, step: int, routings: Sequence[Routing], *, loss: Tensor | float | None = None,
                       padding_mask: Tensor | None = None) -> None:
        """Record a forward pass in eval mode, always.

        Give it the batch of the training step with the same number: the two losses then differ by what the modes do
        differently (capacity, noise, thresholds, who competes with whom), and not by what the model has not learned.
        """
        self._check(routings)
        self.evaluation.append(self._record(step, routings, loss, padding_mask, None, None))

    def close(self) -> None:
        """Take the hooks off the shared gates; what was recorded stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._gates.clear()

    def to_dict(self) -> dict:
        """Plain values only, ready for JSON."""
        return {"every": self.every, "training": [asdict(r) for r in self.training],
                "evaluation": [asdict(r) for r in self.evaluation]}

    @classmethod
    def from_dict(cls, values: dict) -> "RoutingLog":
        """The inverse of ``to_dict``, without a model. Raises ValueError for a key that is unknown or missing."""
        _exactly(values, {"every", "training", "evaluation"}, "RoutingLog")
        log = cls(every=values["every"])
        log.training = [_step_from(record) for record in values["training"]]
        log.evaluation = [_step_from(record) for record in values["evaluation"]]
        return log

    def _check(self, routings: Sequence[Routing]) -> None:
        expected = len(self._layers) or (len(self.training[0].layers) if self.training else max(len(routings), 1))
        if len(routings) != expected:
            raise ValueError(f"routings has {len(routings)} entries, must have one for each of the {expected} MoE layers")

    @torch.no_grad()
    def _record(self, step, routings, loss, padding_mask, route_flips, costs) -> StepRecord:
        if route_flips is not None and len(route_flips) != len(routings):
            raise ValueError(f"route_flips has {len(route_flips)} entries, must have one for each of {len(routings)} layers")
        if padding_mask is None:
            padding_mask = routings[0].padding_mask
        elif padding_mask.shape != routings[0].real_tokens.shape or padding_mask.dtype != torch.bool:
            raise ValueError(f"padding_mask must be bool of shape {tuple(routings[0].real_tokens.shape)}, "
                             f"this one is {padding_mask.dtype} of shape {tuple(padding_mask.shape)}")
        layers = []
        for index, routing in enumerate(routings):
            layer = layer_record(routing, padding_mask)
            if self._layers:
                router = self._layers[index].router
                layer.aim, layer.bias, layer.thresholds = aim(router), _bias(router), _floats(getattr(router, "cutoffs", None))
            if index in self._gates:
                layer.shared_gate = float(self._gates[index].float().sigmoid().mean())
            if route_flips is not None:
                layer.route_flips = float(route_flips[index])
            layers.append(layer)
        return StepRecord(step, layers, loss=loss.item() if isinstance(loss, Tensor) else loss, costs=costs or StepCosts(),
                          padding_share=None if padding_mask is None else float(1 - padding_mask.double().mean()))


def layer_record(routing: Routing, padding_mask: Tensor | None = None) -> LayerRecord:
    """What one routing alone tells; the device is waited for once."""
    real_BN, E = routing.real_tokens, routing.n_experts
    n_real = real_BN.sum()
    mean = lambda values_BN: values_BN.double().masked_fill(~real_BN, 0).sum() / n_real.clamp(min=1)  # noqa: E731
    logits_BNE = routing.logits
    padding = routing.selected_mask[~padding_mask].sum() if padding_mask is not None else n_real.new_zeros(())
    numbers = torch.cat([
        routing.slots_per_expert(), routing.tokens_per_expert,
        torch.stack([
            n_real, padding, metrics.router_entropy(routing), mean(logits_BNE.logsumexp(-1).square()).sqrt(),
            mean(logits_BNE.abs().amax(-1)), mean(routing.scores.amax(-1)),
            *_held_by_bf16(logits_BNE), *_held_by_bf16(routing.expert_weights), *routing.losses.values(),
        ]),
    ]).tolist()  # the one wait for the device
    asked, kept, rest = numbers[:E], numbers[E : 2 * E], numbers[2 * E :]
    tokens, padding_slots, entropy, logsumexp, largest_logit, largest_score, *rest = rest
    logits_held, logits_seen, weights_held, weights_seen, *losses = rest
    return LayerRecord(
        asked=[int(n) for n in asked], kept=[int(n) for n in kept], tokens=int(tokens),
        padding_slots=None if padding_mask is None else int(padding_slots), entropy=entropy, logsumexp=logsumexp,
        largest_logit=largest_logit, largest_score=largest_score,
        bf16_logits=logits_held / logits_seen if logits_seen else None,
        bf16_weights=weights_held / weights_seen if weights_seen else None,
        capacity=_places(routing), losses=dict(zip(routing.losses, losses)), aim=[routing.top_k / E] * E,
    )


def aim(router: Router) -> list[float]:
    """(E,) the share of the tokens that a router means each expert to get: alike, but where real and cheap experts differ."""
    E = router.n_experts
    if not isinstance(router, ZeroComputationRouter):
        return [(router.expansion if hasattr(router, "expansion") else router.top_k) / E] * E
    n_ffn, K = router.n_ffn_experts, router.top_k
    ffn = K * router.ffn_ratio * n_ffn / (router.ffn_ratio * n_ffn + E - n_ffn)  # experts per token that compute something
    if router.bias_update_rate > 0:
        ffn = router.mean_ffn_experts
    return [ffn / n_ffn] * n_ffn + [(K - ffn) / (E - n_ffn)] * (E - n_ffn)


def _places(routing: Routing) -> int | None:
    if routing.capacity is None or routing.capacity_scope == "batch":
        return routing.capacity
    return routing.capacity * routing.scores.shape[0]  # counted for each sequence


def _bias(router: Router) -> list[float] | None:
    """What is added to the scores before selecting."""
    beta = getattr(router, "beta", None)
    return _floats(getattr(router, "expert_bias", None) if beta is None else -beta)


def _floats(values: Tensor | None) -> list[float] | None:
    return None if values is None else values.tolist()


def _held_by_bf16(values: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the first values bfloat16 holds exactly, and how many there are. A power of two says nothing: 1/K is one."""
    values = values.flatten()[:_SAMPLE]
    telling = (values != 0) & (values.frexp().mantissa.abs() != 0.5)
    held = telling & (values.bfloat16().to(values.dtype) == values)
    return held.sum(), telling.sum()


def _step_from(values: dict) -> StepRecord:
    _exactly(values, {f.name for f in fields(StepRecord)}, "StepRecord")
    for layer in values["layers"]:
        _exactly(layer, {f.name for f in fields(LayerRecord)}, "LayerRecord")
    _exactly(values["costs"], {f.name for f in fields(StepCosts)}, "StepCosts")
    return StepRecord(**{**values, "layers": [LayerRecord(**layer) for layer in values["layers"]], "costs": StepCosts(**values["costs"])})


def _exactly(values: dict, names: set[str], what: str) -> None:
    if set(values) != names:
        raise ValueError(f"{what} has the keys {', '.join(sorted(values))}, must have {', '.join(sorted(names))}")
