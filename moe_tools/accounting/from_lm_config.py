"""From the config of our own language model to its spec."""

import torch

from moe_core.config import MoEConfig
from moe_core.lm import LMConfig

from .attention import AttentionSpec
from .feed_forward import DenseSpec, MoESpec
from .spec import ModelSpec


def from_lm(config: LMConfig) -> ModelSpec:
    """The spec of a ``moe_core.LanguageModel``, from its config."""
    moe = None if config.moe is None else moe_spec(config.moe)
    dense = None if config.moe is not None else DenseSpec(config.d_ff, config.glu)
    attention = AttentionSpec(config.n_heads, config.n_heads, config.d_model // config.n_heads)
    return ModelSpec.decoder(
        d_model=config.d_model,
        vocab_size=config.vocab_size,
        n_layers=config.n_layers,
        attention=attention,
        moe=moe,
        dense=dense,
        tied=True,
    )


def moe_spec(config: MoEConfig) -> MoESpec:
    """The spec of one MoE layer."""
    with torch.device("meta"):
        router = config.build_router()
    weights = list(router.parameters())
    return MoESpec(
        config.n_experts,
        config.top_k,
        config.d_ff,
        config.n_shared_experts,
        config.shared_d_ff,
        config.shared_gate,
        config.glu,
        config.bias,
        router_bias=any(w.ndim == 1 for w in weights),
        router_matrices=sum(w.ndim == 2 for w in weights),
        n_zero_experts=router.n_experts - config.n_experts,
        n_constant_experts=router.cheap_experts[2] if router.cheap_experts else 0,
    )
