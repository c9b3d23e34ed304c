"""MoEConfig: everything that defines an MoE layer, validated, and serialisable to a plain dict."""

from dataclasses import asdict, dataclass, fields

from ._validate import at_least, between, boolean, one_of, top_k_fits, whole
from .experts import ACTIVATIONS, BACKENDS

ROUTERS = ("topk",)


@dataclass(frozen=True)
class MoEConfig:
    """An MoE layer in numbers.

    Attributes:
        d_model, d_ff, n_experts, top_k: D, F (of one expert), E and K.
        capacity_factor: places per slot at perfect balance; None means dropless.
        router: the name of the router, "topk".
        norm_topk_prob: renormalise the weights of the K chosen experts so that they sum to 1.
        aux_loss_weight, z_loss_weight: coefficients of the load-balancing loss and of the z-loss; 0 leaves a loss out.
        jitter_noise: epsilon of the multiplicative noise on the router's input, in training only.
        n_shared_experts: experts that every token visits besides its K; they are one MLP of width n_shared_experts * d_ff.
        activation, glu, drop_path, backend: see ``Experts``.

    Raises:
        ValueError: a value is out of its range; the message names the argument, the value and the range.
    """

    d_model: int
    d_ff: int
    n_experts: int
    top_k: int
    capacity_factor: float | None = None
    router: str = "topk"
    norm_topk_prob: bool = True
    aux_loss_weight: float = 0.0
    z_loss_weight: float = 0.0
    jitter_noise: float = 0.0
    n_shared_experts: int = 0
    activation: str = "silu"
    glu: bool = True
    drop_path: float = 0.0
    backend: str = "auto"

    def __post_init__(self):
        whole(1, d_model=self.d_model, d_ff=self.d_ff)
        top_k_fits(self.top_k, self.n_experts)
        whole(0, n_shared_experts=self.n_shared_experts)
        at_least(0, aux_loss_weight=self.aux_loss_weight, z_loss_weight=self.z_loss_weight)
        if self.capacity_factor is not None:
            at_least(0, capacity_factor=self.capacity_factor)
        between(0.0, 1.0, jitter_noise=self.jitter_noise, drop_path=self.drop_path)
        boolean(norm_topk_prob=self.norm_topk_prob, glu=self.glu)
        one_of(ROUTERS, router=self.router)
        one_of(ACTIVATIONS, activation=self.activation)
        one_of(BACKENDS, backend=self.backend)

    def to_dict(self) -> dict:
        """Plain values only, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "MoEConfig":
        """The inverse of ``to_dict``.

        Raises:
            ValueError: a key is not a field of this config.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown keys in MoEConfig: {', '.join(unknown)}")
        return cls(**values)
