"""Parameters counted from a config against the models that transformers builds from it, on the meta device: no memory, no download."""

import json
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import moe_core
from moe_tools.accounting import forward_flops, from_hf, kv_cache_bytes
from moe_tools.accounting.from_hf_config import SPEC_FAMILIES
from moe_tools.accounting.published import MODELS

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 77,
    "intermediate_size": 20,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LATENT = {
    "q_lora_rank": 9,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 14,
    "num_key_value_heads": 4,
}
ROUTED = {
    "moe_intermediate_size": 12,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 3,
    "n_group": 1,
    "topk_group": 1,
}
DEEPSEEK = {**LATENT, **ROUTED, "first_k_dense_replace": 2}
LOCAL = {"num_local_experts": 5, "num_experts_per_tok": 3}
QWEN = {
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 18,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "linear_conv_kernel_dim": 3,
}
HALF = ["linear_attention", "full_attention"] * 3
TIED = {"tie_word_embeddings": True}
# model_type -> module, config, model, and the small variants that are built
MODELLED = {
    "mixtral": ("mixtral", "MixtralConfig", "MixtralForCausalLM", [LOCAL, {**LOCAL, **TIED}]),
    "olmoe": (
        "olmoe",
        "OlmoeConfig",
        "OlmoeForCausalLM",
        [{**QWEN, "head_dim": 12}, {**QWEN, "head_dim": 12, "attention_bias": True}],
    ),
    "qwen2_moe": (
        "qwen2_moe",
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        [
            QWEN,
            {**QWEN, "decoder_sparse_step": 3, "qkv_bias": False},
            {**QWEN, "mlp_only_layers": [0, 4], **TIED},
        ],
    ),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        [
            QWEN,
            {**QWEN, "attention_bias": True, "decoder_sparse_step": 2},
            {**QWEN, "mlp_only_layers": [5], **TIED},
        ],
    ),
    "qwen3_next": (
        "qwen3_next",
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        [
            {**QWEN, **LINEAR, "layer_types": HALF},
            {**QWEN, **LINEAR, "layer_types": HALF, "mlp_only_layers": [1], "attention_bias": True},
        ],
    ),
    "qwen3_5_moe_text": (
        "qwen3_5_moe",
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        [{**QWEN, **LINEAR, "layer_types": HALF}],
    ),
    "granitemoe": (
        "granitemoe",
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        [{**LOCAL, "head_dim": 12}, {**LOCAL, **TIED, "head_dim": 12, "attention_bias": True}],
    ),
    "gpt_oss": ("gpt_oss", "GptOssConfig", "GptOssForCausalLM", [LOCAL, {**LOCAL, **TIED}]),
    "llama4_text": (
        "llama4",
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        [
            {**LOCAL, "intermediate_size_mlp": 25},
            {
                **LOCAL,
                "intermediate_size_mlp": 25,
                "interleave_moe_layer_step": 3,
                "attention_bias": True,
            },
        ],
    ),
    "deepseek_v2": (
        "deepseek_v2",
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        [DEEPSEEK, {**DEEPSEEK, "q_lora_rank": None}],
    ),
    "deepseek_v3": (
        "deepseek_v3",
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        [DEEPSEEK, {**DEEPSEEK, "q_lora_rank": None, **TIED}],
    ),
    "deepseek_v32": (
        "deepseek_v32",
        "DeepseekV32Config",
        "DeepseekV32ForCausalLM",
        [
            {
                **DEEPSEEK,
                "mlp_layer_types": ["dense"] + ["sparse"] * 5,
                "index_n_heads": 3,
                "index_head_dim": 16,
            }
        ],
    ),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        "GlmMoeDsaConfig",
        "GlmMoeDsaForCausalLM",
        [
            {
                **DEEPSEEK,
                "mlp_layer_types": ["dense"] + ["sparse"] * 5,
                "index_n_heads": 3,
                "index_head_dim": 16,
            }
        ],
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        "Glm4MoeLiteConfig",
        "Glm4MoeLiteForCausalLM",
        [{**DEEPSEEK, "mlp_layer_types": ["dense"] + ["sparse"] * 5}],
    ),
    "axk1": (
        "axk1",
        "AXK1Config",
        "AXK1ForCausalLM",
        [{**DEEPSEEK, "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4}],
    ),
    "glm4_moe": (
        "glm4_moe",
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        [
            {**ROUTED, "first_k_dense_replace": 2},
            {**ROUTED, "attention_bias": True, "use_qk_norm": True},
        ],
    ),
    "phimoe": (
        "phimoe",
        "PhimoeConfig",
        "PhimoeForCausalLM",
        [LOCAL, {**LOCAL, "attention_bias": True, "lm_head_bias": True}],
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        [
            {
                "moe_num_experts": 5,
                "moe_k": 2,
                "moe_intermediate_size": 12,
                "moe_num_shared_experts": 2,
                "head_dim": 12,
            },
            {
                "moe_num_experts": 5,
                "moe_k": 2,
                "moe_intermediate_size": 12,
                "moe_num_shared_experts": 0,
                "head_dim": 12,
                "moe_layer_start_index": 2,
                "moe_layer_end_index": 4,
            },
            {
                "moe_num_experts": 5,
                "moe_k": 2,
                "moe_intermediate_size": 12,
                "moe_layer_interval": 2,
                "head_dim": 12,
            },
        ],
    ),
    "jamba": (
        "jamba",
        "JambaConfig",
        "JambaForCausalLM",
        [
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "mamba_d_state": 5,
                "mamba_d_conv": 3,
                "mamba_expand": 3,
                "attn_layer_period": 3,
                "attn_layer_offset": 1,
                "expert_layer_period": 2,
                "expert_layer_offset": 0,
                "head_dim": 12,
            }
        ],
    ),
    "minimax": ("minimax", "MiniMaxConfig", "MiniMaxForCausalLM", [{**LOCAL, "layer_types": HALF}]),
    "kimi_linear": (
        "kimi_linear",
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        [
            {
                **DEEPSEEK,
                "q_lora_rank": None,
                "num_experts": 5,
                "num_experts_per_token": 2,
                "num_shared_experts": 2,
                "mlp_layer_types": ["dense"] + ["sparse"] * 5,
                "layer_types": HALF,
                "linear_num_heads": 3,
                "linear_head_dim": 8,
                "linear_conv_kernel_dim": 2,
            }
        ],
    ),
}
# transformers' default config is that of this model; of the others it is nobody's, or lacks a value.
RELEASED = {
    "mixtral": "mixtral-8x7b",
    "qwen2_moe": "qwen1.5-moe-a2.7b",
    "qwen3_next": "qwen3-next-80b-a3b",
    "qwen3_5_moe_text": "qwen3.5-35b-a3b (text)",
    "gpt_oss": "gpt-oss-120b",
    "llama4_text": "llama-4-scout (text)",
    "deepseek_v3": "deepseek-v3",
    "deepseek_v32": "deepseek-v3.2",
    "glm_moe_dsa": "glm-5",
    "glm4_moe_lite": "glm-4.7-flash",
    "axk1": "a.x-k1",
    "ernie4_5_moe": "ernie-4.5-21b-a3b",
    "jamba": "jamba-v0.1",
    "kimi_linear": "kimi-linear-48b-a3b",
}
# Released models whose numbers are not the default's: what their config.json says otherwise.
CHANGED = {
    "olmoe-1b-7b": ("olmoe", {"intermediate_size": 1024}),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {"num_hidden_layers": 48, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128},
    ),
    "granite-3-1b-a400m": (
        "granitemoe",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "intermediate_size": 512,
            "num_local_experts": 32,
            "num_experts_per_tok": 8,
            "vocab_size": 49155,
            **TIED,
        },
    ),
    "llama-4-maverick (text)": (
        "llama4_text",
        {"num_local_experts": 128, "interleave_moe_layer_step": 2},
    ),
    "phi-3.5-moe": ("phimoe", {"attention_bias": True, "lm_head_bias": True}),
    "glm-4.5-air": ("glm4_moe", {"head_dim": 128, "attention_bias": True}),
    "deepseek-v2": (
        "deepseek_v2",
        {
            "hidden_size": 5120,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "vocab_size": 102400,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
            "num_experts_per_tok": 6,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
        },
    ),
    "kimi-k2": (
        "deepseek_v3",
        {
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "vocab_size": 163840,
            "n_routed_experts": 384,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}


def hf_config(model_type: str, changes: dict):
    module, config = MODELLED[model_type][:2]
    return getattr(import_module(f"transformers.models.{module}.configuration_{module}"), config)(
        **changes
    )


def built(model_type: str, config):
    """transformers' own model, on whatever device is the default."""
    module, _, model = MODELLED[model_type][:3]
    return getattr(import_module(f"transformers.models.{module}.modeling_{module}"), model)(config)


def counted(model_type: str, config) -> int:
    """Parameters of transformers' own model. Its correction bias, which no gradient moves, is a parameter in ERNIE alone: not counted."""
    with torch.device("meta"):
        model = built(model_type, config)
    return sum(p.numel() for name, p in model.named_parameters() if "correction_bias" not in name)


def test_every_family_that_can_be_read_is_tested():
    assert set(MODELLED) | {"kimi_k2"} == set(
        SPEC_FAMILIES
    )  # kimi_k2 is DeepSeek-V3's class under another name


@pytest.mark.parametrize(
    "model_type, i", [(name, i) for name in MODELLED for i in range(len(MODELLED[name][3]))]
)
def test_a_small_model_of_every_family_has_the_parameters_counted(model_type, i):
    config = hf_config(model_type, {**SMALL, **MODELLED[model_type][3][i]})
    spec = from_hf(config)
    assert spec.total_params == counted(model_type, config)
    assert spec.n_layers == 6 and 0 < len(spec.moe_layers) <= 6
    assert (
        from_hf(json.loads(json.dumps(config.to_dict()))) == spec
    )  # as it stands in a config.json


@pytest.mark.parametrize("model_type", RELEASED)
def test_a_released_model_at_full_size_is_the_one_published(model_type):
    config = hf_config(model_type, {})
    spec = from_hf(config)
    assert (
        spec.total_params
        == counted(model_type, config)
        == MODELS[RELEASED[model_type]].total_params
    )
    assert spec.active_params == MODELS[RELEASED[model_type]].active_params


@pytest.mark.parametrize("name", CHANGED)
def test_a_released_model_whose_config_is_not_the_default(name):
    model_type, changes = CHANGED[name]
    config = hf_config(model_type, changes)
    spec = from_hf(config)
    assert spec.total_params == counted(model_type, config) == MODELS[name].total_params
    assert spec.active_params == MODELS[name].active_params


def drawn(model_type: str, config):
    """A small model with every parameter drawn at random: many are not initialised at all."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = built(model_type, config).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.1)
    return model


# Left out: Llama 4, whose block in transformers sends every token through every expert, and those whose mixers are not counted.
@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("mixtral", LOCAL),
        ("olmoe", {**QWEN, "head_dim": 12}),
        ("qwen2_moe", QWEN),
        ("qwen2_moe", {**QWEN, "decoder_sparse_step": 3}),
        ("qwen3_moe", QWEN),
        ("granitemoe", {**LOCAL, "head_dim": 12}),
        ("gpt_oss", LOCAL),
        ("deepseek_v2", DEEPSEEK),
        ("deepseek_v3", {**DEEPSEEK, "head_dim": 8}),
        ("glm4_moe_lite", DEEPSEEK),
        ("glm4_moe", ROUTED),
        ("ernie4_5_moe", MODELLED["ernie4_5_moe"][3][0]),
        ("phimoe", {**LOCAL, "num_experts_per_tok": 2}),
    ],
    ids=str,
)
def test_forward_flops_are_those_of_the_model_that_transformers_runs(model_type, changes):
    config = hf_config(model_type, {**SMALL, **changes})
    config._attn_implementation = config._experts_implementation = "eager"
    model, tokens = drawn(model_type, config), torch.arange(18).view(2, 9)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False)
    flops = forward_flops(from_hf(config), 9, causal=False)
    # it weights the experts' outputs with products of elements, which torch does not count
    assert 18 * (flops.matrices + flops.scores) == counter.get_total_flops()


@pytest.mark.parametrize(
    "model_type, changes",
    [("mixtral", LOCAL), ("qwen3_moe", QWEN), ("granitemoe", {**LOCAL, "head_dim": 12})],
)
def test_the_cache_is_the_one_that_transformers_fills(model_type, changes):
    config = hf_config(model_type, {**SMALL, **changes})
    with torch.no_grad():
        cache = drawn(model_type, config)(
            torch.arange(18).view(2, 9), use_cache=True
        ).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 2 * kv_cache_bytes(from_hf(config), 9, bytes_per_number=4)


def test_a_config_with_several_models_is_read_for_its_text():
    text = hf_config("llama4_text", {}).to_dict()
    assert from_hf({"model_type": "llama4", "text_config": text, "vision_config": {}}) == from_hf(
        text
    )


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"model_type": "llama"},
            "model_type='llama' is no family that can be counted; those known are mixtral, olmoe",
        ),
        ({}, "model_type=None"),
        (
            {"model_type": "mixtral", "num_local_experts": 8},
            "hidden_size is missing|num_attention_heads is missing",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        from_hf(config)


@pytest.mark.parametrize(
    "model_type, changes, message",
    [
        ("deepseek_v3", {"attention_bias": True}, "attention_bias=True must be False"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias=True must be False"),
        ("jamba", {"mamba_proj_bias": True}, "mamba_proj_bias=True must be False"),
        ("glm_moe_dsa", {"indexer_types": ["full", "shared"] * 39}, "indexer_types=.* must be"),
    ],
)
def test_a_variant_that_is_not_known_is_refused(model_type, changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf(hf_config(model_type, changes))


def test_reading_a_config_imports_no_transformers():
    code = (
        "import sys, moe_tools.accounting; moe_tools.accounting.from_hf({'model_type': 'mixtral', 'hidden_size': 8, 'vocab_size': 9, "
        "'num_hidden_layers': 1, 'num_attention_heads': 2, 'num_local_experts': 2, 'num_experts_per_tok': 1, 'intermediate_size': 4}); "
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=moe_core.__path__[0] + "/..",
    )
    assert done.stdout.strip() == "False"
