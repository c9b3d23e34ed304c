"""Chapter 6's own figures: a queue in front of each expert, and the drop rate by place."""

import plotly.graph_objects as go

from moe_core import Routing

from .. import theme
from ._arrays import array
from .lines import curves


def queues(
    expert_indices,
    kept,
    *,
    n_experts: int,
    capacity: int,
    tokens: list[str] | None = None,
    rows: int = 12,
    height: int = 380,
) -> go.Figure:
    """One queue per expert, one square per token in the order of arrival; those below the dashed line got in, the others are hollow.

    Args:
        expert_indices: (T,) the expert each token wants. kept: (T,) bool, whether it got in.
        n_experts: E. capacity: places per expert.
        tokens: T labels, written beside the squares; by default their numbers.
        rows: the longest queue there is room for; fix it across the frames of an Explorer.

    Raises:
        ValueError: a queue is longer than ``rows``.
    """
    index_T, kept_T = (
        array(expert_indices, 1, "expert_indices").astype(int),
        array(kept, 1, "kept").astype(bool),
    )
    labels = [str(t) for t in range(len(index_T))] if tokens is None else [str(t) for t in tokens]
    points = {True: [], False: []}
    for e in range(n_experts):
        queue = [t for t in range(len(index_T)) if index_T[t] == e]
        if len(queue) > rows:
            raise ValueError(
                f"the queue of expert {e} has {len(queue)} tokens; rows={rows} must be at least as many"
            )
        # those who got in stand in front, each group in the order of the batch
        for place, t in enumerate(sorted(queue, key=lambda t: not kept_T[t])):
            points[bool(kept_T[t])].append((e, place, labels[t]))
    side = 0.62 * (height - 80) / rows
    squares = []
    for inside, name in ((True, "got in"), (False, "dropped")):
        colors = [theme.expert_color(e, n_experts) for e, _, _ in points[inside]]
        squares.append(
            go.Scatter(
                x=[e for e, _, _ in points[inside]],
                y=[place + 0.5 for _, place, _ in points[inside]],
                mode="markers+text",
                name=name,
                text=[f" {label}" for _, _, label in points[inside]],
                textposition="middle right",
                textfont={"size": 13, "color": theme.INK},
                customdata=[label for _, _, label in points[inside]],
                meta="token",
                cliponaxis=False,
                marker={
                    "symbol": "square",
                    "size": side,
                    "color": colors if inside else theme.CLEAR,
                    "line": {"color": colors, "width": 2},
                },
            )
        )
    line = go.Scatter(
        x=[-0.5, n_experts - 0.5],
        y=[capacity, capacity],
        mode="lines+text",
        text=["", f" capacity {capacity}"],
        textposition="middle right",
        cliponaxis=False,
        hoverinfo="skip",
        line={"color": theme.INK, "dash": "dash", "width": 1.5},
        textfont={"color": theme.INK},
    )
    return theme.figure(
        [*squares, line],
        height=height,
        margin={"l": 56, "r": 96, "t": 12, "b": 48},
        xaxis={
            "title": {"text": "expert"},
            "range": [-0.5, n_experts - 0.5],
            "tickvals": list(range(n_experts)),
        },
        yaxis={
            "title": {"text": "place in the queue"},
            "range": [0, rows],
            "dtick": 2,
            "showgrid": False,
        },
    )


def drop_profile(
    rates: dict[str, object], *, x_title: str, top: float, height: int = 320
) -> go.Figure:
    """The drop rate in each part of a batch, policy by policy: mean over seeds as a line, smallest to largest as a band.

    Args:
        rates: policy -> (seeds, parts).
        top: upper end of the axis, fixed across the frames of an Explorer.
    """
    parts = array(next(iter(rates.values())), 2, "rates").shape[1]
    drawn = curves(
        dict(rates),
        x=list(range(1, parts + 1)),
        x_title=x_title,
        y_title="share of slots dropped",
        y_range=(0, top),
        height=height,
    )
    return drawn.update_yaxes(tickformat=".0%")


def lettered_queues(routing: Routing) -> go.Figure:
    """The queues of a routing with one slot a token and four experts; tokens are letters."""
    wants_T, kept_T = routing.expert_indices.flatten(), routing.capacity_mask.flatten()
    return queues(
        wants_T,
        kept_T,
        n_experts=4,
        capacity=routing.capacity,
        tokens=[chr(ord("a") + t) for t in range(len(wants_T))],
        rows=19,
        height=440,
    )


