"""Figures of chapter 5: loads side by side and over time, scores of many tokens at once, and quality against balance."""

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
            "title": {"text": "expert (bars: share of the slots, %; dashed: even)"},
            "range": [-0.5, E - 0.5],
            "tickvals": list(range(E)),
            "ticktext": [str(e) for e in range(E)],
            "anchor": "y" if n == 1 else f"y{n}",
        },
    )


def load_over_time(
    load_SE, step_S, *, switched_on: int | None = None, height: int = 320
) -> go.Figure:
    """How the slots were shared out at each step: a band per expert, in its colour, as wide as its share.

    Args:
        load_SE: (S, E) shares, each row sums to 1. step_S: (S,) steps.
        switched_on: a step to mark with a vertical line.
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
        if switched_on is None
        else [
            {
                "type": "line",
                "x0": switched_on,
                "x1": switched_on,
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


def cost_and_balance(coefficients: list[str], cost, violation) -> go.Figure:
    """What a balance loss costs and what it brings. cost, violation: (coefficients, seeds)."""
    panels = {
        "held-out loss above that at 0 (nats)": (cost, (-0.05, 0.25)),
        "MaxVio": (violation, (0, 6)),
    }
    return tradeoff(coefficients, panels, x_title="coefficient of the balance loss")


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
