"""Chapter 3's own figures: rows on their way to the experts and back, dispatch and combine as matrices, and padding."""

import plotly.graph_objects as go

from moe_core import DispatchPlan, Routing

from .. import theme
from ._arrays import array
from .lines import curves

STAGES = ("batch", "copies", "sorted", "experts", "back")


def sorting(routing: Routing, *, stage: int, rows: int, height: int = 560) -> go.Figure:
    """Five columns from left to right, the first ``stage + 1`` of them drawn: tokens, their copies, the copies sorted by expert, one
    block of weights for each expert's rows, and the tokens again.

    Args:
        routing: of one sequence, with at most 8 experts and every slot kept. stage: 0 .. 4.
        rows: the most rows A there is room for; fix it across the frames of an Explorer.

    Raises:
        ValueError: stage is not one of the five, or there are more rows than room.
    """
    plan = DispatchPlan(routing, static=False)
    T, K, E, A = plan.n_tokens, plan.top_k, routing.n_experts, len(plan.slot_A)
    if not 0 <= stage < len(STAGES) or A > rows:
        raise ValueError(
            f"stage={stage} must be 0 to {len(STAGES) - 1}, and A={A} at most rows={rows}"
        )
    slots, expert_S = plan.slot_A.tolist(), routing.expert_indices.flatten().tolist()
    expert_A, counts = [expert_S[s] for s in slots], plan.counts_E.tolist()
    token_y = [t * K + (K - 1) / 2 for t in range(T)]
    size = 0.74 * (height - 40) / rows

    def squares(x, y, tokens, experts=None, side="left"):
        colors = (
            {"color": "rgba(0,0,0,0)"}
            if experts is None
            else {"color": experts, "colorscale": _scale(), "cmin": -0.5, "cmax": 7.5}
        )
        return go.Scatter(
            x=[x] * len(y),
            y=y,
            mode="markers+text",
            text=[str(t) for t in tokens],
            textposition=f"middle {side}",
            textfont={"size": 12},
            marker={
                "symbol": "square",
                "size": size,
                "line": {"width": 1.2, "color": theme.INK},
                **colors,
            },
        )

    def ways(x, there, back, experts):
        """Lines between two columns, a trace for each of 8 experts, so that every frame has the same traces."""
        for e in range(8):
            pairs = [(a, b) for a, b, of in zip(there, back, experts) if of == e]
            yield go.Scatter(
                x=[*x, None] * len(pairs),
                y=[v for a, b in pairs for v in (a, b, None)],
                mode="lines",
                line={"color": theme.OKABE_ITO[e], "width": 1.4},
            )

    starts = [sum(counts[:e]) - 0.45 for e in range(E)]
    blocks = go.Bar(
        x=[3] * E,
        base=starts,
        y=[max(0, n - 0.1) for n in counts],
        width=0.5,
        text=[f"W{e}" if n else "" for e, n in enumerate(counts)],
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        marker={"color": theme.expert_colors(E)},
    )
    columns = [
        [squares(0, token_y, range(T))],
        [squares(1, list(range(A)), [s // K for s in range(A)], expert_S)],
        [
            *ways((1.15, 1.84), slots, range(A), expert_A),
            squares(2, list(range(A)), [s // K for s in slots], expert_A, "right"),
        ],
        [blocks],
        [
            *ways((3.3, 3.84), range(A), [token_y[s // K] for s in slots], expert_A),
            squares(4, token_y, range(T), side="right"),
        ],
    ]
    traces = [
        trace.update(visible=i <= stage) for i, column in enumerate(columns) for trace in column
    ]
    heads = [
        {"x": i, "y": 1, "yref": "paper", "yanchor": "bottom", "text": name, "showarrow": False}
        for i, name in enumerate(STAGES)
    ]
    return theme.figure(
        traces,
        height=height,
        margin={"l": 4, "r": 4, "t": 30, "b": 4},
        annotations=heads,
        xaxis={"visible": False, "range": [-0.5, 4.4]},
        yaxis={"visible": False, "range": [rows - 0.3, -0.8]},
    )


def product(dispatch_AT, combine_TA, expert_A, *, rows: int, height: int = 470) -> go.Figure:
    """Combine times dispatch, as one writes a product of matrices: combine at the lower left, dispatch at the upper right, and where they
    meet their product. A square is a number that is not 0, in the colour of the row's expert, the stronger the larger.

    Args:
        dispatch_AT: (A, T) zeros and ones. combine_TA: (T, A) weights in 0 .. 1. expert_A: (A,) the expert of each row.
        rows: the most rows A there is room for; fix it across the frames of an Explorer.
    """
    P, C, experts = (
        array(dispatch_AT, 2, "dispatch_AT"),
        array(combine_TA, 2, "combine_TA"),
        array(expert_A, 1, "expert_A"),
    )
    A, T = P.shape
    both, color = C @ P, theme.expert_colors(8)
    step = 12
    traces = []
    for xy, values, colors in (
        (("x2", "y2"), P, [color[e] for e in experts]),
        (("x", "y"), C, None),
        (("x2", "y"), both, None),
    ):
        points = [
            (i, j, float(values[i, j]))
            for i in range(values.shape[0])
            for j in range(values.shape[1])
            if values[i, j] > 1e-9
        ]
        fill = [
            theme.fade(theme.MUTED, 0.3 * v)
            if values is both
            else theme.fade(color[experts[i if colors else j]], 0.25 + 0.75 * min(1.0, v))
            for i, j, v in points
        ]
        traces.append(
            go.Scatter(
                x=[j for _, j, _ in points],
                y=[i for i, _, _ in points],
                mode="markers",
                xaxis=xy[0],
                yaxis=xy[1],
                customdata=[round(v, 2) for _, _, v in points],
                meta="entry",
                marker={"symbol": "square", "size": step, "color": fill, "line": {"width": 0}},
            )
        )
    diagonal = go.Scatter(
        x=list(range(T)),
        y=list(range(T)),
        xaxis="x2",
        yaxis="y",
        mode="text",
        textfont={"size": 11, "color": theme.INK},
        text=[f"{round(both[t, t], 2):g}".removeprefix("0") for t in range(T)],
    )
    split = 0.6  # the same for every K, and wide enough for the numbers on the diagonal
    grid = {
        "showgrid": False,
        "showticklabels": False,
        "mirror": "all",
        "showline": True,
        "linecolor": theme.MUTED,
    }
    right, top = [split + 0.07, 1], [T / (rows + T) + 0.05, 0.96]
    heads = [
        {"x": right[0], "y": 1, "text": "dispatch, A × T", "xanchor": "left"},
        {"x": 0, "y": top[0] - 0.045, "text": "combine, T × A", "xanchor": "left"},
        {"x": right[0], "y": top[0] - 0.045, "text": "product", "xanchor": "left"},
    ]
    notes = [
        {
            **head,
            "xref": "paper",
            "yref": "paper",
            "showarrow": False,
            "yanchor": "bottom" if head["y"] == 1 else "middle",
        }
        for head in heads
    ]
    return theme.figure(
        [*traces, diagonal],
        height=height,
        margin={"l": 8, "r": 8, "t": 26, "b": 8},
        annotations=notes,
        xaxis={**grid, "domain": [0, split], "range": [-0.5, A - 0.5], "anchor": "y"},
        xaxis2={**grid, "domain": right, "range": [-0.5, T - 0.5], "anchor": "y"},
        yaxis={**grid, "domain": [0, top[0] - 0.08], "range": [T - 0.5, -0.5], "anchor": "x"},
        yaxis2={**grid, "domain": top, "range": [A - 0.5, -0.5], "anchor": "x2"},
    )


def padding(counts_E, *, top: float, height: int = 320) -> go.Figure:
    """Rows per expert as solid bars, and above them, hollow, the places that a table as high as its fullest column leaves empty.

    Args:
        counts_E: (E,) rows per expert. top: upper end of the axis, the same in all frames of an Explorer.
    """
    count_E = array(counts_E, 1, "counts_E")
    E, C = len(count_E), int(count_E.max())
    colors = theme.expert_colors(E)
    x = list(range(E))
    solid = go.Bar(x=x, y=count_E.tolist(), marker={"color": colors}, name="rows")
    hollow = go.Bar(
        x=x,
        y=(C - count_E).tolist(),
        base=count_E.tolist(),
        name="padding",
        marker={"color": theme.CLEAR, "line": {"color": colors, "width": 1}},
    )
    line = go.Scatter(
        x=[-0.5, E - 0.5],
        y=[C, C],
        mode="lines",
        line={"color": theme.INK, "dash": "dash", "width": 1.5},
    )
    note = {
        "x": E - 0.5,
        "y": C,
        "text": f"C = {C}",
        "showarrow": False,
        "xanchor": "right",
        "yanchor": "bottom",
    }
    return theme.figure(
        [solid, hollow, line],
        height=height,
        barmode="overlay",
        bargap=0.25,
        annotations=[note],
        margin={"l": 56, "r": 16, "t": 16, "b": 48},
        xaxis={
            "title": {"text": "expert"},
            "range": [-0.6, E - 0.4],
            "tickvals": x if E <= 8 else x[::4],
        },
        yaxis={"title": {"text": "rows"}, "range": [0, top]},
    )


def times(series: dict, n_experts: list[int]) -> go.Figure:
    """Time against the number of experts, both axes logarithmic, in units of one dense FFN.

    Args:
        series: name -> (seeds, len(n_experts)).
    """
    figure = curves(
        series,
        x=n_experts,
        log_x=True,
        log_y=True,
        y_range=(0.6, 30),
        x_title="experts, E",
        y_title="time (dense FFN = 1)",
        height=400,
    )
    figure.update_xaxes(tickvals=n_experts, range=[0.6, 1.81])
    return figure.update_yaxes(tickvals=[1, 2, 5, 10, 20])


def _scale():
    """Okabe and Ito's eight colours as steps of a colour scale: a list of numbers takes less room in a frame than one of colours."""
    return [[v, c] for e, c in enumerate(theme.OKABE_ITO) for v in (e / 8, (e + 1) / 8)]
