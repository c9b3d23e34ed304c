"""Chapter 7's own figure: how often GShard's second expert is asked."""

import plotly.graph_objects as go

from .. import theme
from ._arrays import array


def asked(weight_T, share_T, *, height: int = 320) -> go.Figure:
    """A square per token: the weight of its second expert, and how often that expert was asked; the rule 2 g as a dashed line.

    Args:
        weight_T: (T,) weight g of the second expert, at most 1/2. share_T: (T,) share of draws in which it was asked.
    """
    weight, share = array(weight_T, 1, "weight_T"), array(share_T, 1, "share_T")
    rule = go.Scatter(
        x=[0, 0.5],
        y=[0, 1],
        mode="lines",
        name="2 g",
        cliponaxis=False,
        line={"color": theme.INK, "dash": "dash", "width": 1.5},
    )
    label = go.Scatter(
        x=[0.03],
        y=[0.9],
        mode="text",
        text=["dashed: twice the weight"],
        textposition="middle right",
        textfont={"color": theme.INK},
        hoverinfo="skip",
    )
    color = theme.OKABE_ITO[1]
    tokens = go.Scatter(
        x=weight.tolist(),
        y=share.tolist(),
        mode="markers",
        name="tokens",
        cliponaxis=False,
        marker={
            "symbol": "square",
            "size": 10,
            "color": theme.fade(color, 0.5),
            "line": {"color": color, "width": 1.5},
        },
    )
    return theme.figure(
        [rule, label, tokens],
        height=height,
        margin={"l": 64, "r": 24, "t": 12, "b": 48},
        xaxis={"title": {"text": "weight of the second expert"}, "range": [0, 0.52]},
        yaxis={"title": {"text": "share of draws in which it is asked"}, "range": [-0.03, 1.06]},
    )
