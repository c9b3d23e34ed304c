"""Counting a model before it exists: parameters, FLOPs, memory, bytes on the wire.

``ModelSpec`` is a model in numbers; everything else is a function of one. Published models:
``moe_core.published.MODELS``.
"""

from .activation_bytes import activation_bytes_per_token
from .attention import AttentionSpec, LatentAttentionSpec, Mixer
from .communication import AllToAll, all_to_alls
from .dense_equivalent import DenseEquivalent, dense_of_equal_active, dense_of_equal_total
from .feed_forward import DenseSpec, MoESpec
from .flops import Flops, forward_flops, training_flops
from .from_hf_config import from_hf
from .from_lm_config import from_lm
from .model_memory import (
    PRECISIONS,
    Precision,
    StateMemory,
    kv_cache_bytes,
    kv_cache_bytes_per_token,
    state_memory,
)
from .recurrent import GatedDeltaNetSpec, KimiDeltaSpec, LightningAttentionSpec, MambaSpec
from .roofline import (
    ACCELERATORS,
    Accelerator,
    attainable_flops,
    distinct_experts,
    expert_roofline,
    intensity,
    tokens_per_expert,
    tokens_to_reach,
)
from .spec import LayerSpec, ModelSpec

__all__ = [
    "ACCELERATORS",
    "Accelerator",
    "AllToAll",
    "AttentionSpec",
    "DenseEquivalent",
    "DenseSpec",
    "Flops",
    "GatedDeltaNetSpec",
    "KimiDeltaSpec",
    "LatentAttentionSpec",
    "LayerSpec",
    "LightningAttentionSpec",
    "MambaSpec",
    "Mixer",
    "MoESpec",
    "ModelSpec",
    "PRECISIONS",
    "Precision",
    "StateMemory",
    "activation_bytes_per_token",
    "all_to_alls",
    "attainable_flops",
    "dense_of_equal_active",
    "dense_of_equal_total",
    "distinct_experts",
    "expert_roofline",
    "forward_flops",
    "from_hf",
    "from_lm",
    "intensity",
    "kv_cache_bytes",
    "kv_cache_bytes_per_token",
    "state_memory",
    "tokens_per_expert",
    "tokens_to_reach",
    "training_flops",
]
