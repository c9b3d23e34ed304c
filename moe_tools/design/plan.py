"""The distribution plan: of all ways that fit, the one with the shortest modelled step."""

from dataclasses import dataclass, replace

from moe_core.parallel import Placement, contiguous

from ..accounting import expert_roofline, training_flops
from ..units import count
from .budget import DesignBudget
from .exchange_cost import ExchangeCost, exchange_of, node_limit
from .gpu_memory import SAVINGS, GpuMemory, does_not_fit, ep_sizes, gpu_memory
from .model_shape import ModelShape
from .replicas import replica_seconds
from .rules import Choice, choice

SHARE_LIMIT = 0.3  # rule "30 % exchange"
MICRO_BATCHES = (1, 2, 4, 8, 16)  # sequences


@dataclass(frozen=True)
class Plan:
    """How a shape is spread.

    Attributes:
        shape, budget: what is spread, and over what.
        ep: ranks that hold the experts once between them; gpus / ep such groups hold the same ones.
        sharded: of what is held alike, what is divided among the ranks; see
            ``accounting.state_memory``.
        recompute: what the backward pass computes again; see
            ``accounting.activation_bytes_per_token``.
        micro_batch: sequences that a GPU runs at a time.
        max_nodes: nodes that a token may go to, or None.
        memory: of one GPU.
    """

    shape: ModelShape
    budget: DesignBudget
    ep: int
    sharded: str
    recompute: str
    micro_batch: int
    max_nodes: int | None
    memory: GpuMemory

    @property
    def placement(self) -> Placement:
        """Neighbouring experts on one rank, so that groups of experts are nodes."""
        return contiguous(self.shape.n_experts, self.ep)

    @property
    def dp(self) -> int:
        """Groups that hold the same experts."""
        return self.budget.gpus // self.ep

    @property
    def micro_tokens(self) -> int:
        """Tokens that a GPU runs at a time."""
        return self.micro_batch * self.budget.seq_len

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a GPU in one step."""
        return self.budget.sequences_per_step // self.micro_batch

    @property
    def exchange(self) -> ExchangeCost:
        """The exchange of one micro-batch."""
        return exchange_of(
            self.shape,
            self.budget,
            ep=self.ep,
            tokens=self.micro_tokens,
            recompute=self.recompute,
            max_nodes=self.max_nodes,
        )

    @property
    def roofline(self) -> dict[str, float]:
        """Of one expert's products with its group's tokens; see ``expert_roofline``."""
        return expert_roofline(
            self.shape.spec, self.ep * self.micro_tokens, self.budget.accelerator
        )[0]

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, and one more forward pass where layers are computed again."""
        return training_flops(self.shape.spec, self.budget.seq_len).total * (
            4 / 3 if self.recompute == "layer" else 1
        )

    @property
    def compute_seconds(self) -> float:
        r"""Computing of one step; experts with few tokens run below the peak.

        .. math:: t = \frac{\text{FLOPs of all else} + \text{FLOPs of experts} / \text{share of
            peak}}{\text{peak} \cdot \text{utilisation}}
        """
        spec = self.shape.spec
        experts = 2 * spec.active_parts["experts"] * (4 if self.recompute == "layer" else 3)
        per_token = self.flops_per_token - experts + experts / self.roofline["share_of_peak"]
        return (
            per_token
            * self.budget.tokens_per_step
            / self.budget.gpus
            / (self.budget.accelerator.peak_flops * self.budget.utilisation)
        )

    @property
    def exchange_seconds(self) -> float:
        """All-to-alls of one step."""
        return self.micro_batches * self.exchange.seconds

    @property
    def replica_seconds(self) -> float:
        """Gradients summed and weights gathered in one step; see ``replicas``."""
        return replica_seconds(
            self.shape.spec,
            self.budget,
            ep=self.ep,
            sharded=self.sharded,
            micro_batches=self.micro_batches,
        )

    @property
    def step_seconds(self) -> float:
        """Exchange, plus the longer of computing and replicas' traffic."""
        return max(self.compute_seconds, self.replica_seconds) + self.exchange_seconds

    @property
    def exchange_share(self) -> float:
        """Of the step."""
        return self.share_with(self.exchange)

    def share_with(self, exchange: ExchangeCost) -> float:
        """Share of the step that another exchange would take, all else being the same."""
        seconds = self.micro_batches * exchange.seconds
        return seconds / (seconds + self.step_seconds - self.exchange_seconds)

    @property
    def training_seconds(self) -> float:
        """All steps."""
        return self.step_seconds * self.budget.tokens / self.budget.tokens_per_step


