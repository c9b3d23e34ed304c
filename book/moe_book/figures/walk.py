"""A token's walk through an MoE layer: from the token to its experts, and back to where it stood."""

import plotly.graph_objects as go

from .. import theme
from ._arrays import array


def token_walk(
    tokens: list[str],
    expert_indices,
    expert_weights,
    *,
    n_experts: int,
    current: int,
    height: int = 400,
) -> go.Figure:
    """Tokens on the left, experts in the middle, outputs on the right; the routes of tokens up to ``current``, the last one bold.

    Args:
        tokens: T labels.
        expert_indices, expert_weights: (T, K) the experts of each token and their weights in 0 .. 1 (the width of the route).
        n_experts: E.
        current: 0 .. T-1, the token that is walking now; later ones have not set out yet.

    Raises:
        ValueError: current is not a token.
    """
    index_TK, weight_TK = (
        array(expert_indices, 2, "expert_indices"),
        array(expert_weights, 2, "expert_weights"),
    )
    T = len(index_TK)
    if not 0 <= current < T:
        raise ValueError(f"current={current} must be between 0 and T-1={T - 1}")
    token_y = [T - 1 - t for t in range(T)]
    expert_y = [(T - 1) * (1 - (e + 0.5) / n_experts) for e in range(n_experts)]
    # One line an expert for all who have passed, and one a slot for the token that walks: few lines are quick to draw.
    gone = [(t, int(e)) for t in range(current) for e in index_TK[t]]
    walks = [([(t, e) for t, of in gone if of == e], e, 1.5, 0.32) for e in range(n_experts)]
    walks += [
        ([(current, int(e))], int(e), 1 + 9 * float(w), 1.0)
        for e, w in zip(index_TK[current], weight_TK[current])
    ]
    traces = []
    for routes, e, width, alpha in walks:
        y = [v for t, _ in routes for v in [*_curve(token_y[t], expert_y[e]), None]]
        traces.append(
            go.Scatter(
                x=[*_ACROSS, None] * len(routes),
                y=y,
                mode="lines",
                line={"color": theme.fade(theme.expert_color(e, n_experts), alpha), "width": width},
            )
        )
    count_E = [int((index_TK[: current + 1] == e).sum()) for e in range(n_experts)]
    labels = [_visible(token) for token in tokens]
    for x, shown in ((0, T), (2, current + 1)):
        sizes = [30] * T
        fill = [theme.fade(theme.INK, 0.0)] * T
        ink = [
            theme.INK if t == current else theme.MUTED if t < shown else theme.CLEAR
            for t in range(T)
        ]
        traces.append(
            go.Scatter(
                x=[x] * T,
                y=token_y,
                mode="markers+text",
                text=labels,
                textfont={"size": 16, "color": ink, "family": "monospace"},
                marker={
                    "symbol": "square",
                    "size": sizes,
                    "color": fill,
                    "line": {"width": [3 if t == current else 1 for t in range(T)], "color": ink},
                },
            )
        )
    traces.append(
        go.Scatter(
            x=[1] * n_experts,
            y=expert_y,
            mode="markers",
            marker={
                "symbol": "square",
                "size": 46,
                "color": [theme.expert_color(e, n_experts) for e in range(n_experts)],
            },
        )
    )
    traces.append(
        go.Scatter(
            x=[1] * n_experts,
            y=[y - 0.72 for y in expert_y],
            mode="text",
            textfont={"color": theme.INK, "size": 13},
            text=[f"expert {e}: {n} slot{'' if n == 1 else 's'}" for e, n in enumerate(count_E)],
        )
    )
    hidden = {"visible": False, "range": [-0.15, 2.15]}
    return theme.figure(
        traces,
        height=height,
        margin={"l": 4, "r": 4, "t": 28, "b": 4},
        xaxis=hidden,
        yaxis={"visible": False, "range": [-0.75, T - 0.4]},
        annotations=[
            {
                "x": x,
                "y": 1,
                "yref": "paper",
                "yanchor": "bottom",
                "showarrow": False,
                "text": text,
                "font": {"color": theme.MUTED},
            }
            for x, text in ((0, "in"), (1, "experts"), (2, "out"))
        ],
    )


_STEPS = [i / 10 for i in range(11)]
_ACROSS = [0.09 + 0.83 * s for s in _STEPS] + [1.08 + 0.83 * s for s in _STEPS]


def _curve(token_y: float, expert_y: float) -> list[float]:
    """There and back: level at both ends, steepest in the middle (smoothstep)."""
    there = [round(token_y + (expert_y - token_y) * s * s * (3 - 2 * s), 3) for s in _STEPS]
    return there + there[::-1]


def _visible(token: str) -> str:
    return {" ": "␣", "\n": "⏎"}.get(token, token)
