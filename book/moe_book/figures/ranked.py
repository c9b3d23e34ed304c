"""Loads ranked from busy to idle, with the spread over seeds."""

import plotly.graph_objects as go

from .. import theme
from ._arrays import array


def ranked_load(
    load_SE, *, uniform: float, top: float | None = None, height: int = 300
) -> go.Figure:
    """Load by rank, the busiest expert first: mean over seeds as a bar, smallest to largest as a whisker.

    Experts of different seeds have nothing in common but their rank, so they carry no expert's colour here.

    Args:
        load_SE: (seeds, E), each row sorted from large to small.
        uniform: the even share, drawn as a dashed line.
        top: upper end of the axis.
    """
    load = array(load_SE, 2, "load_SE")
    mean, E = load.mean(0), load.shape[1]
    bars = go.Bar(
        x=list(range(1, E + 1)),
        y=mean.tolist(),
        name="share",
        marker={"color": theme.OKABE_ITO[0]},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": (load.max(0) - mean).tolist(),
            "arrayminus": (mean - load.min(0)).tolist(),
            "color": theme.INK,
            "thickness": 1.5,
            "width": 5,
        },
    )
    even = go.Scatter(
        x=[0.5, E + 0.5],
        y=[uniform, uniform],
        mode="lines+text",
        text=["", " even"],
        textposition="middle right",
        cliponaxis=False,
        line={"color": theme.INK, "dash": "dash", "width": 1.5},
        textfont={"color": theme.INK},
        name="even",
    )
    return theme.figure(
        [bars, even],
        height=height,
        bargap=0.35,
        margin={"l": 60, "r": 56, "t": 12, "b": 48},
        xaxis={
            "title": {"text": "expert, by rank of its load"},
            "range": [0.5, E + 0.5],
            "tickvals": list(range(1, E + 1)),
        },
        yaxis={
            "title": {"text": "share of the slots"},
            "range": [0, top or 1.1 * float(load.max())],
            "tickformat": ".0%",
        },
    )
