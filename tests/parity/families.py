"""The Hugging Face blocks, and the same weights in moe_core: what the parity tests share.

A ``Pair`` holds one random block and its twin. Each family says how to build the block, which of its modules is the router and
where its weights go; what the router does is only in ``moe_core.routers.presets``.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from moe_core import Experts, FeedForward, Routing, TopKRouter
from moe_core.capacity import CapacityRule
from moe_core.routers.presets import preset

# B, N, D, F, E, K, groups, kept groups: wide and narrow, odd sizes, one token, K = 1, K = E
SHAPES = [
    (2, 5, 16, 8, 8, 2, 4, 2),
    (1, 7, 12, 20, 12, 4, 3, 2),
    (3, 1, 32, 16, 16, 6, 4, 3),
    (2, 3, 10, 6, 4, 4, 2, 2),
    (1, 9, 8, 8, 6, 1, 3, 1),
]


@dataclass
class Family:
    """How one Hugging Face block is built and read."""

    module: str  # transformers.models.<module>
    config: str
    block: str
    sizes: dict  # names in the config -> letters of the shape, or values
    gate: str = "gate"  # the block's router
    shared: str | None = None  # its shared expert, a gated MLP
    transposed: bool = False  # expert weights (E, D, 2F) and (E, F, D)
    own_experts: bool = False  # moe_core.Experts has no such expert (biases, interleaved, clamped): both sides use the block's own
    float32_logits: bool = False  # the block computes logits in float32 whatever its dtype
    top_1_only: bool = False
    grouped: bool = False

    def shapes(self):
        return (
            [shape for shape in SHAPES if shape[5] == 1] + [(2, 8, 16, 8, 4, 1, 1, 1)]
            if self.top_1_only
            else SHAPES
        )


COMMON = {"hidden_size": "D", "num_experts_per_tok": "K"}
LOCAL = {**COMMON, "intermediate_size": "F", "num_local_experts": "E"}
DEEPSEEK = {
    **COMMON,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "moe_intermediate_size": "F",
    "n_routed_experts": "E",
    "n_shared_experts": 2,
}
FAMILIES = {
    "mixtral": Family("mixtral", "MixtralConfig", "MixtralSparseMoeBlock", LOCAL),
    "olmoe": Family(
        "olmoe",
        "OlmoeConfig",
        "OlmoeSparseMoeBlock",
        {**COMMON, "intermediate_size": "F", "num_experts": "E"},
    ),
    "qwen2_moe": Family(
        "qwen2_moe",
        "Qwen2MoeConfig",
        "Qwen2MoeSparseMoeBlock",
        {
            **COMMON,
            "moe_intermediate_size": "F",
            "shared_expert_intermediate_size": 14,
            "num_experts": "E",
        },
        shared="shared_expert",
    ),
    "qwen3_moe": Family(
        "qwen3_moe",
        "Qwen3MoeConfig",
        "Qwen3MoeSparseMoeBlock",
        {**COMMON, "moe_intermediate_size": "F", "num_experts": "E", "norm_topk_prob": True},
    ),
    "granite": Family("granitemoe", "GraniteMoeConfig", "GraniteMoeMoE", LOCAL, gate="router"),
    "gpt_oss": Family(
        "gpt_oss", "GptOssConfig", "GptOssMLP", LOCAL, gate="router", own_experts=True
    ),
    "llama4": Family(
        "llama4",
        "Llama4TextConfig",
        "Llama4TextMoe",
        LOCAL,
        gate="router",
        shared="shared_expert",
        transposed=True,
    ),
    "deepseek_v2": Family(
        "deepseek_v2",
        "DeepseekV2Config",
        "DeepseekV2Moe",
        {
            **DEEPSEEK,
            "n_group": "G",
            "topk_group": "g",
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
        },
        shared="shared_experts",
        float32_logits=True,
        grouped=True,
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        "DeepseekV3Config",
        "DeepseekV3MoE",
        {**DEEPSEEK, "n_group": "G", "topk_group": "g"},
        shared="shared_experts",
        float32_logits=True,
        grouped=True,
    ),
    "deepseek_v4": Family(  # a limit beyond reach: moe_core's experts do not clamp
        "deepseek_v4",
        "DeepseekV4Config",
        "DeepseekV4SparseMoeBlock",
        {**COMMON, "moe_intermediate_size": "F", "n_routed_experts": "E", "swiglu_limit": 1e9},
        shared="shared_experts",
    ),
    "switch": Family(
        "switch_transformers",
        "SwitchTransformersConfig",
        "SwitchTransformersSparseMLP",
        {
            "d_model": "D",
            "d_ff": "F",
            "num_experts": "E",
            "expert_capacity": 10**6,
            "dropout_rate": 0.0,
        },
        gate="router",
        float32_logits=True,
        top_1_only=True,
    ),
}
CASES = [
    (name, shape, seed, dtype)
    for name, family in FAMILIES.items()
    for shape in family.shapes()
    for seed, dtype in [(0, torch.float32), (1, torch.float32), (2, torch.bfloat16)]
]


def hf_config(name: str, shape: tuple, **changes):
    """The config of a model with such blocks."""
    family = FAMILIES[name]
    letters = dict(zip(("B", "N", "D", "F", "E", "K", "G", "g"), shape))
    sizes = {
        key: letters.get(value, value) if isinstance(value, str) else value
        for key, value in family.sizes.items()
    }
    config = getattr(import_module(f"transformers.models.{family.module}"), family.config)(
        **{**sizes, **changes}
    )
    config._experts_implementation = "eager"
    return config


def hf_block(name: str, shape: tuple, seed: int = 0, **changes) -> nn.Module:
    """A block with every parameter and bias drawn at random, none of them zero; in eval mode."""
    family, config = FAMILIES[name], hf_config(name, shape, **changes)
    models = import_module(f"transformers.models.{family.module}.modeling_{family.module}")
    block = getattr(models, family.block)(
        config, *([config.mlp_layer_types.index("moe")] if name == "deepseek_v4" else [])
    )
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in [*block.named_parameters(), *block.named_buffers()]:
        size = (
            0.5
            if "bias" in key
            else 1 / tensor.shape[-2 if family.transposed and tensor.ndim == 3 else -1] ** 0.5
        )
        tensor.data.normal_(
            0, 2 * size if ".weight" in key and family.gate in key else size, generator=generator
        )
    return block.eval()


def randn(*shape, seed: int, dtype=torch.float32) -> Tensor:
    """Normal numbers, rounded to bfloat16 first if asked so that both sides see the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed)).to(dtype)


