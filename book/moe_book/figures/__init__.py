"""The kinds of figure the book uses, one function each: plain arrays or tensors in, a plotly Figure out."""

from .bars import load_bars, score_bars
from .blocks import expert_blocks
from .histogram import score_histogram
from .lines import curves
from .link_bytes import link_bytes
from .load_over_time import load_over_time
from .parameters import parameter_treemap
from .ranked import ranked_load
from .roofline import roofline
from .routing import routing_map
from .text import text_in_color
from .triangle import simplex
from .walk import token_walk
from .words import in_words

__all__ = [
    "curves",
    "expert_blocks",
    "in_words",
    "link_bytes",
    "load_bars",
    "load_over_time",
    "parameter_treemap",
    "ranked_load",
    "roofline",
    "routing_map",
    "score_bars",
    "score_histogram",
    "simplex",
    "text_in_color",
    "token_walk",
]
