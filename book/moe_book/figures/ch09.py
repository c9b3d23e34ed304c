"""Chapter 9's own figures: who changes places when the future changes, what an eavesdropper still believes, the arms of the stored run."""

import plotly.graph_objects as go

from moe_core import Routing
from moe_core.metrics import expert_sets

from .. import theme
from ._arrays import array
from .lines import curves
from .routing import routing_map
from .text import text_in_color

TRUE = "#D55E00"


def flip_map(
    before, after, tokens: list[str], *, changed: int, new: str, height: int | None = None
) -> go.Figure:
    """Tokens in rows, experts in columns, in two states of the text: what stayed, what was gained (thick outline) and what was lost (a cross).

    Args:
        before, after: (T, E) bool, who takes whom, before and after one token is changed.
        tokens: T labels, of the text before the change.
        changed: the token that is changed; a dotted line above it parts past and future.
        new: its new label.
    """
    before_TE, after_TE = (
        array(before, 2, "before").astype(bool),
        array(after, 2, "after").astype(bool),
    )
    T, E = before_TE.shape
    height = height or 90 + 26 * T
    size = min(20, 260 / E)
    kinds = {
        "stays": before_TE & after_TE,
        "gained": after_TE & ~before_TE,
        "lost": before_TE & ~after_TE,
    }
    traces = [
        go.Scatter(
            x=list(range(E)),
            y=[-1] * E,
            mode="markers",
            hoverinfo="skip",
            marker={"size": 13, "color": theme.expert_colors(E)},
        )
    ]
    for name, cells_TE in kinds.items():
        at = [(t, e) for t in range(T) for e in range(E) if cells_TE[t, e]]
        colors = [theme.expert_color(e, E) for _, e in at]
        outline = {
            "color": theme.INK if name == "gained" else colors,
            "width": 4 if name == "gained" else 1.5,
        }
        symbol, fill = (
            ("x-thin", theme.CLEAR)
            if name == "lost"
            else ("square", [theme.fade(c, 0.9 if name == "gained" else 0.45) for c in colors])
        )
        traces.append(
            go.Scatter(
                x=[e for _, e in at],
                y=[t for t, _ in at],
                mode="markers",
                name=name,
                marker={
                    "symbol": symbol,
                    "size": size * (0.7 if name == "lost" else 1),
                    "color": fill,
                    "line": {**outline, "width": 4 if name == "lost" else outline["width"]},
                },
            )
        )
    labels = [
        f"{shown(token)} → {shown(new)}" if t == changed else shown(token)
        for t, token in enumerate(tokens)
    ]
    border = go.Scatter(
        x=[-0.6, E - 0.4],
        y=[changed - 0.5] * 2,
        mode="lines",
        hoverinfo="skip",
        line={"color": theme.MUTED, "dash": "dot", "width": 1.5},
    )
    return theme.figure(
        [*traces, border],
        height=height,
        margin={"l": 76, "r": 8, "t": 52, "b": 8},
        xaxis={
            "title": {"text": "expert"},
            "side": "top",
            "range": [-0.6, E - 0.4],
            "tickvals": list(range(E)),
            "showgrid": True,
        },
        yaxis={
            "title": {"text": "token"},
            "range": [T - 0.4, -1.5],
            "tickvals": list(range(T)),
            "ticktext": labels,
        },
    )


def beliefs(labels: list[str], prior, posterior, *, truth: int, height: int = 300) -> go.Figure:
    """A bar per candidate: hollow what was believed before listening, solid what is left; the true one in a colour of its own.

    Args:
        labels: V names of the candidates. prior, posterior: (V,) probabilities. truth: the index of the true one.
    """
    prior_V, posterior_V = array(prior, 1, "prior"), array(posterior, 1, "posterior")
    x, colors = (
        list(range(len(labels))),
        [TRUE if v == truth else theme.MUTED for v in range(len(labels))],
    )
    bars = [
        go.Bar(
            x=x, y=posterior_V.tolist(), width=0.7, name="after listening", marker={"color": colors}
        ),
        go.Bar(
            x=x,
            y=prior_V.tolist(),
            width=0.7,
            name="before",
            marker={"color": theme.CLEAR, "line": {"color": colors, "width": 1.5}},
        ),
    ]
    return theme.figure(
        bars,
        height=height,
        barmode="overlay",
        margin={"l": 60, "r": 8, "t": 12, "b": 48},
        xaxis={
            "title": {"text": "next byte"},
            "tickvals": x,
            "ticktext": [shown(label) for label in labels],
        },
        yaxis={"title": {"text": "probability"}, "range": [0, 1]},
    )


