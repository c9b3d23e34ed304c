"""The Hugging Face blocks we can read: their options in our words, and their weights.

A family is a row of ``FAMILIES``. How its router scores, selects and weighs stands in
``moe_core.routers.presets`` and nowhere else; here it gets the numbers of the config at hand.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from moe_core.capacity import CapacityRule
from moe_core.config import MoEConfig
from moe_core.routers.presets import PRESETS
from moe_core.routing import Routing

from .layouts import (
    Layout,
    concatenated,
    interleaved,
    interleaved_and_transposed,
    same,
    stacked,
    transposed,
)

# Their names of an activation -> ours. "gelu" is the exact one; gelu_new and its like are others.
HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "quick_gelu": "quick_gelu",
}


def _routing(preset: str, **changes) -> dict:
    """The router's fields of MoEConfig: the preset's options, with this config's numbers."""
    options = {**PRESETS[preset].options, **changes}
    fields = {
        name: options.pop(name)
        for name in ("norm_topk_prob", "capacity_factor", "jitter_noise")
        if name in options
    }
    return {**fields, "router_options": options}


def _sizes(config, d_ff: str, n_experts: str) -> dict:
    return {
        "d_model": config.hidden_size,
        "d_ff": getattr(config, d_ff),
        "n_experts": getattr(config, n_experts),
        "top_k": config.num_experts_per_tok,
        "activation": HF_ACTIVATIONS[config.hidden_act],
    }


def _mixtral(config, gate) -> dict:
    return {**_sizes(config, "intermediate_size", "num_local_experts"), **_routing("mixtral")}


def _olmoe(config, gate) -> dict:
    return {
        **_sizes(config, "intermediate_size", "num_experts"),
        **_routing("olmoe", norm_topk_prob=config.norm_topk_prob),
    }


def _qwen2_moe(config, gate) -> dict:
    shared = {
        "n_shared_experts": 1,
        "shared_d_ff": config.shared_expert_intermediate_size,
        "shared_gate": True,
    }
    return {
        **_sizes(config, "moe_intermediate_size", "num_experts"),
        **shared,
        **_routing("qwen2_moe", norm_topk_prob=config.norm_topk_prob),
    }


def _qwen3_moe(config, gate) -> dict:
    return {
        **_sizes(config, "moe_intermediate_size", "num_experts"),
        **_routing("qwen3_moe", norm_topk_prob=config.norm_topk_prob),
    }


def _granite(config, gate) -> dict:
    return {**_sizes(config, "intermediate_size", "num_local_experts"), **_routing("granite")}


def _gpt_oss(
    config, gate
) -> dict:  # its activation is written out in the block, hidden_act is not read
    experts = {
        "activation": "quick_gelu",
        "glu_limit": config.swiglu_limit,
        "up_offset": 1.0,
        "bias": True,
    }
    return {
        **_sizes(config, "intermediate_size", "num_local_experts"),
        **experts,
        **_routing("gpt_oss"),
    }


def _llama4(config, gate) -> dict:
    return {
        **_sizes(config, "intermediate_size", "num_local_experts"),
        "n_shared_experts": 1,
        **_routing("llama4"),
    }


def _deepseek_v2(config, gate) -> dict:
    groups = (
        {}
        if config.topk_method == "greedy"
        else {"n_groups": config.n_group, "topk_groups": config.topk_group}
    )
    return {
        **_sizes(config, "moe_intermediate_size", "n_routed_experts"),
        "n_shared_experts": config.n_shared_experts,
        **_routing("deepseek_v2", routed_scaling_factor=config.routed_scaling_factor, **groups),
    }


def _deepseek_v3(config, gate) -> dict:
    options = {
        "norm_topk_prob": config.norm_topk_prob,
        "routed_scaling_factor": config.routed_scaling_factor,
        "n_groups": config.n_group,
        "topk_groups": config.topk_group,
    }
    return {
        **_sizes(config, "moe_intermediate_size", "n_routed_experts"),
        "n_shared_experts": config.n_shared_experts,
        **_routing("deepseek_v3", **options),
    }


