"""The public name of ``moe_tools.accounting.published``."""

from moe_tools.accounting.published import ANNOUNCED, MODELS, UNSUPPORTED

__all__ = ["ANNOUNCED", "MODELS", "UNSUPPORTED"]
