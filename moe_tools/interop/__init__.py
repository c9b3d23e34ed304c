"""Models that others trained, in and out.

``hf`` reads Hugging Face's; it needs torch only, transformers is the caller's.
"""

from . import hf

__all__ = ["hf"]
