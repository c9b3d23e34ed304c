"""Curves with bands over seeds."""

import textwrap

import numpy as np
import plotly.graph_objects as go

from .. import theme
from ._arrays import array


def curves(
    series: dict,
    x=None,
    *,
    x_title: str = "optimiser step",
    y_title: str = "loss (nats)",
    y_range=None,
    log_x: bool = False,
    log_y: bool = False,
    colors: dict | None = None,
    height: int = 340,
) -> go.Figure:
    """Lines over time or size, each with a band that spans its seeds, and its name written at its end.

    Args:
        series: name -> (S, X) one row a seed: the mean as a line, minimum to maximum as the band; or (X,) a single line;
            or a tuple (mean, low, high) of (X,) each, for a band of your own.
        x: (X,) positions; by default 0, 1, 2, ...; a dict name -> (X,) when series differ.
        y_range: (low, high) in data units; fix it across the frames of an Explorer.
        colors: name -> "#rrggbb"; by default the book's colours in order.

    Raises:
        ValueError: a series and x differ in length.
    """
    traces, ends = [], []
    for i, (name, values) in enumerate(series.items()):
        mean, low, high = (
            (array(v, 1, name) for v in values)
            if isinstance(values, tuple)
            else _band(array(values, name=name))
        )
        given = x.get(name) if isinstance(x, dict) else x
        at = np.arange(len(mean)) if given is None else array(given, 1, "x")
        if len(at) != len(mean):
            raise ValueError(f"series {name!r} has {len(mean)} points; x has {len(at)}")
        color = (colors or {}).get(name, theme.OKABE_ITO[i % len(theme.OKABE_ITO)])
        if not np.array_equal(low, high):
            traces.append(
                go.Scatter(
                    x=[*at, *at[::-1]],
                    y=[*high, *low[::-1]],
                    fill="toself",
                    fillcolor=theme.fade(color, 0.2),
                    mode="none",
                    hoverinfo="skip",
                )
            )
        traces.append(
            go.Scatter(
                x=at.tolist(),
                y=mean.tolist(),
                mode="lines" if len(mean) > 1 else "markers",
                name=name,
                line={"color": color, "width": 2.5},
                marker={"color": color, "size": 9},
                cliponaxis=False,
            )
        )
        ends.append((float(at[-1]), float(mean[-1]), name, color))
    kind = {"x": "log" if log_x else "linear", "y": "log" if log_y else "linear"}
    span = y_range or _span(traces, log_y)
    limits = [float(v) for v in (np.log10(span) if log_y else span)]
    return theme.figure(
        [*traces, *_labels(ends, limits, log_y, height)],
        height=height,
        margin={
            "l": 64,
            "r": 36 + 8 * max(len(line) for name in series for line in _wrap(name)),
            "t": 12,
            "b": 48,
        },
        xaxis={"title": {"text": x_title}, "type": kind["x"], "range": _extent(traces, log_x)},
        yaxis={"title": {"text": y_title}, "type": kind["y"], "range": limits},
    )


def _band(values):
    if values.ndim == 1:
        return values, values, values
    values = array(values, 2, "series")
    return values.mean(0), values.min(0), values.max(0)


def _span(traces, log):
    every = np.concatenate([np.asarray(t.y, float) for t in traces])
    low, high = np.nanmin(every), np.nanmax(every)
    if log:
        return low / 1.1, high * 1.1
    pad = 0.06 * (high - low) or 0.5
    return low - pad, high + pad


def _extent(traces, log):
    """First and last x. Explorers keep 4 digits, and log10 of an end may round inwards: its label would fall off the axis. Hence a margin."""
    every = np.concatenate([np.asarray(t.x, float) for t in traces])
    low, high = every.min(), every.max()
    if not log:
        return [float(low), float(high)]
    low, high = np.log10([low, high])
    margin = 1e-3 * max(abs(low), abs(high))
    return [float(low - margin), float(high + margin)]


def _labels(ends, limits, log, height):
    """Names at the lines' ends, pushed apart (a line of text is about 18 pixels) where two lines end together."""
    low, high = limits
    gap = 18 * (high - low) / max(height - 60, 1)
    free = float("-inf")  # everything below is taken
    for x, y, name, color in sorted(ends, key=lambda end: end[1]):
        half = len(_wrap(name)) / 2 * gap
        centre = max(np.log10(y) if log else y, free + half)
        free = centre + half
        yield go.Scatter(
            x=[x],
            y=[float(10**centre if log else centre)],
            mode="text",
            hoverinfo="skip",
            cliponaxis=False,
            text=[f' <span style="color:{color}">●</span> ' + "<br>    ".join(_wrap(name))],
            textposition="middle right",
        )


def _wrap(name):
    return textwrap.wrap(name, 14) or [""]
