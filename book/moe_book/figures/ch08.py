"""Chapter 8's own figures: the border between two experts, and panels of bars over the same experts, for scores, weights and groups."""

import plotly.graph_objects as go

from .. import theme
from ._arrays import array
from .ch02 import dots
from .lines import curves


def expert_panels(
    rows: dict, *, ranges: dict, filled: dict, groups: int = 1, height: int = 430
) -> go.Figure:
    """Panels of bars, one above the other, all over the same experts; what is not filled is hollow.

    Args:
        rows: title -> (E,) values, from the upper panel to the lower; a value of -inf is drawn as a cross.
        ranges: title -> (low, high), the same in all frames of an Explorer.
        filled: title -> (E,) bool, the solid bars.
        groups: the experts stand in so many groups of neighbours, told apart by a gap-wide line.
    """
    titles, n = list(rows), len(rows)
    E = len(array(rows[titles[0]], 1, titles[0]))
    colors = theme.expert_colors(E)
    room = 1 / n
    traces, layout, shapes = [], {}, []
    for i, title in enumerate(titles):
        value_E, solid_E = array(rows[title], 1, title), array(filled[title], 1, title).astype(bool)
        axis = "y" if i == 0 else f"y{i + 1}"
        low, high = ranges[title]
        absent = [v == float("-inf") for v in value_E]
        traces.append(
            go.Bar(
                x=list(range(E)),
                y=[0 if gone else float(v) for v, gone in zip(value_E, absent)],
                name=title,
                yaxis=axis,
                textangle=0,
                textposition="outside",
                cliponaxis=False,
                constraintext="none",
                textfont={"size": 14 if E <= 4 else 12},  # eight labels fit a phone, none is shrunk
                text=[
                    "×" if gone else f"{v:.2f}".replace("-", "−")
                    for v, gone in zip(value_E, absent)
                ],
                marker={
                    "color": [c if yes else theme.CLEAR for c, yes in zip(colors, solid_E)],
                    "line": {"color": colors, "width": 2},
                },
            )
        )
        top = 1 - i * room
        layout["yaxis" if i == 0 else f"yaxis{i + 1}"] = {
            "title": {"text": title},
            "domain": [top - room + (0.1 if i < n - 1 else 0.0), top - 0.02],
            "range": [low, high],
            "nticks": 5,
            "zeroline": True,
            "zerolinecolor": theme.MUTED,
        }
    for g in range(1, groups):
        x = g * E / groups - 0.5
        shapes.append(
            {
                "type": "line",
                "x0": x,
                "x1": x,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"color": theme.MUTED, "width": 1, "dash": "dot"},
            }
        )
    return theme.figure(
        traces,
        height=height,
        bargap=0.4,
        margin={"l": 64, "r": 16, "t": 8, "b": 44},
        shapes=shapes,
        **layout,
        xaxis={
            "title": {"text": "expert"},
            "range": [-0.5, E - 0.5],
            "tickvals": list(range(E)),
            "ticktext": [str(e) for e in range(E)],
            "anchor": "y" if n == 1 else f"y{n}",
        },
    )


def biased_token(scores_E, choice_E, weights_E) -> go.Figure:
    """One token: its scores, the scores with a bias, and the weights of those it chose."""
    chosen_E = array(weights_E, 1, "weights_E") > 0
    rows = {"score": scores_E, "score + bias": choice_E, "weight": weights_E}
    ranges = {"score": (0, 1.1), "score + bias": (0, 1.8), "weight": (0, 1.1)}
    return expert_panels(rows, ranges=ranges, filled=dict.fromkeys(rows, chosen_E), height=460)


