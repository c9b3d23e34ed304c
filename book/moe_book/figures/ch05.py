"""Figures of chapter 5: tokens that point one way, loads side by side and over time, prices, who waits for whom, and quality against balance."""

import numpy as np
import plotly.graph_objects as go

from .. import theme
from ._arrays import array


def load_panels(panels: dict, *, top: float, panel_height: int = 130) -> go.Figure:
    """One row of bars per name, one bar per expert, all on the same axis; the even load as a dashed line.

    Args:
        panels: name -> (E,) shares of 1, drawn from top to bottom; every panel has the same E.
        top: upper end of the axes, at most 1.15.
    """
    n = len(panels)
    traces, notes, layout = [], [], {}
    for i, (name, load) in enumerate(panels.items()):
        load_E = array(load, 1, name)
        E = len(load_E)
        high, low = _span(i, n)
        colors = theme.expert_colors(E)
        axis = "y" if i == 0 else f"y{i + 1}"
        bars = go.Bar(
            x=list(range(E)),
            y=[round(v, 4) for v in load_E.tolist()],
            name=name,
            yaxis=axis,
            cliponaxis=False,
            marker={"color": colors, "line": {"color": colors, "width": 2}},
        )
        traces += [bars, *_even_and_labels(load_E, yaxis=axis)]
        notes.append(_name(name, high))
        layout["yaxis" + axis[1:]] = {
            "domain": [low, high - 0.01],
            "range": [0, top],
            "tickformat": ".0%",
            "nticks": 4,
        }
    E = len(array(next(iter(panels.values()))))
    return theme.figure(
        traces,
        height=48 + n * panel_height,
        bargap=0.35,
        margin={"l": 56, "r": 12, "t": 8, "b": 44},
        annotations=notes,
        **layout,
        xaxis={
            "title": {"text": "expert (share of slots, %; dashed: even)"},
            "range": [-0.5, E - 0.5],
            "tickvals": list(range(E)),
            "ticktext": [str(e) for e in range(E)],
            "anchor": "y" if n == 1 else f"y{n}",
        },
    )


def shares_over_time(
    load_SE, step_S, *, switched_at: int | None = None, height: int = 320
) -> go.Figure:
    """How the slots were shared out at each step: a band per expert, in its colour, as wide as its share.

    Args:
        load_SE: (S, E) shares, each row sums to 1. step_S: (S,) steps.
        switched_at: a step to mark with a vertical line.
    """
    load = array(load_SE, 2, "load_SE")
    steps = [int(s) for s in array(step_S, 1, "step_S")]
    colors = theme.expert_colors(load.shape[1])
    bands = [
        go.Scatter(
            x=steps,
            y=[round(v, 3) for v in load[:, e].tolist()],
            name=f"expert {e}",
            stackgroup="load",
            mode="lines",
            line={"width": 0.5, "color": colors[e]},
            fillcolor=theme.fade(colors[e], 0.8),
        )
        for e in range(load.shape[1])
    ]
    mark = (
        []
        if switched_at is None
        else [
            {
                "type": "line",
                "x0": switched_at,
                "x1": switched_at,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"color": theme.INK, "width": 2, "dash": "dash"},
            }
        ]
    )
    return theme.figure(
        bands,
        height=height,
        margin={"l": 56, "r": 16, "t": 10, "b": 48},
        shapes=mark,
        xaxis={"title": {"text": "optimiser step"}, "range": [steps[0], steps[-1]]},
        yaxis={
            "title": {"text": "share of the slots"},
            "range": [0, 1],
            "tickformat": ".0%",
            "showgrid": False,
        },
    )


