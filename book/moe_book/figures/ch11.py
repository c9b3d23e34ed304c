"""Chapter 11: routers in rows, and the plan that Sinkhorn balances."""

from html import escape

import plotly.graph_objects as go
from IPython.display import HTML

from .. import theme
from ._arrays import array
from .bars import load_bars
from .lines import curves
from .text import text_in_color

LOSS = "held-out loss (nats per byte)"
DEMANDS = {  # control -> label, does a router with these facts fail, why
    "decoder": ("A causal language model", lambda f: not f["causal"], "sees later tokens"),
    "same": (
        "Same routing in training and generation",
        lambda f: not f["in training"],
        "trains on the whole batch",
    ),
    "serving": (
        "Answers independent of the batch",
        lambda f: not f["batch-invariant"],
        "depends on the batch",
    ),
    "fixed": ("Fixed compute per token", lambda f: len(f["experts"]) > 1, "compute varies"),
    "no_loss": ("No extra loss to tune", lambda f: bool(f["losses"]), "extra loss"),
    "no_state": ("No state beside the weights", lambda f: bool(f["state"]), "carries state"),
}


def standings(
    values: dict, *, x_title: str, x_range, out: dict | None = None, decimals: int = 2
) -> go.Figure:
    """One row per name, a dot for each seed and a bar at their mean; a name that is out says why instead.

    Args:
        values: name -> (S,) one value a seed, the first on top.
        x_range: (low, high); fix it across the frames of an Explorer.
        out: name -> a few words, for the names that a reader has ruled out.
        decimals: of the mean that stands beside each name.
    """
    out = out or {}
    rows = {name: (i, array(value, 1, name)) for i, (name, value) in enumerate(values.items())}
    kept = [(i, value_S, name) for name, (i, value_S) in rows.items() if name not in out]
    dots = go.Scatter(
        x=[float(v) for _, value_S, _ in kept for v in value_S],
        y=[i for i, value_S, _ in kept for _ in value_S],
        mode="markers",
        name="seed",
        marker={
            "size": 10,
            "color": theme.fade(theme.OKABE_ITO[0], 0.45),
            "line": {"color": theme.OKABE_ITO[0], "width": 1.5},
        },
    )
    means = go.Scatter(
        x=[float(value_S.mean()) for _, value_S, _ in kept],
        y=[i for i, _, _ in kept],
        mode="markers",
        name="mean",
        marker={"symbol": "line-ns", "size": 18, "line": {"color": theme.INK, "width": 2.5}},
    )
    reasons = go.Scatter(
        x=[x_range[0]] * len(out),
        y=[rows[name][0] for name in out],
        mode="text",
        text=[f"  {why}" for why in out.values()],
        textposition="middle right",
        textfont={"size": 12, "color": theme.MUTED},
        name="out",
        hoverinfo="skip",
    )
    labels = [
        name if name in out else f"{name}  {value_S.mean():.{decimals}f}"
        for name, (_, value_S) in rows.items()
    ]
    return theme.figure(
        [dots, means, reasons],
        height=70 + 30 * len(rows),
        margin={"l": 158, "r": 12, "t": 8, "b": 48},
        xaxis={"title": {"text": x_title}, "range": list(x_range), "showgrid": True, "nticks": 6},
        yaxis={
            "tickvals": list(range(len(rows))),
            "ticktext": labels,
            "range": [len(rows) - 0.4, -0.6],
            "showgrid": False,
            "tickfont": {"size": 12},
        },
    )


def plan(shares, chosen) -> go.Figure:
    """A transport plan as a heatmap, tokens in rows and experts in columns, with the sum of each; the chosen cell is framed.

    Args:
        shares: (T, E) the plan, times T: a token's row should sum to 1.
        chosen: (T,) the expert with the largest share of each row.
    """
    share_TE, chosen_T = array(shares, 2, "shares"), array(chosen, 1, "chosen").astype(int)
    T, E = share_TE.shape
    cells = go.Heatmap(
        x=list(range(E)),
        y=list(range(T)),
        z=share_TE.round(3).tolist(),
        zmin=0,
        zmax=1,
        showscale=False,
        xgap=3,
        ygap=3,
        meta="share",
        colorscale=[
            [0, theme.fade(theme.OKABE_ITO[0], 0.04)],
            [1, theme.fade(theme.OKABE_ITO[0], 0.9)],
        ],
    )
    frames = go.Scatter(
        x=chosen_T.tolist(),
        y=list(range(T)),
        mode="markers",
        hoverinfo="skip",
        marker={"symbol": "square-open", "size": 22, "color": theme.INK, "line": {"width": 2}},
    )
    return theme.figure(
        [cells, frames],
        height=90 + 34 * T,
        margin={"l": 96, "r": 12, "t": 8, "b": 64},
        xaxis={
            "title": {"text": "expert, and the sum of its column"},
            "tickvals": list(range(E)),
            "ticktext": [f"{e}<br>{v:.2f}" for e, v in enumerate(share_TE.sum(0))],
        },
        yaxis={
            "tickvals": list(range(T)),
            "ticktext": [
                f"{'abcdefghijkl'[t]}  sum {v:.2f}" for t, v in enumerate(share_TE.sum(1))
            ],
            "range": [T - 0.5, -0.5],
            "showgrid": False,
        },
    )


def bench(values: dict, show: str) -> go.Figure:
    """``standings`` of the stored bench. values: router -> (seeds,) of the quantity `show`."""
    return standings(values, x_title=show, x_range=_range(values, 0.06))


def cuts(values: dict, sizes: dict, show: str) -> go.Figure:
    """``standings`` of layers cut finer. values: name -> (seeds,). sizes: name -> (E, K, F, shared, factor)."""
    short = {
        name: f"{E}/{K}" + " + 1 shared" * shared + " times 2" * (factor == 2)
        for name, (E, K, _, shared, factor) in sizes.items()
    }
    return standings(
        {short[name]: value for name, value in values.items()},
        x_title=show,
        x_range=_range(values, 0.08),
        decimals=1 if "(ms)" in show else 2,
    )


def choose(values: dict, out: dict) -> go.Figure:
    """``standings`` of the held-out losses, with the routers that are out and why."""
    return standings(values, x_title=LOSS, x_range=(1.87, 2.19), out=out)


def compute(series: dict) -> go.Figure:
    """Experts per token, a mean of each ten steps. series: router -> (seeds, 50)."""
    return curves(
        series, x=[10 * i + 5 for i in range(50)], y_title="experts per token", y_range=(0, 8.3)
    )


def hashed(passage: str, experts_T, share_E):
    """A passage in the colours of a table's experts, above each expert's share of the whole text."""
    E = len(share_E)
    words = text_in_color(list(passage), experts_T, n_experts=E)
    return words, load_bars(share_E, uniform=1 / E, unit="share of the text", top=0.7, height=260)


def table(title: str, *rows: list) -> HTML:
    """Rows of cells, the first one the head, as a table that scrolls on a phone."""
    body = ""
    for i, cells in enumerate(rows):
        tag = "td" if i else "th"
        line = "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells)
        body += f"<tr>{line}</tr>"
    scrolls = f'style="overflow-x: auto" tabindex="0" role="region" aria-label="{title}"'
    small = 'class="table" style="font-size: 0.85em"'
    return HTML(f"<div {scrolls}><table {small}>{body}</table></div>")


def _range(values: dict, margin: float) -> tuple[float, float]:
    every = [v for value in values.values() for v in value]
    pad = margin * (max(every) - min(every))
    return min(every) - pad, max(every) + pad
