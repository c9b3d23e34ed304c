"""The load of every expert, step by step."""

import numpy as np
import plotly.graph_objects as go

from .. import theme
from ._arrays import array
from ._ramp import GREY, strip

HOT, COLD = theme.OKABE_ITO[5], theme.OKABE_ITO[0]


def load_over_time(
    load_SE, steps=None, *, x_title: str = "optimiser step", height: int | None = None
) -> go.Figure:
    """Steps across, a row per expert: a cell is blue below the even share 1/E, faint at it, orange above; a dead expert is a thin line.

    A heatmap and no stack of bands: with many experts bands are too thin to follow, and an expert that gets nothing has no band at all.
    What a RoutingLog holds fits: ``[record.layers[l].asked for record in log.training]``.

    Args:
        load_SE: (S, E) slots or shares of each expert at S steps; a row is divided by its sum.
        steps: S positions, increasing; by default 0, 1, 2, ...
        height: pixels; by default grows with E.

    Raises:
        ValueError: shapes differ, there are fewer than 2 steps or experts, steps do not increase, a load is negative, or a step
            has none.
    """
    load_SE = array(load_SE, 2, "load_SE")
    S, E = load_SE.shape
    step_S = np.arange(S) if steps is None else array(steps, 1, "steps")
    total_S = load_SE.sum(1)
    if min(S, E) < 2 or len(step_S) != S or (np.diff(step_S) <= 0).any():
        raise ValueError(
            f"load_SE of shape {(S, E)} must have at least 2 steps and 2 experts, and as many increasing steps as steps has: "
            f"{len(step_S)}"
        )
    if (load_SE < 0).any() or not (total_S > 0).all():
        raise ValueError("load_SE must hold no negative load, and every step must have some")
    multiple_SE = load_SE / total_S[:, None] * E
    height = height or 130 + (max(160, 26 * E) if E <= 16 else min(560, 8 * E))
    margin = {"l": 62, "r": 50 if E <= 16 else 14, "t": 8, "b": 48}
    most, scale = _scale(E)
    key, layout, domain = _key(most, scale, height - margin["t"] - margin["b"])
    edges = np.concatenate(
        [
            [1.5 * step_S[0] - step_S[1] / 2],
            (step_S[1:] + step_S[:-1]) / 2,
            [1.5 * step_S[-1] - step_S[-2] / 2],
        ]
    )
    cells = go.Heatmap(
        x=step_S.tolist(),
        y=list(range(E)),
        z=multiple_SE.T.round(2).tolist(),
        zmin=0,
        zmax=most,
        colorscale=scale,
        showscale=False,
        meta="load, × even share",
    )
    pad = 0.05 * (edges[-1] - edges[0])
    discs = go.Scatter(
        x=[float(edges[0] - pad / 2)] * E,
        y=list(range(E)),
        mode="markers",
        hoverinfo="skip",
        marker={"size": min(10, 0.5 * (height - 130) / E), "color": theme.expert_colors(E)},
    )
    last = [] if E > 16 else [_last(multiple_SE[-1] / E, float(edges[-1]))]
    every = 1 if E <= 16 else E // 8
    return theme.figure(
        [cells, _flat(load_SE, edges), discs, *last, key],
        height=height,
        margin=margin,
        **layout,
        xaxis={"title": {"text": x_title}, "range": [float(edges[0] - pad), float(edges[-1])]},
        yaxis={
            "title": {"text": "expert"},
            "range": [E - 0.5, -0.5],
            "domain": domain,
            "showgrid": False,
            "tickvals": list(range(0, E, every)),
            "ticktext": [str(e) for e in range(0, E, every)],
        },
    )


def _scale(E):
    """The largest multiple that has a colour of its own, and the colours: by factors of 2 away from the even share, which is faint."""
    most = min(8.0, float(E))
    cold = [(2.0**k, theme.fade(COLD, min(1.0, 0.12 + 0.3 * -k))) for k in (-3, -2, -1)]
    hot = [(most ** (i / 3), theme.fade(HOT, 0.12 + 0.28 * i)) for i in (1, 2, 3)]
    stops = [
        (0.0, theme.CLEAR),
        (1e-3, theme.CLEAR),
        (1.1e-3, theme.fade(COLD, 1.0)),
        *cold,
        (1.0, theme.fade(GREY, 0.12)),
        *hot,
    ]
    return most, [[value / most, color] for value, color in stops]


def _key(most, scale, plot_height):
    """First what is dead, then from an eighth of the even share to the most, equal factors side by side."""
    steps, last = 4, int(np.log2(most))  # steps to a factor of 2
    shades = [0] * steps + [2 ** ((i + 0.5) / steps) for i in range(-3 * steps, last * steps)]
    names = {-2: "¼", -1: "½", 0: "even", **{k: f"{2**k}×" for k in range(1, last + 1)}}
    ticks = {steps / 2: "dead", **{(k + 4) * steps: name for k, name in names.items()}}
    return strip(
        "load", shades, ticks, colorscale=scale, zmax=most, plot_height=plot_height, left=0.15
    )


def _flat(load_SE, edges):
    """A thin line through the steps at which an expert got nothing."""
    x, y = [], []
    for e, dead_S in enumerate((load_SE == 0).T):
        turns = np.flatnonzero(np.diff(np.concatenate([[False], dead_S, [False]])))
        for first, end in turns.reshape(-1, 2):
            x += [float(edges[first]), float(edges[end]), None]
            y += [e, e, None]
    width = 1.5 if load_SE.shape[1] <= 16 else 0.75
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        name="dead",
        hoverinfo="skip",
        line={"color": theme.MUTED, "width": width},
    )


def _last(share_E, x):
    text = [
        "dead" if share == 0 else f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"
        for share in share_E
    ]
    return go.Scatter(
        x=[x] * len(share_E),
        y=list(range(len(share_E))),
        mode="text",
        text=[f" {words}" for words in text],
        hoverinfo="skip",
        textposition="middle right",
        cliponaxis=False,
        textfont={"size": 12},
    )
