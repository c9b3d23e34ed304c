"""Who else takes part in the layer bench, where it is installed."""

from torch import nn

from moe_core.layer import MixtureOfExperts

from ..interop import hf


def others(ours: MixtureOfExperts) -> dict[str, nn.Module]:
    """Hugging Face's Mixtral block with our weights, and st-moe-pytorch's layer."""
    return _hugging_face(ours) | _st_moe(ours)


def _hugging_face(ours: MixtureOfExperts) -> dict[str, nn.Module]:
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        return {}
    config, blocks = ours.config, {}
    for implementation in ("eager", "grouped_mm"):
        theirs = MixtralConfig(
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_local_experts=config.n_experts,
            num_experts_per_tok=config.top_k,
            router_jitter_noise=0.0,
        )
        theirs._experts_implementation = implementation
        block = MixtralSparseMoeBlock(theirs).to(
            ours.router.weight.device, ours.experts.down_proj.dtype
        )
        blocks[f"Hugging Face {implementation}"] = hf.to_block(ours, block)
    return blocks


def _st_moe(ours: MixtureOfExperts) -> dict[str, nn.Module]:
    """Its own weights, capacity and router; its experts as wide as ours.

    It takes two thirds of its multiplier.
    """
    try:
        from st_moe_pytorch import MoE
    except ImportError:
        return {}
    config = ours.config
    if config.top_k < 2:  # it always takes two or more
        return {}
    layer = MoE(
        dim=config.d_model,
        num_experts=config.n_experts,
        gating_top_n=config.top_k,
        expert_hidden_mult=1.5 * config.d_ff / config.d_model,
    )
    return {"st-moe-pytorch": layer.to(ours.router.weight.device, ours.experts.down_proj.dtype)}
