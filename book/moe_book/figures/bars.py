"""Bars, one per expert: how much each does, and how each scores."""

import plotly.graph_objects as go

from .. import theme
from ._arrays import array


def load_bars(
    load,
    *,
    capacity: float | None = None,
    uniform: bool | float = False,
    dropped=None,
    unit: str = "tokens",
    top: float | None = None,
    height: int = 300,
) -> go.Figure:
    """A bar per expert in the expert's colour; capacity or the uniform load as a dashed line; what was turned away hollow on top.

    Args:
        load: (E,) what each expert takes, in `unit` (counts, or shares of 1).
        capacity: places per expert, drawn as a dashed line.
        uniform: True draws the mean of load + dropped as a dashed line; a number draws that.
        dropped: (E,) what each expert turned away.
        top: upper end of the axis; fix it across the frames of an Explorer, so that bars can be compared.

    Raises:
        ValueError: shapes differ.
    """
    load_E = array(load, 1, "load")
    over_E = load_E * 0 if dropped is None else array(dropped, 1, "dropped")
    if over_E.shape != load_E.shape:
        raise ValueError(f"dropped has shape {over_E.shape}; it must match load {load_E.shape}")
    E, total_E = len(load_E), load_E + over_E
    lines = [] if capacity is None else [("capacity", float(capacity))]
    if uniform is not False:
        lines.append(("uniform", float(total_E.mean()) if uniform is True else float(uniform)))
    top = top or 1.15 * max([*total_E, *(value for _, value in lines), 1e-9])
    colors = theme.expert_colors(E)
    taken = _bars("taken", load_E, colors, colors)
    if dropped is not None:
        taken.textposition = "inside"  # the room on top belongs to what was turned away
    hollow = [] if dropped is None else [_bars("dropped", over_E, theme.CLEAR, colors)]
    return theme.figure(
        [taken, *hollow, *(_line(name, value, E, unit) for name, value in lines)],
        height=height,
        barmode="stack",
        bargap=0.35,
        margin={"l": 60, "r": 110 if lines else 16, "t": 12, "b": 48},
        xaxis=_experts(E),
        yaxis={"title": {"text": unit}, "range": [0, top]},
    )


def score_bars(
    scores,
    *,
    chosen=None,
    threshold: float | None = None,
    unit: str = "score",
    top: float | None = None,
    bottom: float = 0.0,
    height: int = 280,
) -> go.Figure:
    """The scores of one token over the experts; chosen experts solid, the others hollow; a threshold as a dashed line.

    Args:
        scores: (E,) scores or logits.
        chosen: (E,) bool, or the indices of the chosen experts; None: all solid.
        bottom, top: ends of the axis.
    """
    score_E = array(scores, 1, "scores")
    E = len(score_E)
    picked = set(range(E)) if chosen is None else _picked(array(chosen, 1, "chosen"))
    colors = theme.expert_colors(E)
    bars = _bars(
        unit, score_E, [c if e in picked else theme.CLEAR for e, c in enumerate(colors)], colors
    )
    lines = [] if threshold is None else [_line("threshold", float(threshold), E, "")]
    top = top or 1.18 * max([*score_E, threshold or 0, 1e-9])
    return theme.figure(
        [bars, *lines],
        height=height,
        bargap=0.35,
        margin={"l": 60, "r": 110 if lines else 16, "t": 12, "b": 48},
        xaxis=_experts(E),
        yaxis={"title": {"text": unit}, "range": [bottom, top]},
    )


def _picked(chosen):
    return (
        {e for e, yes in enumerate(chosen) if yes}
        if chosen.dtype == bool
        else {int(e) for e in chosen}
    )


def _bars(name, values, fill, outline):
    return go.Bar(
        x=list(range(len(values))),
        y=values.tolist(),
        name=name,
        text=[f"{v:.3g}" if v else "" for v in values],
        textposition="outside",
        textangle=0,
        cliponaxis=False,
        insidetextanchor="end",
        marker={"color": fill, "line": {"color": outline, "width": 2}},
    )


def _line(name, value, E, unit):
    label = f" {name} {value:.3g}" if unit != "" else f" {name}<br> {value:.3g}"
    return go.Scatter(
        x=[-0.5, E - 0.5],
        y=[value, value],
        mode="lines+text",
        name=name,
        text=["", label],
        textposition="middle right",
        cliponaxis=False,
        line={"color": theme.INK, "dash": "dash", "width": 1.5},
        textfont={"color": theme.INK},
    )


def _experts(E):
    return {
        "title": {"text": "expert"},
        "range": [-0.5, E - 0.5],
        "tickvals": list(range(E)),
        "ticktext": [str(e) for e in range(E)],
    }
