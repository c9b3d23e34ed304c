"""Counting a model before it exists: parameters, FLOPs, memory, bytes on the wire.

``ModelSpec`` is a model in numbers; everything else is a function of one. Published models: ``moe_core.published.MODELS``.
"""

from .attention import AttentionSpec, LatentAttentionSpec, Mixer
from .feed_forward import DenseSpec, MoESpec
from .recurrent import GatedDeltaNetSpec, KimiDeltaSpec, LightningAttentionSpec, MambaSpec
from .spec import LayerSpec, ModelSpec

__all__ = [
    "AttentionSpec", "DenseSpec", "GatedDeltaNetSpec", "KimiDeltaSpec", "LatentAttentionSpec", "LayerSpec", "LightningAttentionSpec",
    "MambaSpec", "Mixer", "MoESpec", "ModelSpec",
]
