"""The public name of ``moe_tools.interop.hf``."""

from moe_tools.interop.hf import convert, from_block, restore, to_block

__all__ = ["convert", "from_block", "restore", "to_block"]