def make_plan(shape: ModelShape, budget: DesignBudget) -> Plan:
    """The plan with the shortest modelled step among those that fit.

    A node limit only where the exchange would pass 30 % of the step.

    Weights are sharded only where nothing else fits: that all of their traffic hides behind
    computing is hoped for, not known.

    Raises:
        Impossible: nothing fits.
    """
    fitting = list(_fitting(shape, budget))
    if not fitting:
        raise does_not_fit(shape, budget)
    fastest = min(fitting, key=_key)
    if (
        fastest.exchange_share > SHARE_LIMIT and budget.router_name == "loss_free"
    ):  # the router that can choose among groups of experts
        fastest = min(fitting + [plan for plan in map(_limited, fitting) if plan], key=_key)
    return fastest


def fits(shape: ModelShape, budget: DesignBudget) -> bool:
    """Whether any plan does."""
    return any(True for _ in _fitting(shape, budget))


def _fitting(shape: ModelShape, budget: DesignBudget):
    for sharded, recompute in SAVINGS:
        for ep in ep_sizes(budget.gpus, budget.gpus_per_node, shape.n_experts):
            for micro in MICRO_BATCHES:
                if micro > budget.sequences_per_step:
                    break
                memory = gpu_memory(
                    shape.spec,
                    gpus=budget.gpus,
                    ep=ep,
                    sharded=sharded,
                    recompute=recompute,
                    tokens=micro * budget.seq_len,
                )
                if memory.total > budget.usable_memory:
                    break
                yield Plan(shape, budget, ep, sharded, recompute, micro, None, memory)


def _key(plan: Plan) -> tuple:
    """Shorter is better; then fewer ranks that exchange, less recomputed, less at a time."""
    return (
        plan.sharded == "weights",
        round(plan.step_seconds, 9),
        plan.ep,
        SAVINGS.index((plan.sharded, plan.recompute)),
        plan.micro_batch,
    )


def _limited(plan: Plan) -> Plan | None:
    """The same plan with a limit on nodes, where the groups of experts are large enough for it."""
    nodes, n_experts = plan.exchange.nodes, plan.shape.n_experts
    limit, per_node = node_limit(nodes), n_experts // nodes
    if nodes < 2 or n_experts % nodes or per_node < 2 or limit * per_node < plan.shape.top_k:
        return None
    return replace(plan, max_nodes=limit)


def plan_choices(plan: Plan) -> list[Choice]:
    """What the plan rests on."""
    b = plan.budget
    why = (
        "experts fit on every GPU and get no fewer tokens"
        if plan.ep == 1
        else "the shortest modelled step among the sizes that fit"
        + (", inside a node" if plan.ep <= b.gpus_per_node else "")
    )
    again = {"nothing": "nothing", "activation": "activations of MLPs", "layer": "whole layers"}[
        plan.recompute
    ]
    choices = [
        choice("expert parallel", f"{plan.ep} of {b.gpus} GPUs", why, "when to spread experts"),
        choice(
            "placement",
            f"{plan.placement.places_per_rank} neighbouring experts a rank, {plan.dp} equal groups",
            "by measured load once a run has one",
            "divisible experts",
        ),
        choice(
            "sharded",
            "weights, gradients, AdamW" if plan.sharded == "weights" else "AdamW",
            "among ranks that hold the same",
            "optimizer state",
        ),
        choice(
            "micro-batch; computed again",
            f"{plan.micro_batch} sequences, {plan.micro_batches} times a step; {again}",
            "fits and is fastest",
            "memory reserve",
        ),
        choice(
            "batch",
            f"{count(b.tokens_per_step)} tokens",
            "a power of two of sequences a GPU"
            + (f", for the {count(b.batch_tokens)} asked for" if b.batch_tokens else ""),
            "batch",
        ),
    ]
    if plan.max_nodes:
        choices.append(
            choice(
                "nodes of a token",
                f"{plan.max_nodes} of {plan.exchange.nodes}",
                "by groups of experts",
                "node limit",
            )
        )
    return choices
