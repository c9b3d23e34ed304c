"""MixtureOfExperts = router + plan + experts (+ shared experts)."""

from torch import Tensor, nn

from .build import build
from .config import MoEConfig
from .experts import Experts
from .experts.shared import SharedExperts
from .experts.zero_computation import ZeroComputationExperts, ffn_routing
from .parallel.expert_parallel import ExpertShard
from .routers.zero_computation import ZeroComputationRouter
from .routing import Routing


class MixtureOfExperts(nn.Module):
    r"""A layer that stands where a transformer's feed-forward layer stood.

    .. math:: y_t = \sum_{k} w_{t,k} \, f_{e_{t,k}}(x_t) \; [+ (1 + w^{over}_t) f_{shared}(x_t)]

    w^over is the weight of the token's slots over capacity where the ``CapacityRule`` hands it to the shared expert, else 0.

    Args:
        config: an ``MoEConfig``.
        shard: which of the experts live here, see ``Experts``; None for all of them.

    Attributes:
        router: returns a ``Routing``. experts: an ``Experts``. shared_experts: a ``SharedExperts``, or None.
        zero_computation_experts: a ``ZeroComputationExperts`` behind a router that sends tokens there, or None.
    """

    def __init__(self, config: MoEConfig, shard: ExpertShard | None = None):
        super().__init__()
        self.config = config
        self.router = build(config)
        mlp = config.mlp_options()
        self.experts = Experts(
            config.d_model,
            config.d_ff,
            config.n_experts,
            drop_path=config.drop_path,
            backend=config.backend,
            shard=shard,
            ep_size=1 if shard is None else shard.placement.n_ranks,
            **mlp,
        )
        self.zero_computation_experts = None
        if isinstance(self.router, ZeroComputationRouter):
            cheap = (
                self.router.n_zero_experts,
                self.router.n_copy_experts,
                self.router.n_constant_experts,
            )
            self.zero_computation_experts = ZeroComputationExperts(config.d_model, *cheap)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = SharedExperts(
                config.d_model,
                config.shared_d_ff or config.d_ff,
                config.n_shared_experts,
                gated=config.shared_gate,
                combine=config.shared_combine,
                **mlp,
            )

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """Route, compute, combine.

        Args:
            x: (B, N, D) tokens.
            padding_mask: (B, N) bool, True for real tokens; None when all are real.
            token_ids: (B, N) int64, for the routers that read them (hash routing); the others leave them alone.

        Returns:
            y (B, N, D) in x's dtype, and the ``Routing``. The residual connection is the caller's.

        Raises:
            ValueError: a shape does not fit, or the router needs token_ids and there are none.
        """
        routing = self.route(x, padding_mask, token_ids)
        return self.add_others(self.experts(x, self.expert_routing(routing)), x, routing), routing

    def route(
        self, x: Tensor, padding_mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> Routing:
        """The first part of forward: what the router says."""
        if not self.router.needs_token_ids:
            return self.router(x, padding_mask)
        if token_ids is None:
            raise ValueError(
                f"token_ids=None must be (B, N) int64: router={self.config.router!r} needs them"
            )
        return self.router(x, padding_mask, token_ids)

    def expert_routing(self, routing: Routing) -> Routing:
        """The part of a routing that goes to ``experts``: all of it, unless some experts compute nothing."""
        return (
            routing
            if self.zero_computation_experts is None
            else ffn_routing(routing, self.config.n_experts)
        )

    def add_others(self, y: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """The last part of forward: the experts' output, and what experts without computation and shared experts add to it."""
        if self.zero_computation_experts is not None:
            y = y + self.zero_computation_experts(x, routing)
        if self.shared_experts is not None:
            shared = self.shared_experts(x)
            y = y + shared
            if routing.overflow == "shared":  # stands in for the experts that were full
                y = y + (routing.overflow_weight.unsqueeze(-1) * shared).to(y.dtype)
        return y