def _deepseek_v4(config, gate) -> dict:
    sizes = _sizes(config, "moe_intermediate_size", "n_routed_experts")
    routing = _routing("deepseek_v4", routed_scaling_factor=config.routed_scaling_factor)
    if hasattr(gate, "tid2eid"):  # the first layers look the experts up by token id
        options = {
            name: routing["router_options"][name]
            for name in ("score_func", "norm_eps", "routed_scaling_factor")
        }
        routing = {
            "router": "hash",
            "router_options": {**options, "weights": "learned", "vocab_size": config.vocab_size},
        }
    return {**sizes, "n_shared_experts": 1, "glu_limit": config.swiglu_limit, **routing}


def _switch(config, gate) -> dict:
    capacity = CapacityRule(expert_capacity=config.expert_capacity, scope="sequence")
    return {
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "n_experts": config.num_experts,
        "top_k": 1,
        "glu": False,
        "activation": HF_ACTIVATIONS[config.dense_act_fn],
        "dropout": config.dropout_rate,
        **_routing(
            "switch",
            capacity_factor=capacity,
            jitter_noise=config.router_jitter_noise,
            bias=config.router_bias,
        ),
    }


def _flat(values: Tensor) -> Tensor:
    """(B, N, ...) -> (T, ...)"""
    return values.flatten(0, 1)


def _gated_mlp(name: str) -> dict[str, Layout]:
    return {
        "shared_experts.gate_up_proj.weight": concatenated(
            f"{name}.gate_proj.weight", f"{name}.up_proj.weight"
        ),
        "shared_experts.down_proj.weight": same(f"{name}.down_proj.weight"),
    }


BANK = {
    "experts.gate_up_proj": same("experts.gate_up_proj"),
    "experts.down_proj": same("experts.down_proj"),
}
BANK_TRANSPOSED = {
    "experts.gate_up_proj": transposed("experts.gate_up_proj"),
    "experts.down_proj": transposed("experts.down_proj"),
}


@dataclass(frozen=True)
class Family:
    """One kind of block.

    Attributes:
        options: (their config, the block's router) -> the fields of ``MoEConfig``.
        layouts: name of a weight of ours -> how it lies there. A weight that this block's variant
            does not have (a bias, a table) is left out.
        gate: the name of the block's router.
        demands: option of their config -> the values under which their block does what ours does.
        returns: (y (B, N, D), routing) -> what the block's forward returns.
        logits_at: where the logits stand in what the block's router returns: there transformers
            looks for them.
        flat_logits: whether they are (T, E) there, or (B, N, E).
    """

    options: Callable[[Any, nn.Module], dict]
    layouts: dict[str, Layout]
    gate: str = "gate"
    demands: dict[str, tuple] = field(default_factory=dict)
    returns: Callable[[Tensor, Routing], Any] = lambda y, routing: y
    logits_at: int = 0
    flat_logits: bool = True


