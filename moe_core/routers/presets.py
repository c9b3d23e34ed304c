"""Published routers by name: each is a TopKRouter with its options.

``python -m moe_core.routers`` prints how they differ, measured.
"""

from dataclasses import dataclass, field

from ..capacity import CapacityRule
from ..validate import one_of
from .topk import TopKRouter


@dataclass(frozen=True)
class Preset:
    """A published router: the model, its sizes, what makes the family, and where it is written."""

    model: str
    sizes: dict = field(repr=False)
    options: dict
    source: str


def _sizes(d_model: int, n_experts: int, top_k: int, **groups: int) -> dict[str, int]:
    return {"d_model": d_model, "n_experts": n_experts, "top_k": top_k, **groups}


_SECOND_CHOICES_LAST = CapacityRule(factor=1.0, drop_policy="slot_position")
_TWO_FACTORS = CapacityRule(factor=1.25, eval_factor=2.0)
_CHOSEN_LOGITS = {"score_after_topk": True, "norm_topk_prob": False}
_WITH_BIAS = {"expert_bias": True, "norm_eps": 1e-20}

PRESETS: dict[str, Preset] = {
    "gshard": Preset(
        "GShard",
        {"top_k": 2},  # without its random second expert, which is GShardRouter's
        dict(norm_topk_prob=True, capacity_factor=_SECOND_CHOICES_LAST),
        "Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1",
    ),
    "switch": Preset(
        "Switch-Base-8",
        _sizes(768, 8, 1),
        dict(norm_topk_prob=False, capacity_factor=_TWO_FACTORS, jitter_noise=0.01),
        "Fedus et al. 2021, arXiv 2101.03961, section 2; transformers switch_transformers",
    ),
    "mixtral": Preset(
        "Mixtral-8x7B",
        _sizes(4096, 8, 2),
        dict(norm_topk_prob=True),
        "Jiang et al. 2024, arXiv 2401.04088, section 2.1; transformers mixtral",
    ),
    "olmoe": Preset(
        "OLMoE-1B-7B",
        _sizes(2048, 64, 8),
        dict(norm_topk_prob=False),
        "Muennighoff et al. 2024, arXiv 2409.02060; transformers olmoe",
    ),
    "qwen2_moe": Preset(
        "Qwen1.5-MoE-A2.7B",
        _sizes(2048, 60, 4),
        dict(norm_topk_prob=False),
        "transformers qwen2_moe",
    ),
    "qwen3_moe": Preset(
        "Qwen3-30B-A3B",
        _sizes(2048, 128, 8),
        dict(norm_topk_prob=True),
        "transformers qwen3_moe, with the released config's norm_topk_prob=true",
    ),
    "granite": Preset(
        "Granite-3-1B-A400M", _sizes(1024, 32, 8), _CHOSEN_LOGITS, "transformers granitemoe"
    ),
    "gpt_oss": Preset(
        "gpt-oss-120b",
        _sizes(2880, 128, 4),
        dict(bias=True, **_CHOSEN_LOGITS),
        "openai/gpt-oss torch/model.py; transformers gpt_oss",
    ),
    "llama4": Preset(
        "Llama-4-Scout",
        _sizes(5120, 16, 1),
        dict(score_func="sigmoid", weights_on="input", **_CHOSEN_LOGITS),
        "transformers llama4",
    ),
    "deepseek_v2": Preset(
        "DeepSeek-V2",
        _sizes(5120, 160, 6, n_groups=8, topk_groups=3),
        dict(norm_topk_prob=False, routed_scaling_factor=16.0, group_score="max"),
        "DeepSeek-AI 2024, arXiv 2405.04434, section 2.2; transformers deepseek_v2",
    ),
    "deepseek_v3": Preset(
        "DeepSeek-V3",
        _sizes(7168, 256, 8, n_groups=8, topk_groups=4),
        dict(score_func="sigmoid", routed_scaling_factor=2.5, group_score="top2_sum", **_WITH_BIAS),
        "DeepSeek-AI 2024, arXiv 2412.19437, section 2.1.2; transformers deepseek_v3",
    ),
    "deepseek_v4": Preset(
        "DeepSeek-V4-Flash",
        _sizes(4096, 256, 6),
        dict(score_func="sqrt_softplus", routed_scaling_factor=1.5, **_WITH_BIAS),
        "transformers deepseek_v4 (its first layers choose by a hash instead: HashRouter)",
    ),
}


def preset(name: str, **changes) -> TopKRouter:
    """The router of a published model: ``preset("mixtral")`` is Mixtral-8x7B's own.

    ``changes`` are arguments of ``TopKRouter`` that replace the preset's; sizes above all. Raises
    ValueError where there is no such preset, it has no size of its own for one that is missing, or
    a value is out of range; TypeError where ``TopKRouter`` has no such argument.
    """
    one_of(PRESETS, preset=name)
    # Coefficients of losses are choices of a training run, not of a router: none is set.
    arguments = {**PRESETS[name].sizes, **PRESETS[name].options, **changes}
    missing = [size for size in ("d_model", "n_experts", "top_k") if size not in arguments]
    if missing:
        needed = " and ".join(missing)
        raise ValueError(f"preset {name!r} needs {needed}: it stands for a family of sizes")
    return TopKRouter(**arguments)