def one_way(x_T2, rows_E2, *, height: int = 330) -> go.Figure:
    """Left: tokens as squares around the origin, a router's rows as arrows; a token has the colour of the row with the largest dot product.
    Right: the load of each expert.

    Args:
        x_T2: (T, 2) tokens, drawn at length 1. rows_E2: (E, 2) the router's rows, drawn in proportion.
    """
    x, rows = array(x_T2, 2, "x_T2"), array(rows_E2, 2, "rows_E2")
    E, x = len(rows), x / np.linalg.norm(x, axis=1, keepdims=True)
    rows = 1.25 * rows / np.linalg.norm(rows, axis=1).max()  # the longest fits into the picture
    choice_T, colors = (x @ rows.T).argmax(1), theme.expert_colors(E)
    arrows = [
        go.Scatter(
            x=[0, round(float(u), 3)],
            y=[0, round(float(v), 3)],
            mode="lines+markers+text",
            name=f"row {e}",
            text=["", str(e)],
            textposition=_beside(u, v),
            line={"color": colors[e], "width": 3},
            marker={"size": [0, 8], "color": colors[e]},
        )
        for e, (u, v) in enumerate(rows)
    ]
    tokens = go.Scatter(
        x=x[:, 0].round(3).tolist(),
        y=x[:, 1].round(3).tolist(),
        mode="markers",
        name="tokens",
        marker={
            "symbol": "square",
            "size": 11,
            "color": [theme.fade(colors[e], 0.75) for e in choice_T],
            "line": {"color": theme.INK, "width": 1},
        },
    )
    load_E = np.bincount(choice_T, minlength=E) / len(x)
    bars = go.Bar(
        x=list(range(E)),
        y=load_E.round(4).tolist(),
        xaxis="x2",
        yaxis="y2",
        name="load",
        cliponaxis=False,
        marker={"color": colors},
        width=0.65,
    )
    square = {"range": [-1.5, 1.5], "showgrid": False, "showticklabels": False}
    return theme.figure(
        [tokens, *arrows, bars, *_even_and_labels(load_E, xaxis="x2", yaxis="y2")],
        height=height,
        margin={"l": 12, "r": 12, "t": 30, "b": 48},
        annotations=[_name("tokens and rows", 1.0), _name("load, %", 1.0) | {"x": 0.56}],
        xaxis={**square, "domain": [0, 0.48], "constrain": "domain", "title": {"text": ""}},
        yaxis={**square, "scaleanchor": "x", "constrain": "domain", "title": {"text": ""}},
        xaxis2={
            "domain": [0.56, 1],
            "anchor": "y2",
            "range": [-0.5, E - 0.5],
            "tickvals": list(range(E)),
            "title": {"text": "expert"},
        },
        yaxis2={
            "anchor": "x2",
            "range": [0, 1.15],
            "showticklabels": False,
            "showgrid": False,
            "title": {"text": ""},
        },
    )


def prices(f_E, before_E, after_E, *, height: int = 400) -> go.Figure:
    """Above, the price of each expert, its load f, with the price that one token expects to pay as a dashed line. Below, that token's
    probabilities: hollow before, filled now.

    Args:
        f_E: (E,) share of the slots. before_E, after_E: (E,) the token's probabilities at the start and now.
    """
    f, before, after = (
        array(v, 1, name)
        for v, name in ((f_E, "f_E"), (before_E, "before_E"), (after_E, "after_E"))
    )
    E, expected = len(f), float((f * after).sum())
    colors, at = theme.expert_colors(E), list(range(E))
    tags = go.Bar(x=at, y=f.round(4).tolist(), name="price", width=0.5, marker={"color": colors})
    line = go.Scatter(
        x=[-0.5, E - 0.5],
        y=[round(expected, 4)] * 2,
        mode="lines",
        name="expected price",
        line={"color": theme.INK, "dash": "dash", "width": 2},
    )
    words = go.Scatter(
        x=at,
        y=[round(max(float(v), expected) + 0.02, 4) for v in f],
        mode="text",
        name="direction",
        text=[_direction(v - expected) for v in f],
        textposition="top center",
        cliponaxis=False,
    )
    shares = [
        go.Bar(
            x=[e + shift for e in at],
            y=values.round(4).tolist(),
            xaxis="x2",
            yaxis="y2",
            width=0.3,
            name=name,
            marker={"color": fill, "line": {"color": colors, "width": 2}},
        )
        for shift, values, name, fill in (
            (-0.17, before, "before", theme.CLEAR),
            (0.17, after, "now", colors),
        )
    ]
    common = {"range": [-0.5, E - 0.5], "tickvals": at}
    return theme.figure(
        [tags, line, words, *shares],
        height=height,
        barmode="overlay",
        margin={"l": 56, "r": 12, "t": 26, "b": 46},
        annotations=[
            _name("price: an expert's load (dashed: expected)", 1.0),
            _name("probabilities (hollow: at first)", 0.43),
        ],
        xaxis={**common, "anchor": "y", "title": {"text": ""}},
        yaxis={"domain": [0.57, 1], "range": [0, 0.95], "nticks": 4, "title": {"text": ""}},
        xaxis2={**common, "anchor": "y2", "title": {"text": "expert"}},
        yaxis2={"domain": [0, 0.42], "range": [0, 0.8], "nticks": 4, "title": {"text": ""}},
    )


