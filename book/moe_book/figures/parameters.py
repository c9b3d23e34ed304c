"""Where the parameters of a model are, and which of them one token uses."""

import plotly.graph_objects as go

from moe_tools.accounting import ModelSpec, MoESpec
from moe_tools.accounting.spec import NORMS, LayerSpec

from .. import theme
from ._ramp import GREY
from ._units import count

EXPERTS = theme.OKABE_ITO[0]
COLORS = {
    "experts": EXPERTS,
    "experts at rest": theme.fade(EXPERTS, 0.24),
    "shared experts": theme.OKABE_ITO[4],
    "attention": theme.OKABE_ITO[1],
    "router": theme.OKABE_ITO[5],
    "dense FFN": theme.OKABE_ITO[2],
    "embedding": theme.OKABE_ITO[3],
    "head": theme.OKABE_ITO[6],
    "norms": GREY,
}
OUTSIDE = "outside the layers"
WHITE, BLACK = "#ffffff", "#000000"


def parameter_treemap(
    spec: ModelSpec, *, name: str, active_only: bool = False, height: int = 500
) -> go.Figure:
    """A tile for each part of a model, as large as its parameters: solid what one token uses, below it, faint, the experts at rest.

    A list of all parts stands under the tiles, since most are too small for words. The solid band is as high as the active share.
    Layers of a kind are taken together: with a router, without one, with both kinds of feed-forward network. "experts" are those that a
    token visits, top_k in each layer.

    Args:
        spec: say ``moe_core.published.MODELS["deepseek-v3"]``.
        name: of the model, for the line above.
        active_only: leave the experts at rest out and give all room to the rest.
    """
    groups = parameter_groups(spec)
    tiles = [
        (group, part, n)
        for group, parts in groups.items()
        for part, n in parts.items()
        if n and part != "experts at rest"
    ]
    rest, active, total = (
        sum(parts.get("experts at rest", 0) for parts in groups.values()),
        spec.active_params,
        spec.total_params,
    )
    columns = _columns(groups)
    margin = {"l": 0, "r": 0, "t": 44, "b": 17 * max(map(len, columns)) + 14}
    edge = rest / total if rest and not active_only else 0.0
    band = (1 - edge) * (height - margin["t"] - margin["b"])
    between = (
        None if band < 26 else " " if band < 60 else "<br>"
    )  # no room for words, for one line, for two
    inner = list(dict.fromkeys(group for group, _, _ in tiles))
    sums = [sum(n for g, _, n in tiles if g == group) for group in inner]
    used = _treemap(
        [name, *inner, *(part for _, part, _ in tiles)],
        ["", *[name] * len(inner), *(group for group, _, _ in tiles)],
        [sum(sums), *sums, *(n for _, _, n in tiles)],
        [""] * (1 + len(inner)) + [_label(part, n, between) for _, part, n in tiles],
        [theme.CLEAR] * (1 + len(inner)) + [COLORS[part] for _, part, _ in tiles],
        [theme.INK] * (1 + len(inner)) + [_ink(part) for _, part, _ in tiles],
        [edge, 1],
    )
    part = "experts at rest"
    unused = _treemap(
        [part], [""], [rest], [_label(part, rest, "<br>")], [COLORS[part]], [theme.INK], [0, edge]
    )
    percent = f"{100 * active / total:.{1 if active < 0.1 * total else 0}f} %"
    head = f"<b>{name}</b>: {count(total)} parameters<br>a token uses {count(active)}, {percent} (solid)"
    return theme.figure(
        [used, unused] if edge else [used],
        height=height,
        margin=margin,
        uniformtext={"minsize": 10, "mode": "hide"},
        annotations=[
            _words(head, 0, 1, "bottom", 14),
            *(
                _words("<br>".join(lines), x, 0, "top", 12, -6)
                for x, lines in zip((0, 0.5), columns)
            ),
        ],
        xaxis={"visible": False, "title": {"text": "belongs to"}},
        yaxis={"visible": False, "title": {"text": "part"}},
    )


