"""Chapter 2's own figures: from logits to weights, regions of the plane, the push on each logit, runs as dots."""

import math

import plotly.graph_objects as go
import torch

from moe_core import TopKRouter

from .. import theme
from ._arrays import array


def score_steps(logits, scores, weights, *, logit_top: float, height: int = 430) -> go.Figure:
    """Three panels, one above the other: an expert's logit, its probability, its weight; experts without weight are hollow.

    Args:
        logits, scores, weights: (E,) each, none below 0; a weight of 0 means not chosen.
        logit_top: upper end of the logits' axis, the same in all frames of an Explorer.
    """
    rows = [
        array(v, 1, name)
        for v, name in ((logits, "logits"), (scores, "scores"), (weights, "weights"))
    ]
    E, chosen = len(rows[0]), rows[2] > 0
    colors = theme.expert_colors(E)
    fill = [c if yes else theme.CLEAR for c, yes in zip(colors, chosen)]
    ranges = [[0, logit_top], [0, 1.3], [0, 1.3]]
    spans = [(0.74, 1.0), (0.40, 0.66), (0.06, 0.32)]
    traces, layout = [], {}
    for i, (values, title) in enumerate(zip(rows, ("logit", "probability", "weight")), start=1):
        bars = _signed_bars(title, values, fill, colors)
        traces.append(bars.update(xaxis="x", yaxis=f"y{i}" if i > 1 else "y"))
        layout["yaxis" if i == 1 else f"yaxis{i}"] = {
            **_axis(title),
            "domain": spans[i - 1],
            "range": ranges[i - 1],
            "nticks": 4,
            "zeroline": True,
            "zerolinecolor": theme.MUTED,
        }
    return theme.figure(
        traces,
        height=height,
        bargap=0.4,
        margin={"l": 56, "r": 16, "t": 8, "b": 40},
        xaxis={**_experts(E), "anchor": "y3"},
        **layout,
    )


def regions(
    router: TopKRouter, x_TD, *, cloud_TD=None, reach: float = 2.4, height: int = 430
) -> go.Figure:
    """The plane of two-dimensional tokens: whose row has the largest dot product where, and where tokens lie.

    A wedge has the colour of the first choice there; a token has its first choice as fill and its second as outline; lines from the
    origin are the router's rows.

    Args:
        router: with d_model=2 and top_k=2. x_TD: (T, 2) tokens.
        cloud_TD: (S, 2) copies of one token, drawn small.
        reach: half the width of the plane shown.
    """
    E = router.n_experts
    colors = theme.expert_colors(E)
    wedges = [
        go.Scatter(
            x=x,
            y=y,
            mode="none",
            fill="toself",
            fillcolor=theme.fade(colors[e], 0.22),
            hoverinfo="skip",
        )
        for e, (x, y) in enumerate(_wedges(router, 4 * reach))
    ]
    rows = [
        go.Scatter(
            x=[0, w[0]],
            y=[0, w[1]],
            mode="lines+markers+text",
            line={"color": colors[e], "width": 4},
            text=["", f"expert {e}"],
            textposition="top center",
            textfont={"color": theme.INK},
            marker={"size": [1, 9], "color": colors[e]},
            cliponaxis=False,
        )
        for e, w in enumerate(router.weight.tolist())
    ]
    tokens = [_tokens(router, x_TD, 15, colors)] + (
        [] if cloud_TD is None else [_tokens(router, cloud_TD, 6, colors)]
    )
    axis = {
        "range": [-reach, reach],
        "constrain": "domain",
        "showgrid": False,
        "zeroline": True,
        "zerolinecolor": theme.MUTED,
    }
    return theme.figure(
        [*wedges, *rows, *tokens],
        height=height,
        margin={"l": 48, "r": 8, "t": 8, "b": 48},
        xaxis={**axis, "title": {"text": "first coordinate of the token"}},
        yaxis={**axis, "title": {"text": "second coordinate"}, "scaleanchor": "x"},
    )


def pushes(push, chosen, *, top: float, height: int = 300) -> go.Figure:
    """One bar per expert, up or down: where a gradient step moves its logit. Experts that were not chosen are hollow.

    Args:
        push: (E,) minus the gradient of the loss by each logit. chosen: (E,) bool. top: half the height of the axis.
    """
    push_E, chosen_E = array(push, 1, "push"), array(chosen, 1, "chosen").astype(bool)
    colors = theme.expert_colors(len(push_E))
    bars = _signed_bars(
        "push", push_E, [c if yes else theme.CLEAR for c, yes in zip(colors, chosen_E)], colors
    )
    return theme.figure(
        [bars],
        height=height,
        bargap=0.4,
        margin={"l": 64, "r": 16, "t": 8, "b": 48},
        xaxis=_experts(len(push_E)),
        yaxis={
            **_axis("push on the logit, −∂L/∂h"),
            "range": [-top, top],
            "zeroline": True,
            "zerolinecolor": theme.INK,
        },
    )


