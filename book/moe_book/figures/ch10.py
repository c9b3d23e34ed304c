"""Chapter 10's own figures: experts' logits with cutoffs that move, and bars with a whisker over seeds."""

import numpy as np
import plotly.graph_objects as go

from .. import theme
from ._arrays import array
from .bars import load_bars
from .ch02 import dots
from .histogram import score_histogram
from .lines import curves
from .routing import routing_map
from .text import text_in_color

READ = {  # how a model is read -> key of the stored run, the sentence below the figure
    "causally": ("final_loss", "Expert choice is read by its thresholds: each byte by itself."),
    "as in training": (
        "final_loss_as_trained",
        "Expert choice chooses among the tokens of a batch: it may look at later ones.",
    ),
}
LEAST = 0.02  # what is asked for less is drawn here
MEMORIES = {  # memory of the average -> arm of the stored run -> its name in the figure
    "20 steps": {
        "threshold": "warm-up and band",
        "threshold, no band": "warm-up only",
        "threshold, no warm-up": "band only",
        "threshold, neither": "neither",
    },
    "100 steps": {
        "long memory, no warm-up": "no warm-up",
        "long memory, warm-up 80": "warm-up of 80 steps",
        "long memory, warm-up 300": "warm-up of 300 steps",
    },
}


def moving_cutoffs(
    logits_TE,
    thresholds,
    own_cuts,
    *,
    span: tuple[float, float] = (-4.0, 6.0),
    bins: int = 40,
    top: float = 0.2,
    height: int = 430,
) -> go.Figure:
    """A panel per expert: the histogram of this batch's logits, the threshold in force (line), and where the batch itself would cut (dots).

    Args:
        logits_TE: (T, E) this batch's logits.
        thresholds: (E,) what they are compared with. own_cuts: (E,) each expert's k-th largest logit in this batch.
        span, bins: of the logits' axis, the same in all frames of an Explorer. top: upper end of the share axis.
    """
    logits_TE, thresholds, own_cuts = (
        array(logits_TE, 2, "logits_TE"),
        array(thresholds, 1, "thresholds"),
        array(own_cuts, 1, "own_cuts"),
    )
    E, edges, traces, layout, notes = logits_TE.shape[1], np.linspace(*span, bins + 1), [], {}, []
    gap = 0.12
    tall = (1 - gap * (E - 1)) / E
    for e in range(E):
        axis, color = f"y{e + 1}" if e else "y", theme.expert_color(e)
        share = np.histogram(logits_TE[:, e], edges)[0] / len(logits_TE)
        for x, y, above in _split(edges, share, float(thresholds[e])):
            traces.append(
                go.Scatter(
                    x=x,
                    y=y,
                    mode="lines",
                    yaxis=axis,
                    line={"shape": "hv", "color": color, "width": 1.5},
                    fill="tozeroy",
                    fillcolor=theme.fade(color, 0.75 if above else 0.12),
                    name=f"expert {e}, {'above' if above else 'below'}",
                )
            )
        for value, dash, name in (
            (thresholds[e], "solid", "threshold in force"),
            (own_cuts[e], "dot", "where this batch would cut"),
        ):
            traces.append(
                go.Scatter(
                    x=[float(value)] * 2,
                    y=[0, top],
                    mode="lines",
                    yaxis=axis,
                    name=f"expert {e}: {name}",
                    line={"color": theme.INK, "dash": dash, "width": 2 if dash == "solid" else 1.5},
                )
            )
        low = 1 - (e + 1) * tall - e * gap
        layout["yaxis" if e == 0 else f"yaxis{e + 1}"] = {
            "domain": [max(0.0, low), low + tall],
            "range": [0, top],
            "showticklabels": False,
            "showgrid": False,
            "title": {"text": f"expert {e}"},
        }
        taken = float((logits_TE[:, e] > thresholds[e]).mean())
        notes.append(
            {
                "x": 1,
                "xref": "paper",
                "y": low + tall,
                "yref": "paper",
                "xanchor": "right",
                "yanchor": "top",
                "showarrow": False,
                "text": f"takes {100 * taken:.0f} %",
            }
        )
    return theme.figure(
        traces,
        height=height,
        margin={"l": 36, "r": 12, "t": 8, "b": 48},
        annotations=notes,
        **layout,
        xaxis={
            "title": {"text": "logit (line: threshold; dots: this batch's own cut)"},
            "range": list(span),
            "anchor": f"y{E}" if E > 1 else "y",
        },
    )


def _split(edges, share, cut):
    """The outline of a histogram below and above a cut."""
    cut = float(np.clip(cut, edges[0], edges[-1]))
    i = int(np.clip(np.searchsorted(edges, cut, side="right") - 1, 0, len(share) - 1))
    heights = [round(float(v), 4) for v in share]
    ends = [round(float(v), 3) for v in edges]
    yield [*ends[: i + 1], cut], [*heights[: i + 1], 0], False
    yield [cut, *ends[i + 1 :]], [heights[i], *heights[i + 1 :], 0], True


