"""Chapter 7's own figures: noise, its estimate of the load, one expert a token, and how often GShard's second is asked."""

import math

import plotly.graph_objects as go

from .. import theme
from ._arrays import array
from .ch02 import dots
from .lines import curves

LOSS = "held-out loss (nats per byte)"
TOP1_SHOWS = {  # what is shown -> the sentence below it
    "router's gradient": "Four seeds each. The gradient is that of the language model's loss alone, "
    "the balance loss left out.",
    "tokens that change experts": "Four seeds each. The share of one held-out batch that another expert serves than 25 steps before.",
    "held-out loss at the end": "Four seeds each, 300 steps. Further left is better.",
}
NOISE_SHOWS = {  # what is shown -> key of the run, title and range of the axis, None for that of the data
    "spread of the load": ("variation", "coefficient of variation", (0, 2.0)),
    "held-out loss": ("valid_loss", LOSS, None),
    "tokens that change experts": ("moved", "share of tokens", (-0.05, 1.05)),
}


def asked(weight_T, share_T, *, height: int = 320) -> go.Figure:
    """A square per token: the weight of its second expert, and how often that expert was asked; the rule 2 g as a dashed line.

    Args:
        weight_T: (T,) weight g of the second expert, at most 1/2. share_T: (T,) share of draws in which it was asked.
    """
    weight, share = array(weight_T, 1, "weight_T"), array(share_T, 1, "share_T")
    rule = go.Scatter(
        x=[0, 0.5],
        y=[0, 1],
        mode="lines",
        name="2 g",
        cliponaxis=False,
        line={"color": theme.INK, "dash": "dash", "width": 1.5},
    )
    label = go.Scatter(
        x=[0.03],
        y=[0.9],
        mode="text",
        text=["dashed: twice the weight"],
        textposition="middle right",
        textfont={"color": theme.INK},
        hoverinfo="skip",
    )
    color = theme.OKABE_ITO[1]
    tokens = go.Scatter(
        x=weight.tolist(),
        y=share.tolist(),
        mode="markers",
        name="tokens",
        cliponaxis=False,
        marker={
            "symbol": "square",
            "size": 10,
            "color": theme.fade(color, 0.5),
            "line": {"color": color, "width": 1.5},
        },
    )
    return theme.figure(
        [rule, label, tokens],
        height=height,
        margin={"l": 64, "r": 24, "t": 12, "b": 48},
        xaxis={"title": {"text": "weight of the second expert"}, "range": [0, 0.52]},
        yaxis={"title": {"text": "share of draws in which it is asked"}, "range": [-0.03, 1.06]},
    )


def asked_and_dropped(routing, dropped: float) -> go.Figure:
    """``asked`` for many draws of one sequence, with the dropped slots per token written into it."""
    asked_T = routing.selected_mask[..., 1].double().mean(0)
    figure = asked(routing.expert_weights[0, :, 1], asked_T)
    return figure.add_annotation(
        x=0.03,
        y=1,
        xanchor="left",
        yanchor="middle",
        showarrow=False,
        text=f"dropped slots per token: {dropped:.2f}",
    )


def visits_over_time(seen_RSE) -> go.Figure:
    """Share of tokens that visit each expert, every fifth step. seen_RSE: (seeds, steps, E)."""
    seen = array(seen_RSE, 3, "seen_RSE")
    E = seen.shape[-1]
    return curves(
        {f"expert {e}": seen[:, ::5, e] for e in range(E)},
        x=list(range(0, seen.shape[1], 5)),
        y_title="share of tokens that visit it",
        y_range=(-0.03, 1.15),
        colors={f"expert {e}": color for e, color in enumerate(theme.expert_colors(E))},
    )


def own_noise_again(h_E, H_E, threshold_E, P_E, sigma: float, *, height: int = 380) -> go.Figure:
    """A row per expert: where its logit would fall if its own noise were drawn again, its threshold, and the part above it.

    Args:
        h_E: logits without noise. H_E: the noisy ones of this draw. threshold_E: what each has to beat. P_E: its chance. sigma: of the noise.
    """
    h, H, thresholds, P = (
        array(v, 1, name).tolist()
        for v, name in ((h_E, "h_E"), (H_E, "H_E"), (threshold_E, "threshold_E"), (P_E, "P_E"))
    )
    traces = []
    for e, color in enumerate(theme.expert_colors(len(h))):
        row = len(h) - 1 - e  # expert 0 on top

        def bell(x, e=e, row=row):
            return row + 0.7 * math.exp(-(((x - h[e]) / sigma) ** 2) / 2)

        grid = [h[e] + sigma * (i - 24) / 7 for i in range(49)]
        above = [thresholds[e]] + [x for x in grid if x > thresholds[e]]
        line = {"color": color, "width": 2}
        traces += [
            go.Scatter(x=grid, y=[bell(x) for x in grid], mode="lines", line=line),
            go.Scatter(
                x=[above[0], *above, above[-1]],
                y=[row, *map(bell, above), row],
                mode="none",
                fill="toself",
                fillcolor=theme.fade(color, 0.45),
            ),
            go.Scatter(
                x=[thresholds[e]] * 2,
                y=[row, row + 0.8],
                mode="lines",
                line={"color": theme.INK, "dash": "dash", "width": 1.5},
            ),
            go.Scatter(
                x=[H[e]],
                y=[row],
                mode="markers",
                cliponaxis=False,
                marker={
                    "symbol": "diamond",
                    "size": 11,
                    "color": color if H[e] > thresholds[e] else theme.CLEAR,
                    "line": {"color": color, "width": 2},
                },
            ),
        ]
    notes = [
        {
            "x": 1,
            "xref": "paper",
            "y": len(h) - 1 - e + 0.45,
            "text": f"P = {P[e]:.2f}",
            "showarrow": False,
            "xanchor": "right",
        }
        for e in range(len(h))
    ]
    names = [f"expert {len(h) - 1 - row}" for row in range(len(h))]
    return theme.figure(
        traces,
        height=height,
        margin={"l": 80, "r": 24, "t": 12, "b": 48},
        annotations=notes,
        xaxis={"title": {"text": "logit"}, "range": [-4, 8]},
        yaxis={"tickvals": list(range(len(h))), "ticktext": names, "range": [-0.2, len(h) - 0.1]},
        showlegend=False,
    )