def _treemap(labels, parents, values, text, colors, inks, y):
    # Several groups have norms: a name alone says not which.
    ids = [
        label if parent in ("", labels[0]) else f"{parent}: {label}"
        for label, parent in zip(labels, parents)
    ]
    return go.Treemap(
        ids=ids,
        labels=labels,
        parents=parents,
        values=values,
        branchvalues="total",
        meta="parameters",
        text=text,
        textinfo="text",
        textposition="middle center",
        textfont={"size": 13, "color": inks},
        pathbar={"visible": False},
        domain={"y": y},
        marker={"colors": colors, "line": {"width": 0}, "pad": dict.fromkeys("tlrb", 0)},
        tiling={"packing": "squarify", "pad": 2},
    )


def parameter_groups(spec: ModelSpec) -> dict[str, dict[str, int]]:
    """Kind of layer -> part -> parameters; together ``spec.total_params``, without "experts at rest" ``spec.active_params``."""
    D, norm = spec.d_model, NORMS[spec.norm] * spec.d_model
    kinds: dict[tuple, list[LayerSpec]] = {}
    for layer in spec.layers:
        kinds.setdefault((bool(layer.moes), len(layer.moes) < len(layer.feed_forwards)), []).append(
            layer
        )
    groups = {}
    for (has_moe, has_dense), layers in sorted(kinds.items(), reverse=True):
        parts = dict.fromkeys(
            (
                "experts at rest",
                "experts",
                "shared experts",
                "router",
                "dense FFN",
                "attention",
                "norms",
            ),
            0,
        )
        for layer in layers:
            parts["attention"] += sum(
                mixer.matrices(D) + mixer.vectors(D) for mixer in layer.mixers
            )
            parts["norms"] += layer.n_norms * norm
            for f in layer.feed_forwards:
                counted = {part: sum(numbers) for part, numbers in f.parts(D).items()}
                if isinstance(f, MoESpec):
                    visited = f.experts_per_token * f.expert_params(D)
                    parts["experts"] += visited
                    parts["experts at rest"] += counted["experts"] - visited
                    parts["shared experts"] += counted["shared"]
                    parts["router"] += counted["router"]
                else:
                    parts["dense FFN"] += counted["dense"]
        kind = "MoE + dense " if has_moe and has_dense else "MoE " if has_moe else "dense "
        groups[f"{len(layers)} {kind}layer{'' if len(layers) == 1 else 's'}"] = {
            part: round(n) for part, n in parts.items()
        }
    return {
        **groups,
        OUTSIDE: {
            "embedding": spec.parts["embedding"],
            "head": spec.parts["head"],
            "norms": spec.n_final_norms * norm,
        },
    }


def _label(part, n, between):
    return "" if between is None else f"{part}{between}{count(n)}"


def _ink(part):
    if part == "experts at rest":
        return theme.INK
    return WHITE if part in ("experts", "dense FFN", "router", "norms") else BLACK


def _columns(groups):
    """The list below: MoE layers at the left, all else at the right."""
    columns = [[], []]
    for i, (group, parts) in enumerate(groups.items()):
        lines = columns[0 if i == 0 and group != OUTSIDE else 1]
        lines.append(f"<b>{group}</b>")
        for part, n in parts.items():
            if n:
                color, square = (EXPERTS, "□") if part == "experts at rest" else (COLORS[part], "■")
                lines.append(f'<span style="color:{color}">{square}</span> {part} {count(n)}')
    return columns


def _words(text, x, y, yanchor, size, yshift=0):
    return {
        "text": text,
        "showarrow": False,
        "xref": "paper",
        "yref": "paper",
        "x": x,
        "y": y,
        "xanchor": "left",
        "yanchor": yanchor,
        "align": "left",
        "font": {"size": size},
        "yshift": yshift,
    }
