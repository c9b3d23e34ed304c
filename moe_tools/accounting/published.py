"""Published models: ``MODELS[name]`` is a spec, ``UNSUPPORTED[name]`` says why there is none.

Only the language model is counted: no vision tower, no block that predicts further tokens.
Correction biases of loss-free balancing are moved by hand, not learned, and do not count either
(but Kimi-K3's do, as in its source).

What its makers announced stands in ``ANNOUNCED`` and need not agree: they round, and mean different
things by "active".
"""

from dataclasses import replace
from typing import NoReturn

from . import (
    AttentionSpec,
    DenseSpec,
    GatedDeltaNetSpec,
    KimiDeltaSpec,
    LatentAttentionSpec,
    LayerSpec,
    LightningAttentionSpec,
    MambaSpec,
    ModelSpec,
    MoESpec,
)

GQA, MLA = AttentionSpec, LatentAttentionSpec


class _Models(dict):
    """A dict that says why a model is not in it."""

    def __missing__(self, name) -> NoReturn:
        if name in UNSUPPORTED:
            raise KeyError(f"{name!r} has no ModelSpec: {UNSUPPORTED[name]}")
        raise KeyError(f"{name!r} is not among the published models: {', '.join(self)}")


def _model(
    source: str, layers: int, d_model: int, vocab_size: int, attention, moe: MoESpec, **model
) -> ModelSpec:
    return ModelSpec.decoder(
        n_layers=layers,
        d_model=d_model,
        vocab_size=vocab_size,
        attention=attention,
        moe=moe,
        source=source,
        **model,
    )


def _hybrid(layers: int, every: int, others, attention) -> list:
    """One layer in ``every`` has this attention, the others have the other mixer."""
    return [attention if (i + 1) % every == 0 else others for i in range(layers)]


def _switch(
    source: str,
    n_layers: int,
    d_model: int,
    n_heads: int,
    n_experts: int,
    d_ff: int,
    *,
    every: int = 2,
    glu: bool = False,
    tied: bool = True,
) -> ModelSpec:
    """T5 with every ``every``-th layer MoE, encoder and decoder; 32 relative-position buckets."""
    moe, dense = MoESpec(n_experts, 1, d_ff, glu=glu), DenseSpec(d_ff, glu=glu)
    attention = GQA(n_heads, n_heads, 64)
    layers = []
    for cross in (
        (),
        (attention,),
    ):  # the decoder's layers also look at the encoder, with a norm of its own
        for i in range(n_layers):
            own = replace(
                attention, position_buckets=32 if i == 0 else 0
            )  # the first layer's table serves all
            feed_forward = moe if (i + 1) % every == 0 else dense
            layers.append(LayerSpec((own, *cross), (feed_forward,), n_norms=2 + len(cross)))
    return ModelSpec(
        d_model,
        32128,
        tuple(layers),
        tied=tied,
        n_final_norms=2,
        n_encoder_layers=n_layers,
        source=source,
    )


def _longcat() -> ModelSpec:
    """Shortcut-connected: two attentions and two dense MLPs a layer, one MoE beside them."""
    mla, dense, moe = (
        MLA(64, 1536, 512, 128, 64, 128),
        DenseSpec(12288),
        MoESpec(512, 12, 2048, n_zero_experts=256),
    )
    layer = LayerSpec((mla, mla), (dense, dense, moe), n_norms=4)
    return ModelSpec(
        6144,
        131072,
        (layer,) * 28,
        source="transformers, LongcatFlashConfig; README: 560B, about 27B active on average",
    )


def _ax_k1() -> ModelSpec:
    """DeepSeek-V3's shape, with a third norm behind every MoE."""
    spec = _model(
        "transformers, AXK1Config",
        61,
        7168,
        163840,
        MLA(64, 1536, 512, 128, 64, 128),
        MoESpec(192, 8, 2048, 1),
        n_dense_layers=1,
        dense=DenseSpec(18432),
    )
    return replace(
        spec,
        layers=tuple(replace(layer, n_norms=3) if layer.moes else layer for layer in spec.layers),
    )


def _kimi_k3() -> ModelSpec:
    """Every fourth layer and the last are MLA; 4 vectors of residual attention a layer.

    Its source counts the router's correction bias as parameters, so here they are.
    """
    kda, mla = (
        KimiDeltaSpec(96, 128, full_rank_gate=True),
        MLA(96, 1536, 512, 128, 64, 128, output_gate=True),
    )
    moe = MoESpec(896, 16, 3072, 2, router_bias=True, latent_dim=3584, latent_norm=True)
    source = (
        "NeMo-Automodel's test of the released config.json; Megatron-Bridge, kimi_k3_layers.py; "
        "head sizes of MLA and the residual attention are assumed"
    )
    return _model(
        source,
        93,
        7168,
        163840,
        [*_hybrid(92, 4, kda, mla), mla],
        moe,
        n_dense_layers=1,
        dense=DenseSpec(33792),
        n_norms=6,
    )


