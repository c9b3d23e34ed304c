"""Distributions of scores."""

import numpy as np
import plotly.graph_objects as go

from .. import theme
from ._arrays import array


def score_histogram(
    groups,
    *,
    bins: int = 30,
    span: tuple[float, float] = (0.0, 1.0),
    threshold: float | None = None,
    unit: str = "score",
    top: float | None = None,
    height: int = 300,
) -> go.Figure:
    """Histograms as steps, of all tokens or group by group, and a threshold as a dashed line.

    Args:
        groups: (T,) values, or a dict name -> (T,). An int as a name is an expert and takes its colour.
        bins: number of bins over span = (low, high).
        threshold: drawn as a dashed vertical line.
        top: upper end of the axis (share of the tokens in a bin).
    """
    groups = groups if isinstance(groups, dict) else {"tokens": groups}
    edges = np.linspace(*span, bins + 1)
    experts = [name for name in groups if isinstance(name, int)]
    traces, peak = [], 0.0
    for i, (name, values) in enumerate(groups.items()):
        values = array(values, 1, str(name))
        share = np.histogram(values, edges)[0] / max(len(values), 1)
        peak = max(peak, share.max())
        color = (
            theme.expert_color(name, max(8, max(experts) + 1))
            if isinstance(name, int)
            else theme.OKABE_ITO[i % 8]
        )
        traces.append(
            go.Scatter(
                x=edges.tolist(),
                y=[*share.tolist(), 0],
                mode="lines",
                line={"shape": "hv", "color": color, "width": 2},
                fill="tozeroy",
                fillcolor=theme.fade(color, 0.25),
                name=f"expert {name}" if isinstance(name, int) else name,
            )
        )
    top = top or 1.1 * peak or 1.0
    if threshold is not None:
        traces.append(
            go.Scatter(
                x=[threshold, threshold],
                y=[0, top],
                mode="lines",
                line={"color": theme.INK, "dash": "dash", "width": 1.5},
                name=f"threshold {threshold:.3g}",
            )
        )
    return theme.figure(
        traces,
        height=height,
        showlegend=len(traces) > 1,
        margin={"l": 64, "r": 16, "t": 40 if len(traces) > 1 else 12, "b": 48},
        xaxis={"title": {"text": unit}, "range": list(span)},
        yaxis={"title": {"text": "share of tokens"}, "range": [0, top]},
    )
