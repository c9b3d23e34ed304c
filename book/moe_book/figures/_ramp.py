"""A strip that says what a heatmap's colours mean: one more heatmap, because plotly's own colour bar is hundreds of shapes."""

import plotly.graph_objects as go

from .. import theme

ROOM = 58  # pixels of a strip with its ticks, and the gap to what is next to it
GREY = theme.OKABE_ITO[
    7
]  # in the middle between black and white: seen on a light page and on a dark one
GREYS = [[0, theme.fade(GREY, 0.07)], [1, theme.fade(GREY, 0.85)]]


def strip(
    title: str,
    shades,
    ticks: dict,
    *,
    colorscale,
    zmax: float,
    plot_height: float,
    left: float = 0.44,
    at: str = "top",
) -> tuple[go.Heatmap, dict, list[float]]:
    """The strip, its two axes for the layout, and the domain that is left for the figure's own vertical axis.

    Args:
        title: what the colours measure; stands left of the strip.
        shades: values whose colours are shown, from left to right, side by side.
        ticks: position -> label; 0 is the left end of the strip, len(shades) its right end.
        colorscale, zmax: of the heatmap that is explained; its zmin is 0.
        plot_height: pixels between the margins.
        left: where the strip begins, as a share of the width: room for the title.
        at: "top" or "bottom".
    """
    low, high = (1 - 12 / plot_height, 1) if at == "top" else (22 / plot_height, 34 / plot_height)
    cells = go.Heatmap(
        x=[i + 0.5 for i in range(len(shades))],
        y=[0],
        z=[[round(float(v), 4) for v in shades]],
        zmin=0,
        zmax=zmax,
        colorscale=colorscale,
        showscale=False,
        xaxis="x9",
        yaxis="y9",
        hoverinfo="skip",
    )
    frame = {
        "showgrid": False,
        "showline": True,
        "mirror": True,
        "linecolor": theme.MUTED,
        "ticks": "",
    }
    layout = {
        "xaxis9": {
            **frame,
            "domain": [left, 0.985],
            "anchor": "y9",
            "range": [0, len(shades)],
            "tickvals": list(ticks),
            "ticktext": list(ticks.values()),
            "tickfont": {"size": 12},
            "tickangle": 0,
        },
        "yaxis9": {**frame, "domain": [low, high], "anchor": "x9", "tickvals": []},
        "annotations": [
            {
                "text": title,
                "showarrow": False,
                "xref": "paper",
                "yref": "paper",
                "x": left - 0.02,
                "y": (low + high) / 2,
                "xanchor": "right",
                "yanchor": "middle",
                "font": {"size": 13},
            }
        ],
    }
    share = ROOM / plot_height
    return cells, layout, [0, 1 - share] if at == "top" else [share, 1]
