"""The corpus of the chapters; it lives in ``moe_tools.corpus``, so that the tools can read it too."""

from moe_tools.corpus import SPLITS, VOCAB_SIZE, Corpus, decode, from_texts, load

__all__ = ["SPLITS", "VOCAB_SIZE", "Corpus", "decode", "from_texts", "load"]
