"""Figures of chapter 4: where FLOPs and parameters sit, and who serves which text."""

import plotly.graph_objects as go

from .. import theme
from .lines import curves

PARTS = (
    "attention: projections",
    "attention: scores",
    "FFN or experts",
    "router",
    "embedding and head",
)
PART_COLORS = dict(zip(PARTS, ["#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#8C8C8C"]))
PARAMETER_COLORS = {
    "attention": "#0072B2",
    "FFN or experts": "#E69F00",
    "router": "#D55E00",
    "embedding and norms": "#8C8C8C",
}
MODEL_COLORS = {
    "dense": "#8C8C8C",
    "MoE, E = 4": "#56B4E9",
    "MoE, E = 8": "#0072B2",
    "MoE, E = 16": "#009E73",
    "wide dense": "#D55E00",
    "E = 8, times 2": "#CC79A7",
}


def stacked_rows(
    rows: dict[str, dict],
    colors: dict,
    *,
    unit: str,
    top: float,
    percent: bool = False,
    legend: bool = True,
    height: int = 300,
) -> go.Figure:
    """One horizontal bar per row, made of named parts.

    Args:
        rows: name -> {part -> amount >= 0}, drawn from top to bottom; every row has the same parts.
        colors: part -> "#rrggbb".
        unit: title of the axis. top: its right end. percent: write the axis and the larger parts as percentages.
        legend: name the parts above the bars; without, parts that are numbers are experts and carry their number.
    """
    names = list(rows)
    parts = list(rows[names[0]])
    traces = []
    for part in parts:
        values = [float(rows[name][part]) for name in names]
        label = [
            (f"{100 * v:.0f} %" if percent and legend else str(part)) if v > 0.055 * top else ""
            for v in values
        ]
        traces.append(
            go.Bar(
                x=values,
                y=list(range(len(names))),
                orientation="h",
                name=str(part),
                marker={"color": colors[part], "line": {"width": 0}},
                text=label if percent else None,
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                textfont={"color": "#111111"},
            )
        )
    return theme.figure(
        traces,
        height=height,
        barmode="stack",
        bargap=0.5,
        showlegend=legend,
        margin={"l": 16, "r": 24, "t": 92 if legend else 12, "b": 48},
        legend={"orientation": "h", "x": 0, "y": 1.04, "yanchor": "bottom", "traceorder": "normal"},
        xaxis={
            "title": {"text": unit},
            "range": [0, top],
            "showgrid": True,
            **({"tickformat": ".0%"} if percent else {}),
        },
        yaxis={"visible": False, "range": [len(names) - 0.5, -0.75]},
        annotations=[
            {
                "x": 0,
                "xref": "paper",
                "y": i - 0.4,
                "text": name,
                "showarrow": False,
                "xanchor": "left",
                "yanchor": "middle",
            }
            for i, name in enumerate(names)
        ],
    )


def parameter_rows(rows: dict[str, dict]) -> go.Figure:
    """Parameters of a few models, each cut into the parts of PARAMETER_COLORS."""
    return stacked_rows(rows, PARAMETER_COLORS, unit="parameters", top=700_000)


def share_rows(rows: dict[str, dict]) -> go.Figure:
    """Shares of 1, each row cut into PARTS."""
    return stacked_rows(rows, PART_COLORS, unit="share", top=1.0, percent=True, height=330)


def lead(model: str, lead_SX, step_X) -> go.Figure:
    """A model's held-out loss minus that of the dense model, which is the line at 0."""
    return curves(
        {model: lead_SX, "dense": [0.0] * len(step_X)},
        step_X,
        colors=MODEL_COLORS,
        y_title="held-out loss minus dense (nats)",
        y_range=(-0.15, 0.4),
    )


def comparison(loss: dict, x: dict, *, x_title: str, limits) -> go.Figure:
    """Held-out loss of several models. loss: name -> (seeds, X). x: name -> (X,). limits: the ends of the loss axis."""
    low, high = (float(limit) for limit in limits)
    return curves(
        loss,
        x,
        x_title=x_title,
        y_title="held-out loss (nats per byte)",
        colors=MODEL_COLORS,
        y_range=(low, high),
        height=400,
    )


def domain_shares(share_domain_expert: dict[str, list], *, height: int = 260) -> go.Figure:
    """A bar per domain, cut into the shares of its slots that each expert takes, in the experts' colours."""
    n_experts = len(next(iter(share_domain_expert.values())))
    rows = {domain: dict(enumerate(shares)) for domain, shares in share_domain_expert.items()}
    colors = dict(enumerate(theme.expert_colors(n_experts)))
    return stacked_rows(
        rows,
        colors,
        unit="share of the domain's slots",
        top=1.0,
        percent=True,
        legend=False,
        height=height,
    )


