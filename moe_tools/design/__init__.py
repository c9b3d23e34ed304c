"""The design assistant: from a budget and GPUs to a written MoE design. ``python -m moe_tools.design --help``.

    budget -> shape -> plan (memory, exchange) -> router -> report        each choice names one of ``rules.RULES``

Also: ``scaling``, what published laws expect of the loss; ``hf``, the design as a Hugging Face config.
"""

from .assistant import Design, design
from .budget import DesignBudget, Impossible
from .rules import RULES, Rule

__all__ = ["RULES", "DesignBudget", "Design", "Impossible", "Rule", "design"]
