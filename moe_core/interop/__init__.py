"""The public name of ``moe_tools.interop``."""

from . import hf
