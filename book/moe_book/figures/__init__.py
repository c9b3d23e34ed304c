"""The kinds of figure the book uses, one function each: plain arrays or tensors in, a plotly Figure out."""
from .bars import load_bars, score_bars
from .histogram import score_histogram
from .lines import curves
from .routing import routing_map
from .text import text_in_color
from .triangle import simplex

__all__ = ["curves", "load_bars", "routing_map", "score_bars", "score_histogram", "simplex", "text_in_color"]
