"""Bytes per link: who sends how much to whom, and how much work that makes where it arrives."""

import numpy as np
import plotly.graph_objects as go

from .. import theme
from ._arrays import array
from ._ramp import GREYS
from ._units import in_bytes

SLOW = theme.OKABE_ITO[5]


def link_bytes(
    bytes_RR,
    rows_R,
    *,
    experts_of_rank=None,
    ranks_per_node: int | None = None,
    top: float | None = None,
    top_rows: float | None = None,
    height: int = 470,
) -> go.Figure:
    """A matrix of bytes, from rank (row) to rank (column); above each column a bar, the rows its experts work on, the straggler's orange.

    Between them each rank is a box with its experts in their colours. A dashed line is the mean of the rows; dotted lines part nodes.
    ``Traffic`` of ``moe_core.parallel.simulate`` has what is needed: ``link_bytes(traffic.bytes_RR, traffic.rows_per_rank)``.

    Args:
        bytes_RR: (R, R) bytes that rank s (row) sends to rank r (column).
        rows_R: (R,) rows that the experts of each rank work on, those that stayed at home included.
        experts_of_rank: R sequences of expert numbers, as in a Placement; None draws empty boxes.
        ranks_per_node: draws the borders of nodes.
        top, top_rows: bytes and rows at the upper end of the colours and of the bars; fix them across the frames of an Explorer.

    Raises:
        ValueError: shapes differ, or a number is negative.
    """
    bytes_RR, rows_R = array(bytes_RR, 2, "bytes_RR"), array(rows_R, 1, "rows_R")
    R = len(rows_R)
    held = [()] * R if experts_of_rank is None else list(experts_of_rank)
    if bytes_RR.shape != (R, R) or len(held) != R:
        raise ValueError(
            f"bytes_RR of shape {bytes_RR.shape} and experts_of_rank of {len(held)} must fit the {R} ranks of rows_R"
        )
    if (bytes_RR < 0).any() or (rows_R < 0).any():
        raise ValueError("bytes_RR and rows_R must hold no negative number")
    top, top_rows = (
        top or max(float(bytes_RR.max()), 1.0),
        top_rows or 1.3 * max(float(rows_R.max()), 1.0),
    )
    unit, size = in_bytes(top)
    away_RR = np.where(
        np.eye(R, dtype=bool), np.nan, bytes_RR / size
    )  # what stays at home uses no link
    shown = [[None if np.isnan(v) else float(f"{v:.3g}") for v in row] for row in away_RR]
    cells = go.Heatmap(
        x=list(range(R)),
        y=list(range(R)),
        z=shown,
        zmin=0,
        zmax=top / size,
        colorscale=GREYS,
        showscale=False,
        xgap=2,
        ygap=2,
        meta=unit,
        name="bytes sent",
        xaxis="x",
        yaxis="y",
    )
    links = [(s, r) for s in range(R) for r in range(R) if r != s]
    numbers = [
        go.Scatter(
            x=[r for _, r in links],
            y=[s for s, _ in links],
            mode="text",
            text=[_short(away_RR[link]) for link in links],
            hoverinfo="skip",
            textfont={"size": 12},
        )
    ]
    ticks = list(range(R)) if R <= 16 else list(range(0, R, R // 8))
    return theme.figure(
        [cells, *(numbers if R <= 8 else []), *_bars(rows_R), *_boxes(held, R)],
        height=height,
        margin={"l": 58, "r": 12, "t": 24, "b": 48},
        bargap=0.3,
        shapes=_nodes(R, ranks_per_node),
        annotations=[
            _words(f"{unit} from rank (row) to rank (column)", 0.605),
            _words(_waits(rows_R), 1.0),
            {**_words("experts", 0.725), "xanchor": "right", "yanchor": "middle", "xshift": -4},
        ],
        xaxis={
            "title": {"text": "to rank"},
            "range": [-0.5, R - 0.5],
            "tickvals": ticks,
            "anchor": "y",
        },
        yaxis={
            "title": {"text": "from rank"},
            "range": [R - 0.5, -0.5],
            "tickvals": ticks,
            "domain": [0, 0.6],
            "showgrid": False,
        },
        yaxis2={
            "title": {"text": "rows"},
            "range": [0, top_rows],
            "domain": [0.78, 1],
            "nticks": 4,
        },
        yaxis3={"visible": False, "range": [-0.5, 0.5], "domain": [0.685, 0.765]},
    )


def _bars(rows_R):
    mean = float(rows_R.mean())
    colors = [
        SLOW if r == rows_R.argmax() and np.ptp(rows_R) else theme.OKABE_ITO[7]
        for r in range(len(rows_R))
    ]
    yield go.Bar(
        x=list(range(len(rows_R))),
        y=rows_R.tolist(),
        yaxis="y2",
        name="rows",
        marker={"color": colors},
    )
    yield go.Scatter(
        x=[-0.5, len(rows_R) - 0.5],
        y=[mean, mean],
        yaxis="y2",
        mode="lines",
        name="mean",
        hoverinfo="skip",
        line={"color": theme.INK, "dash": "dash", "width": 1.5},
    )


def _waits(rows_R):
    slow, mean = int(rows_R.argmax()), rows_R.mean()
    if not np.ptp(rows_R):
        return "no straggler: all ranks have the same rows"
    return f"straggler: rank {slow}, {rows_R[slow] / mean:.2f} × the mean"


def _boxes(held, R):
    """A box for each rank, and its experts as discs inside, at most eight."""
    box_x = [v for r in range(R) for v in (r - 0.44, r + 0.44, r + 0.44, r - 0.44, r - 0.44, None)]
    box_y = [v for _ in range(R) for v in (-0.45, -0.45, 0.45, 0.45, -0.45, None)]
    yield go.Scatter(
        x=box_x,
        y=box_y,
        yaxis="y3",
        mode="lines",
        hoverinfo="skip",
        line={"color": theme.MUTED, "width": 1.5},
    )
    E = 1 + max((e for experts in held for e in experts), default=0)
    spots = [
        (r + 0.8 * ((i + 0.5) / min(len(experts), 8) - 0.5), int(e))
        for r, experts in enumerate(held)
        for i, e in enumerate(experts[:8])
    ]
    widest = max((len(experts[:8]) for experts in held), default=1)
    yield go.Scatter(
        x=[x for x, _ in spots],
        y=[0] * len(spots),
        yaxis="y3",
        mode="markers",
        hoverinfo="skip",
        marker={
            "size": max(4, min(13, 200 / (R * max(widest, 1)))),
            "color": [theme.expert_color(e, E) for _, e in spots],
        },
    )


def _nodes(R, m):
    at = [] if m is None else [r - 0.5 for r in range(m, R, m)]
    line = {"color": theme.INK, "width": 1.5, "dash": "dot"}
    across = [
        {
            "type": "line",
            "xref": "x",
            "yref": "paper",
            "x0": v,
            "x1": v,
            "y0": low,
            "y1": high,
            "line": line,
        }
        for v in at
        for low, high in ((0, 0.6), (0.67, 0.78))
    ]
    return across + [
        {
            "type": "line",
            "xref": "x",
            "yref": "y",
            "x0": -0.5,
            "x1": R - 0.5,
            "y0": v,
            "y1": v,
            "line": line,
        }
        for v in at
    ]


def _words(text, y):
    return {
        "text": text,
        "showarrow": False,
        "xref": "paper",
        "yref": "paper",
        "x": 0,
        "y": y,
        "xanchor": "left",
        "yanchor": "bottom",
        "font": {"size": 13},
    }


def _short(v):
    return f"{v:.0f}" if v >= 10 or v == 0 else f"{v:.1f}" if v >= 0.05 else "<0.1"