def border(d_T, border_S, step: int) -> go.Figure:
    """Tokens on the line p_0 - p_1 and the border between two experts, above the way the border has come.

    A token right of the border goes to expert 0, one left of it to expert 1. Who changed sides in the last step has a dark outline.

    Args:
        d_T: (T,) p_0 - p_1 of each token; equal ones are stacked.
        border_S: (S + 1,) where the border stands before each step. step: the one shown.
    """
    d, way = array(d_T, 1, "d_T"), array(border_S, 1, "border_S")
    now, before = way[step], way[max(step - 1, 0)]
    right, was = d > now, d > before
    place, height = {}, []
    for at in d:
        place[at] = place.get(at, 0) + 1
        height.append(place[at])
    top = max(height) + 2.5
    zero, one = theme.expert_color(0), theme.expert_color(1)
    dashes = {"color": theme.INK, "width": 2, "dash": "dash"}
    traces = [
        go.Scatter(
            x=d,
            y=height,
            mode="markers",
            name="tokens",
            marker={
                "symbol": "square",
                "size": 9,
                "color": [zero if r else one for r in right],
                "line": {
                    "color": [theme.INK if r != w else theme.CLEAR for r, w in zip(right, was)],
                    "width": 2,
                },
            },
        ),
        go.Scatter(
            x=[now, now], y=[0, top], mode="lines", name="border", cliponaxis=False, line=dashes
        ),
        go.Scatter(
            x=[-0.36, 0.88],
            y=[top - 0.8] * 2,
            mode="text",
            name="loads",
            text=[f"expert 1: {int((~right).sum())}", f"expert 0: {int(right.sum())}"],
            textposition=["middle right", "middle left"],
            textfont={"size": 14},
        ),
        go.Scatter(
            x=way[: step + 1],
            y=list(range(step + 1)),
            yaxis="y2",
            mode="lines+markers",
            name="way",
            line={"color": theme.MUTED, "width": 2},
            marker={"size": 7, "color": theme.INK},
        ),
    ]
    return theme.figure(
        traces,
        height=430,
        margin={"l": 56, "r": 16, "t": 8, "b": 48},
        xaxis={
            "title": {"text": "p<sub>0</sub> − p<sub>1</sub> of a token"},
            "range": [-0.38, 0.9],
            "tickvals": [-0.2, 0, 0.2, 0.4, 0.6, 0.8],
            "anchor": "y2",
        },
        yaxis={"title": {"text": "tokens"}, "range": [0, top], "domain": [0.44, 1], "nticks": 5},
        yaxis2={
            "title": {"text": "step"},
            "range": [len(way) - 0.5, -0.5],
            "domain": [0, 0.4],
            "tickvals": [0, 5, 10, 15],
        },
    )


def vio_over_time(vio: dict) -> go.Figure:
    """MaxVio in means of ten steps. vio: step size u -> (300,)."""
    return curves(
        {f"u = {u}": array(vio_S, 1).reshape(30, 10).mean(1) for u, vio_S in vio.items()},
        x=list(range(5, 300, 10)),
        x_title="step",
        y_title="MaxVio per batch",
        y_range=(0, 2.4),
    )


def spans(series: dict, sizes: list[int]) -> go.Figure:
    """Spans of the balanced biases against the number of experts. series: score function -> one number a size."""
    drawn = curves(
        series,
        x=sizes,
        log_x=True,
        log_y=True,
        x_title="experts",
        y_title="span of the balanced biases",
        y_range=(0.01, 3),
        colors={"softmax": "#D55E00", "sigmoid": "#0072B2", "sqrt_softplus": "#009E73"},
    )
    drawn.update_xaxes(tickvals=sizes, range=[0.89, 2.12])
    return drawn.update_yaxes(tickvals=[0.01, 0.03, 0.1, 0.3, 1, 3])


def grouped_token(scores_E, bias: float, masked_E, chosen_K) -> go.Figure:
    """One token and four groups of two experts: biased scores, the same after masking, and weights of the scores chosen."""
    score_E, index_K = array(scores_E, 1), array(chosen_K, 1)
    chosen_E = [e in index_K for e in range(len(score_E))]
    weights_E = score_E * chosen_E / (score_E * chosen_E).sum()
    rows = {"score + bias": score_E + bias, "after masking": masked_E, "weight": weights_E}
    return expert_panels(
        rows,
        ranges={"score + bias": (-1.5, 1.3), "after masking": (-1.5, 1.3), "weight": (0, 1.35)},
        groups=4,
        filled=dict.fromkeys(rows, chosen_E),
        height=480,
    )


def say_groups(experts: list[int], best: list[int]) -> str:
    """Which experts and groups of two a token takes, and whether they are among its best groups."""
    used = {e // 2 for e in experts}
    shown, groups, right = (str(sorted(some))[1:-1] for some in (experts, used, best))
    verdict = ", among its best." if used <= set(best) else f". Its best groups are {right}!"
    return f"The token takes experts {shown} in groups {groups}{verdict}"


def arms(values: dict, measure: str) -> go.Figure:
    """The stored run at its end, one row an arm. measure: "held-out loss", or one of MaxVio."""
    if measure == "held-out loss":
        return dots(values, x_title="held-out loss (nats per byte)", x_range=(2.1, 2.8))
    name = measure.replace("in training", "MaxVio per batch in training")
    return dots(values, x_title=f"{name}, mean of two layers", x_range=(0, 2.8))


def in_training(series: dict, *, every: int) -> go.Figure:
    """MaxVio over steps. series: arm -> (seeds, points), a mean over each ``every`` steps."""
    points = array(next(iter(series.values()))).shape[1]
    return curves(
        series,
        x=[every * (i + 0.5) for i in range(points)],
        x_title="optimiser step",
        y_title="MaxVio per batch",
        y_range=(0, 3.0),
    )
