"""MoEConfig: everything that defines an MoE layer, validated, and serialisable to a plain dict."""

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import Enum
from typing import Any

from .capacity import CapacityRule
from .experts import BACKENDS, MLPOptions
from .experts.shared import COMBINE
from .routers import ROUTERS, Router
from .validate import between, boolean, one_of, whole

# Fields that several routers share -> the value for a router that has no such option.
SHARED_OPTIONS = {
    **dict.fromkeys(("capacity_factor", "norm_topk_prob"), None),
    **dict.fromkeys(("aux_loss_weight", "z_loss_weight", "jitter_noise"), 0.0),
}


class Default(Enum):
    """Stands for the value that the router's class has; a config replaces it at once."""

    OF_THE_ROUTER = "the router's own"


@dataclass(frozen=True)
class MoEConfig:
    """An MoE layer in numbers; raises ValueError where the layer's parts would.

    Attributes:
        d_model, d_ff, n_experts, top_k: D, F (of one expert), E and K. Where a token may take any
            number of experts, K is their mean number, the router's ``expansion``.
        capacity_factor, aux_loss_weight, z_loss_weight, jitter_noise: see ``Router``.
        router: a name in ``moe_core.routers.ROUTERS``.
        norm_topk_prob: the weights of the K chosen experts sum to 1.
        n_shared_experts: experts that every token visits besides its K.
        shared_d_ff: width of one shared expert, None for d_ff.
        shared_gate, shared_combine: see ``SharedExperts``.
        activation, glu, bias, glu_limit, up_offset, dropout: see ``MLPOptions``; of all experts.
        drop_path, backend: see ``Experts``.
        router_options: what only this router knows, name -> plain value.

    The five fields that start with ``Default`` take what the router's class has.
    """

    d_model: int
    d_ff: int
    n_experts: int
    top_k: int | float
    capacity_factor: float | CapacityRule | None = Default.OF_THE_ROUTER
    router: str = "topk"
    norm_topk_prob: bool | None = Default.OF_THE_ROUTER
    aux_loss_weight: float = Default.OF_THE_ROUTER
    z_loss_weight: float = Default.OF_THE_ROUTER
    jitter_noise: float = Default.OF_THE_ROUTER
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
        one_of(ROUTERS, router=self.router)
        self._set(router_options=_plain(self.router_options))
        accepted = self._accepted()
        # Replaced at once, so that a config says every value and its dict stays true later.
        for name, nothing in SHARED_OPTIONS.items():
            if getattr(self, name) is Default.OF_THE_ROUTER:
                self._set(**{name: accepted.get(name, nothing)})
        rule = CapacityRule.of(self.capacity_factor)
        if isinstance(self.capacity_factor, dict):  # as it comes out of to_dict
            self._set(capacity_factor=rule)
        ROUTERS[self.router].Options(**self.router_arguments())  # checks them
        whole(1, d_ff=self.d_ff)
        whole(0, n_shared_experts=self.n_shared_experts)
        whole(1, shared_d_ff=self.d_ff if self.shared_d_ff is None else self.shared_d_ff)
        shared = self.shared_d_ff, self.shared_gate, self.shared_combine
        for needed, why in (
            (rule.overflow == "shared", "the overflow goes to the shared expert"),
            (shared != (None, False, "sum"), "shared_d_ff, shared_gate or shared_combine is given"),
        ):
            if needed and self.n_shared_experts == 0:
                raise ValueError(f"n_shared_experts=0 must be at least 1 where {why}")
        one_of(COMBINE, shared_combine=self.shared_combine)
        between(0.0, 1.0, drop_path=self.drop_path)
        boolean(shared_gate=self.shared_gate)
        MLPOptions(**self.mlp_options())  # checks them
        one_of(BACKENDS, backend=self.backend)

    def _set(self, **values) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen for everybody else

    def _accepted(self) -> dict[str, Any]:
        """The router's arguments and their defaults, MISSING where there is none."""
        return {f.name: f.default for f in fields(ROUTERS[self.router].Options) if f.init}

    def router_arguments(self) -> dict[str, Any]:
        """What the router's class is called with; ValueError for options it has not, or lacks."""
        cls, accepted, router = ROUTERS[self.router], self._accepted(), f"router={self.router!r}"
        mean = cls.top_k_is_a_mean
        top_k = {"expansion": self.top_k} if mean else {"top_k": self.top_k}
        given = {"d_model": self.d_model, "n_experts": self.n_experts, **top_k}
        given |= {name: getattr(self, name) for name in SHARED_OPTIONS}
        own = [name for name in accepted if name not in given]
        for name in self.router_options:
            if name in given or name in ("top_k", "expansion"):
                as_field = f"give it as the field {'top_k' if name == 'expansion' else name}"
                raise ValueError(f"router_options[{name!r}]: {as_field} of MoEConfig")
            if name not in own:
                has = f"it has {', '.join(own)}" if own else "it has none"
                raise ValueError(f"router_options[{name!r}]: {router} has no such option; {has}")
        for name in own:
            if accepted[name] is MISSING and name not in self.router_options:
                raise ValueError(f"{router} needs router_options[{name!r}]")
        for name in given.keys() - accepted.keys():
            fixed = SHARED_OPTIONS[name] if name in SHARED_OPTIONS else cls.Options.top_k
            if given.pop(name) != fixed:
                why = f"{router} has no {'such option' if name in SHARED_OPTIONS else 'other'}"
                raise ValueError(f"{name}={getattr(self, name)!r} must be {fixed!r}: {why}")
        return given | self.router_options

    def build_router(self) -> Router:
        """The router that this config names."""
        return ROUTERS[self.router](**self.router_arguments())

    def mlp_options(self) -> dict:
        """What one expert is made of besides its size, see ``MLPOptions``."""
        return {f.name: getattr(self, f.name) for f in fields(MLPOptions)}

    def to_dict(self) -> dict:
        """Plain values only, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "MoEConfig":
        """The inverse of ``to_dict``. Raises ValueError for a key that is no field."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:  # from another version, say: better than a TypeError about __init__
            raise ValueError(f"unknown keys in MoEConfig: {', '.join(unknown)}")
        return cls(**values)


def _plain(options: dict) -> dict:
    """A copy of its own, after a check that JSON gives back what went in."""
    try:
        copy = json.loads(json.dumps(options, allow_nan=False))
    except (TypeError, ValueError):
        copy = None
    if not isinstance(options, dict) or copy != options:
        plain = "a dict of names to plain JSON values (lists, not tuples)"
        raise ValueError(f"router_options={options!r} must be {plain}")
    return copy
