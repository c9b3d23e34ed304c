"""The routing map: who goes where."""

from html import escape

import plotly.graph_objects as go

from .. import theme
from ._arrays import array
from ._ramp import GREYS, ROOM, strip


def routing_map(
    expert_indices,
    expert_weights=None,
    kept=None,
    *,
    n_experts: int,
    tokens: list[str] | None = None,
    chosen=None,
    scores=None,
    unit: str = "probability",
    top: float | None = None,
    height: int | None = None,
) -> go.Figure:
    """Tokens in rows, experts in columns; a square where a token goes to an expert, the stronger the more weight, hollow if dropped.

    With scores it is the expert-token heatmap: grey cells under the squares say how much the router wants each pair, chosen or not.

    Args:
        expert_indices: (T, K) int, the expert of each slot; a (B, N, K) tensor is read as T = B*N tokens.
        expert_weights: (T, K) in 0 .. 1, sets how solid a square is; None draws all solid.
        kept: (T, K) bool, False where the slot was dropped; None: all kept. Pass routing.capacity_mask.
        n_experts: E, the number of columns.
        tokens: T labels for the rows; by default their numbers.
        chosen: (T, K) bool, False where a slot was never wanted and is not drawn, for routers with K = E slots; None: all wanted.
        scores: (T, E) or (B, N, E), at least 0; None draws no cells.
        unit, top: what the scores are, and the one that is drawn darkest (default 1, or the largest if that is more).
        height: pixels; by default grows with T.

    Raises:
        ValueError: shapes differ, a score is negative, or an index is not in 0 .. n_experts - 1.
    """
    index_TK = _slots(expert_indices, "expert_indices").astype(int)
    T, K = index_TK.shape
    given = {"expert_weights": expert_weights, "kept": kept, "chosen": chosen}
    slots = {name: None if v is None else _slots(v, name) for name, v in given.items()}
    for name, values in slots.items():
        if values is not None and values.shape != (T, K):
            raise ValueError(
                f"{name} has shape {values.shape}; it must match expert_indices {(T, K)}"
            )
    if T and not 0 <= index_TK.min() <= index_TK.max() < n_experts:
        raise ValueError(
            f"expert_indices must be between 0 and n_experts-1={n_experts - 1}, found {index_TK.min()} to {index_TK.max()}"
        )
    labels = (
        [str(t) for t in range(T)]
        if tokens is None
        else [escape(str(t).replace("\n", "⏎"), quote=False) for t in tokens]  # plotly reads tags
    )
    if len(labels) != T:
        raise ValueError(f"tokens has {len(labels)} labels; there are {T} tokens")

    room = 0 if scores is None else ROOM
    height = height or max(160, min(900, 90 + 30 * T)) + room
    tall, wide = (
        (0.8, 260) if scores is None else (0.5, 170)
    )  # over cells squares are smaller: one sees what they stand on
    size = max(4, min(24, tall * (height - 90 - room) / max(T, 1), wide / n_experts))
    cells, key, layout, domain = (), (), {}, {}
    if scores is not None:
        cells, key, layout, domain = _cells(
            _slots(scores, "scores"), (T, n_experts), unit, top, height - 60
        )
    points = {"kept": [], "dropped": []}
    for t in range(T):
        for k in range(K):
            if slots["chosen"] is not None and not slots["chosen"][t, k]:
                continue
            weight = (
                1.0 if slots["expert_weights"] is None else float(slots["expert_weights"][t, k])
            )
            alive = slots["kept"] is None or bool(slots["kept"][t, k])
            points["kept" if alive else "dropped"].append((int(index_TK[t, k]), t, weight))
    return theme.figure(
        [
            *cells,
            _heads(n_experts),
            *(
                _squares(name, rows, n_experts, size, 0.2 if scores is None else 1.0)
                for name, rows in points.items()
            ),
            *key,
        ],
        height=height,
        **layout,
        margin={"l": 24 + 8 * max([4, *map(len, labels)]), "r": 8, "t": 52, "b": 8},
        xaxis={
            "title": {"text": "expert"},
            "side": "top",
            "range": [-0.6, n_experts - 0.4],
            "tickvals": list(range(n_experts)),
            "ticktext": [str(e) for e in range(n_experts)],
            "showgrid": scores is None,
        },
        yaxis={
            "title": {"text": "token"},
            "range": [T - 0.4, -1.5],
            **domain,
            "tickvals": list(range(T)),
            "ticktext": labels,
        },
    )


def _slots(values, name):
    values = array(values, name=name)
    return array(values.reshape(-1, values.shape[-1]) if values.ndim > 2 else values, 2, name)


def _cells(score_TE, shape, unit, top, plot_height):
    """The cells, the strip that explains them, its layout and the domain that it leaves."""
    if score_TE.shape != shape or (score_TE < 0).any():
        raise ValueError(f"scores of shape {score_TE.shape} must be {shape} numbers, at least 0")
    top = top or max(1.0, float(score_TE.max(initial=0)))
    cells = go.Heatmap(
        x=list(range(shape[1])),
        y=list(range(shape[0])),
        z=score_TE.round(3).tolist(),
        zmin=0,
        zmax=top,
        colorscale=GREYS,
        showscale=False,
        xgap=2,
        ygap=2,
        name=unit,
        meta=unit,
    )
    shades, ticks = (
        [top * (i + 0.5) / 20 for i in range(20)],
        {0: "0", 10: f"{top / 2:.3g}", 20: f"{top:.3g}"},
    )
    key, layout, domain = strip(
        unit, shades, ticks, colorscale=GREYS, zmax=top, plot_height=plot_height, at="bottom"
    )
    return [cells], [key], layout, {"domain": domain, "showgrid": False}


def _heads(n_experts):
    """A disc in its colour for each expert, above its column."""
    return go.Scatter(
        x=list(range(n_experts)),
        y=[-1] * n_experts,
        mode="markers",
        hoverinfo="skip",
        marker={"size": min(14, 200 / n_experts), "color": theme.expert_colors(n_experts)},
    )


def _squares(name, points, n_experts, size, faintest):
    colors = [theme.expert_color(e, n_experts) for e, _, _ in points]
    kept = name == "kept"
    # Even a small weight stays visible: opacity runs from 0.2 to 1. Over cells it is 1: their grey says how much.
    fill = (
        [
            theme.fade(c, faintest + (1 - faintest) * min(1.0, max(0.0, w)))
            for c, (_, _, w) in zip(colors, points)
        ]
        if kept
        else theme.CLEAR
    )
    return go.Scatter(
        x=[e for e, _, _ in points],
        y=[t for _, t, _ in points],
        customdata=[w for _, _, w in points],
        meta="weight",
        mode="markers",
        name=name,
        marker={
            "symbol": "square",
            "size": size,
            "color": fill,
            "line": {"color": colors, "width": 1.5 if kept else 2},
        },
    )