def count_and_estimate(count_X, P_X, logit_X) -> go.Figure:
    """How often an expert is chosen, and the estimate of it, against its logit."""
    return curves(
        {"count": count_X, "estimate": P_X},
        x=logit_X,
        x_title="logit of expert 3",
        y_title="share of draws, or P",
        y_range=(-0.03, 1.15),
    )


def top1(runs: dict[str, list[dict]], show: str) -> go.Figure:
    """The stored run of top-1 routers: the gradient of three over steps, how many tokens change experts, or every router's loss at the end."""
    if show == "held-out loss at the end":
        final = {name: [one["valid_loss"][-1] for one in seeds] for name, seeds in runs.items()}
        return dots(final, x_title=LOSS, x_range=_around(final))
    if show == "tokens that change experts":
        names = ("weight p", "renormalised", "frozen, weight 1", "no balance loss")
        return curves(
            {name: [one["moved"] for one in runs[name]] for name in names},
            x=runs[names[0]][0]["gradient_step"][1:],
            y_title="share of tokens",
            y_range=(-0.02, 1.0),
            height=400,
            colors=dict(zip(runs, theme.OKABE_ITO)),
        )
    shown = list(runs)[:3]
    figure = curves(
        {name: [one["gradient_norm"] for one in runs[name]] for name in shown},
        x=runs[shown[0]][0]["gradient_step"],
        y_title="norm of the router's gradient",
        log_y=True,
        height=400,
        y_range=(1e-11, 4),
        colors=dict(zip(runs, theme.OKABE_ITO)),
    )
    ticks = {1e-10: "10⁻¹⁰", 1e-8: "10⁻⁸", 1e-6: "10⁻⁶", 1e-4: "10⁻⁴", 1e-2: "10⁻²", 1: "1"}
    return figure.update_yaxes(tickvals=list(ticks), ticktext=list(ticks.values()))


def capacity(runs: dict[str, list[dict]], show: str) -> go.Figure:
    """The stored run of capacity factors: the drop rate over steps, or the loss at the end, by the factor in eval."""
    if show == "drop rate in training":
        shown = ("0.5", "1.0", "1.25", "2.0")
        return curves(
            {f"factor {name}": [one["drop_rate"] for one in runs[name]] for name in shown},
            x=runs["1.0"][0]["drop_step"],
            y_title="share of tokens dropped",
            y_range=(-0.02, 1.0),
            colors={f"factor {name}": color for name, color in zip(runs, theme.OKABE_ITO)},
            height=380,
        )
    final, factor = {}, show.split()[-1]
    for name, seeds in runs.items():
        if factor == "2.0":
            label = name if name == "dropless" else f"factor {name}"
            final[label] = [one["valid_loss"][-1] for one in seeds]
        else:
            final[f"trained at {name}"] = [one["loss_by_eval_factor"][factor] for one in seeds]
    return dots(final, x_title=LOSS, rows=6, x_range=_around(final))


def noise(runs: dict[str, list[dict]], show: str) -> go.Figure:
    """The stored run of noisy routers at its end. show: one of NOISE_SHOWS."""
    key, title, limits = NOISE_SHOWS[show]
    final = {name: [one[key][-1] for one in seeds] for name, seeds in runs.items()}
    return dots(final, x_range=limits or _around(final), rows=max(3, len(runs)), x_title=title)


def _around(groups: dict[str, list[float]]) -> tuple[float, float]:
    """A range that holds every value, in whole hundredths."""
    values = [value for group in groups.values() for value in group]
    margin = 0.08 * (max(values) - min(values)) + 0.01
    return math.floor(100 * (min(values) - margin)) / 100, math.ceil(
        100 * (max(values) + margin)
    ) / 100