# The class of the block -> its family.
FAMILIES: dict[str, Family] = {
    "MixtralSparseMoeBlock": Family(
        _mixtral,
        {"router.weight": same("gate.weight"), **BANK},
        demands={
            "router_jitter_noise": (0.0,)
        },  # their experts see the noise too, ours only the router
    ),
    "OlmoeSparseMoeBlock": Family(_olmoe, {"router.weight": same("gate.weight"), **BANK}),
    "Qwen2MoeSparseMoeBlock": Family(
        _qwen2_moe,
        {
            "router.weight": same("gate.weight"),
            **BANK,
            **_gated_mlp("shared_expert"),
            "shared_experts.gate.weight": same("shared_expert_gate.weight"),
        },
    ),
    "Qwen3MoeSparseMoeBlock": Family(_qwen3_moe, {"router.weight": same("gate.weight"), **BANK}),
    "GraniteMoeMoE": Family(
        _granite, {"router.weight": same("router.weight"), **BANK}, gate="router"
    ),
    "GptOssMLP": Family(
        _gpt_oss,
        {
            "router.weight": same("router.weight"),
            "router.bias": same("router.bias"),
            "experts.gate_up_proj": interleaved_and_transposed("experts.gate_up_proj"),
            "experts.gate_up_bias": interleaved("experts.gate_up_proj_bias"),
            "experts.down_proj": transposed("experts.down_proj"),
            "experts.down_bias": same("experts.down_proj_bias"),
        },
        gate="router",
        demands={"swiglu_alpha": (1.702,)},
        returns=lambda y, routing: (y, _flat(routing.expert_weights)),
    ),
    "Llama4TextMoe": Family(
        _llama4,
        {"router.weight": same("router.weight"), **BANK_TRANSPOSED, **_gated_mlp("shared_expert")},
        gate="router",
        returns=lambda y, routing: (_flat(y), _flat(routing.logits)),
        logits_at=1,
    ),
    "DeepseekV2Moe": Family(
        _deepseek_v2,
        {"router.weight": same("gate.weight"), **BANK, **_gated_mlp("shared_experts")},
        demands={"topk_method": ("greedy", "group_limited_greedy"), "mlp_bias": (False,)},
    ),
    "DeepseekV3MoE": Family(
        _deepseek_v3,
        {
            "router.weight": same("gate.weight"),
            "router.expert_bias": same("gate.e_score_correction_bias"),
            **BANK,
            **_gated_mlp("shared_experts"),
        },
    ),
    "DeepseekV4SparseMoeBlock": Family(
        _deepseek_v4,
        {
            "router.weight": same("gate.weight"),
            "router.expert_bias": same("gate.e_score_correction_bias"),
            "router.table": same("gate.tid2eid"),
            **BANK,
            **_gated_mlp("shared_experts"),
        },
        demands={"scoring_func": ("sqrtsoftplus",), "mlp_bias": (False,)},
    ),
    "SwitchTransformersSparseMLP": Family(
        _switch,
        {
            "router.weight": same("router.classifier.weight"),
            "router.bias": same("router.classifier.bias"),
            "experts.gate_up_proj": stacked("experts.expert_{e}.wi.weight"),
            "experts.down_proj": stacked("experts.expert_{e}.wo.weight"),
        },
        gate="router",
        demands={"router_dtype": ("float32",)},
        logits_at=2,
        flat_logits=False,
    ),
}


def family_of(block: nn.Module) -> Family:
    """The family of a block, by the name of its class.

    Raises:
        ValueError: it is none of those we know.
    """
    name = type(block).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"{name} is no block that can be read; those known are {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def config_of(block: nn.Module, hf_config) -> MoEConfig:
    """What a block of this family and config does, as our config.

    Raises:
        ValueError: the block is of no known family, the config lacks what the family needs (it is
            another model's), or an option has a value under which the block does what ours does
            not.
    """
    family, config = family_of(block), getattr(hf_config, "text_config", hf_config)
    for option, allowed in family.demands.items():
        value = getattr(config, option, allowed[0])
        if value not in allowed:
            known = ", ".join(map(repr, allowed))
            raise ValueError(
                f"{option}={value!r} of {type(block).__name__} has no counterpart here; known: "
                f"{known}"
            )
    try:
        return MoEConfig(**family.options(config, getattr(block, family.gate)))
    except AttributeError as error:
        raise ValueError(
            f"{type(config).__name__} is not the config of a {type(block).__name__}: {error}"
        ) from error
    except KeyError as error:
        known = ", ".join(HF_ACTIVATIONS)
        raise ValueError(
            f"the activation {error} of {type(block).__name__} has no counterpart here; known: "
            f"{known}"
        ) from error
