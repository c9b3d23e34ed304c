"""Chapter 10's own figures: experts' logits with cutoffs that move, and bars with a whisker over seeds."""

import numpy as np
import plotly.graph_objects as go

from .. import theme
from ._arrays import array


def moving_cutoffs(
    logits_TE,
    thresholds,
    own_cuts,
    *,
    span: tuple[float, float] = (-4.0, 6.0),
    bins: int = 40,
    top: float = 0.2,
    height: int = 430,
) -> go.Figure:
    """A panel per expert: the histogram of this batch's logits, the threshold in force (line), and where the batch itself would cut (dots).

    Args:
        logits_TE: (T, E) this batch's logits.
        thresholds: (E,) what they are compared with. own_cuts: (E,) each expert's k-th largest logit in this batch.
        span, bins: of the logits' axis, the same in all frames of an Explorer. top: upper end of the share axis.
    """
    logits_TE, thresholds, own_cuts = (
        array(logits_TE, 2, "logits_TE"),
        array(thresholds, 1, "thresholds"),
        array(own_cuts, 1, "own_cuts"),
    )
    E, edges, traces, layout, notes = logits_TE.shape[1], np.linspace(*span, bins + 1), [], {}, []
    gap = 0.12
    tall = (1 - gap * (E - 1)) / E
    for e in range(E):
        axis, color = f"y{e + 1}" if e else "y", theme.expert_color(e)
        share = np.histogram(logits_TE[:, e], edges)[0] / len(logits_TE)
        for x, y, above in _split(edges, share, float(thresholds[e])):
            traces.append(
                go.Scatter(
                    x=x,
                    y=y,
                    mode="lines",
                    yaxis=axis,
                    line={"shape": "hv", "color": color, "width": 1.5},
                    fill="tozeroy",
                    fillcolor=theme.fade(color, 0.75 if above else 0.12),
                    name=f"expert {e}, {'above' if above else 'below'}",
                )
            )
        for value, dash, name in (
            (thresholds[e], "solid", "threshold in force"),
            (own_cuts[e], "dot", "where this batch would cut"),
        ):
            traces.append(
                go.Scatter(
                    x=[float(value)] * 2,
                    y=[0, top],
                    mode="lines",
                    yaxis=axis,
                    name=f"expert {e}: {name}",
                    line={"color": theme.INK, "dash": dash, "width": 2 if dash == "solid" else 1.5},
                )
            )
        low = 1 - (e + 1) * tall - e * gap
        layout["yaxis" if e == 0 else f"yaxis{e + 1}"] = {
            "domain": [max(0.0, low), low + tall],
            "range": [0, top],
            "showticklabels": False,
            "showgrid": False,
            "title": {"text": f"expert {e}"},
        }
        taken = float((logits_TE[:, e] > thresholds[e]).mean())
        notes.append(
            {
                "x": 1,
                "xref": "paper",
                "y": low + tall,
                "yref": "paper",
                "xanchor": "right",
                "yanchor": "top",
                "showarrow": False,
                "text": f"takes {100 * taken:.0f} %",
            }
        )
    return theme.figure(
        traces,
        height=height,
        margin={"l": 36, "r": 12, "t": 8, "b": 48},
        annotations=notes,
        **layout,
        xaxis={
            "title": {"text": "logit (line: threshold; dots: this batch's own cut)"},
            "range": list(span),
            "anchor": f"y{E}" if E > 1 else "y",
        },
    )


def _split(edges, share, cut):
    """The outline of a histogram below and above a cut."""
    cut = float(np.clip(cut, edges[0], edges[-1]))
    i = int(np.clip(np.searchsorted(edges, cut, side="right") - 1, 0, len(share) - 1))
    heights = [round(float(v), 4) for v in share]
    ends = [round(float(v), 3) for v in edges]
    yield [*ends[: i + 1], cut], [*heights[: i + 1], 0], False
    yield [cut, *ends[i + 1 :]], [heights[i], *heights[i + 1 :], 0], True


def paired_bars(
    groups: dict, x, *, x_title: str, y_title: str, top: float, height: int = 320
) -> go.Figure:
    """Bars side by side for each x, one colour a group, with a whisker from the smallest to the largest seed.

    Args:
        groups: name -> (S, X) one row a seed, or (X,) for numbers without seeds.
        x: X labels. top: upper end of the axis.
    """
    traces = []
    for i, (name, values) in enumerate(groups.items()):
        values = array(values, name=name)
        rows = values if values.ndim == 2 else values[None]
        mean, color = rows.mean(0), theme.OKABE_ITO[i % 8]
        error = (
            {}
            if len(rows) == 1
            else {
                "error_y": {
                    "type": "data",
                    "array": (rows.max(0) - mean).tolist(),
                    "symmetric": False,
                    "arrayminus": (mean - rows.min(0)).tolist(),
                    "color": theme.MUTED,
                    "thickness": 1.5,
                }
            }
        )
        traces.append(
            go.Bar(
                x=list(range(len(x))),
                y=mean.tolist(),
                name=name,
                marker={"color": theme.fade(color, 0.75)},
                **error,
            )
        )
    return theme.figure(
        traces,
        height=height,
        barmode="group",
        bargap=0.25,
        showlegend=True,
        margin={"l": 64, "r": 12, "t": 56, "b": 48},
        xaxis={
            "title": {"text": x_title},
            "tickvals": list(range(len(x))),
            "ticktext": [str(v) for v in x],
        },
        yaxis={"title": {"text": y_title}, "range": [0, top]},
    )