def paired_bars(
    groups: dict, x, *, x_title: str, y_title: str, top: float, height: int = 320
) -> go.Figure:
    """Bars side by side for each x, one colour a group, with a whisker from the smallest to the largest seed.

    Args:
        groups: name -> (S, X) one row a seed, or (X,) for numbers without seeds.
        x: X labels. top: upper end of the axis.
    """
    traces = []
    for i, (name, values) in enumerate(groups.items()):
        values = array(values, name=name)
        rows = values if values.ndim == 2 else values[None]
        mean, color = rows.mean(0), theme.OKABE_ITO[i % 8]
        error = (
            {}
            if len(rows) == 1
            else {
                "error_y": {
                    "type": "data",
                    "array": (rows.max(0) - mean).tolist(),
                    "symmetric": False,
                    "arrayminus": (mean - rows.min(0)).tolist(),
                    "color": theme.MUTED,
                    "thickness": 1.5,
                }
            }
        )
        traces.append(
            go.Bar(
                x=list(range(len(x))),
                y=mean.tolist(),
                name=name,
                marker={"color": theme.fade(color, 0.75)},
                **error,
            )
        )
    return theme.figure(
        traces,
        height=height,
        barmode="group",
        bargap=0.25,
        showlegend=True,
        margin={"l": 64, "r": 12, "t": 56, "b": 48},
        xaxis={
            "title": {"text": x_title},
            "tickvals": list(range(len(x))),
            "ticktext": [str(v) for v in x],
        },
        yaxis={"title": {"text": y_title}, "range": [0, top]},
    )


def one_cutoff(logits_T, cutoff: float) -> go.Figure:
    """One expert's logits, and the cutoff above which it takes them."""
    return score_histogram(
        {0: logits_T}, span=(-4.0, 5.0), bins=45, threshold=cutoff, unit="logit", top=0.09
    )


def drifting(logits_TE, thresholds, own_cuts) -> go.Figure:
    """``moving_cutoffs`` with the axes of chapter 10's stream."""
    return moving_cutoffs(logits_TE, thresholds, own_cuts, span=(-4.0, 7.0), bins=22, top=0.3)


def pursuit(series: dict, drift: float) -> go.Figure:
    """Cutoffs of batches 1 to 119 that drift by so much a batch. series: name -> (119,)."""
    top = {0: 2.3, 0.01: 3.0, 0.05: 7.6}[drift]
    return curves(
        series, x=list(range(1, 120)), x_title="batch", y_title="logit", y_range=(0.3, top)
    )


def sinking(quantile_S, threshold_S, gap: float) -> go.Figure:
    """A quantile that sinks and the threshold after it; an expert whose threshold is more than gap too high is hungry. Both (149,)."""
    series = {"threshold": threshold_S, "hungry above": quantile_S + gap, "quantile": quantile_S}
    return curves(
        series,
        x=list(range(1, 150)),
        x_title="batch",
        y_title="logit",
        y_range=(-6.5, 2.8),
        colors=dict(zip(series, ["#E69F00", "#8C8C8C", "#0072B2"])),
    )


def band(routing) -> go.Figure:
    """Tokens each of eight experts takes of 256, and those the capacity band drops."""
    kept_E, asked_E = routing.tokens_per_expert, routing.slots_per_expert()
    return load_bars(kept_E, dropped=asked_E - kept_E, uniform=32.0, top=190)


def growing(words: list[str], chosen_NE) -> go.Figure:
    """Who takes which word, while only the first len(chosen_NE) have come. chosen_NE: (words so far, E) bool."""
    chosen = array(chosen_NE, 2, "chosen_NE")
    seen, E = chosen.shape
    rows = np.zeros((len(words), E), dtype=bool)
    rows[:seen] = chosen
    return routing_map(
        [list(range(E))] * len(words),
        n_experts=E,
        tokens=[word if i < seen else "" for i, word in enumerate(words)],
        chosen=rows,
        height=430,
    )


def how_many(share, binomial: list[float]) -> go.Figure:
    """How many experts a token has, measured and by chance. share: (seeds, E + 1); the first six are drawn."""
    shown = {
        "measured (three seeds)": array(share, 2, "share")[:, :6],
        "independent experts": binomial[:6],
    }
    return paired_bars(
        shown, range(6), x_title="routed experts of a token", y_title="share of tokens", top=1.05
    )


def tinted(passage: str, visits: list[int]):
    """A passage, each byte tinted by its number of experts."""
    return text_in_color(
        list(passage), amount=visits, amount_max=4, amount_label="routed experts per byte"
    )


def by_loss(seeds: list[dict]) -> go.Figure:
    """Experts per byte, from the easiest tenth of the bytes to the hardest, of one arm of the stored run."""
    losses = np.mean([one["loss_by_loss"] for one in seeds], axis=0)
    return paired_bars(
        {"routed experts, both layers": [one["visits_by_loss"] for one in seeds]},
        [f"{v:.1f}" if v >= 0.1 else f"{v:.2f}" for v in losses],
        x_title="mean loss of the tenth (nats), easy to hard",
        y_title="experts per byte",
        top=4,
    )


def losses(values: dict) -> go.Figure:
    """Held-out losses of the stored run's six models. values: name -> (seeds,)."""
    return dots(values, x_title="held-out loss (nats per byte)", x_range=(1.95, 2.25))


def hungriest(series: dict, step: list[int]) -> go.Figure:
    """What the least asked expert asks for over time. series: the names of one of the MEMORIES -> (seeds, steps)."""
    figure = curves(
        {name: np.asarray(values).clip(LEAST) for name, values in series.items()},
        x=step,
        y_title="least asked expert (1 is fair)",
        y_range=(0.9 * LEAST, 9),
        log_y=True,
        colors=dict(zip(series, ["#0072B2", "#E69F00", "#009E73", "#D55E00"])),
    )
    return figure.update_yaxes(tickvals=[LEAST, 0.1, 1, 8], ticktext=["≤0.02", "0.1", "1", "8"])
