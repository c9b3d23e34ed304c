"""From a Hugging Face config to a ModelSpec: what each family's config leaves unsaid stands here.

A family is a function from the config's values to a spec. Only values are read: transformers is
never imported. Vision towers are left out, and so are blocks that predict further tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from .attention import AttentionSpec, LatentAttentionSpec, Mixer
from .feed_forward import DenseSpec, MoESpec
from .recurrent import GatedDeltaNetSpec, KimiDeltaSpec, LightningAttentionSpec, MambaSpec
from .spec import ModelSpec

_NEEDED = object()
# transformers 5 writes the second name where a released config.json has the first, or the other way
# round.
_ALIASES = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}


class _Values:
    """The values of a config, by name; its text model's where it has several."""

    def __init__(self, config):
        values = (
            config
            if isinstance(config, Mapping)
            else getattr(config, "to_dict", lambda: vars(config))()
        )
        self.values, self.model_type = values, values.get("model_type")
        if self.model_type not in SPEC_FAMILIES and isinstance(values.get("text_config"), Mapping):
            self.values, self.model_type = (
                values["text_config"],
                values["text_config"].get("model_type"),
            )

    def __call__(self, name: str, default: Any = _NEEDED) -> Any:
        value = self.values.get(name, self.values.get(_ALIASES.get(name)))
        if value is None and default is _NEEDED:
            raise ValueError(
                f"{name} is missing from this config of model_type={self.model_type!r}"
            )
        return default if value is None else value

    def head_dim(self) -> int:
        """Given, or what the heads share out."""
        return self("head_dim", self("hidden_size") // self("num_attention_heads"))


def _decoder(c: _Values, attention, moe: MoESpec, **model) -> ModelSpec:
    return ModelSpec.decoder(
        d_model=c("hidden_size"),
        vocab_size=c("vocab_size"),
        n_layers=c("num_hidden_layers"),
        attention=attention,
        moe=moe,
        tied=bool(c("tie_word_embeddings", False)),
        source=f"config of model_type {c.model_type}",
        **model,
    )


def _pattern(
    c: _Values, attention, moe: MoESpec, is_moe: list[bool], dense: DenseSpec, **model
) -> ModelSpec:
    """A decoder of which these layers are MoE; the list says it layer by layer."""
    spec = _decoder(c, attention, moe, **model)
    layers = tuple(
        layer if sparse else replace(layer, feed_forwards=(dense,))
        for layer, sparse in zip(spec.layers, is_moe, strict=True)
    )
    return replace(spec, layers=layers)


def _gqa(c: _Values, **options) -> AttentionSpec:
    heads = c("num_attention_heads")
    return AttentionSpec(heads, c("num_key_value_heads", heads), c.head_dim(), **options)


def _mla(c: _Values, **options) -> LatentAttentionSpec:
    return LatentAttentionSpec(
        c("num_attention_heads"),
        c("q_lora_rank", None),
        c("kv_lora_rank"),
        c("qk_nope_head_dim"),
        c("qk_rope_head_dim"),
        c("v_head_dim"),
        **options,
    )


def _demand(c: _Values, **values) -> None:
    """Raise ValueError where the config says otherwise: that variant is not known."""
    for name, value in values.items():
        if c(name, value) != value:
            raise ValueError(
                f"{name}={c(name)!r} must be {value!r}: model_type={c.model_type!r} is known "
                "only so"
            )


def _biased(c: _Values) -> dict:
    return {
        "qkv_bias": bool(c("attention_bias", False)),
        "out_bias": bool(c("attention_bias", False)),
    }


def _first_dense(c: _Values) -> list[bool]:
    """The leading layers are dense. Newer configs list the kind of every layer."""
    kinds = c("mlp_layer_types", None)
    if kinds is not None:
        return [kind == "sparse" for kind in kinds]
    return [i >= c("first_k_dense_replace", 0) for i in range(c("num_hidden_layers"))]


def _kinds(c: _Values, mixers: dict[str, Mixer]) -> list[Mixer]:
    """One mixer a layer, as ``layer_types`` names them."""
    unknown = sorted(set(c("layer_types")) - set(mixers))
    if unknown:
        raise ValueError(
            f"layer_types has {', '.join(unknown)}; model_type={c.model_type!r} is known with "
            f"{', '.join(mixers)}"
        )
    return [mixers[kind] for kind in c("layer_types")]


def _local(c: _Values, **options) -> MoESpec:
    return MoESpec(
        c("num_local_experts"), c("num_experts_per_tok"), c("intermediate_size"), **options
    )


def _mixtral(c):
    return _decoder(c, _gqa(c, **_biased(c)), _local(c))


def _olmoe(c):
    return _decoder(
        c,
        _gqa(c, qk_norm="full", **_biased(c)),
        MoESpec(c("num_experts"), c("num_experts_per_tok"), c("intermediate_size")),
    )


def _qwen_moe_layers(c) -> list[bool]:
    step, dense = c("decoder_sparse_step", 1), c("mlp_only_layers", [])
    return [i not in dense and (i + 1) % step == 0 for i in range(c("num_hidden_layers"))]


def _qwen2_moe(c):
    moe = MoESpec(
        c("num_experts"),
        c("num_experts_per_tok"),
        c("moe_intermediate_size"),
        1,
        c("shared_expert_intermediate_size"),
        True,
    )
    return _pattern(
        c,
        _gqa(c, qkv_bias=bool(c("qkv_bias", True))),
        moe,
        _qwen_moe_layers(c),
        DenseSpec(c("intermediate_size")),
    )


def _qwen3_moe(c):
    moe = MoESpec(c("num_experts"), c("num_experts_per_tok"), c("moe_intermediate_size"))
    return _pattern(
        c,
        _gqa(c, qk_norm="head", **_biased(c)),
        moe,
        _qwen_moe_layers(c),
        DenseSpec(c("intermediate_size")),
    )


def _qwen3_next(c):
    moe = MoESpec(
        c("num_experts"),
        c("num_experts_per_tok"),
        c("moe_intermediate_size"),
        1,
        c("shared_expert_intermediate_size"),
        True,
    )
    mixers = {
        "linear_attention": GatedDeltaNetSpec(
            c("linear_num_key_heads"),
            c("linear_num_value_heads"),
            c("linear_key_head_dim"),
            c("linear_value_head_dim"),
            c("linear_conv_kernel_dim"),
        ),
        "full_attention": _gqa(c, qk_norm="head", output_gate=True, **_biased(c)),
    }
    attention = _kinds(c, mixers)
    if c.model_type == "qwen3_next":
        return _pattern(c, attention, moe, _qwen_moe_layers(c), DenseSpec(c("intermediate_size")))
    return _decoder(c, attention, moe)


def _gpt_oss(c):
    full = _gqa(c, sinks=True, **_biased(c))
    attention = _kinds(
        c, {"full_attention": full, "sliding_attention": replace(full, window=c("sliding_window"))}
    )
    return _decoder(c, attention, _local(c, bias=True, router_bias=True))


def _llama4(c):
    moe = MoESpec(c("num_local_experts"), c("num_experts_per_tok"), c("intermediate_size"), 1)
    step = c("interleave_moe_layer_step")
    moe_layers = c("moe_layers", list(range(step - 1, c("num_hidden_layers"), step)))
    is_moe = [i in moe_layers for i in range(c("num_hidden_layers"))]
    return _pattern(c, _gqa(c, **_biased(c)), moe, is_moe, DenseSpec(c("intermediate_size_mlp")))


def _deepseek_moe(c) -> MoESpec:
    return MoESpec(
        c("n_routed_experts"),
        c("num_experts_per_tok"),
        c("moe_intermediate_size"),
        c("n_shared_experts", 0),
    )


def _deepseek(c):
    _demand(c, attention_bias=False, mlp_bias=False, moe_layer_freq=1)
    indexer = {}
    if c.model_type in ("deepseek_v32", "glm_moe_dsa"):
        _demand(c, indexer_types=["full"] * c("num_hidden_layers"))
        indexer = {"indexer_heads": c("index_n_heads"), "indexer_dim": c("index_head_dim")}
    spec = _pattern(
        c, _mla(c, **indexer), _deepseek_moe(c), _first_dense(c), DenseSpec(c("intermediate_size"))
    )
    if c.model_type == "axk1":  # a third norm behind every MoE
        spec = replace(
            spec,
            layers=tuple(
                replace(layer, n_norms=3) if layer.moes else layer for layer in spec.layers
            ),
        )
    return spec


def _glm4_moe(c):
    bias = bool(c("attention_bias", False))  # q, k and v alone
    attention = _gqa(c, qkv_bias=bias, qk_norm="head" if c("use_qk_norm", False) else None)
    return _pattern(
        c, attention, _deepseek_moe(c), _first_dense(c), DenseSpec(c("intermediate_size"))
    )


def _phimoe(c):
    return _decoder(
        c, _gqa(c, **_biased(c)), _local(c), norm="layer", head_bias=bool(c("lm_head_bias", False))
    )


def _ernie(c):
    _demand(c, use_bias=False)
    moe = MoESpec(
        c("moe_num_experts"), c("moe_k"), c("moe_intermediate_size"), c("moe_num_shared_experts", 0)
    )
    first, last, step = (
        c("moe_layer_start_index", 1),
        c("moe_layer_end_index", -1),
        c("moe_layer_interval", 1),
    )
    last = c("num_hidden_layers") - 1 if last == -1 else last
    is_moe = [first <= i <= last and (i + 1) % step == 0 for i in range(c("num_hidden_layers"))]
    return _pattern(c, _gqa(c), moe, is_moe, DenseSpec(c("intermediate_size")))


def _jamba(c):
    _demand(c, mamba_conv_bias=True, mamba_proj_bias=False)
    rank = -(-c("hidden_size") // 16) if c("mamba_dt_rank") == "auto" else c("mamba_dt_rank")
    mamba = MambaSpec(
        c("mamba_expand") * c("hidden_size"), c("mamba_d_state"), c("mamba_d_conv"), rank
    )
    mixers = [
        _gqa(c) if i % c("attn_layer_period") == c("attn_layer_offset") else mamba
        for i in range(c("num_hidden_layers"))
    ]
    is_moe = [
        i % c("expert_layer_period") == c("expert_layer_offset")
        for i in range(c("num_hidden_layers"))
    ]
    moe = MoESpec(c("num_experts"), c("num_experts_per_tok"), c("intermediate_size"))
    return _pattern(c, mixers, moe, is_moe, DenseSpec(c("intermediate_size")))


def _minimax(c):
    mixers = {
        "full_attention": _gqa(c),
        "linear_attention": LightningAttentionSpec(c("num_attention_heads"), c.head_dim()),
    }
    return _decoder(c, _kinds(c, mixers), _local(c))


def _kimi_linear(c):
    mixers = {
        "full_attention": _mla(c),
        "linear_attention": KimiDeltaSpec(
            c("linear_num_heads"), c("linear_head_dim"), c("linear_conv_kernel_dim")
        ),
    }
    moe = MoESpec(
        c("num_experts"),
        c("num_experts_per_token"),
        c("moe_intermediate_size"),
        c("num_shared_experts"),
    )
    return _pattern(c, _kinds(c, mixers), moe, _first_dense(c), DenseSpec(c("intermediate_size")))


# model_type -> family.
SPEC_FAMILIES: dict[str, Callable[[_Values], ModelSpec]] = {
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _qwen3_next,
    "qwen3_5_moe_text": _qwen3_next,
    "granitemoe": _mixtral,
    "gpt_oss": _gpt_oss,
    "llama4_text": _llama4,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
    "deepseek_v32": _deepseek,
    "glm_moe_dsa": _deepseek,
    "glm4_moe_lite": _deepseek,
    "axk1": _deepseek,
    "glm4_moe": _glm4_moe,
    "phimoe": _phimoe,
    "ernie4_5_moe": _ernie,
    "jamba": _jamba,
    "minimax": _minimax,
    "kimi_linear": _kimi_linear,
}


def from_hf(config) -> ModelSpec:
    """The spec of a Hugging Face config: an object of transformers, or the dict of a config.json.

    Raises:
        ValueError: its model_type is none of ``SPEC_FAMILIES``, or a value is missing or unknown.
    """
    values = _Values(config)
    if values.model_type not in SPEC_FAMILIES:
        raise ValueError(
            f"model_type={values.model_type!r} is no family that can be counted; those known are "
            f"{', '.join(SPEC_FAMILIES)}"
        )
    return SPEC_FAMILIES[values.model_type](values)
