"""FLOPs against what torch counts, and the dense models of equal size."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_core import LanguageModel, LMConfig
from moe_tools.accounting import (
    AttentionSpec,
    DenseSpec,
    Flops,
    LatentAttentionSpec,
    MambaSpec,
    ModelSpec,
    MoESpec,
    dense_of_equal_active,
    dense_of_equal_total,
    forward_flops,
    from_lm,
    training_flops,
)
from moe_tools.accounting.published import MODELS

from ..core.helpers import config

B, N = 3, 8
VARIANTS = [
    {},
    {"top_k": 1},
    {"n_shared_experts": 2, "shared_gate": True},
    {"bias": True},
    {"glu": False, "activation": "relu"},
    {"router": "noisy_topk"},
    {"router_options": {"bias": True}},
]


def lm_config(n_layers=2, **moe) -> LMConfig:
    return LMConfig(
        vocab_size=32,
        d_model=16,
        n_layers=n_layers,
        n_heads=2,
        max_seq_len=N,
        moe=config(d_model=16, d_ff=12, **moe),
    )


def products(flops: Flops) -> float:
    """What a counter of products can see: an expert's output is weighted where it is added up."""
    return B * N * (flops.matrices + flops.scores)


def counted(cfg: LMConfig, backward: bool = False) -> int:
    """What torch counts. Its counter sees the products inside attention only where attention is made of products."""
    tokens = torch.randint(32, (B, N), generator=torch.Generator().manual_seed(0))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = LanguageModel(cfg)(tokens)[0]
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("backend", ["loop", "fused"])
@pytest.mark.parametrize("moe", VARIANTS, ids=str)
def test_forward_flops_are_those_that_torch_counts(moe, backend):
    cfg = lm_config(backend=backend, **moe)
    flops = forward_flops(from_lm(cfg), N, causal=False)
    assert products(flops) == counted(cfg)
    assert flops.weighting == 2 * cfg.n_layers * cfg.moe.top_k * cfg.d_model
    dense = LMConfig(
        vocab_size=32, d_model=16, n_layers=2, n_heads=2, max_seq_len=N, d_ff=20, glu=cfg.moe.glu
    )
    assert B * N * forward_flops(from_lm(dense), N, causal=False).total == counted(dense)


@pytest.mark.parametrize("backend", ["loop", "fused"])
@pytest.mark.parametrize("moe", VARIANTS, ids=str)
def test_training_flops_are_those_that_torch_counts(moe, backend):
    cfg = lm_config(backend=backend, **moe)
    flops = training_flops(from_lm(cfg), N, causal=False)
    assert products(flops) == counted(cfg, backward=True)


def test_a_causal_token_pays_for_the_positions_it_sees():
    spec = from_lm(lm_config())
    pairs = sum(n + 1 for n in range(N))  # position n sees n + 1
    assert N * forward_flops(spec, N).scores == pairs * 2 * 4 * 16
    assert forward_flops(spec, N).matrices == forward_flops(spec, 1).matrices


@pytest.mark.parametrize("window", [1, 3, 8, 20])
def test_a_window_bounds_what_a_token_sees(window):
    spec = ModelSpec.decoder(
        d_model=8,
        vocab_size=5,
        n_layers=1,
        attention=AttentionSpec(2, 1, 4, window=window),
        moe=MoESpec(2, 1, 4),
    )
    seen = sum(min(n + 1, window) for n in range(N))
    assert N * forward_flops(spec, N).scores == pytest.approx(seen * 4 * 8, rel=1e-12)
    assert forward_flops(spec, N, causal=False).scores == min(N, window) * 4 * 8


def test_latent_attention_scores_by_hand():
    spec = ModelSpec.decoder(
        d_model=8,
        vocab_size=5,
        n_layers=1,
        attention=LatentAttentionSpec(2, 4, 4, 6, 2, 3),
        dense=DenseSpec(8),
    )
    assert forward_flops(spec, N, causal=False).scores == N * 2 * 2 * (6 + 2) + N * 2 * 2 * 3


def test_forward_is_about_twice_the_active_parameters_without_the_embedding():
    spec = MODELS["deepseekmoe-16b"]
    flops = forward_flops(spec, 4096)
    assert flops.matrices == pytest.approx(
        2 * spec.active_params_head, rel=1e-3
    )  # norms are the difference
    assert flops.total == flops.matrices + flops.scores + flops.weighting


def test_a_tied_head_is_multiplied_all_the_same():
    given = {
        "d_model": 8,
        "vocab_size": 50,
        "n_layers": 1,
        "attention": AttentionSpec(2, 2, 4),
        "dense": DenseSpec(8),
    }
    assert forward_flops(ModelSpec.decoder(tied=True, **given), N) == forward_flops(
        ModelSpec.decoder(**given), N
    )


@pytest.mark.parametrize(
    "name",
    [
        "mixtral-8x7b",
        "deepseek-v3",
        "olmoe-1b-7b",
        "gpt-oss-120b",
        "llama-4-maverick (text)",
        "longcat-flash",
    ],
)
def test_the_dense_equivalents_are_as_near_as_a_whole_width_can_be(name):
    spec = MODELS[name]
    n_moe = len(spec.moe_layers)
    for make, params in (
        (dense_of_equal_active, spec.active_params),
        (dense_of_equal_total, spec.total_params),
    ):
        d_ff, dense = make(spec)
        step = n_moe * (
            3 * spec.d_model + 2 * spec.moe_layers[0].bias
        )  # what one more unit of width adds
        assert abs(dense.total_params - params) <= step / 2
        assert (
            dense.moe_layers == ()
            and dense.parts["attention"] == spec.parts["attention"]
            and d_ff > 0
        )
        assert dense.active_params == dense.total_params


def test_the_dense_model_of_equal_active_parameters_by_hand():
    d_ff, dense = dense_of_equal_active(MODELS["mixtral-8x7b"])
    # two experts of 14336, and the router's 8 x 4096 numbers, which are 8/3 of a unit of width
    assert d_ff == 2 * 14336 + 3
    assert dense.total_params == MODELS["mixtral-8x7b"].active_params + 32 * (3 * 3 - 8) * 4096


def test_flops_that_are_not_known_are_refused():
    recurrent = ModelSpec.decoder(
        d_model=8, vocab_size=5, n_layers=1, attention=MambaSpec(16, 4, 4, 2), dense=DenseSpec(8)
    )
    with pytest.raises(ValueError, match="FLOPs of MambaSpec"):
        forward_flops(recurrent, N)
    with pytest.raises(ValueError, match="n_encoder_layers=12 must be 0"):
        forward_flops(MODELS["switch-base-8"], N)
    with pytest.raises(ValueError, match="seq_len=0"):
        forward_flops(MODELS["mixtral-8x7b"], 0)
    with pytest.raises(ValueError, match="no MoE layer"):
        dense_of_equal_total(recurrent)