def waste(pairs, factors: list[float]) -> go.Figure:
    """Shares dropped and empty against the capacity factor. pairs: (draws, factors, 2)."""
    pairs = array(pairs, 3, "pairs")
    return curves(
        {"dropped": pairs[..., 0], "empty": pairs[..., 1]},
        x=factors,
        x_title="capacity factor",
        y_title="share",
        y_range=(0, 1),
        colors={"dropped": "#D55E00", "empty": "#0072B2"},
    )


def over_time(series: dict, *, every: int) -> go.Figure:
    """Shares of all slots in training. series: name -> (seeds, points), a mean over each ``every`` steps."""
    points = array(next(iter(series.values()))).shape[1]
    names = ["dropless", "capacity", "dropless+loss", "capacity+loss"]
    return curves(
        series,
        x=[every * (i + 0.5) for i in range(points)],
        y_title="share of all slots",
        y_range=(0, 0.75),
        colors=dict(zip(names, ["#8C8C8C", "#D55E00", "#56B4E9", "#0072B2"])),
    )


def timeline(load_SE, *, capacity: int | None, longest: int, height: int = 260) -> go.Figure:
    """Experts on GPUs of their own, batch after batch, in the time that one token takes; the next batch begins when all are done.

    Without a capacity, a GPU works on the tokens it was sent, and waits for the busiest. With one, each works on its places, also on those that stay
    empty, and the tokens beyond them cost no time; how many they are stands at the end of the row.

    Args:
        load_SE: (S, E) tokens sent to each expert in each batch. capacity: places per expert, None for no limit.
        longest: the latest end there is room for; fix it across the frames of an Explorer.

    Raises:
        ValueError: the batches take longer than ``longest``.
    """
    load_SE = array(load_SE, 2, "load_SE").astype(int)
    E = load_SE.shape[1]
    lasts = [int(row.max()) if capacity is None else capacity for row in load_SE]
    ends = [sum(lasts[: s + 1]) for s in range(len(lasts))]
    if ends[-1] > longest:
        raise ValueError(f"the batches take {ends[-1]}; longest={longest} must be at least as long")
    worked, idle, done, lost = [], [], [], [0] * E
    for load_E, last, end in zip(load_SE.tolist(), lasts, ends):
        for e, load in enumerate(load_E):
            kept = min(load, last)
            worked += [(end - last + i + 0.5, e) for i in range(kept)]
            idle += [(end - last + i + 0.5, e) for i in range(kept, last)]
            done.append((end - last + kept, e))
            lost[e] += load - kept
    spots = {"works on a token": (worked, 0.5), "has none": (idle, 0.06)}
    squares = [
        go.Bar(
            x=[0.84] * len(points),
            base=[x - 0.42 for x, _ in points],
            y=[e for _, e in points],
            width=width,
            offset=-width / 2,
            orientation="h",
            name=name,
            hoverinfo="skip",
            marker={
                "color": [
                    theme.expert_color(e, E) if points is worked else theme.MUTED for _, e in points
                ]
            },
        )
        for name, (points, width) in spots.items()
    ]
    marks = go.Scatter(
        x=[x for end in ends for x in (end, end, None)],
        y=[y for _ in ends for y in (-0.6, E - 0.4, None)],
        mode="lines",
        hoverinfo="skip",
        line={"color": theme.INK, "dash": "dash", "width": 1.5},
    )
    table = go.Scatter(  # unseen: what the table behind the figure says
        x=[x for x, _ in done],
        y=[e for _, e in done],
        mode="markers",
        name="last token done",
        marker={"size": 1, "color": theme.CLEAR},
    )
    said = go.Scatter(
        x=[ends[-1] + 0.5] * E,
        y=list(range(E)),
        mode="text",
        hoverinfo="skip",
        cliponaxis=False,
        text=[f" {n} dropped" if n else "" for n in lost],
        textposition="middle right",
    )
    return theme.figure(
        [*squares, marks, said, table],
        height=height,
        margin={"l": 64, "r": 84, "t": 12, "b": 48},
        xaxis={"title": {"text": "time, in the work on one token"}, "range": [-0.5, longest + 0.7]},
        yaxis={
            "tickvals": list(range(E)),
            "ticktext": [f"GPU {e}" for e in range(E)],
            "range": [E - 0.4, -0.6],
            "showgrid": False,
        },
    )
