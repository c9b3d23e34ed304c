"""Roofline: does a matrix product wait for arithmetic or for memory?"""

import numpy as np
import plotly.graph_objects as go

from moe_tools.accounting import Accelerator

from .. import theme

SIDES = (
    ("bottom right", "circle", theme.OKABE_ITO[0]),
    ("top left", "diamond-open", theme.OKABE_ITO[5]),
)


def roofline(
    accelerator: Accelerator,
    products: dict,
    *,
    x_range=(0.3, 10_000.0),
    y_range=(5e11, 9e15),
    height: int = 400,
) -> go.Figure:
    """FLOP/s that a chip allows against FLOPs per byte, both logarithmic; each product is a point on the roof, its label beside it.

    .. math:: \\text{attainable} = \\min(\\text{peak}, I \\cdot \\text{bandwidth})

    Left of the ridge a product waits for memory, right of it for arithmetic.

    Args:
        accelerator: one of ``moe_tools.accounting.ACCELERATORS``, or your own.
        products: name -> [(label, arithmetic intensity in FLOPs/byte), ...]; one or two names. Labels of the first stand below the roof,
            those of the second above. Where points crowd, not all are labelled.
        x_range, y_range: (low, high) of the axes, the same in all frames of an Explorer; what lies outside is not drawn.

    Raises:
        ValueError: there are no names or more than two, or an intensity is not above 0.
    """
    if not 1 <= len(products) <= len(SIDES):
        raise ValueError(f"products has {len(products)} names; it must have 1 or {len(SIDES)}")
    for name, points in products.items():
        if not all(intensity > 0 for _, intensity in points):
            raise ValueError(f"products[{name!r}]={points!r} must have intensities above 0")
    peak, ridge, (low, high) = accelerator.peak_flops, accelerator.ridge, x_range
    roof = go.Scatter(
        x=[low, ridge, high],
        y=[low * accelerator.memory_bandwidth, peak, peak],
        mode="lines",
        name="roof",
        showlegend=False,
        line={"color": theme.INK, "width": 2.5},
    )
    drop = go.Scatter(
        x=[ridge, ridge],
        y=[y_range[0], peak],
        mode="lines",
        name="ridge",
        showlegend=False,
        line={"color": theme.MUTED, "width": 1.5, "dash": "dash"},
    )
    dots = [
        _dots(accelerator, name, points, *SIDES[i], np.log10(high / low))
        for i, (name, points) in enumerate(products.items())
    ]
    note = {"showarrow": False, "font": {"size": 13}, "align": "left"}
    at, floor = float(np.log10(ridge)), float(np.log10(y_range[0]))
    notes = [
        {
            **note,
            "xref": "paper",
            "yref": "paper",
            "x": 0.02,
            "y": 0.98,
            "xanchor": "left",
            "yanchor": "top",
            "text": f"<b>{accelerator.name}</b><br>{peak / 1e12:,.0f} TFLOP/s<br>{accelerator.memory_bandwidth / 1e12:.3g} TB/s",
        },
        {
            **note,
            "x": at,
            "y": (floor + float(np.log10(peak))) / 2,
            "text": f" ridge<br> {ridge:.0f}",
            "xanchor": "left",
            "yanchor": "middle",
        },
        {
            **note,
            "x": at,
            "y": floor,
            "text": "waits for memory ",
            "xanchor": "right",
            "yanchor": "bottom",
        },
        {
            **note,
            "x": at,
            "y": floor,
            "text": " for<br> arithmetic",
            "xanchor": "left",
            "yanchor": "bottom",
        },
    ]
    return theme.figure(
        [roof, drop, *dots],
        height=height,
        margin={"l": 66, "r": 14, "t": 40, "b": 48},
        annotations=notes,
        showlegend=True,
        xaxis={
            "title": {"text": "arithmetic intensity, FLOPs per byte"},
            "type": "log",
            "range": [float(np.log10(v)) for v in x_range],
            "showgrid": True,
            **_decades(x_range, ""),
        },
        yaxis={
            "title": {"text": "attainable, TFLOP/s"},
            "type": "log",
            "range": [float(np.log10(v)) for v in y_range],
            **_decades(y_range, "T"),
        },
    )


def _dots(accelerator, name, points, side, symbol, color, decades):
    text, free = [], float("-inf")
    for label, intensity in points:
        fits = np.log10(intensity) >= free
        text.append(label if fits else "")
        free = (
            np.log10(intensity) + 0.027 * decades * (len(label) + 1) if fits else free
        )  # a phone shows about 40 letters in a row
    return go.Scatter(
        x=[float(i) for _, i in points],
        y=[min(accelerator.peak_flops, i * accelerator.memory_bandwidth) for _, i in points],
        mode="markers+text",
        name=name,
        text=text,
        textposition=side,
        textfont={"size": 12},
        customdata=[label for label, _ in points],
        meta="product",
        marker={"symbol": symbol, "size": 10, "color": color, "line": {"width": 2, "color": color}},
    )


def _decades(ends, unit):
    """A tick at each power of ten, as a number one reads at once."""
    powers = range(
        int(np.ceil(np.log10(ends[0]) - 1e-9)), int(np.floor(np.log10(ends[1]) + 1e-9)) + 1
    )
    return {
        "tickvals": [10.0**p for p in powers],
        "ticktext": [f"{10.0**p / (1e12 if unit == 'T' else 1):,g}" for p in powers],
    }
