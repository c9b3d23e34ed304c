"""MixtureOfExperts = router + experts (+ experts that cost nothing, + shared experts)."""

from torch import Tensor, nn

from .config import MoEConfig
from .experts import Experts, SharedExperts, ZeroComputationExperts
from .parallel import ExpertShard
from .routing import Routing


class MixtureOfExperts(nn.Module):
    r"""A layer that stands where a transformer's feed-forward layer stood.

    .. math:: y_t = \sum_{k} w_{t,k} \, f_{e_{t,k}}(x_t) \; [+ (1 + w^{over}_t) f_{shared}(x_t)]

    w^over is ``Routing.overflow_weight``; ``shard`` says which experts live here, None for all.
    """

    def __init__(self, config: MoEConfig, shard: ExpertShard | None = None):
        super().__init__()
        self.config = config
        self.router = config.build_router()
        sizes, mlp = (config.d_model, config.d_ff, config.n_experts), config.mlp_options()
        parallel = {} if shard is None else {"shard": shard, "ep_size": shard.placement.n_ranks}
        bank = {"drop_path": config.drop_path, "backend": config.backend, **parallel, **mlp}
        self.experts = Experts(*sizes, n_routed=self.router.n_experts, **bank)
        self.zero_computation_experts = self.shared_experts = None
        if self.router.cheap_experts is not None:
            cheap = ZeroComputationExperts(config.d_model, *self.router.cheap_experts)
            self.zero_computation_experts = cheap
        if config.n_shared_experts:
            sizes = config.d_model, config.shared_d_ff or config.d_ff, config.n_shared_experts
            how = {"gated": config.shared_gate, "combine": config.shared_combine}
            self.shared_experts = SharedExperts(*sizes, **how, **mlp)

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """Route, compute, combine: y (B, N, D) in x's dtype, without a residual, and the Routing.

        Args:
            x: (B, N, D) tokens.
            padding_mask: (B, N) bool, True for real tokens; None when all are real.
            token_ids: (B, N) int64, for the routers that read them (hash routing).

        Raises ValueError where a shape does not fit, or the router needs token_ids and has none.
        """
        routing = self.router(x, padding_mask, token_ids)
        y = self.experts(x, routing)
        return self.add_others(y, x, routing), routing

    def add_others(self, y: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """y, and what experts without computation and shared experts add to it."""
        for others in (self.zero_computation_experts, self.shared_experts):
            if others is not None:
                y = y + others(x, routing)
        return y
