"""MoEConfig: everything that defines an MoE layer, validated, and serialisable to a plain dict."""

import json
from dataclasses import asdict, dataclass, field, fields

import torch

from .build import build, shared_defaults, top_k_is_a_mean
from .capacity import CapacityRule
from .experts import BACKENDS
from .experts.activations import Activation
from .experts.shared import COMBINE
from .routers import ROUTERS
from .validate import at_least, between, boolean, one_of, top_k_fits, whole


@dataclass(frozen=True)
class MoEConfig:
    """An MoE layer in numbers.

    Attributes:
        d_model, d_ff, n_experts, top_k: D, F (of one expert), E and K. Where a token may take any number of experts (expert
            choice, threshold, ReLU), K is their mean number, the router's ``expansion``, and may be a fraction.
        capacity_factor: places per slot at perfect balance; None means dropless. Or a ``CapacityRule``.
        router: the name of the router, one of ``moe_core.routers.ROUTERS``.
        norm_topk_prob: renormalise the weights of the K chosen experts so that they sum to 1; None where the router decides.
        aux_loss_weight, z_loss_weight: coefficients of the load-balancing loss and of the z-loss; 0 leaves a loss out.
        jitter_noise: epsilon of the multiplicative noise on the router's input, in training only.
        n_shared_experts: experts that every token visits besides its K; they are one MLP of width n_shared_experts * shared_d_ff.
        shared_d_ff: width of one shared expert, None for d_ff. shared_gate, shared_combine: see ``SharedExperts``.
        activation, glu, bias, glu_limit, up_offset, dropout: of all experts, the shared ones included; see ``Experts``.
        drop_path, backend: see ``Experts``.
        router_options: what only this router knows, name -> plain value, as in its class. The router is built once to check them.

    capacity_factor, norm_topk_prob, aux_loss_weight, z_loss_weight and jitter_noise belong to the routers that have such an
    argument. "default" stands for the value that the router's class has (for "topk": None, True, 0, 0, 0) and is replaced by it at
    once, so that a config always says what is done. A router without the argument has None, None, 0, 0, 0 and refuses all else.

    Raises:
        ValueError: a value is out of its range, or the router cannot use it; the message names the argument, the value and the range.
    """

    d_model: int
    d_ff: int
    n_experts: int
    top_k: int | float
    capacity_factor: float | CapacityRule | None | str = "default"
    router: str = "topk"
    norm_topk_prob: bool | None | str = "default"
    aux_loss_weight: float | str = "default"
    z_loss_weight: float | str = "default"
    jitter_noise: float | str = "default"
    n_shared_experts: int = 0
    shared_d_ff: int | None = None
    shared_gate: bool = False
    shared_combine: str = "sum"
    activation: str = "silu"
    glu: bool = True
    bias: bool = False
    glu_limit: float | None = None
    up_offset: float = 0.0
    dropout: float = 0.0
    drop_path: float = 0.0
    backend: str = "auto"
    router_options: dict = field(default_factory=dict, hash=False)  # a dict has no hash

    def __post_init__(self):
        whole(1, d_model=self.d_model, d_ff=self.d_ff, n_experts=self.n_experts)
        one_of(ROUTERS, router=self.router)
        for name, value in shared_defaults(self.router).items():
            if isinstance(getattr(self, name), str) and getattr(self, name) == "default":
                object.__setattr__(self, name, value)
        if top_k_is_a_mean(self.router):
            at_least(0, top_k=self.top_k)  # the router says the rest, of its expansion
        else:
            top_k_fits(self.top_k, self.n_experts)
        whole(0, n_shared_experts=self.n_shared_experts)
        at_least(0, aux_loss_weight=self.aux_loss_weight, z_loss_weight=self.z_loss_weight)
        rule = CapacityRule.of(self.capacity_factor)
        if isinstance(self.capacity_factor, dict):  # as it comes out of to_dict
            object.__setattr__(self, "capacity_factor", rule)
        if rule.overflow == "shared" and self.n_shared_experts == 0:
            raise ValueError(
                "n_shared_experts=0 must be at least 1 where the overflow goes to the shared expert"
            )
        if self.n_shared_experts == 0 and (
            self.shared_d_ff,
            self.shared_gate,
            self.shared_combine,
        ) != (None, False, "sum"):
            raise ValueError(
                "n_shared_experts=0 must be at least 1 where shared_d_ff, shared_gate or shared_combine is given"
            )
        whole(1, shared_d_ff=self.d_ff if self.shared_d_ff is None else self.shared_d_ff)
        one_of(COMBINE, shared_combine=self.shared_combine)
        between(
            0.0, 1.0, jitter_noise=self.jitter_noise, dropout=self.dropout, drop_path=self.drop_path
        )
        boolean(bias=self.bias, shared_gate=self.shared_gate)
        Activation(self.activation, self.glu, self.glu_limit, self.up_offset)  # checks the four
        one_of(BACKENDS, backend=self.backend)
        object.__setattr__(self, "router_options", _plain(self.router_options))
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
        ):  # to make a config draws no random number
            build(self)

    def mlp_options(self) -> dict:
        """What one expert is made of besides its size: the options of ``FeedForward`` and ``Experts``."""
        return {
            name: getattr(self, name)
            for name in ("activation", "glu", "bias", "glu_limit", "up_offset", "dropout")
        }

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


def _plain(options: dict) -> dict:
    """A copy of its own, after a check that JSON gives back what went in."""
    try:
        copy = json.loads(json.dumps(options, allow_nan=False))
    except (TypeError, ValueError):
        copy = None
    if not isinstance(options, dict) or copy != options:
        raise ValueError(
            f"router_options={options!r} must be a dict of names to plain JSON values (lists, not tuples)"
        )
    return copy