def dots(groups: dict, *, x_title: str, x_range, rows: int | None = None) -> go.Figure:
    """One row per name: each run a dot, their mean a bar; names stand above their rows, so that a phone has room.

    Args:
        groups: name -> (S,) one value a seed.
        x_range: (low, high); fix it across the frames of an Explorer.
        rows: how many rows to leave room for; by default as many as there are.
    """
    traces, notes = [], []
    for i, (name, values) in enumerate(groups.items()):
        value_S, color = array(values, 1, name), theme.OKABE_ITO[i % 8]
        traces.append(
            go.Scatter(
                x=value_S.tolist(),
                y=[i] * len(value_S),
                mode="markers",
                name=name,
                marker={
                    "size": 13,
                    "color": theme.fade(color, 0.55),
                    "line": {"color": color, "width": 1.5},
                },
            )
        )
        traces.append(
            go.Scatter(
                x=[float(value_S.mean())] * 2,
                y=[i - 0.25, i + 0.25],
                mode="lines",
                name=f"{name}, mean",
                line={"color": theme.INK, "width": 2},
            )
        )
        notes.append(
            {
                "x": 0,
                "xref": "paper",
                "y": i - 0.42,
                "text": f"{name}: mean {value_S.mean():.3f}",
                "showarrow": False,
                "xanchor": "left",
                "yanchor": "middle",
            }
        )
    rows = rows or len(groups)
    return theme.figure(
        traces,
        height=70 + 54 * rows,
        margin={"l": 16, "r": 16, "t": 8, "b": 48},
        annotations=notes,
        xaxis={"title": {"text": x_title}, "range": list(x_range), "showgrid": True},
        yaxis={"visible": False, "range": [rows - 0.5, -0.75]},
    )


def agreement(tokens, experts_T) -> float:
    """Share of the pairs of equal tokens that have the same expert."""
    pairs = [
        experts_T[i] == experts_T[j]
        for i in range(len(tokens))
        for j in range(i)
        if tokens[i] == tokens[j]
    ]
    return sum(pairs) / len(pairs)


def _choices(router, x_TD):
    with torch.no_grad():
        return router(x_TD.to(router.weight.dtype).unsqueeze(0)).expert_indices[0]


def _wedges(router, radius):
    """For each expert the outline of where it is first: without a bias only the direction of a token decides, so a slice of the circle."""

    def ring(degrees):
        angle = degrees * math.pi / 180
        return radius * torch.stack([angle.cos(), angle.sin()], dim=-1)

    edge_AD = ring(torch.arange(361, dtype=torch.float64))
    first_A = _choices(router, ring(torch.arange(360, dtype=torch.float64) + 0.5))[
        :, 0
    ].tolist()  # in the middle of each degree
    outlines = [([], []) for _ in range(router.n_experts)]
    start = 0
    for a in range(1, 361):
        if a == 360 or first_A[a] != first_A[start]:
            arc = edge_AD[[*range(start, a, 30), a]]
            x, y = outlines[first_A[start]]
            x += [0, *arc[:, 0].tolist(), 0, None]
            y += [0, *arc[:, 1].tolist(), 0, None]
            start = a
    return outlines


def _tokens(router, x_TD, size, colors):
    choice_TK = _choices(router, x_TD).tolist()
    return go.Scatter(
        x=x_TD[:, 0].tolist(),
        y=x_TD[:, 1].tolist(),
        mode="markers",
        name="tokens",
        meta="choices",
        customdata=[f"experts {a} and {b}" for a, b in choice_TK],
        marker={
            "symbol": "square",
            "size": size,
            "color": [colors[a] for a, _ in choice_TK],
            "line": {"color": [colors[b] for _, b in choice_TK], "width": size / 5},
        },
    )


def _signed_bars(name, values, fill, outline):
    return go.Bar(
        x=list(range(len(values))),
        y=values.tolist(),
        name=name,
        textposition="outside",
        textangle=0,
        cliponaxis=False,
        text=[f"{v:.2f}".replace("-", "−") if v else "0" for v in values],
        marker={"color": fill, "line": {"color": outline, "width": 2}},
    )


def _axis(title):
    return {"title": {"text": title}}


def _experts(E):
    return {
        "title": {"text": "expert"},
        "range": [-0.5, E - 0.5],
        "tickvals": list(range(E)),
        "ticktext": [str(e) for e in range(E)],
    }
