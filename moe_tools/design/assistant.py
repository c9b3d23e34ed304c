"""``design(budget)``: from a budget to a written design."""

from dataclasses import dataclass, replace
from functools import cached_property

from moe_core.config import MoEConfig

from ..accounting import ModelSpec, dense_of_equal_active, dense_of_equal_total, training_flops
from .budget import DesignBudget, Impossible
from .design_report import report
from .model_shape import SPARSITY, TOLERANCE, ModelShape, choose_shape, find_shape
from .plan import Plan, fits, make_plan
from .router_choices import router_design
from .rules import Choice
from .scaling_laws import Prediction, fine_grained, fine_grained_dense, routed
from .to_hf_config import hf_config


@dataclass(frozen=True)
class Design:
    """A design: print it, or write ``markdown()``.

    Attributes:
        budget: what was asked for. shape, plan: the model in numbers, and how it is spread over the
            GPUs.
        moe: the config of an MoE layer of ``moe_core``.
        router_choices: what the router does, and why.
    """

    budget: DesignBudget
    shape: ModelShape
    plan: Plan
    moe: MoEConfig
    router_choices: tuple[Choice, ...]

    @property
    def spec(self) -> ModelSpec:
        """The model, to count with."""
        return self.shape.spec

    @property
    def training_flops(self) -> float:
        """Of all tokens, without what is computed again."""
        return training_flops(self.spec, self.budget.seq_len).total * self.budget.tokens

    @cached_property
    def dense(self) -> dict[str, ModelSpec]:
        """The dense models of "equal active" and of "equal total" parameters."""
        return {
            "equal active": dense_of_equal_active(self.spec).spec,
            "equal total": dense_of_equal_total(self.spec).spec,
        }

    @property
    def losses(self) -> dict[str, Prediction]:
        """What ``scaling_laws`` expect of this model and of the dense ones."""
        D, spec, expansion = self.budget.tokens, self.spec, self.shape.expansion
        dense = {
            f"dense of {name}": fine_grained_dense(_nonemb(model), D)
            for name, model in self.dense.items()
        }
        return {
            "fine-grained": fine_grained(_nonemb(spec), D, self.shape.granularity, expansion),
            **dense,
            "routed": routed(spec.active_params_nonemb, expansion, D),
        }

    def hf_config(self) -> dict:
        """What stands in a config.json; see ``to_hf_config``.

        Raises ValueError where no family has the router.
        """
        return hf_config(self.plan)

    def markdown(self) -> str:
        """The design in four parts, and the rules behind it."""
        return report(self)

    __str__ = markdown


def design(budget: DesignBudget) -> Design:
    """A design for a budget; the same budget gives the same design.

    Raises:
        Impossible: nothing fits; the message says why, and what would have to change.
    """
    shape = _shape(budget)
    try:
        plan = make_plan(shape, budget)
    except Impossible as error:
        raise Impossible(error.reason, *error.nearest, *_smaller(shape, budget)) from None
    moe, choices = router_design(plan)
    return Design(budget, shape, plan, moe, tuple(choices))


def _nonemb(spec: ModelSpec) -> int:
    """N of Krajewski et al.: all parameters but embedding and head."""
    return spec.total_params - spec.parts["embedding"] - spec.parts["head"]


def _shape(budget: DesignBudget) -> ModelShape:
    """The shape for the active parameters or the FLOPs asked for."""
    if budget.active:
        return _sparse_enough(budget, budget.active)
    active, best = budget.flops / (6 * budget.tokens), None
    for _ in range(
        12
    ):  # FLOPs are nearly proportional to active parameters: a few corrections are enough
        if budget.total is not None and budget.total < active:
            raise Impossible(
                f"total={budget.total:.4g} is less than the {active:.4g} active parameters that "
                f"flops={budget.flops:.4g} on tokens={budget.tokens:.4g} pay for",
                f"total={active:.4g} (a dense model)",
            )
        shape = _sparse_enough(budget, active)
        ratio = training_flops(shape.spec, budget.seq_len).total * budget.tokens / budget.flops
        if best is None or abs(ratio - 1) < abs(best[0] - 1):
            best = ratio, shape
        if abs(ratio - 1) < TOLERANCE / 5:
            break
        active /= ratio
    if abs(best[0] - 1) > TOLERANCE:
        raise Impossible(
            f"no shape costs flops={budget.flops:.4g} on tokens={budget.tokens:.4g}",
            f"flops={best[0] * budget.flops:.4g}",
        )
    return best[1]


def _sparse_enough(budget: DesignBudget, active: float) -> ModelShape:
    """With no total asked for: half or a quarter of the experts where memory holds no more."""
    shape = choose_shape(budget, active)
    for sparsity in () if budget.total is not None else (SPARSITY // 2, SPARSITY // 4):
        if fits(shape, budget):
            break
        shape = _with_sparsity(shape, active, sparsity)
    return shape


def _with_sparsity(shape: ModelShape, active: float, sparsity: int) -> ModelShape:
    return find_shape(
        active, shape.vocab_size, shape.top_k, shape.n_shared_experts, sparsity * shape.top_k
    )


def _smaller(shape: ModelShape, budget: DesignBudget) -> list[str]:
    """The next smaller model that would fit: fewer experts, else fewer active parameters."""
    active, free = shape.spec.active_params, replace(budget, total=None)
    if budget.total is not None:
        for sparsity in (SPARSITY * 2, SPARSITY, SPARSITY // 2, SPARSITY // 4):
            fewer = _with_sparsity(shape, active, sparsity)
            if fewer.n_experts < shape.n_experts and fits(fewer, budget):
                return [f"total={fewer.spec.total_params:.4g}"]
    for n in range(1, 60):
        less = float(f"{active * 0.9**n:.3g}")
        try:
            found = _sparse_enough(free, less)
        except Impossible:
            break
        if fits(found, free):
            flops = training_flops(found.spec, budget.seq_len).total * budget.tokens
            return [
                (f"flops={flops:.4g}" if budget.flops else f"active={less:.4g}")
                + ("" if budget.total is None else " and no total")
            ]
    return []
