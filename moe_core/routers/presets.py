"""Published routers by name: each is a TopKRouter with its options.

``python -m moe_core.routers`` prints how they differ, measured.
"""

from dataclasses import dataclass, field

from ..capacity import CapacityRule
from ..validate import one_of
from .topk import TopKRouter


@dataclass(frozen=True)
class Preset:
    """A published router.

    Attributes:
        model: the model whose sizes these are.
        sizes: arguments of ``TopKRouter`` that are numbers of that model: d_model, n_experts, top_k, groups.
        options: arguments that make the family: how it scores, selects and weighs.
        source: where this is written.
    """

    model: str
    sizes: dict = field(repr=False)
    options: dict
    source: str


PRESETS: dict[str, Preset] = {
    "gshard": Preset(  # without its random second expert, which is GShardRouter's
        "GShard",
        {"top_k": 2},
        {
            "norm_topk_prob": True,
            "capacity_factor": CapacityRule(factor=1.0, drop_policy="slot_position"),
        },
        "Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1",
    ),
    "switch": Preset(
        "Switch-Base-8",
        {"d_model": 768, "n_experts": 8, "top_k": 1},
        {
            "norm_topk_prob": False,
            "capacity_factor": CapacityRule(factor=1.25, eval_factor=2.0),
            "jitter_noise": 0.01,
        },
        "Fedus et al. 2021, arXiv 2101.03961, section 2; transformers switch_transformers",
    ),
    "mixtral": Preset(
        "Mixtral-8x7B",
        {"d_model": 4096, "n_experts": 8, "top_k": 2},
        {"norm_topk_prob": True},
        "Jiang et al. 2024, arXiv 2401.04088, section 2.1; transformers mixtral",
    ),
    "olmoe": Preset(
        "OLMoE-1B-7B",
        {"d_model": 2048, "n_experts": 64, "top_k": 8},
        {"norm_topk_prob": False},
        "Muennighoff et al. 2024, arXiv 2409.02060; transformers olmoe",
    ),
    "qwen2_moe": Preset(
        "Qwen1.5-MoE-A2.7B",
        {"d_model": 2048, "n_experts": 60, "top_k": 4},
        {"norm_topk_prob": False},
        "transformers qwen2_moe",
    ),
    "qwen3_moe": Preset(
        "Qwen3-30B-A3B",
        {"d_model": 2048, "n_experts": 128, "top_k": 8},
        {"norm_topk_prob": True},
        "transformers qwen3_moe, with the released config's norm_topk_prob=true",
    ),
    "granite": Preset(
        "Granite-3-1B-A400M",
        {"d_model": 1024, "n_experts": 32, "top_k": 8},
        {"score_after_topk": True, "norm_topk_prob": False},
        "transformers granitemoe",
    ),
    "gpt_oss": Preset(
        "gpt-oss-120b",
        {"d_model": 2880, "n_experts": 128, "top_k": 4},
        {"score_after_topk": True, "norm_topk_prob": False, "bias": True},
        "openai/gpt-oss torch/model.py; transformers gpt_oss",
    ),
    "llama4": Preset(
        "Llama-4-Scout",
        {"d_model": 5120, "n_experts": 16, "top_k": 1},
        {
            "score_func": "sigmoid",
            "score_after_topk": True,
            "norm_topk_prob": False,
            "weights_on": "input",
        },
        "transformers llama4",
    ),
    "deepseek_v2": Preset(
        "DeepSeek-V2",
        {"d_model": 5120, "n_experts": 160, "top_k": 6, "n_groups": 8, "topk_groups": 3},
        {"norm_topk_prob": False, "routed_scaling_factor": 16.0, "group_score": "max"},
        "DeepSeek-AI 2024, arXiv 2405.04434, section 2.2; transformers deepseek_v2",
    ),
    "deepseek_v3": Preset(
        "DeepSeek-V3",
        {"d_model": 7168, "n_experts": 256, "top_k": 8, "n_groups": 8, "topk_groups": 4},
        {
            "score_func": "sigmoid",
            "norm_eps": 1e-20,
            "routed_scaling_factor": 2.5,
            "expert_bias": True,
            "group_score": "top2_sum",
        },
        "DeepSeek-AI 2024, arXiv 2412.19437, section 2.1.2; transformers deepseek_v3",
    ),
    "deepseek_v4": Preset(
        "DeepSeek-V4-Flash",
        {"d_model": 4096, "n_experts": 256, "top_k": 6},
        {
            "score_func": "sqrt_softplus",
            "norm_eps": 1e-20,
            "routed_scaling_factor": 1.5,
            "expert_bias": True,
        },
        "transformers deepseek_v4 (its first layers choose by a hash instead: HashRouter)",
    ),
}


def preset(name: str, **changes) -> TopKRouter:
    """The router of a published model, or of one like it in other sizes.

    ``preset("mixtral")`` is Mixtral-8x7B's own router, ``preset("mixtral", d_model=64)`` the same for narrower tokens.
    Coefficients of losses are choices of a training run, not of a router: none is set, pass ``aux_loss_weight=...``.

    Args:
        name: a key of ``PRESETS``.
        changes: arguments of ``TopKRouter`` that replace the preset's; sizes above all.

    Raises:
        ValueError: there is no such preset, it has no size of its own for an argument that is missing, or a value is out of range.
        TypeError: an argument is not one of ``TopKRouter``'s.
    """
    one_of(PRESETS, preset=name)
    arguments = {**PRESETS[name].sizes, **PRESETS[name].options, **changes}
    missing = [size for size in ("d_model", "n_experts", "top_k") if size not in arguments]
    if missing:
        raise ValueError(
            f"preset {name!r} needs {' and '.join(missing)}: it stands for a family of sizes"
        )
    return TopKRouter(**arguments)
