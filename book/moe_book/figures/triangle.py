"""The simplex: probabilities over three experts as points in a triangle."""

import math

import plotly.graph_objects as go

from .. import theme
from ._arrays import array


def simplex(
    scores,
    *,
    experts=None,
    kept=None,
    labels: list[str] | None = None,
    size: float = 12,
    height: int = 380,
) -> go.Figure:
    """Tokens in a triangle whose corners are three experts: at a corner all probability is on that expert, in the middle a third each.

    Args:
        scores: (T, 3) rows that sum to 1.
        experts: (T,) the expert each token goes to; by default its largest score. Gives the token its colour.
        kept: (T,) bool, False draws the token hollow.
        labels: T words written next to the tokens.

    Raises:
        ValueError: scores is not (T, 3), or a row is not a probability.
    """
    p_TE = array(scores, 2, "scores")
    if p_TE.shape[1] != 3 or (p_TE < -1e-6).any() or (abs(p_TE.sum(1) - 1) > 1e-3).any():
        raise ValueError(
            f"scores with shape {p_TE.shape} must have 3 columns, and rows of probabilities that sum to 1"
        )
    expert_T = (p_TE.argmax(1) if experts is None else array(experts, 1, "experts")).astype(int)
    kept_T = [True] * len(p_TE) if kept is None else [bool(k) for k in array(kept, 1, "kept")]
    corners = [(0.0, 0.0), (1.0, 0.0), (0.5, math.sqrt(3) / 2)]
    x_T, y_T = (p_TE @ [corner[i] for corner in corners] for i in (0, 1))
    colors = [theme.expert_color(e, 3) for e in expert_T]
    # The three borders run from the middle of each side to the centre: there two experts tie.
    centre = (0.5, math.sqrt(3) / 6)
    borders = [
        (*centre, (a[0] + b[0]) / 2, (a[1] + b[1]) / 2)
        for a, b in ((corners[0], corners[1]), (corners[1], corners[2]), (corners[2], corners[0]))
    ]
    guides = [
        go.Scatter(
            x=[c[0] for c in (*corners, corners[0])],
            y=[c[1] for c in (*corners, corners[0])],
            mode="lines",
            hoverinfo="skip",
            line={"color": theme.MUTED, "width": 1.5},
        ),
        go.Scatter(
            x=[v for b in borders for v in (b[0], b[2], None)],
            y=[v for b in borders for v in (b[1], b[3], None)],
            mode="lines",
            hoverinfo="skip",
            line={"color": theme.MUTED, "dash": "dot", "width": 1},
        ),
        go.Scatter(
            x=[c[0] for c in corners],
            y=[c[1] for c in corners],
            mode="markers+text",
            hoverinfo="skip",
            cliponaxis=False,
            text=[f"expert {e}" for e in range(3)],
            textposition=["bottom center", "bottom center", "top center"],
            marker={"size": 12, "color": theme.expert_colors(3)},
        ),
    ]
    tokens = go.Scatter(
        x=x_T.tolist(),
        y=y_T.tolist(),
        mode="markers+text" if labels else "markers",
        text=labels,
        textposition="top center",
        name="tokens",
        customdata=[f"expert {e}" for e in expert_T],
        meta="goes to",
        marker={
            "symbol": "square",
            "size": size,
            "color": [theme.fade(c, 0.6) if k else theme.CLEAR for c, k in zip(colors, kept_T)],
            "line": {"color": colors, "width": 1.5},
        },
    )
    bare = {"visible": False, "showgrid": False}
    return theme.figure(
        [*guides, tokens],
        height=height,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        xaxis={**bare, "range": [-0.15, 1.15]},
        yaxis={**bare, "range": [-0.12, 1.0], "scaleanchor": "x"},
    )
