"""The corpus of the chapters; it lives in ``moe_core.corpus``, so that the core's benches can read it too."""

from moe_tools.corpus import VOCAB_SIZE, Corpus, decode, from_texts, load

__all__ = ["VOCAB_SIZE", "Corpus", "decode", "from_texts", "load"]