_DEEPSEEK = MLA(128, 1536, 512, 128, 64, 128)
_QWEN3_NEXT = GatedDeltaNetSpec(16, 32, 128, 128)
_SWITCH = "flaxformer, switch_*.gin; arXiv 2101.03961"
_ET = (
    "arXiv 2603.11535, Table 5, and the official code's model_base.py (multi-head attention, norms "
    "without parameters)"
)

MODELS: dict[str, ModelSpec] = _Models(
    {
        "mixtral-8x7b": _model(
            "transformers, MixtralConfig; arXiv 2401.04088",
            32,
            4096,
            32000,
            GQA(32, 8, 128),
            MoESpec(8, 2, 14336),
        ),
        "deepseekmoe-16b": _model(
            "deepseek-moe-16b-base's config; README of DeepSeekMoE",
            28,
            2048,
            102400,
            GQA(16, 16, 128),
            MoESpec(64, 6, 1408, 2),
            n_dense_layers=1,
            dense=DenseSpec(10944),
        ),
        "deepseek-v2": _model(
            "DeepSeek-V3 repository, inference/configs/config_236B.json",
            60,
            5120,
            102400,
            _DEEPSEEK,
            MoESpec(160, 6, 1536, 2),
            n_dense_layers=1,
            dense=DenseSpec(12288),
        ),
        "deepseek-v3": _model(
            "DeepSeek-V3 repository, inference/configs/config_671B.json, README_WEIGHTS.md",
            61,
            7168,
            129280,
            _DEEPSEEK,
            MoESpec(256, 8, 2048, 1),
            n_dense_layers=3,
            dense=DenseSpec(18432),
        ),
        "kimi-k2": _model(
            "MaxText, kimi-k2-1t.yml; README of Kimi-K2",
            61,
            7168,
            163840,
            replace(_DEEPSEEK, n_heads=64),
            MoESpec(384, 8, 2048, 1),
            n_dense_layers=1,
            dense=DenseSpec(18432),
        ),
        "qwen1.5-moe-a2.7b": _model(
            "transformers, Qwen2MoeConfig",
            24,
            2048,
            151936,
            GQA(16, 16, 128, qkv_bias=True),
            MoESpec(60, 4, 1408, 4, shared_gate=True),
        ),
        "qwen3-30b-a3b": _model(
            "MaxText, qwen3-30b-a3b.yml",
            48,
            2048,
            151936,
            GQA(32, 4, 128, qk_norm="head"),
            MoESpec(128, 8, 768),
        ),
        "qwen3-next-80b-a3b": _model(
            "transformers, Qwen3NextConfig; model card",
            48,
            2048,
            151936,
            _hybrid(48, 4, _QWEN3_NEXT, GQA(16, 2, 256, qk_norm="head", output_gate=True)),
            MoESpec(512, 10, 512, 1, shared_gate=True),
        ),
        "olmoe-1b-7b": _model(
            "OLMoE-1B-7B-0924.yml; arXiv 2409.02060",
            16,
            2048,
            50304,
            GQA(16, 16, 128, qk_norm="full"),
            MoESpec(64, 8, 1024),
        ),
        "dbrx": _model(
            "databricks/dbrx, model/config.json",
            40,
            6144,
            100352,
            GQA(48, 8, 128),
            MoESpec(16, 4, 10752),
        ),
        "grok-1": _model(
            "xai-org/grok-1, run.py and model.py",
            64,
            6144,
            131072,
            GQA(48, 8, 128),
            MoESpec(8, 2, 32768),
            n_norms=4,
            tied=True,
        ),
        "gpt-oss-120b": _model(
            "openai/gpt-oss, torch/model.py; transformers, GptOssConfig",
            36,
            2880,
            201088,
            _hybrid(
                36,
                2,
                GQA(64, 8, 64, qkv_bias=True, out_bias=True, sinks=True, window=128),
                GQA(64, 8, 64, qkv_bias=True, out_bias=True, sinks=True),
            ),
            MoESpec(128, 4, 2880, bias=True, router_bias=True),
        ),
        "llama-4-scout (text)": _model(
            "transformers, Llama4TextConfig",
            48,
            5120,
            202048,
            GQA(40, 8, 128),
            MoESpec(16, 1, 8192, 1),
        ),
        "llama-4-maverick (text)": _model(
            "MaxText, llama4-17b-128e.yml",
            48,
            5120,
            202048,
            GQA(40, 8, 128),
            MoESpec(128, 1, 8192, 1),
            moe_every=2,
            dense=DenseSpec(16384),
        ),
        "glm-4.5-air": _model(
            "slime, glm4.5-106B-A12B.sh; README of GLM-4.5",
            46,
            4096,
            151552,
            GQA(96, 8, 128, qkv_bias=True),
            MoESpec(128, 8, 1408, 1),
            n_dense_layers=1,
            dense=DenseSpec(10944),
        ),
        "minimax-text-01": _model(
            "model card; transformers, MiniMaxConfig for the layers' shapes",
            80,
            6144,
            200064,
            _hybrid(80, 8, LightningAttentionSpec(64, 128), GQA(64, 8, 128)),
            MoESpec(32, 2, 9216),
        ),
        "granite-3-1b-a400m": _model(
            "model card of Granite 3.1",
            24,
            1024,
            49155,
            GQA(16, 8, 64),
            MoESpec(32, 8, 512),
            tied=True,
        ),
        "phi-3.5-moe": _model(
            "transformers, PhimoeConfig; README of GRIN-MoE",
            32,
            4096,
            32064,
            GQA(32, 8, 128, qkv_bias=True, out_bias=True),
            MoESpec(16, 2, 6400),
            norm="layer",
            head_bias=True,
        ),
        "jamba-v0.1": _model(
            "transformers, JambaConfig",
            32,
            4096,
            65536,
            _hybrid(32, 8, MambaSpec(8192, 16, 4, 256), GQA(32, 8, 128)),
            MoESpec(16, 2, 14336),
            moe_every=2,
            dense=DenseSpec(14336),
        ),
        "arctic": _model(
            "README: 10B dense and 128 x 3.66B, top-2",
            35,
            7168,
            32000,
            GQA(56, 8, 128),
            MoESpec(128, 2, 4864, 1, 7168),
            n_norms=3,
        ),  # the dense MLP beside the experts counts as shared
        "hunyuan-large": _model(
            "README; sizes from a unit test of ATB-LLM",
            64,
            6400,
            129024,
            _hybrid(
                64,
                2,
                GQA(80, 8, 80, qk_norm="head"),
                GQA(80, 8, 80, qk_norm="head", shared_kv=True),
            ),
            MoESpec(16, 1, 18304, 1),
            tied=True,
        ),
        "ernie-4.5-21b-a3b": _model(
            "transformers, Ernie4_5_MoeConfig; model card",
            28,
            2560,
            103424,
            GQA(20, 4, 128),
            MoESpec(64, 6, 1536, 2),
            n_dense_layers=1,
            dense=DenseSpec(12288),
            tied=True,
        ),
        "ernie-4.5-300b-a47b": _model(
            "model card; widths not confirmed by a primary text",
            54,
            8192,
            103424,
            GQA(64, 8, 128),
            MoESpec(64, 8, 3584),
            n_dense_layers=3,
            dense=DenseSpec(28672),
        ),
        "longcat-flash": _longcat(),
        "qwen3.5-35b-a3b (text)": _model(
            "transformers, Qwen3_5MoeTextConfig; MaxText, qwen3.5-35b-a3b.yml",
            40,
            2048,
            248320,
            _hybrid(40, 4, _QWEN3_NEXT, GQA(16, 2, 256, qk_norm="head", output_gate=True)),
            MoESpec(256, 8, 512, 1, shared_gate=True),
        ),
        "qwen3.5-397b-a17b (text)": _model(
            "MaxText, qwen3.5-397b-a17b.yml",
            60,
            4096,
            248320,
            _hybrid(
                60,
                4,
                replace(_QWEN3_NEXT, n_v_heads=64),
                GQA(32, 2, 256, qk_norm="head", output_gate=True),
            ),
            MoESpec(512, 10, 1024, 1, shared_gate=True),
        ),
        "glm-4.7-flash": _model(
            "transformers, Glm4MoeLiteConfig",
            47,
            2048,
            154880,
            MLA(20, 768, 512, 192, 64, 256),
            MoESpec(64, 4, 1536, 1),
            n_dense_layers=1,
            dense=DenseSpec(10240),
        ),
        **{
            f"switch-base-{E}": _switch(_SWITCH, 12, 768, 12, E, 3072)
            for E in (8, 16, 32, 64, 128, 256)
        },
        "switch-large-128": _switch(_SWITCH, 24, 1024, 16, 128, 4096),
        "switch-xxl": _switch(
            _SWITCH + " (128 experts; a table of the paper prints 64)",
            24,
            4096,
            64,
            128,
            10240,
            glu=True,
            tied=False,
        ),
        "switch-c": _switch(_SWITCH, 15, 2080, 30, 2048, 6144, every=1, tied=False),
        "deepseek-v3.2": _model(
            "transformers, DeepseekV32Config",
            61,
            7168,
            129280,
            replace(_DEEPSEEK, indexer_heads=64, indexer_dim=128),
            MoESpec(256, 8, 2048, 1),
            n_dense_layers=3,
            dense=DenseSpec(18432),
        ),
        "glm-5": _model(
            "transformers, GlmMoeDsaConfig",
            78,
            6144,
            154880,
            MLA(64, 2048, 512, 192, 64, 256, 32, 128),
            MoESpec(256, 8, 2048, 1),
            n_dense_layers=3,
            dense=DenseSpec(12288),
        ),
        "kimi-linear-48b-a3b": _model(
            "transformers, KimiLinearConfig",
            27,
            2304,
            163840,
            [
                (
                    MLA(32, None, 512, 128, 64, 128)
                    if i in (3, 7, 11, 15, 19, 26)
                    else KimiDeltaSpec(32, 128)
                )
                for i in range(27)
            ],
            MoESpec(256, 8, 1024, 1),
            n_dense_layers=1,
            dense=DenseSpec(9216),
        ),
        "a.x-k1": _ax_k1(),
        "ling-flash-2.0 (= ring-flash)": _model(
            "Megatron-Bridge's documentation; sizes not confirmed by a primary text",
            32,
            4096,
            157184,
            GQA(32, 4, 128, qk_norm="head"),
            MoESpec(256, 8, 1024, 1),
            n_dense_layers=1,
            dense=DenseSpec(9216),
        ),
        "ling-1t (= ring-1t)": _model(
            "sizes not confirmed by a primary text",
            80,
            8192,
            157184,
            GQA(64, 8, 128, qk_norm="head"),
            MoESpec(256, 8, 2048, 1),
            n_dense_layers=4,
            dense=DenseSpec(18432),
        ),
        "et-d12 (2603.11535)": _model(
            _ET,
            12,
            768,
            65536,
            GQA(6, 6, 128),
            MoESpec(16, 1, 1536, 1, glu=False),
            n_dense_layers=1,
            dense=DenseSpec(3072, glu=False),
            norm="none",
        ),
        "et-d20 (2603.11535)": _model(
            _ET,
            20,
            1280,
            65536,
            GQA(10, 10, 128),
            MoESpec(16, 1, 2560, 1, glu=False),
            n_dense_layers=1,
            dense=DenseSpec(5120, glu=False),
            norm="none",
        ),
        "kimi-k3 (text)": _kimi_k3(),
    }
)