def characters_in_color(
    text: str, experts: list[int], *, n_experts: int, columns: int = 36, height: int = 320
) -> go.Figure:
    """Text as it stands in its file, line by line, each character on a tile of its expert's colour; long lines are continued below.

    Args:
        text: characters, a line break as "\\n" (drawn as ⏎, so that its expert is seen too).
        experts: the expert of each character.
        columns: characters a line; 36 fit a phone.

    Raises:
        ValueError: text and experts differ in length.
    """
    if len(text) != len(experts):
        raise ValueError(f"text has {len(text)} characters; experts has {len(experts)}")
    places, column, line = [], 0, 0
    for character in text:
        if column == columns:
            column, line = 0, line + 1
        places.append((column, line))
        column, line = (0, line + 1) if character == "\n" else (column + 1, line)
    x, y = [place[0] for place in places], [place[1] for place in places]
    colors = [theme.expert_color(e, n_experts) for e in experts]
    shown = [
        "⏎" if c == "\n" else "" if c == " " else c for c in text
    ]  # a blank is a bare tile: letters are what takes time to draw
    tiles = go.Bar(
        orientation="h",
        base=[v - 0.46 for v in x],
        x=[0.92] * len(x),
        y=y,
        width=0.86,
        hoverinfo="skip",
        marker={"color": [theme.fade(c, 0.45) for c in colors], "line": {"width": 0}},
    )
    letters = go.Scatter(
        x=x,
        y=y,
        mode="text",
        text=shown,
        name="characters",
        cliponaxis=False,
        textfont={"family": "monospace", "size": 13},
        customdata=[f"{c or 'blank'}: expert {e}" for c, e in zip(shown, experts)],
        meta="character and expert",
    )
    bare = {"visible": False, "showgrid": False}
    # The key is a first row of tiles: it stays in one line on a phone, where a legend does not.
    key = [9 + 27 * e / n_experts for e in range(n_experts)]
    names = go.Scatter(
        x=[2.5, *key],
        y=[-1.6] * (n_experts + 1),
        mode="text",
        text=["expert", *map(str, range(n_experts))],
        cliponaxis=False,
        textfont={"size": 13},
    )
    key_tiles = go.Bar(
        orientation="h",
        base=[v - 0.8 for v in key],
        x=[1.6] * n_experts,
        y=[-1.6] * n_experts,
        width=0.95,
        hoverinfo="skip",
        marker={
            "color": [theme.fade(c, 0.45) for c in theme.expert_colors(n_experts)],
            "line": {"width": 0},
        },
    )
    return theme.figure(
        [tiles, letters, key_tiles, names],
        height=height,
        barmode="overlay",
        margin={"l": 0, "r": 0, "t": 4, "b": 8},
        xaxis={**bare, "range": [-0.6, columns - 0.4]},
        yaxis={**bare, "range": [max(max(y), 8) + 0.5, -2.2]},
    )


SECOND = ("dense FFN", "MoE", "MoE, one token without a place")


def block(second: str, *, height: int = 300) -> go.Figure:
    """A pre-norm block and four tokens on their residual streams: attention, where tokens meet, then the second place, where each is alone.

    Args:
        second: one of SECOND: what stands in the second place. The dense FFN is drawn as its two halves.

    Raises:
        ValueError: second is none of them.
    """
    if second not in SECOND:
        raise ValueError(f"second={second!r} must be one of {SECOND}")
    chosen = [(2, 5), (0, 2), (5, 1), (2, 0)]  # two of eight experts for each token
    dropped = 2 if second == SECOND[2] else None
    lanes, dense = range(len(chosen)), second == SECOND[0]
    streams = go.Scatter(
        x=[0.35, 9.1, None] * len(chosen),
        y=[y for n in lanes for y in (n, n, None)],
        mode="lines",
        line={"color": theme.MUTED, "width": 2},
    )
    meetings = [(m, n) for n in lanes for m in range(n + 1)]  # no way from a later token
    attention = go.Scatter(
        x=[1.3, 2.9, 3.5, None] * len(meetings),
        y=[y for m, n in meetings for y in (m, n - 0.38, n, None)],
        mode="lines",
        line={"color": theme.INK, "width": 1},
    )
    ways = [n for n in lanes if n != dropped]
    boxes = [(x, n, e) for n in ways for x, e in zip((5.7, 6.7), chosen[n])]
    second_place = go.Scatter(
        x=[v for x, _, _ in boxes for v in (4.6, x, 7.8, None)],
        y=[v for _, n, _ in boxes for v in (n, n - 0.38, n, None)],
        mode="lines",
        line={"color": theme.INK, "width": 1},
    )
    experts = go.Scatter(
        x=[x for x, _, _ in boxes],
        y=[n - 0.38 for _, n, _ in boxes],
        mode="markers+text",
        text=["½" if dense else f"W{e}" for _, _, e in boxes],
        textfont={"size": 12, "color": "#111111"},
        marker={
            "symbol": "square",
            "size": 25,
            "color": ["#8C8C8C" if dense else theme.expert_color(e) for _, _, e in boxes],
            "line": {"width": 0},
        },
    )
    sums = [(3.5, n) for n in lanes] + [(7.8, n) for n in ways]
    plus = go.Scatter(
        x=[x for x, _ in sums],
        y=[n for _, n in sums],
        mode="markers",
        marker={"symbol": "cross", "size": 10, "color": theme.INK},
    )
    tokens = go.Scatter(
        x=[0] * len(chosen) + [9.45] * len(chosen),
        y=[*lanes, *lanes],
        mode="markers+text",
        text=[str(n) for n in lanes] * 2,
        textfont={"size": 12},
        marker={
            "symbol": "square",
            "size": 22,
            "color": theme.CLEAR,
            "line": {"width": 1.4, "color": theme.INK},
        },
    )
    heads = [
        {"x": x, "y": -0.9, "text": text, "showarrow": False}
        for x, text in (
            (0, "x"),
            (2.4, "attention"),
            (6.2, "dense FFN" if dense else "experts"),
            (9.45, "x′"),
        )
    ]
    bare = {"visible": False, "showgrid": False}
    return theme.figure(
        [streams, attention, second_place, experts, plus, tokens],
        height=height,
        margin={"l": 4, "r": 4, "t": 4, "b": 4},
        annotations=heads,
        xaxis={**bare, "range": [-0.5, 9.95]},
        yaxis={**bare, "range": [len(chosen) - 0.5, -1.2]},
    )
