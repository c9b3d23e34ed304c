"""Colours and layout that every figure shares: an expert is a colour, a token is a square, a dropped token is hollow.

Figures are drawn for no particular page. What must contrast with the page (text, axes, outlines) is written in the colours INK, MUTED and
GRID; the page's script puts in their place the reader's own text colour, whole or faint, so that one set of frames serves light and dark.
"""

import colorsys

import plotly.graph_objects as go

INK, MUTED, GRID = "#1f2328", "#57606a", "#d8dee4"
TOKENS = {
    INK: 1.0,
    MUTED: 0.74,
    GRID: 0.16,
}  # colour -> opacity of the reader's text colour that replaces it
CLEAR = "rgba(0,0,0,0)"

# Okabe and Ito (2008), told apart by readers with any of the common colour deficiencies; their black, lost on a dark page, is a grey here.
OKABE_ITO = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#8C8C8C"]

_AXIS_TEXT = {
    "title": {"standoff": 8, "font": {"size": 14}},
    "tickfont": {"size": 13},
    "ticklabelstandoff": 4,
}
TEMPLATE = {
    "layout": {
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "colorway": OKABE_ITO,
        "showlegend": False,
        "hovermode": False,
        "dragmode": False,
        "font": {"family": "inherit", "size": 14, "color": INK},
        "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
        "xaxis": {
            "gridcolor": GRID,
            "zeroline": False,
            "showgrid": False,
            "linecolor": MUTED,
            "fixedrange": True,
            **_AXIS_TEXT,
        },
        "yaxis": {
            "gridcolor": GRID,
            "zeroline": False,
            "showgrid": True,
            "linecolor": MUTED,
            "fixedrange": True,
            **_AXIS_TEXT,
        },
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    }
}
_TEMPLATE = go.layout.Template(
    TEMPLATE
)  # made once: plotly checks every entry of it, which takes longer than a whole figure


def expert_color(e: int, n_experts: int = 8) -> str:
    """The colour of expert e, "#rrggbb", the same in every figure that has up to 8 experts.

    Beyond 8 there is no set of colours that everybody can tell apart: a ramp of hues with alternating lightness keeps neighbours distinct.

    Raises:
        ValueError: e is not in 0 .. n_experts - 1.
    """
    if not 0 <= e < n_experts:
        raise ValueError(f"e={e} must be between 0 and n_experts-1={n_experts - 1}")
    if n_experts <= len(OKABE_ITO):
        return OKABE_ITO[e]
    lightness = (0.42, 0.62)[e % 2]
    rgb = colorsys.hls_to_rgb((0.57 + e / n_experts) % 1.0, lightness, 0.62)
    return "#" + "".join(f"{round(255 * c):02x}" for c in rgb)


def expert_colors(n_experts: int) -> list[str]:
    """The colours of experts 0 .. n_experts - 1."""
    return [expert_color(e, n_experts) for e in range(n_experts)]


def fade(color: str, alpha: float) -> str:
    """A "#rrggbb" colour at opacity alpha (0 to 1), as "rgba(...)"."""
    r, g, b = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{round(float(alpha), 3):g})"


def token(color: str = INK, alpha: float = 1.0, *, dropped: bool = False, size: float = 20) -> dict:
    """The marker of a token: a square of `size` pixels, filled with `color`, or hollow if it was dropped."""
    return {
        "symbol": "square",
        "size": size,
        "color": CLEAR if dropped else fade(color, alpha),
        "line": {"color": color, "width": 1.5},
    }


def apply(figure: go.Figure) -> go.Figure:
    """Give a plotly figure the book's fonts, colours and margins as defaults; what the figure sets itself stays. Returns it."""
    figure.layout.template = _TEMPLATE
    return figure


def figure(traces=(), **layout) -> go.Figure:
    """A plotly figure with the book's defaults."""
    return go.Figure(list(traces), {"template": _TEMPLATE, **layout})
