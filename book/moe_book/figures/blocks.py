"""An MoE layer as blocks: all that lies in memory, and the part one token uses."""

import plotly.graph_objects as go

from .. import theme


def expert_blocks(
    E: int, K: int, expert_width: float, *, row_width: float = 8.0, rows: int = 8, height: int = 330
) -> go.Figure:
    """One FFN on top; below it E experts, each a block as long as it is wide in parameters, the K that a token uses solid.

    Args:
        E, K: number of experts, and how many one token uses (the first K, so that the figure stays calm).
        expert_width: width of an expert; one FFN is 1.
        row_width, rows: parameters that fit a row (one FFN = 1), and the number of rows to leave room for.

    Raises:
        ValueError: the experts don't fit into the rows.
    """
    per_row = int(row_width / expert_width)
    if E > per_row * rows:
        raise ValueError(
            f"E={E} experts of width {expert_width} must be at most {per_row * rows} to fit {rows} rows"
        )
    colors = theme.expert_colors(E)
    fill = [color if e < K else theme.fade(color, 0.22) for e, color in enumerate(colors)]
    ffn = go.Bar(
        x=[1],
        base=[0],
        y=[-1.6],
        width=0.8,
        orientation="h",
        marker={"color": theme.MUTED},
        name="one FFN",
    )
    experts = go.Bar(
        x=[expert_width - 0.03] * E,
        base=[(e % per_row) * expert_width for e in range(E)],
        y=[e // per_row for e in range(E)],  # 0.03: a gap
        width=0.8,
        orientation="h",
        marker={"color": fill},
        name="parameters of each expert",
    )
    labels = [
        (-2.3, "one FFN"),
        (-0.72, f"{E} expert{'' if E == 1 else 's'} in memory; solid: the {K} one token uses"),
    ]
    return theme.figure(
        [ffn, experts],
        height=height,
        barmode="overlay",
        margin={"l": 8, "r": 8, "t": 8, "b": 44},
        xaxis={
            "range": [0, row_width],
            "title": {"text": "parameters (one FFN = 1)"},
            "dtick": 1,
            "ticks": "outside",
        },
        yaxis={"visible": False, "range": [rows - 0.4, -2.7]},
        annotations=[
            {
                "x": 0,
                "y": y,
                "text": text,
                "showarrow": False,
                "xanchor": "left",
                "yanchor": "middle",
            }
            for y, text in labels
        ],
    )
