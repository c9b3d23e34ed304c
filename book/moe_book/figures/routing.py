"""The routing map: who goes where."""
import plotly.graph_objects as go

from .. import theme
from ._arrays import array


def routing_map(expert_indices, expert_weights=None, kept=None, *, n_experts: int, tokens: list[str] | None = None, chosen=None,
                height: int | None = None) -> go.Figure:
    """Tokens in rows, experts in columns; a square where a token goes to an expert, the stronger the more weight, hollow if dropped.

    Args:
        expert_indices: (T, K) int, the expert of each slot; a (B, N, K) tensor is read as T = B*N tokens.
        expert_weights: (T, K) in 0 .. 1, sets how solid a square is; None draws all solid.
        kept: (T, K) bool, False where the slot was dropped; None: all kept. Pass routing.capacity_mask.
        n_experts: E, the number of columns.
        tokens: T labels for the rows; by default their numbers.
        chosen: (T, K) bool, False where a slot was never wanted and is not drawn, for routers with K = E slots; None: all wanted.
        height: pixels; by default grows with T.

    Raises:
        ValueError: shapes differ, or an index is not in 0 .. n_experts - 1.
    """
    index_TK = _slots(expert_indices, "expert_indices").astype(int)
    T, K = index_TK.shape
    given = {"expert_weights": expert_weights, "kept": kept, "chosen": chosen}
    slots = {name: None if v is None else _slots(v, name) for name, v in given.items()}
    for name, values in slots.items():
        if values is not None and values.shape != (T, K):
            raise ValueError(f"{name} has shape {values.shape}; it must match expert_indices {(T, K)}")
    if T and not 0 <= index_TK.min() <= index_TK.max() < n_experts:
        raise ValueError(f"expert_indices must be between 0 and n_experts-1={n_experts - 1}, found {index_TK.min()} to {index_TK.max()}")
    labels = [str(t) for t in range(T)] if tokens is None else [str(t).replace("\n", "⏎") for t in tokens]
    if len(labels) != T:
        raise ValueError(f"tokens has {len(labels)} labels; there are {T} tokens")

    height = height or max(160, min(900, 90 + 30 * T))
    size = max(4, min(24, 0.8 * (height - 90) / max(T, 1), 260 / n_experts))
    points = {"kept": [], "dropped": []}
    for t in range(T):
        for k in range(K):
            if slots["chosen"] is not None and not slots["chosen"][t, k]:
                continue
            weight = 1.0 if slots["expert_weights"] is None else float(slots["expert_weights"][t, k])
            alive = slots["kept"] is None or bool(slots["kept"][t, k])
            points["kept" if alive else "dropped"].append((int(index_TK[t, k]), t, weight))
    return theme.figure(
        [_heads(n_experts), *(_squares(name, rows, n_experts, size) for name, rows in points.items())],
        height=height,
        margin={"l": 24 + 8 * max([4, *map(len, labels)]), "r": 8, "t": 52, "b": 8},
        xaxis={"title": {"text": "expert"}, "side": "top", "range": [-0.6, n_experts - 0.4], "tickvals": list(range(n_experts)),
               "ticktext": [str(e) for e in range(n_experts)], "showgrid": True},
        yaxis={"title": {"text": "token"}, "range": [T - 0.4, -1.5], "tickvals": list(range(T)), "ticktext": labels},
    )


def _slots(values, name):
    values = array(values, name=name)
    return array(values.reshape(-1, values.shape[-1]) if values.ndim > 2 else values, 2, name)


def _heads(n_experts):
    """A disc in its colour for each expert, above its column."""
    return go.Scatter(x=list(range(n_experts)), y=[-1] * n_experts, mode="markers", hoverinfo="skip",
                      marker={"size": min(14, 200 / n_experts), "color": theme.expert_colors(n_experts)})


def _squares(name, points, n_experts, size):
    colors = [theme.expert_color(e, n_experts) for e, _, _ in points]
    kept = name == "kept"
    # Even a small weight stays visible: opacity runs from 0.2 to 1.
    fill = [theme.fade(c, 0.2 + 0.8 * min(1.0, max(0.0, w))) for c, (_, _, w) in zip(colors, points)] if kept else theme.CLEAR
    return go.Scatter(
        x=[e for e, _, _ in points], y=[t for _, t, _ in points], customdata=[w for _, _, w in points], meta="weight", mode="markers",
        name=name, marker={"symbol": "square", "size": size, "color": fill, "line": {"color": colors, "width": 1.5 if kept else 2}},
    )