UNSUPPORTED: dict[str, str] = {
    "deepseek-v4-flash": (
        "its layers compress past keys and values and mix several residual streams "
        "(hyper-connections); no spec here has such parts"
    ),
    "inkling (text)": (
        "its layers have short convolutions on keys, values and both residual branches, and "
        "projections of relative positions; no spec here has such parts"
    ),
}

# Billions of total and active parameters as papers, model cards and READMEs print them (for a few,
# a framework's documentation); None where we have seen no figure.
ANNOUNCED: dict[str, tuple[float | None, float | None]] = {
    "mixtral-8x7b": (46.7, 12.9),
    "deepseekmoe-16b": (16.4, None),
    "deepseek-v2": (236, 21),
    "deepseek-v3": (671, 36.7),
    "kimi-k2": (1000, 32),
    "qwen3-next-80b-a3b": (80, 3),
    "olmoe-1b-7b": (6.9, 1.3),
    "dbrx": (132, 36),
    "grok-1": (314, None),
    "gpt-oss-120b": (117, 5.1),
    "glm-4.5-air": (106, 12),
    "minimax-text-01": (456, 45.9),
    "granite-3-1b-a400m": (1.3, 0.4),
    "phi-3.5-moe": (None, 6.6),
    "arctic": (480, 17),
    "hunyuan-large": (389, 52),
    "ernie-4.5-21b-a3b": (21, 3),
    "ernie-4.5-300b-a47b": (300, 47),
    "longcat-flash": (560, 27),
    "qwen3.5-35b-a3b (text)": (35, 3),
    "qwen3.5-397b-a17b (text)": (397, 17),
    "glm-4.7-flash": (30, 3),
    "deepseek-v3.2": (671, 37),
    "deepseek-v4-flash": (284, 13),
    "glm-5": (744, 40),
    "kimi-linear-48b-a3b": (48, 3),
    "inkling (text)": (975, 41),
    "ling-flash-2.0 (= ring-flash)": (100, 6.1),
    "et-d12 (2603.11535)": (0.575, 0.195),
    "et-d20 (2603.11535)": (2.43, 0.561),
    "kimi-k3 (text)": (2800, 104.2),
}