def waiting(load_E, *, longest: float, height: int = 330) -> go.Figure:
    """A row per GPU, each with one expert: how long it works in this layer, filled, and how long it waits for the busiest, hollow.

    Args:
        load_E: (E,) shares; the time of an even share is 1. longest: upper end of the axis, the same in every frame.
    """
    time_E = array(load_E, 1, "load_E")
    time_E = time_E / time_E.mean()
    E, colors = len(time_E), theme.expert_colors(len(time_E))
    last = float(time_E.max())
    work, wait = (
        go.Bar(
            x=values.round(3).tolist(),
            y=list(range(E)),
            orientation="h",
            name=name,
            width=0.7,
            marker={"color": fill, "line": {"color": edge, "width": 1}},
        )
        for name, values, fill, edge in (
            ("works", time_E, colors, colors),
            ("waits", last - time_E, theme.CLEAR, theme.MUTED),
        )
    )
    even = go.Scatter(
        x=[1, 1],
        y=[-0.5, E - 0.5],
        mode="lines",
        name="even",
        line={"color": theme.INK, "dash": "dash", "width": 1.5},
    )
    return theme.figure(
        [work, wait, even],
        height=height,
        barmode="stack",
        margin={"l": 56, "r": 16, "t": 8, "b": 48},
        xaxis={"title": {"text": "time in this layer (even load: 1)"}, "range": [0, longest]},
        yaxis={
            "title": {"text": "GPU, one expert each"},
            "range": [E - 0.5, -0.5],
            "tickvals": list(range(E)),
            "showgrid": False,
        },
    )


def score_strip(scores_TE, experts_T, *, height: int = 420) -> go.Figure:
    """Above, each token a column: its probabilities stacked in the experts' colours, its choice a square on top. Below, the load.

    Args:
        scores_TE: (T, E) probabilities. experts_T: (T,) the expert each token takes.
    """
    scores, choice_T = (
        array(scores_TE, 2, "scores_TE"),
        array(experts_T, 1, "experts_T").astype(int),
    )
    T, E = scores.shape
    colors = theme.expert_colors(E)
    stacks = [
        go.Bar(
            x=list(range(T)),
            y=[round(v, 3) for v in scores[:, e].tolist()],
            name=f"expert {e}",
            marker={"color": theme.fade(colors[e], 0.75), "line": {"width": 0}},
        )
        for e in range(E)
    ]
    chosen = go.Scatter(
        x=list(range(T)),
        y=[1.09] * T,
        mode="markers",
        name="takes",
        cliponaxis=False,
        marker={"symbol": "square", "size": 9, "color": [colors[e] for e in choice_T]},
    )
    load_E = np.bincount(choice_T, minlength=E) / T
    bars = go.Bar(
        x=list(range(E)),
        y=load_E.tolist(),
        xaxis="x2",
        yaxis="y2",
        name="load",
        cliponaxis=False,
        marker={"color": colors},
        width=0.65,
    )
    even = _even_and_labels(load_E, xaxis="x2", yaxis="y2")
    return theme.figure(
        [*stacks, chosen, bars, *even],
        height=height,
        barmode="stack",
        bargap=0.12,
        margin={"l": 56, "r": 12, "t": 34, "b": 44},
        annotations=[
            _name("each token: probabilities, and its choice", 1.0, shift=4),
            _name("load, % of the tokens", 0.33),
        ],
        xaxis={
            "domain": [0, 1],
            "anchor": "y",
            "range": [-0.7, T - 0.3],
            "showticklabels": False,
            "title": {"text": ""},
        },
        yaxis={
            "domain": [0.46, 0.97],
            "range": [0, 1.16],
            "tickvals": [0, 0.5, 1],
            "title": {"text": "probability"},
        },
        xaxis2={
            "domain": [0, 1],
            "anchor": "y2",
            "range": [-0.5, E - 0.5],
            "tickvals": list(range(E)),
            "title": {"text": "expert"},
        },
        yaxis2={
            "domain": [0, 0.32],
            "range": [0, 1.2],
            "tickformat": ".0%",
            "tickvals": [0, 0.5, 1],
        },
    )


