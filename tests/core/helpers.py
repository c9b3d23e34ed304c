"""What the tests of the core share: small inputs, hand-made routings, and references written one token at a time."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from moe_core import DropReason, MoEConfig, Routing, TopKRouter
from moe_core.experts import ACTIVATIONS

# The same examples on every run, and no clock.
fast = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)


# What rounding may do to a result, relative to its largest value. Processors add in other orders, and n terms in another order are off
# by up to n/2 units in the last place. The sums here have some hundred terms, one after the other: 84 units in float32. The coarse types
# add in float32 and round each result: 10 units for a chain of such results. float64 has digits to spare: 45 thousand units.
RTOL = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def close(found, expected, *, size=0.0, dtype=None) -> bool:
    """Equal but for rounding, whatever processor computed it: no further apart than RTOL times the largest value expected.

    What the same operations compute in the same order from the same shapes is equal bit by bit (``torch.equal``), and so is what is only
    moved or counted.

    Args:
        size: of the numbers that were added up, where they may cancel; the largest value expected, if that is more.
        dtype: the coarsest type on the way, where that is not the result's own.
    """
    assert found.dtype == expected.dtype, (found.dtype, expected.dtype)
    finite = expected.detach()[expected.isfinite()].abs()
    largest = max(size, finite.max().item() if finite.numel() else 0.0)
    return torch.allclose(found, expected, rtol=0, atol=RTOL[dtype or expected.dtype] * largest)


def about(value, *, size=0.0):
    """A number, or a list of them, that was computed in float32: equal but for rounding. size: as for ``close``, where numbers cancel."""
    return pytest.approx(value, rel=RTOL[torch.float32], abs=RTOL[torch.float32] * size)


def randn(*shape, seed=0, dtype=torch.float32):
    """Normal numbers that are the same on every call."""
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def mask(*shape, seed=0):
    """Random booleans, about three in four True."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.75


def config(**changes) -> MoEConfig:
    """A small valid MoEConfig."""
    return MoEConfig(**{"d_model": 8, "d_ff": 16, "n_experts": 4, "top_k": 2, **changes})


def seeded(make, *args, seed=0, **kwargs):
    """make(*args, **kwargs) with torch's generator at this seed, so that parameters are the same on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(*args, **kwargs)


def lopsided(make, **options):
    """A router of this class for 8 experts, of which expert 0 is far ahead on a ``stream``."""
    router = seeded(make, **{"d_model": 8, "n_experts": 8, **options})
    with torch.no_grad():
        router.weight[0, 0] += 3.0
    return router


def stream(seed, B=4, N=128):
    """Tokens (B, N, 8) whose first component is 1, another batch for each seed."""
    x = randn(B, N, 8, seed=seed)
    x[..., 0] = 1.0
    return x


def routing_of(
    indices, n_experts, *, scores=None, weights=None, reasons=None, padding_mask=None, capacity=None
) -> Routing:
    """A Routing written by hand from nested lists; kept slots, even weights and even scores unless told otherwise."""
    indices = torch.as_tensor(indices, dtype=torch.int64)
    B, N, K = indices.shape
    reasons = (
        torch.zeros(B, N, K, dtype=torch.int8)
        if reasons is None
        else torch.as_tensor(reasons, dtype=torch.int8)
    )
    scores = (
        torch.full((B, N, n_experts), 1 / n_experts) if scores is None else torch.as_tensor(scores)
    )
    weights = torch.full((B, N, K), 1 / K) if weights is None else torch.as_tensor(weights)
    return Routing(
        expert_indices=indices,
        expert_weights=weights,
        capacity_mask=reasons == DropReason.KEPT,
        logits=scores.clamp(min=1e-9).log(),
        scores=scores,
        drop_reason=reasons,
        padding_mask=padding_mask,
        capacity=capacity,
    )


def mlp_of_expert(experts, e, x):
    """f_e(x) for one token, from the formula."""
    bias = experts.gate_up_bias is not None
    projected = experts.gate_up_proj[e] @ x + (experts.gate_up_bias[e] if bias else 0)
    if experts.glu:
        gate, up = projected[: experts.d_ff], projected[experts.d_ff :]
        if experts.act.limit is not None:
            gate, up = (
                gate.minimum(gate.new_tensor(experts.act.limit)),
                up.clamp(-experts.act.limit, experts.act.limit),
            )
        hidden = ACTIVATIONS[experts.activation](gate) * (up + experts.act.up_offset)
    else:
        hidden = ACTIVATIONS[experts.activation](projected)
    return experts.down_proj[e] @ hidden + (experts.down_bias[e] if bias else 0)


def experts_token_by_token(experts, x, routing):
    """What Experts must return: every token, every slot, one after the other."""
    B, N, K = routing.expert_indices.shape
    rows = []
    for b in range(B):
        for n in range(N):
            y = x[b, n] * 0
            for k in range(K):
                expert = int(routing.expert_indices[b, n, k])
                # Indices beyond the bank are experts that compute without it.
                if routing.capacity_mask[b, n, k] and expert < experts.n_experts:
                    y = y + routing.expert_weights[b, n, k] * mlp_of_expert(
                        experts, routing.expert_indices[b, n, k], x[b, n]
                    )
            rows.append(y)
    return torch.stack(rows).view(x.shape) if rows else x * 0


def first_come_first_served(routing, capacity):
    """The capacity mask of the position policy, as a queue in plain Python."""
    kept, places = routing.capacity_mask.clone(), [0] * routing.n_experts
    for b, n, k in torch.cartesian_prod(*map(torch.arange, kept.shape)).tolist():
        if kept[b, n, k]:
            expert = int(routing.expert_indices[b, n, k])
            kept[b, n, k] = places[expert] < capacity
            places[expert] += int(kept[b, n, k])
    return kept


@dataclass
class Case:
    """One drawn situation: sizes, a seed, how large the logits are (0: all tied), and whether some tokens are padding."""

    B: int
    N: int
    E: int
    K: int
    seed: int
    scale: float
    padded: bool
    capacity_factor: float | None
    normalized: bool
    D: int = 4

    def x(self, dtype=torch.float32):
        return randn(self.B, self.N, self.D, seed=self.seed, dtype=dtype)

    def padding_mask(self):
        return mask(self.B, self.N, seed=self.seed) if self.padded else None

    def router(self, **changes) -> TopKRouter:
        router = seeded(
            TopKRouter,
            self.D,
            self.E,
            self.K,
            seed=self.seed,
            **{
                "capacity_factor": self.capacity_factor,
                "norm_topk_prob": self.normalized,
                "aux_loss_weight": 0.01,
                "z_loss_weight": 0.001,
                **changes,
            },
        )
        with torch.no_grad():
            router.weight *= self.scale
        return router


@st.composite
def cases(draw) -> Case:
    """Situations a router must survive: no sequence, no token, one expert, K = E, ties, saturated softmax, padding, no room."""
    E = draw(st.integers(1, 6))
    return Case(
        B=draw(st.integers(0, 3)),
        N=draw(st.integers(0, 6)),
        E=E,
        K=draw(st.integers(1, E)),
        seed=draw(st.integers(0, 999)),
        scale=draw(st.sampled_from([0.0, 1.0, 10.0, 1e4])),
        padded=draw(st.booleans()),
        capacity_factor=draw(st.sampled_from([None, 0.0, 0.5, 1.0, 1.25, 100.0])),
        normalized=draw(st.booleans()),
    )
