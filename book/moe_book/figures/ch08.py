"""Chapter 8's own figure: panels of bars over the same experts, for scores and weights, loads and biases, and groups."""

import plotly.graph_objects as go

from .. import theme
from ._arrays import array


def expert_panels(
    rows: dict,
    *,
    ranges: dict,
    filled: dict,
    groups: int = 1,
    lines: dict | None = None,
    height: int = 430,
) -> go.Figure:
    """Panels of bars, one above the other, all over the same experts; what is not filled is hollow.

    Args:
        rows: title -> (E,) values, from the upper panel to the lower; a value of -inf is drawn as a cross.
        ranges: title -> (low, high), the same in all frames of an Explorer.
        filled: title -> (E,) bool, the solid bars.
        groups: the experts stand in so many groups of neighbours, told apart by a gap-wide line.
        lines: title -> a value, drawn as a dashed line across that panel.
    """
    titles, n = list(rows), len(rows)
    E = len(array(rows[titles[0]], 1, titles[0]))
    colors = theme.expert_colors(E)
    room = 1 / n
    traces, layout, shapes = [], {}, []
    for i, title in enumerate(titles):
        value_E, solid_E = array(rows[title], 1, title), array(filled[title], 1, title).astype(bool)
        axis = "y" if i == 0 else f"y{i + 1}"
        low, high = ranges[title]
        absent = [v == float("-inf") for v in value_E]
        traces.append(
            go.Bar(
                x=list(range(E)),
                y=[0 if gone else float(v) for v, gone in zip(value_E, absent)],
                name=title,
                yaxis=axis,
                textangle=0,
                textposition="none"
                if lines and title in lines
                else "outside",  # a line would cross what stands on top
                cliponaxis=False,
                constraintext="none",
                textfont={"size": 14 if E <= 4 else 12},  # eight labels fit a phone, none is shrunk
                text=[
                    "×" if gone else f"{v:.2f}".replace("-", "−")
                    for v, gone in zip(value_E, absent)
                ],
                marker={
                    "color": [c if yes else theme.CLEAR for c, yes in zip(colors, solid_E)],
                    "line": {"color": colors, "width": 2},
                },
            )
        )
        if lines and title in lines:
            traces.append(
                go.Scatter(
                    x=[-0.5, E - 0.5],
                    y=[lines[title]] * 2,
                    mode="lines",
                    yaxis=axis,
                    name=f"{title}: line",
                    line={"color": theme.INK, "dash": "dash", "width": 1.5},
                )
            )
        top = 1 - i * room
        layout["yaxis" if i == 0 else f"yaxis{i + 1}"] = {
            "title": {"text": title},
            "domain": [top - room + (0.1 if i < n - 1 else 0.0), top - 0.02],
            "range": [low, high],
            "nticks": 5,
            "zeroline": True,
            "zerolinecolor": theme.MUTED,
        }
    for g in range(1, groups):
        x = g * E / groups - 0.5
        shapes.append(
            {
                "type": "line",
                "x0": x,
                "x1": x,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"color": theme.MUTED, "width": 1, "dash": "dot"},
            }
        )
    return theme.figure(
        traces,
        height=height,
        bargap=0.4,
        margin={"l": 64, "r": 16, "t": 8, "b": 44},
        shapes=shapes,
        **layout,
        xaxis={
            "title": {"text": "expert"},
            "range": [-0.5, E - 0.5],
            "tickvals": list(range(E)),
            "ticktext": [str(e) for e in range(E)],
            "anchor": "y" if n == 1 else f"y{n}",
        },
    )