def arms(
    trained: dict, read: dict, *, x_title: str, x_range, height: int | None = None
) -> go.Figure:
    """One row per arm: a faint dot per seed as trained, a solid one as it is read now, and the two means joined by a line.

    Args:
        trained, read: name -> (S,) one value a seed. x_range: (low, high), fixed across frames.
    """
    traces, notes = [], []
    for i, (name, values) in enumerate(trained.items()):
        before_S, now_S, color = (
            array(values, 1, name),
            array(read[name], 1, name),
            theme.OKABE_ITO[i % 8],
        )
        traces.append(
            go.Scatter(
                x=[float(before_S.mean()), float(now_S.mean())],
                y=[i, i],
                mode="lines",
                hoverinfo="skip",
                line={"color": theme.MUTED, "width": 2},
            )
        )
        for label, value_S, alpha in (("as trained", before_S, 0.2), ("read so", now_S, 0.85)):
            traces.append(
                go.Scatter(
                    x=value_S.tolist(),
                    y=[i] * len(value_S),
                    mode="markers",
                    name=f"{name}, {label}",
                    marker={
                        "size": 12,
                        "color": theme.fade(color, alpha),
                        "line": {"color": color, "width": 1.5},
                    },
                )
            )
        notes.append(
            {
                "x": 0,
                "xref": "paper",
                "y": i - 0.42,
                "text": f"{name}: mean {now_S.mean():.3f}",
                "showarrow": False,
                "xanchor": "left",
                "yanchor": "middle",
            }
        )
    rows = len(trained)
    return theme.figure(
        traces,
        height=height or 70 + 50 * rows,
        margin={"l": 16, "r": 16, "t": 8, "b": 48},
        annotations=notes,
        xaxis={"title": {"text": x_title}, "range": list(x_range), "showgrid": True},
        yaxis={"visible": False, "range": [rows - 0.5, -0.75]},
    )


def counts(share, *, top: float = 1.0, height: int = 230) -> go.Figure:
    """How many experts a token gets: a bar for 0 (hollow), 1, 2, ..."""
    share_M = array(share, 1, "share")
    x = list(range(len(share_M)))
    bars = go.Bar(
        x=x,
        y=share_M.tolist(),
        marker={
            "color": [theme.CLEAR, *[theme.OKABE_ITO[0]] * (len(x) - 1)],
            "line": {"color": theme.OKABE_ITO[0], "width": 2},
        },
        text=[f"{v:.0%}" if v >= 0.005 else "" for v in share_M],
        textposition="outside",
        textangle=0,
        cliponaxis=False,
        constraintext="none",
        textfont={"size": 12},
    )  # one size for all, on a phone too
    return theme.figure(
        [bars],
        height=height,
        bargap=0.3,
        margin={"l": 60, "r": 8, "t": 12, "b": 48},
        xaxis={"title": {"text": "experts per byte"}, "tickvals": x, "range": [-0.6, len(x) - 0.4]},
        yaxis={"title": {"text": "share of the bytes"}, "range": [0, top], "tickformat": ".0%"},
    )


def shown(token: str) -> str:
    """A byte as one can see it."""
    return {" ": "␣", "\n": "⏎", "\t": "⇥"}.get(token, token)


def who_chooses(text: str, routing: Routing) -> go.Figure:
    """Bytes in rows, experts in columns: a square where an expert takes a byte. Routing of one sequence."""
    E = routing.n_experts
    return routing_map(
        [list(range(E))] * len(text),
        chosen=expert_sets(routing)[0],
        n_experts=E,
        tokens=[shown(c) for c in text],
        height=400,
    )


def compute_map(passage: list[str], experts_T, share):
    """A passage, each byte tinted by its number of experts, above ``counts`` of all bytes."""
    return text_in_color(passage, amount=experts_T, amount_max=8), counts(share, top=1.1)


def places(text: str, positions: list[int]) -> str:
    """`t at position 0 and ␣ at position 3`, or `none`."""
    return " and ".join(f"{shown(text[t])} at position {t}" for t in positions) or "none"


def next_byte(prior_V, left_V, truth: int, most: int = 14) -> go.Figure:
    """``beliefs`` about the most likely next bytes, the true one among them."""
    prior, left = array(prior_V, 1, "prior_V"), array(left_V, 1, "left_V")
    likely = (-prior).argsort(kind="stable")[:most].tolist()
    bytes_ = likely if truth in likely else [*likely[:-1], truth]
    labels = [chr(v) if 32 <= v < 127 else "⏎" if v == 10 else "·" for v in bytes_]
    return beliefs(labels, prior[bytes_], left[bytes_], truth=bytes_.index(truth))


def ceiling(counted: dict[int, float], limit: float, paper: float) -> go.Figure:
    """How many bits a routing holds. counted: size of the pool -> bits per token and layer."""
    sizes = list(counted)
    figure = curves(
        {
            "counted": list(counted.values()),
            "limit": [limit] * len(sizes),
            "paper": [paper] * len(sizes),
        },
        sizes,
        x_title="tokens in the pool, T",
        y_title="bits per token and layer",
        y_range=(0, 60),
        log_x=True,
    )
    return figure.update_xaxes(range=(0.6, 3.63), tickvals=[4**i for i in range(1, 7)])


def leak_by_place(leak_SP) -> go.Figure:
    """The leak against the place in a pool of 4, 16 or 64. leak_SP: (seeds, places) nats per byte."""
    leak = array(leak_SP, 2, "leak_SP")
    n = leak.shape[1]
    top, every = (0.9, 1) if n <= 4 else (0.36, 3) if n <= 16 else (0.36, 10)
    figure = curves(
        {"leak": leak},
        list(range(1, n + 1)),
        x_title="place in the pool",
        y_title="false minus true (nats per byte)",
        y_range=(-0.15 * top, top),
    )
    return figure.update_xaxes(dtick=every, tick0=1)
