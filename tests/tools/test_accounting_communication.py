"""Bytes on the wire against bytes that were moved; the roofline of an expert against its definition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_core import Experts
from moe_core.parallel import SimulatedExchange, contiguous, run_rows
from moe_tools.accounting import (
    ACCELERATORS,
    AllToAll,
    all_to_alls,
    attainable_flops,
    dense_of_equal_active,
    distinct_experts,
    expert_roofline,
    intensity,
    tokens_per_expert,
    tokens_to_reach,
)
from moe_tools.accounting.published import MODELS

from ..core.helpers import fast, randn

LAYER = {
    "tokens_per_rank": 4096,
    "top_k": 8,
    "width": 7168,
    "n_ranks": 64,
}  # DeepSeek-V3 on 64 ranks


def test_the_volume_of_deepseek_v3_by_hand():
    bf16 = AllToAll(**LAYER)
    assert bf16.dispatch == 4096 * 8 * 7168 * 2 * 63 / 64
    assert (
        round(bf16.dispatch / 1e6, 1) == 462.4 and round(bf16.dispatch / 50e9 * 1e3, 2) == 9.25
    )  # MB, and ms at 50 GB/s
    assert bf16.forward == 2 * bf16.dispatch and bf16.step == 4 * bf16.dispatch
    limited = AllToAll(**LAYER, dispatch_bytes=1, max_copies=4)
    assert (
        round(limited.dispatch / 1e6, 1) == 115.6
        and round(limited.dispatch / 50e9 * 1e3, 2) == 2.31
    )
    assert limited.combine == 2 * limited.dispatch  # comes back in bfloat16
    assert limited.step == 2 * 3 * limited.dispatch


def test_a_limit_on_copies_counts_only_below_top_k():
    assert (
        AllToAll(**LAYER, max_copies=8).step
        == AllToAll(**LAYER).step
        == AllToAll(**LAYER, max_copies=20).step
    )


def test_one_rank_sends_nothing():
    assert AllToAll(**{**LAYER, "n_ranks": 1}).step == 0


@pytest.mark.parametrize("R, k", [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_are_those_that_an_exchange_moves(R, k, dtype):
    E, D, T = 8, 16, 32
    banks = [Experts(D, 8, E // R, backend="loop").to(dtype) for _ in range(R)]
    rows = [randn(T * k, D, seed=r, dtype=dtype).requires_grad_() for r in range(R)]
    counts = [torch.full((E,), T * k // E) for _ in range(R)]  # tokens choose evenly
    exchange = SimulatedExchange(R)
    outputs = run_rows(rows, counts, [bank.run_rows for bank in banks], exchange, contiguous(E, R))
    sum(y.float().sum() for y in outputs).backward()
    away = [
        transfer.bytes_RR.clone().fill_diagonal_(0)
        for transfer in exchange.transfers
        if transfer.what in ("rows", "gradients")
    ]
    counted = AllToAll(T, k, D, R, dtype.itemsize, dtype.itemsize)
    assert [matrix.sum(1).tolist() for matrix in away] == [[counted.dispatch] * R] * 4
    assert sum(away).sum(1).tolist() == [counted.step] * R


def test_every_moe_layer_of_a_model_has_its_own():
    layers = all_to_alls(MODELS["deepseek-v3"], 4096, 64)
    assert len(layers) == 58 and layers[0] == AllToAll(**LAYER)
    assert {layer.width for layer in all_to_alls(MODELS["kimi-k3 (text)"], 4096, 64)} == {
        3584
    }  # experts in a latent: half the bytes
    assert {layer.top_k for layer in all_to_alls(MODELS["longcat-flash"], 4096, 64)} == {
        8
    }  # zero experts stay at home


@pytest.mark.parametrize(
    "d, f, tokens", [(7168, 2048, 362), (4096, 14336, 325), (4096, 1536, 401), (2048, 768, 625)]
)
def test_tokens_an_expert_needs_to_be_bound_by_arithmetic_on_an_h100(d, f, tokens):
    assert round(ACCELERATORS["h100"].ridge) == 295
    assert round(tokens_to_reach(295, d, f)) == tokens


@fast
@given(
    d=st.integers(1, 9000),
    f=st.integers(1, 9000),
    ridge=st.floats(0.01, 2000),
    b=st.sampled_from([1, 2, 4]),
)
def test_at_the_ridge_the_intensity_is_the_ridge(d, f, ridge, b):
    m = tokens_to_reach(ridge, d, f, b)
    limit = 2 * d * f / (b * (d + f))
    assert (m == math.inf) == (limit <= ridge) or limit == pytest.approx(ridge, rel=1e-9)
    if m < 1e9:
        assert intensity(m, d, f, b) == pytest.approx(ridge, rel=1e-6)


def test_with_few_tokens_the_intensity_is_their_number():
    assert intensity(4, 7168, 2048) == pytest.approx(4, rel=0.01)
    assert intensity(4, 7168, 2048, 1) == pytest.approx(8, rel=0.01)  # half the bytes


def test_the_roofline_is_the_lower_of_two_limits():
    h100 = ACCELERATORS["h100"]
    assert attainable_flops(4, 7168, 2048, h100) == pytest.approx(
        intensity(4, 7168, 2048) * 3.35e12
    )
    assert attainable_flops(4096, 7168, 2048, h100) == h100.peak_flops
    m = tokens_to_reach(h100.ridge, 7168, 2048)
    assert attainable_flops(m, 7168, 2048, h100) == pytest.approx(h100.peak_flops, rel=1e-9)
    assert all(
        a.ridge == a.peak_flops / a.memory_bandwidth and a.memory > 0 for a in ACCELERATORS.values()
    )


@pytest.mark.parametrize("tokens, experts", [(8, 57.4), (32, 163.3), (128, 251.6)])
def test_a_decode_batch_soon_reads_all_experts(tokens, experts):
    assert round(distinct_experts(tokens, 256, 8), 1) == experts


def test_distinct_experts_is_what_independent_tokens_pick():
    E, k, T, trials = 16, 3, 5, 4000
    scores = torch.rand(trials, T, E, generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(trials, E).scatter_(1, scores.topk(k).indices.flatten(1), 1)
    assert chosen.sum(1).mean().item() == pytest.approx(
        distinct_experts(T, E, k), abs=0.1
    )  # its standard error is 0.02
    assert distinct_experts(0, E, k) == 0 and distinct_experts(1, E, k) == pytest.approx(k)


def test_the_roofline_of_a_published_model():
    [row] = expert_roofline(MODELS["deepseek-v3"], 128, ACCELERATORS["h100"])
    assert row["tokens_per_expert"] == tokens_per_expert(128, 256, 8) == 4
    assert row["intensity"] == intensity(4, 7168, 2048) and round(row["experts_read"], 1) == 251.6
    assert row["share_of_peak"] == pytest.approx(row["intensity"] / ACCELERATORS["h100"].ridge)
    assert round(row["tokens_per_expert_at_ridge"]) in (362, 363)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: AllToAll(**{**LAYER, "n_ranks": 0}), "n_ranks=0"),
        (lambda: AllToAll(**LAYER, max_copies=0), "max_copies=0"),
        (lambda: AllToAll(**{**LAYER, "top_k": -1}), "top_k=-1"),
        (lambda: AllToAll(**LAYER, combine_bytes=-1), "combine_bytes=-1"),
        (lambda: intensity(-1, 4, 4), "m=-1"),
        (lambda: tokens_to_reach(-5, 4, 4), "ridge=-5"),
        (lambda: distinct_experts(4, 8, 9), "top_k=9 must be above 0 and at most n_experts=8"),
        (lambda: tokens_per_expert(4, 0, 2), "n_experts=0"),
    ],
)
def test_a_wrong_value_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_model_without_experts_is_refused():
    dense = dense_of_equal_active(MODELS["mixtral-8x7b"]).spec
    with pytest.raises(ValueError, match="no MoE layer"):
        all_to_alls(dense, 8, 2)
    with pytest.raises(ValueError, match="no MoE layer"):
        expert_roofline(dense, 8, ACCELERATORS["h100"])
