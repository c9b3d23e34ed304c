"""Memory against tensors: what AdamW holds, and what autograd keeps, to the byte."""

import pytest
import torch

from moe_core import LanguageModel, LMConfig
from moe_core.lm import next_token_loss
from moe_tools.accounting import (
    AttentionSpec,
    GatedDeltaNetSpec,
    LatentAttentionSpec,
    ModelSpec,
    MoESpec,
    Precision,
    activation_bytes_per_token,
    from_lm,
    kv_cache_bytes,
    kv_cache_bytes_per_token,
    state_memory,
)
from moe_tools.accounting.published import MODELS

from ..core.helpers import config

B, N, D, F, E, K, V, H = 2, 16, 32, 24, 4, 2, 50, 4


def lm_config(**moe) -> LMConfig:
    moe = config(**{"d_model": D, "d_ff": F, "n_experts": E, "top_k": K, **moe})
    return LMConfig(vocab_size=V, d_model=D, n_layers=3, n_heads=H, max_seq_len=N, moe=moe)


DENSE = LMConfig(vocab_size=V, d_model=D, n_layers=3, n_heads=H, max_seq_len=N, d_ff=F)


def loss_of(lm: LanguageModel) -> torch.Tensor:
    tokens = torch.randint(V, (B, N), generator=torch.Generator().manual_seed(0))
    return next_token_loss(lm(tokens)[0], tokens)


def saved_bytes(cfg: LMConfig, dtype=torch.float32) -> int:
    """Bytes that autograd keeps for the backward pass, every storage once, parameters and buffers apart."""
    lm, kept = LanguageModel(cfg).to(dtype), {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*lm.parameters(), *lm.buffers())}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = (
                tensor  # alive, so that no other tensor gets its place
            )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(lm)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def kept_beyond_the_formula(cfg: LMConfig, b: int = 4) -> int:
    """What our layers keep besides on a CPU, in bytes, name by name."""
    moe, n = cfg.moe, cfg.n_layers
    per_token = {
        "a norm's input, and that over its root mean square, both in float32": (2 * n + 1)
        * D
        * (4 + 4 - b),
        "queries and keys before rotation: v is a view of the same product": n * 2 * D * b,
        "the heads' output with heads and positions swapped back": n * D * b,
        "token ids": 8,
    }
    once = {
        "the loss has no target for the last position": -B * V * 4,
        "its weight, its targets and how many there are": 4 + 8 * B * (N - 1) + 8,
    }
    if moe:
        per_token["weights before they are renormalised, their sum, and that kept above 0"] = (
            n * (moe.top_k + 2) * 4
        )
        once["the router's weight in float32"] = n * E * D * 4 if b != 4 else 0
        if moe.backend == "fused":
            per_token["the shared experts are a plain MLP that computes nothing again"] = (
                n * moe.n_shared_experts * 2 * F * b
            )
            once["rows per expert, and of slots that are not kept"] = n * (E + 1) * 8
        if moe.backend == "grouped":
            once["where each expert's rows end"] = n * E * 4
    return B * N * sum(per_token.values()) + sum(once.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "moe", [{}, {"n_shared_experts": 2}, {"glu": False}, {"top_k": 3}], ids=str
)
@pytest.mark.parametrize(
    "backend, recompute", [("loop", "nothing"), ("grouped", "nothing"), ("fused", "activation")]
)
def test_activations_are_those_that_autograd_keeps(backend, recompute, moe, dtype):
    cfg, b = lm_config(backend=backend, **moe), dtype.itemsize
    formula = B * N * sum(activation_bytes_per_token(from_lm(cfg), b, recompute=recompute).values())
    assert saved_bytes(cfg, dtype) == formula + kept_beyond_the_formula(cfg, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_the_dense_model_are_those_that_autograd_keeps(dtype):
    formula = B * N * sum(activation_bytes_per_token(from_lm(DENSE), dtype.itemsize).values())
    assert saved_bytes(DENSE, dtype) == formula + kept_beyond_the_formula(DENSE, dtype.itemsize)


def test_recomputing_layers_keeps_their_inputs_and_one_whole_layer():
    spec = from_lm(lm_config())
    plain, again = (
        activation_bytes_per_token(spec),
        activation_bytes_per_token(spec, recompute="layer"),
    )
    assert again["layer inputs"] == 3 * D * 2
    assert 3 * again["one layer"] + again["norms"] + again["head"] == sum(plain.values())


def test_recomputing_the_activation_saves_half_of_a_gated_mlp():
    spec = from_lm(lm_config())
    saved = sum(activation_bytes_per_token(spec).values()) - sum(
        activation_bytes_per_token(spec, recompute="activation").values()
    )
    assert saved == 3 * K * 2 * F * 2


def test_adamw_holds_what_is_counted():
    lm = LanguageModel(lm_config())
    optimizer = torch.optim.AdamW(lm.parameters())
    loss_of(lm).backward()
    optimizer.step()
    moments = sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    )
    counted = state_memory(from_lm(lm.config), "float32")
    assert counted.weights == sum(p.nbytes for p in lm.parameters())
    assert counted.gradients == sum(p.grad.nbytes for p in lm.parameters())
    assert counted.optimizer == moments


