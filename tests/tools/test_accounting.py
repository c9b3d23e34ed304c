"""Counting a model: parameters against the modules themselves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_core import LanguageModel, LMConfig
from moe_core.routers import ROUTERS
from moe_tools.accounting import (
    AttentionSpec,
    DenseSpec,
    LatentAttentionSpec,
    LayerSpec,
    MambaSpec,
    ModelSpec,
    MoESpec,
    from_lm,
)
from moe_tools.accounting.published import MODELS

from ..core.helpers import config, fast

OPTIONS = {  # what a router needs besides the config's own fields
    "hash": {"vocab_size": 32},
    "zero_computation": {"n_zero_experts": 2, "n_copy_experts": 1, "n_constant_experts": 3},
}


def lm_config(**moe) -> LMConfig:
    return LMConfig(
        vocab_size=32,
        d_model=16,
        n_layers=2,
        n_heads=2,
        max_seq_len=8,
        moe=config(d_model=16, d_ff=12, **moe),
    )


def count(cfg: LMConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in LanguageModel(cfg).parameters())


def decoder(**changes) -> ModelSpec:
    given = {
        "d_model": 64,
        "vocab_size": 100,
        "n_layers": 6,
        "attention": AttentionSpec(4, 2, 16),
        "moe": MoESpec(8, 2, 32),
        **changes,
    }
    return ModelSpec.decoder(**given)


@pytest.mark.parametrize("router", ROUTERS)
def test_parameters_of_our_own_model_are_exact_behind_every_router(router):
    cfg = lm_config(
        router=router,
        top_k=1 if router in ("switch", "base") else 2,
        router_options=OPTIONS.get(router, {}),
    )
    assert from_lm(cfg).total_params == count(cfg)


@pytest.mark.parametrize(
    "moe",
    [
        {"glu": False, "activation": "relu2"},
        {"bias": True},
        {"bias": True, "glu": False},
        {"n_shared_experts": 2},
        {"n_shared_experts": 3, "shared_d_ff": 5, "shared_gate": True, "bias": True},
        {"router_options": {"bias": True}},
        {"router": "hash", "router_options": {"vocab_size": 32, "weights": "uniform"}},
    ],
    ids=str,
)
def test_parameters_of_our_own_model_are_exact_with_every_option(moe):
    cfg = lm_config(**moe)
    assert from_lm(cfg).total_params == count(cfg)
    if not cfg.moe.bias:
        assert from_lm(cfg.dense_twin()).total_params == count(cfg.dense_twin())


def test_active_parameters_by_hand():
    spec = decoder()
    attention, expert, router, norms, embedding = (
        64 * (2 * 64 + 2 * 32),
        3 * 64 * 32,
        64 * 8,
        13 * 64,
        6400,
    )
    rest = 6 * (attention + router) + norms
    assert spec.total_params == rest + 6 * 8 * expert + 2 * embedding
    assert spec.active_params == rest + 6 * 2 * expert + 2 * embedding
    assert spec.active_params_head == spec.active_params - embedding
    assert spec.active_params_nonemb == rest + 6 * 2 * expert


def test_a_tied_embedding_is_counted_once_and_is_the_head():
    tied, untied = decoder(tied=True), decoder()
    assert untied.total_params - tied.total_params == 6400 and tied.parts["head"] == 0
    assert tied.active_params_head == tied.active_params  # the matrix is multiplied
    assert tied.active_params_nonemb == untied.active_params_nonemb


def test_the_routed_parameters_not_visited_are_what_active_lacks():
    for spec in MODELS.values():
        idle = sum(
            (moe.n_experts - moe.experts_per_token) * moe.expert_params(spec.d_model)
            for moe in spec.moe_layers
        )
        assert spec.total_params - spec.active_params == idle


def test_leading_dense_layers_and_every_nth_layer():
    dense = DenseSpec(48)
    spec = decoder(n_layers=10, dense=dense, n_dense_layers=3, moe_every=2)
    assert [bool(layer.moes) for layer in spec.layers] == [i in (3, 5, 7, 9) for i in range(10)]
    assert spec.parts["dense"] == 6 * 3 * 64 * 48
    assert (
        ModelSpec.decoder(
            d_model=64, vocab_size=100, n_layers=2, attention=AttentionSpec(4, 4, 16), dense=dense
        ).moe_layers
        == ()
    )


def test_mixed_layers_give_the_sum_of_their_kinds():
    plain, windowed = AttentionSpec(4, 2, 16), AttentionSpec(4, 2, 16, window=128)
    mamba = MambaSpec(128, 8, 4, 4)
    spec = decoder(attention=[plain, windowed, mamba] * 2)
    assert spec.parts["attention"] == 2 * (
        2 * plain.matrices(64) + mamba.matrices(64) + mamba.vectors(64)
    )


def test_zero_experts_take_their_share_of_the_slots():
    moe = MoESpec(512, 12, 2048, n_zero_experts=256)
    assert moe.experts_per_token == 8
    assert moe.parts(6144)["router"] == (768 * 6144, 0)


@fast
@given(
    D=st.integers(1, 40),
    H=st.integers(1, 6),
    group=st.integers(1, 4),
    d=st.integers(1, 9),
    E=st.integers(1, 8),
    F=st.integers(1, 20),
    data=st.data(),
)
def test_bounds_and_monotony(D, H, group, d, E, F, data):
    k = data.draw(st.integers(1, E))
    build = lambda k, E=E, F=F, n=2: ModelSpec.decoder(
        d_model=D,
        vocab_size=7,
        n_layers=n,
        attention=AttentionSpec(H * group, H, d),
        moe=MoESpec(E, k, F),
    )
    spec = build(k)
    assert (
        build(E).active_params
        == spec.total_params
        >= spec.active_params
        >= spec.active_params_head
        >= spec.active_params_nonemb
    )
    assert (
        build(k, E=E + 1).total_params > spec.total_params
        and build(k, E=E + 1).active_params == spec.active_params + 2 * D
    )  # router
    assert (
        build(k, n=3).total_params - spec.total_params
        == spec.total_params - build(k, n=1).total_params
    )


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            {"attention": AttentionSpec(4, 4, 16), "n_layers": 0},
            "n_layers=0 must be a whole number, at least 1",
        ),
        ({"moe_every": 0}, "moe_every=0"),
        ({"n_dense_layers": 1}, "dense=None must be given"),
        ({"dense": DenseSpec(8)}, "must be None"),
        ({"moe": None}, "dense=None must be given"),
        ({"attention": [AttentionSpec(4, 4, 16)] * 5}, "5 entries, must be one or n_layers=6"),
        ({"norm": "batch"}, "norm='batch' must be one of"),
        ({"tied": 1}, "tied=1 must be True or False"),
        ({"d_model": 6.5}, "d_model=6.5"),
        ({"n_encoder_layers": 7}, "n_encoder_layers=7 must be at most the number of layers=6"),
    ],
)
def test_a_wrong_model_is_refused_by_name_value_and_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        decoder(**wrong)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AttentionSpec(6, 4, 8), "n_kv_heads=4 must divide n_heads=6"),
        (lambda: AttentionSpec(4, 4, 8, qk_norm="layer"), "qk_norm='layer' must be one of"),
        (lambda: AttentionSpec(4, 4, 8, window=0), "window=0"),
        (
            lambda: LatentAttentionSpec(4, None, 8, 4, 4, 4, 2, 8),
            "indexer_heads=2 and indexer_dim=8",
        ),
        (lambda: LatentAttentionSpec(4, 0, 8, 4, 4, 4), "q_rank=0"),
        (lambda: MoESpec(8, 9, 4), "top_k=9 must be above 0 and at most all experts=8"),
        (lambda: MoESpec(8, 0, 4), "top_k=0"),
        (lambda: MoESpec(8, 2, 4, shared_d_ff=4), "n_shared_experts=0 must be at least 1"),
        (
            lambda: MoESpec(8, 2, 4, n_constant_experts=1),
            "n_constant_experts=1 must be at most n_zero_experts=0",
        ),
        (lambda: MoESpec(8, 2, 4, latent_norm=True), "latent_dim=None must be given"),
        (lambda: DenseSpec(0), "d_ff=0"),
        (lambda: LayerSpec(AttentionSpec(4, 4, 8), ()), "mixers=.* must be a tuple of specs"),
        (lambda: ModelSpec(8, 8, ()), "layers=.* at least one LayerSpec"),
        (lambda: decoder().active("routed"), "convention='routed'"),
    ],
)
def test_a_wrong_part_is_refused_by_name_value_and_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