class Pair:
    """A Hugging Face block and moe_core with the same weights.

    Attributes:
        block: theirs. router, experts, shared: ours (experts is None where moe_core has none of this kind).
    """

    def __init__(
        self,
        name: str,
        shape: tuple,
        seed: int = 0,
        *,
        capacity: CapacityRule | None = None,
        **changes,
    ):
        self.name, self.family, self.shape = name, FAMILIES[name], shape
        self.block = hf_block(name, shape, seed, **changes)
        B, N, D, F, E, K, G, g = shape
        groups = {"n_groups": G, "topk_groups": g} if self.family.grouped else {}
        self.router: TopKRouter = preset(
            name, d_model=D, n_experts=E, top_k=K, **groups, capacity_factor=capacity
        ).eval()
        self.router.load_state_dict(self.router_state())
        self.experts = None if self.family.own_experts else self._experts(D, F, E)
        self.shared = self._shared(D) if self.family.shared else None

    @property
    def gate(self) -> nn.Module:
        return getattr(self.block, self.family.gate)

    @property
    def gate_weight(self) -> Tensor:
        return getattr(self.gate, "classifier", self.gate).weight

    def router_state(self) -> dict:
        """The block's router in our names."""
        names = {
            "weight": "weight",
            "classifier.weight": "weight",
            "bias": "bias",
            "e_score_correction_bias": "expert_bias",
        }
        return {names[key]: value for key, value in self.gate.state_dict().items()}

    def _experts(self, D, F, E) -> Experts:
        theirs, switch = self.block.experts, self.name == "switch"
        ours = Experts(D, F, E, activation="relu" if switch else "silu", glu=not switch)
        if switch:
            up = torch.stack([theirs[f"expert_{e}"].wi.weight for e in range(E)])
            down = torch.stack([theirs[f"expert_{e}"].wo.weight for e in range(E)])
        else:
            up, down = theirs.gate_up_proj, theirs.down_proj
            if self.family.transposed:
                up, down = up.transpose(-2, -1), down.transpose(-2, -1)
        ours.load_state_dict({"gate_up_proj": up, "down_proj": down})
        return ours

    def _shared(self, D) -> FeedForward:
        theirs = getattr(self.block, self.family.shared)
        ours = FeedForward(D, theirs.down_proj.weight.shape[-1])
        gate_up = torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight])
        ours.load_state_dict(
            {"gate_up_proj.weight": gate_up, "down_proj.weight": theirs.down_proj.weight}
        )
        return ours

    def their_routing(self, x: Tensor) -> SimpleNamespace:
        """What the block's router returns for x (B, N, D): logits, weights as (T, E) with 0 for the unchosen, and indices where
        it gives any (their order within a token means nothing in DeepSeek: sorted=False)."""
        if self.name == "switch":
            one_hot, probability, logits = self.gate(x)
            return SimpleNamespace(
                logits=logits.flatten(0, 1),
                dense=(one_hot * probability).flatten(0, 1),
                indices=None,
            )
        flat = x.flatten(0, 1)
        if self.name == "llama4":
            dense, logits = self.gate(flat)
            return SimpleNamespace(logits=logits, dense=dense, indices=None)
        logits, weights, indices = self.gate(flat)
        dense = torch.zeros_like(logits, dtype=weights.dtype).scatter(-1, indices, weights)
        return SimpleNamespace(logits=logits, dense=dense, indices=indices)

    def their_output(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return (y[0] if isinstance(y, tuple) else y).view(x.shape)

    def our_output(self, x: Tensor, routing: Routing) -> Tensor:
        """Experts and shared expert of ours, for a routing of ours."""
        if self.experts is None:
            slots = routing.expert_indices.flatten(0, 1), routing.expert_weights.flatten(0, 1)
            y = self.block.experts(x.flatten(0, 1), *slots).view(x.shape)
        else:
            y = self.experts(x, routing)
        if self.shared is not None:
            shared = self.shared(x)
            if self.name == "qwen2_moe":
                shared = torch.sigmoid(x @ self.block.shared_expert_gate.weight.T) * shared
            y = y + shared
        return y


pair_of = cache(Pair)  # for tests that change nothing in it


def dense(routing: Routing) -> Tensor:
    """The weights of a routing as (T, E), 0 for experts that are not chosen or not kept."""
    weights = routing.expert_weights * routing.capacity_mask
    return (
        torch.zeros_like(routing.scores).scatter(-1, routing.expert_indices, weights).flatten(0, 1)
    )


def gap(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest of their values where that is more than 1."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