def test_mixed_precision_costs_sixteen_bytes_a_parameter():
    spec = MODELS["mixtral-8x7b"]
    memory = state_memory(spec, "mixed")
    assert (memory.weights, memory.gradients, memory.optimizer) == (
        2 * spec.total_params,
        2 * spec.total_params,
        12 * spec.total_params,
    )
    assert memory.total == 16 * spec.total_params == state_memory(spec, "float32").total
    assert state_memory(spec, Precision(1, 2, 0, 4)).total == 7 * spec.total_params


def test_expert_parallelism_divides_the_experts_and_sharding_divides_by_their_holders():
    spec = MODELS["deepseek-v3"]
    experts, rest = spec.parts["experts"], spec.total_params - spec.parts["experts"]
    assert state_memory(spec, n_ranks=64, ep=64).weights == 2 * (experts / 64 + rest)
    assert state_memory(spec, n_ranks=128, ep=64).weights == 2 * (
        experts / 64 + rest
    )  # a second copy of everything
    sharded = state_memory(spec, n_ranks=128, ep=64, sharded="optimizer")
    # two ranks hold the same experts, all hold the rest
    assert sharded.optimizer == 12 * (experts / 64 / 2 + rest / 128)
    assert sharded.weights == sharded.gradients == 2 * (experts / 64 + rest)
    assert (
        state_memory(spec, n_ranks=128, ep=64, sharded="gradients").gradients
        == 2 * spec.total_params / 128
    )
    assert state_memory(spec, n_ranks=128, ep=64, sharded="gradients").weights == sharded.weights
    for ep in (1, 8, 128):  # whoever holds what, all ranks together hold each number once
        assert 128 * state_memory(
            spec, n_ranks=128, ep=ep, sharded="weights"
        ).total == pytest.approx(16 * spec.total_params, rel=1e-12)


def test_the_cache_of_published_models():
    assert kv_cache_bytes_per_token(MODELS["mixtral-8x7b"]) == 2 * 32 * 2 * 8 * 128  # 128 KiB
    assert kv_cache_bytes_per_token(MODELS["deepseek-v2"], 1) == 60 * (512 + 64)
    assert kv_cache_bytes(MODELS["deepseek-v3"], 4096) == 4096 * 2 * 61 * 576
    assert (
        kv_cache_bytes_per_token(MODELS["hunyuan-large"]) == 2 * 32 * 2 * 8 * 80
    )  # every second layer has none


def test_a_window_bounds_the_cache():
    full = 18 * 2 * 8 * 64 * 2
    spec = MODELS["gpt-oss-120b"]
    assert kv_cache_bytes_per_token(spec) == 2 * full
    assert (
        kv_cache_bytes(spec, 100) == 100 * 2 * full
        and kv_cache_bytes(spec, 1000) == (1000 + 128) * full
    )


def test_a_recurrent_mixer_keeps_a_state_and_nothing_per_token():
    delta = GatedDeltaNetSpec(2, 4, 8, 16, conv=4)
    spec = ModelSpec.decoder(
        d_model=8,
        vocab_size=5,
        n_layers=2,
        attention=[delta, AttentionSpec(2, 1, 4)],
        moe=MoESpec(2, 1, 4),
    )
    assert kv_cache_bytes_per_token(spec) == 2 * 2 * 4
    assert kv_cache_bytes(spec, 10) == 10 * 16 + 2 * (4 * 8 * 16 + 3 * (2 * 16 + 64))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: state_memory(MODELS["mixtral-8x7b"], n_ranks=16, ep=16),
            "ep=16 must be at most the experts of a layer=8",
        ),
        (
            lambda: state_memory(MODELS["mixtral-8x7b"], n_ranks=6, ep=4),
            "ep=4 must divide n_ranks=6",
        ),
        (
            lambda: state_memory(MODELS["mixtral-8x7b"], "bf16"),
            "precision='bf16' must be one of 'float32'",
        ),
        (
            lambda: state_memory(MODELS["mixtral-8x7b"], sharded="all"),
            "sharded='all' must be one of",
        ),
        (lambda: Precision(2, 2, -1, 8), "master=-1 must be at least 0"),
        (lambda: kv_cache_bytes(MODELS["switch-base-8"], 8), "n_encoder_layers=12 must be 0"),
        (lambda: kv_cache_bytes(MODELS["mixtral-8x7b"], -1), "seq_len=-1"),
        (
            lambda: activation_bytes_per_token(MODELS["switch-base-8"]),
            "n_encoder_layers=12 must be 0",
        ),
        (lambda: activation_bytes_per_token(MODELS["jamba-v0.1"]), "what MambaSpec keeps"),
        (
            lambda: activation_bytes_per_token(MODELS["mixtral-8x7b"], recompute="all"),
            "recompute='all' must be one of",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_latent_attention_keeps_less_in_the_cache_than_in_training():
    mla = LatentAttentionSpec(16, 24, 32, 8, 4, 8)
    # input, both latents before and after their norms, q, k, v, output
    assert mla.saved(64) == 64 + 2 * 24 + 2 * 32 + 2 * 16 * 12 + 2 * 16 * 8
    assert mla.cache() == 32 + 4