def tradeoff(names: list[str], panels: dict, *, x_title: str, height: int = 430) -> go.Figure:
    """One panel per quantity, one above the other, over the same settings: a dot per seed, the means joined by a line.

    Args:
        names: the settings, from left to right.
        panels: title -> (values (settings, seeds), (low, high) of the axis).
    """
    n, traces, notes, layout = len(panels), [], [], {}
    for i, (title, (values, limits)) in enumerate(panels.items()):
        values = array(values, 2, title)
        color, axis = theme.OKABE_ITO[(0, 5, 2)[i % 3]], "y" if i == 0 else f"y{i + 1}"
        high, low = _span(i, n)
        x = [j for j in range(len(names)) for _ in range(values.shape[1])]
        traces.append(
            go.Scatter(
                x=x,
                y=values.flatten().tolist(),
                yaxis=axis,
                mode="markers",
                name=f"{title}, a seed",
                cliponaxis=False,
                marker={
                    "size": 10,
                    "color": theme.fade(color, 0.5),
                    "line": {"color": color, "width": 1.5},
                },
            )
        )
        traces.append(
            go.Scatter(
                x=list(range(len(names))),
                y=values.mean(1).tolist(),
                yaxis=axis,
                mode="lines",
                name=f"{title}, mean",
                line={"color": color, "width": 2.5},
            )
        )
        notes.append(_name(title, high))
        layout["yaxis" + axis[1:]] = {
            "domain": [low, high - 0.01],
            "range": list(limits),
            "nticks": 5,
        }
    return theme.figure(
        traces,
        height=height,
        margin={"l": 56, "r": 16, "t": 8, "b": 48},
        annotations=notes,
        **layout,
        xaxis={
            "title": {"text": x_title},
            "range": [-0.4, len(names) - 0.6],
            "tickvals": list(range(len(names))),
            "ticktext": names,
            "anchor": "y" if n == 1 else f"y{n}",
        },
    )


def cost_and_balance(
    arms: list[str], cost, violation, *, x_title: str = "coefficient of the balance loss"
) -> go.Figure:
    """What a balance loss costs and what it brings. cost, violation: (arms, seeds)."""
    panels = {
        "held-out loss above that at 0 (nats)": (cost, (-0.05, 0.25)),
        "MaxVio": (violation, (0, 6)),
    }
    return tradeoff(arms, panels, x_title=x_title)


def _beside(u, v):
    """Where the name of an arrow stands: at its far side."""
    if abs(u) > abs(v):
        return "middle right" if u > 0 else "middle left"
    return "top center" if v > 0 else "bottom center"


def _direction(over):
    """What happens to a probability whose price is so much over the expected one."""
    return "down" if over > 1e-6 else "up" if over < -1e-6 else "stays"


def _even_and_labels(load_E, **axes):
    """The dashed line of the even load, and each share in percent: above its bar, and above the line where the bar is lower."""
    E, even = len(load_E), 1 / len(load_E)
    line = go.Scatter(
        x=[-0.5, E - 0.5],
        y=[even, even],
        mode="lines",
        hoverinfo="skip",
        line={"color": theme.INK, "dash": "dash", "width": 1.5},
        **axes,
    )
    labels = go.Scatter(
        x=list(range(E)),
        y=[round(max(float(v), even), 4) for v in load_E],
        mode="text",
        text=[f"{100 * v:.0f}" for v in load_E],
        textposition="top center",
        hoverinfo="skip",
        cliponaxis=False,
        **axes,
    )
    return line, labels


def _span(i, n):
    """Top and bottom of panel i of n; its name stands in the gap above it."""
    unit = 1 / n
    return 1 - i * unit - 0.09, 1 - (i + 1) * unit + (0.03 if i < n - 1 else 0)


def _name(text, y, shift=2):
    return {
        "x": 0,
        "xref": "paper",
        "y": y,
        "yref": "paper",
        "yshift": shift,
        "text": text,
        "showarrow": False,
        "xanchor": "left",
        "yanchor": "bottom",
    }
