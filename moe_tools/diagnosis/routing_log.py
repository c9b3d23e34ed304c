"""RoutingLog: what a run writes down, so that one can tell later what went wrong.

    log = RoutingLog(model, every=20)
    for step in ...:
        logits, routings = model(tokens)
        ...                          # loss, backward, optimiser step, router.update
        log.add(step, routings, loss=loss)   # every step; it records each 20th
    print(moe_tools.diagnosis.diagnose(log))

Small plain numbers on the CPU, ready for JSON. A rank of a data-parallel run logs its own routings.
"""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from moe_core.layer import MixtureOfExperts
from moe_core.routing import Routing
from moe_core.validate import whole

from .log_records import StepCosts, StepRecord, exactly, layer_record, step_record


class RoutingLog:
    """Records routings during training; ``diagnose`` reads it.

    Args:
        model: whose routers' biases and thresholds, and shared experts' gates, are recorded too.
            None: routings alone.
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
        self._layers = (
            [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
            if model is not None
            else []
        )
        self._gates: dict[int, Tensor] = {}  # layer -> what its shared gate's linear map gave last
        self._hooks = [
            layer.shared_experts.gate.register_forward_hook(
                lambda module, inputs, output, index=index: self._gates.update(
                    {index: output.detach()}
                )
            )
            for index, layer in enumerate(self._layers)
            if layer.shared_experts is not None and layer.shared_experts.gate is not None
        ]

    def add(
        self,
        step: int,
        routings: Sequence[Routing],
        *,
        loss: Tensor | float | None = None,
        padding_mask: Tensor | None = None,
        route_flips: Sequence[float] | None = None,
        costs: StepCosts | None = None,
    ) -> bool:
        """Record this training step, if it is its turn.

        Call it at every step, after ``router.update``.

        Args:
            step: its number.
            routings: one for each MoE layer, as the model returned them (of one micro-batch, if a
                step has several).
            loss: of the batch, in nats, without auxiliary losses.
            padding_mask: (B, N) bool, True for real tokens: what the data loader knows, whether or
                not the router was told.
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

    def add_evaluation(
        self,
        step: int,
        routings: Sequence[Routing],
        *,
        loss: Tensor | float | None = None,
        padding_mask: Tensor | None = None,
    ) -> None:
        """Record a forward pass in eval mode, always.

        Give it the batch of the training step with the same number: the two losses then differ by
        what the modes do differently (capacity, noise, thresholds, who competes with whom), and not
        by what the model has not learned.
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
        return {
            "every": self.every,
            "training": [asdict(r) for r in self.training],
            "evaluation": [asdict(r) for r in self.evaluation],
        }

    @classmethod
    def from_dict(cls, values: dict) -> "RoutingLog":
        """The inverse of ``to_dict``, without a model.

        Raises ValueError for a key that is unknown or missing.
        """
        exactly(values, {"every", "training", "evaluation"}, "RoutingLog")
        log = cls(every=values["every"])
        log.training = [step_record(record) for record in values["training"]]
        log.evaluation = [step_record(record) for record in values["evaluation"]]
        return log

    def _check(self, routings: Sequence[Routing]) -> None:
        expected = len(self._layers) or (
            len(self.training[0].layers) if self.training else max(len(routings), 1)
        )
        if len(routings) != expected:
            raise ValueError(
                f"routings has {len(routings)} entries, must have one for each of the {expected} "
                "MoE layers"
            )

    def _record(self, step, routings, loss, padding_mask, route_flips, costs) -> StepRecord:
        if route_flips is not None and len(route_flips) != len(routings):
            raise ValueError(
                f"route_flips has {len(route_flips)} entries, must have one for each of "
                f"{len(routings)} layers"
            )
        if padding_mask is None:
            padding_mask = routings[0].padding_mask
        elif (
            padding_mask.shape != routings[0].real_tokens.shape or padding_mask.dtype != torch.bool
        ):
            raise ValueError(
                f"padding_mask must be bool of shape {tuple(routings[0].real_tokens.shape)}, "
                f"this one is {padding_mask.dtype} of shape {tuple(padding_mask.shape)}"
            )
        layers = []
        for index, routing in enumerate(routings):
            layer = layer_record(routing, padding_mask)
            if self._layers:
                router = self._layers[index].router
                layer.aim = (router.mean_top_k * router.expected_share()).tolist()
                layer.bias = _plain(router.selection_bias)
                layer.thresholds = _plain(router.thresholds)
            if index in self._gates:
                layer.shared_gate = float(self._gates[index].float().sigmoid().mean())
            if route_flips is not None:
                layer.route_flips = float(route_flips[index])
            layers.append(layer)
        return StepRecord(
            step,
            layers,
            loss=loss.item() if isinstance(loss, Tensor) else loss,
            costs=costs or StepCosts(),
            padding_share=(
                None if padding_mask is None else float(1 - padding_mask.double().mean())
            ),
        )


def _plain(tensor_E: Tensor | None) -> list[float] | None:
    return None if tensor_E is None else tensor_E.tolist()
