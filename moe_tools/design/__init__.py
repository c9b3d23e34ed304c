"""The design assistant: from a budget and GPUs to a written MoE design.

    budget -> model_shape -> plan (gpu_memory, exchange_cost) -> router_choices -> design_report

Each choice names one of ``rules.RULES``. Also: ``scaling_laws``, what published laws expect of the
loss; ``to_hf_config``, the design as a Hugging Face config.
"""

from .assistant import Design, design
from .budget import DesignBudget, Impossible
from .rules import RULES, Rule

__all__ = ["RULES", "DesignBudget", "Design", "Impossible", "Rule", "design"]
