"""Feed-forward networks in numbers: one dense MLP, or a router and its experts."""

from dataclasses import dataclass

from moe_core.validate import at_least, boolean, whole


def mlp_matrices(width_in: int, d_ff: int, glu: bool) -> int:
    """Three matrices where the MLP is gated (SwiGLU and its like), else two."""
    return (3 if glu else 2) * width_in * d_ff


def mlp_vectors(width_out: int, d_ff: int, glu: bool, bias: bool) -> int:
    """One bias for every output of the matrices."""
    return ((2 if glu else 1) * d_ff + width_out) if bias else 0


@dataclass(frozen=True)
class DenseSpec:
    """One MLP for all tokens.

    Attributes:
        d_ff: its width. glu: gated, so three matrices, else two. bias: every matrix has a bias.

    Raises:
        ValueError: d_ff is not a positive whole number, or an option is not a boolean.
    """

    d_ff: int
    glu: bool = True
    bias: bool = False

    def __post_init__(self):
        whole(1, d_ff=self.d_ff)
        boolean(glu=self.glu, bias=self.bias)

    def parts(self, d_model: int) -> dict[str, tuple[int, int]]:
        """Part of the model -> numbers in its matrices, numbers in its vectors."""
        return {
            "dense": (
                mlp_matrices(d_model, self.d_ff, self.glu),
                mlp_vectors(d_model, self.d_ff, self.glu, self.bias),
            )
        }


@dataclass(frozen=True)
class MoESpec:
    r"""A router, E experts of which a token visits K, and what it visits besides them.

    .. math:: \underbrace{D (E + Z)}_{router} + E \cdot \underbrace{3 D F}_{expert} + \underbrace{3
        D \, n F_{shared}}_{shared}

    Attributes:
        n_experts, top_k, d_ff: E, K (may be a mean, a fraction) and F of one expert.
        n_shared_experts, shared_d_ff: experts that every token visits, and the width of one (None:
            d_ff). They count as one MLP of width n * shared_d_ff. A dense MLP that runs beside the
            experts (Arctic) is one too.
        shared_gate: their output is multiplied by a learned score, D numbers (Qwen2-MoE).
        glu, bias: as in ``DenseSpec``, of routed and shared experts.
        router_bias: a learned bias of the logits (gpt-oss). The correction bias that loss-free
            balancing moves by hand is no parameter and is never counted.
        router_matrices: how many D x E matrices the router has: 2 for noisy top-k, 0 for a fixed
            table.
        n_zero_experts: Z, experts without computation that the router may choose too: of K slots, K
            E / (E + Z) reach an expert on average, if all are chosen alike. n_constant_experts:
            those of them that hold numbers, 3D each (MoE++); every token is multiplied with them,
            so they count as shared.
        latent_dim: width in which the routed experts work, if it is not D: then one matrix leads in
            and one out (LatentMoE).
        latent_norm: the latent has a norm, latent_dim gains (Kimi-K3).

    Raises:
        ValueError: a size or an option is out of its range; the message names it.
    """

    n_experts: int
    top_k: float
    d_ff: int
    n_shared_experts: int = 0
    shared_d_ff: int | None = None
    shared_gate: bool = False
    glu: bool = True
    bias: bool = False
    router_bias: bool = False
    router_matrices: int = 1
    n_zero_experts: int = 0
    n_constant_experts: int = 0
    latent_dim: int | None = None
    latent_norm: bool = False

    def __post_init__(self):
        whole(
            1,
            n_experts=self.n_experts,
            d_ff=self.d_ff,
            shared_d_ff=self.d_ff if self.shared_d_ff is None else self.shared_d_ff,
            latent_dim=1 if self.latent_dim is None else self.latent_dim,
        )
        whole(
            0,
            n_shared_experts=self.n_shared_experts,
            router_matrices=self.router_matrices,
            n_zero_experts=self.n_zero_experts,
            n_constant_experts=self.n_constant_experts,
        )
        if self.n_constant_experts > self.n_zero_experts:
            raise ValueError(
                f"n_constant_experts={self.n_constant_experts} must be at most "
                f"n_zero_experts={self.n_zero_experts}: they are among these"
            )
        at_least(0, top_k=self.top_k)
        if not 0 < self.top_k <= self.n_experts + self.n_zero_experts:
            raise ValueError(
                f"top_k={self.top_k!r} must be above 0 and at most all "
                f"experts={self.n_experts + self.n_zero_experts}"
            )
        boolean(
            shared_gate=self.shared_gate,
            glu=self.glu,
            bias=self.bias,
            router_bias=self.router_bias,
            latent_norm=self.latent_norm,
        )
        if self.latent_norm and self.latent_dim is None:
            raise ValueError("latent_dim=None must be given where latent_norm=True")
        if not self.n_shared_experts and (self.shared_gate or self.shared_d_ff is not None):
            raise ValueError(
                f"n_shared_experts=0 must be at least 1 where shared_gate={self.shared_gate} or "
                f"shared_d_ff={self.shared_d_ff} is given"
            )

    @property
    def experts_per_token(self) -> float:
        """How many of the E experts a token visits on average."""
        return self.top_k * self.n_experts / (self.n_experts + self.n_zero_experts)

    @property
    def shared_width(self) -> int:
        """Width of all shared experts together."""
        return self.n_shared_experts * (self.shared_d_ff or self.d_ff)

    def expert_width(self, d_model: int) -> int:
        """Width of the rows that go to an expert, and over the wire: D, or the latent width."""
        return self.latent_dim or d_model

    def expert_params(self, d_model: int) -> int:
        """Parameters of one routed expert."""
        width = self.expert_width(d_model)
        return mlp_matrices(width, self.d_ff, self.glu) + mlp_vectors(
            width, self.d_ff, self.glu, self.bias
        )

    def parts(self, d_model: int) -> dict[str, tuple[int, int]]:
        """Part of the model -> numbers in its matrices, numbers in its vectors.

        All experts are counted.
        """
        D, E, width = d_model, self.n_experts + self.n_zero_experts, self.expert_width(d_model)
        shared = [2 * D * self.n_constant_experts, D * self.n_constant_experts]
        if self.n_shared_experts:
            shared[0] += mlp_matrices(D, self.shared_width, self.glu) + self.shared_gate * D
            shared[1] += mlp_vectors(D, self.shared_width, self.glu, self.bias)
        return {
            "router": (
                self.router_matrices * D * E + (2 * D * width if self.latent_dim else 0),
                self.router_bias * E + self.latent_norm * width,
            ),
            "experts": (
                self.n_experts * mlp_matrices(width, self.d_ff, self.glu),
                self.n_experts * mlp_vectors(width, self.d_ff, self.glu, self.bias),
            ),
            "shared": tuple(shared),
        }
