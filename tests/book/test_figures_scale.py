"""Figures for models at scale: load over time, the expert-token heatmap, parameters, roofline, bytes per link."""

import json

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from moe_book import figures, theme
from moe_book.explorer import Control, Explorer
from moe_book.figures._units import count, in_bytes
from moe_book.figures.parameters import parameter_groups
from moe_core import LossFreeRouter, MixtureOfExperts, MoEConfig, TopKRouter
from moe_core.parallel import by_load, contiguous, round_robin, simulate
from moe_tools.accounting import ACCELERATORS, attainable_flops, expert_roofline, intensity
from moe_tools.accounting.published import MODELS
from moe_tools.diagnosis.routing_log import RoutingLog

MODEL_NAMES = [
    "deepseek-v3",
    "mixtral-8x7b",
    "olmoe-1b-7b",
    "gpt-oss-120b",
    "llama-4-maverick (text)",
    "longcat-flash",
    "switch-base-8",
]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def named(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


# Each kind as a chapter would use it: a figure over the real core.


def load_of_a_bias_controller(rate=0.02, n_experts=8):
    router = LossFreeRouter(16, n_experts, 2, bias_update_rate=rate).double()
    router.weight.data = randn(n_experts, 16, seed=1)
    log = RoutingLog(every=1)
    for step in range(40):
        routing = router(randn(1, 128, 16, seed=step) + 1.2 * randn(16, seed=99))
        log.add(step, [routing])
        router.update([routing])
    return figures.load_over_time(
        [record.layers[0].asked for record in log.training],
        [record.step for record in log.training],
    )


def scores_of_a_router(capacity_factor=1.0, logit_scale=1.0):
    router = TopKRouter(8, 8, 2, capacity_factor=capacity_factor).double()
    router.weight.data = logit_scale * randn(8, 8, seed=3) / 2
    routing = router(randn(1, 12, 8, seed=4) + 0.5 * randn(8, seed=5))
    return figures.routing_map(
        routing.expert_indices,
        routing.expert_weights,
        routing.capacity_mask,
        chosen=routing.selected_mask,
        n_experts=8,
        tokens="the router sends each token to two of its eight experts .".split(),
        scores=routing.scores,
        top=0.8,
    )


def parameters_of(model="deepseek-v3", active_only=False):
    return figures.parameter_treemap(MODELS[model], name=model, active_only=active_only)


def experts_on(chip="h100", model="deepseek-v3"):
    spec, tokens = MODELS[model], [1, 8, 64, 512, 4096, 32768, 262144]
    moe = spec.moe_layers[0]
    label = {T: f"{T / 1024:.0f}k" if T >= 1024 else str(T) for T in tokens}
    read = {T: expert_roofline(spec, T, ACCELERATORS[chip])[0]["experts_read"] for T in tokens}
    sparse = [
        (label[T], intensity(T * moe.top_k / read[T], spec.d_model, moe.d_ff)) for T in tokens
    ]
    dense = [(label[T], intensity(T, spec.d_model, round(moe.top_k * moe.d_ff))) for T in tokens]
    return figures.roofline(
        ACCELERATORS[chip], {"one expert": sparse, "dense FFN, same FLOPs": dense}
    )


def traffic_of(placement="contiguous", skew=1.0, n_experts=16, n_ranks=8):
    moe = MixtureOfExperts(MoEConfig(d_model=64, d_ff=8, n_experts=n_experts, top_k=2))
    moe.router.weight.data = randn(n_experts, 64, seed=1).float() / 8
    lean = skew * torch.linspace(1, -1, n_experts) @ torch.linalg.pinv(moe.router.weight.data).T
    xs = [randn(1, 256, 64, seed=10 + rank).float() + lean for rank in range(n_ranks)]
    load = sum(moe.router(x).slots_per_expert() for x in xs)
    placements = {
        "contiguous": contiguous(n_experts, n_ranks),
        "round robin": round_robin(n_experts, n_ranks),
        "by load": by_load(load.tolist(), n_ranks),
    }
    held = placements[placement]
    with torch.no_grad():
        traffic = simulate(moe, xs, held).traffic
    return figures.link_bytes(
        traffic.bytes_RR,
        traffic.rows_per_rank,
        experts_of_rank=held.experts_of_rank,
        ranks_per_node=4,
        top=60e3,
        top_rows=1500,
    )


EXPLORERS = {
    "load_over_time": (
        load_of_a_bias_controller,
        {
            "rate": Control([0.0, 0.005, 0.02, 0.5], start=0.02),
            "n_experts": Control([4, 16, 40], start=16),
        },
        "Who is busy, step by step",
        "Steps across, experts down; a cell is blue below the even share, faint at it and orange above; a dead expert is a thin line.",
    ),
    "routing_map": (
        scores_of_a_router,
        {
            "capacity_factor": Control([0.5, 0.75, 1.0, 1.5, 2.0], start=1.0),
            "logit_scale": [0.5, 1.0, 2.0],
        },
        "What the router wants and what it gets",
        "Tokens in rows, experts in columns; the darker a cell, the higher the probability; squares are the slots taken, hollow if dropped.",
    ),
    "parameter_treemap": (
        parameters_of,
        {"model": MODEL_NAMES, "active_only": False},
        "Where the parameters are",
        "A tile for each part of the model, as large as its parameters; the experts that a token leaves alone are faint.",
    ),
    "roofline": (
        experts_on,
        {"chip": Control(list(ACCELERATORS), start="h100"), "model": MODEL_NAMES[:5]},
        "Does an expert wait for memory?",
        "FLOP/s against FLOPs per byte, both logarithmic; points climb the memory's slope until they reach the ridge.",
    ),
    "link_bytes": (
        traffic_of,
        {
            "placement": ["contiguous", "round robin", "by load"],
            "skew": Control([0.0, 0.5, 1.0, 2.0], start=1.0),
        },
        "Who waits for whom",
        "A matrix of bytes from rank to rank; above it bars of the rows each rank works on, the longest in orange.",
    ),
}


@pytest.fixture(scope="module", params=EXPLORERS)
def explorer(request):
    figure, controls, title, alt = EXPLORERS[request.param]
    return Explorer(figure, title=title, alt=alt, **controls)


def test_each_kind_moves_in_an_explorer(explorer):
    for control in explorer.payload["controls"]:
        drawn = [
            explorer.at(**{control["name"]: value}).to_plotly_json() for value in control["values"]
        ]
        assert any(str(one["data"]) != str(drawn[0]["data"]) for one in drawn), control["name"]


def test_frames_share_their_axes(explorer):
    ranges = [
        change["path"] for change in explorer.payload["varying"] if change["path"][-1] == "range"
    ]
    counts_experts = any(control["name"] == "n_experts" for control in explorer.payload["controls"])
    assert ranges == [] or counts_experts


def test_a_frame_is_a_few_elements_of_svg(explorer):
    base = explorer.payload["base"]
    words = sum(
        sum(map(bool, trace["text"]))
        for trace in base["data"]
        if isinstance(trace.get("text"), list)
    )
    marks = sum(
        len(trace["x"])
        for trace in base["data"]
        if "markers" in trace.get("mode", "") or trace["type"] == "bar"
    )
    assert (
        words <= 100
        and marks <= 100
        and len(base["data"]) <= 8
        and len(base["layout"].get("shapes", [])) <= 8
    )
    assert len(json.dumps(explorer.payload)) <= 300_000


@pytest.mark.parametrize("name", EXPLORERS)
def test_each_kind_is_a_figure_on_a_clear_ground(name):
    figure = EXPLORERS[name][0]()
    assert isinstance(figure, go.Figure)
    assert figure.layout.template.layout.paper_bgcolor == theme.CLEAR and figure.layout.height
    if name != "parameter_treemap":
        assert figure.layout.xaxis.title.text and figure.layout.yaxis.title.text


# Load over time.


def test_load_is_told_in_multiples_of_the_even_share():
    figure = figures.load_over_time([[2, 1, 1, 0], [1, 1, 1, 1]], [10, 30])
    cells = figure.data[0]
    assert (
        np.array_equal(cells.z, [[2, 1], [1, 1], [1, 1], [0, 1]])
        and list(cells.x) == [10, 30]
        and (cells.zmin, cells.zmax) == (0, 4)
    )
    assert figures.load_over_time([[0.5, 0.25, 0.25, 0], [0.25] * 4], [10, 30]).data[0] == cells, (
        "shares or slots"
    )


def test_a_dead_expert_is_a_line_where_it_is_dead():
    load = np.ones((6, 3))
    load[[1, 2, 5], 1] = 0
    flat = named(figures.load_over_time(load), "dead")
    assert list(flat.x) == [0.5, 2.5, None, 4.5, 5.5, None] and list(flat.y) == [
        1,
        1,
        None,
        1,
        1,
        None,
    ]
    assert not named(figures.load_over_time(np.ones((6, 3))), "dead").x


def test_the_even_share_is_where_blue_turns_to_orange():
    for n_experts in (2, 4, 5, 8, 64):
        scale = dict(figures.load_over_time(np.ones((2, n_experts))).data[0].colorscale)
        most = figures.load_over_time(np.ones((2, n_experts))).data[0].zmax
        assert most == min(8, n_experts)
        positions = sorted(scale)
        assert positions[0] == 0 and positions[-1] == 1 and scale[0] == theme.CLEAR
        for position, color in scale.items():
            if position > 2e-3 and position != 1 / most:
                blue = color.startswith(theme.fade(theme.OKABE_ITO[0], 0.5)[:11])
                assert blue == (position < 1 / most)


def test_shares_of_the_last_step_stand_at_the_end():
    def words(load):
        return [
            trace.text
            for trace in figures.load_over_time(load).data
            if trace.type == "scatter" and trace.mode == "text"
        ]

    assert words([[1, 1, 1], [1, 0, 199]]) == [(" < 1 %", " dead", " 100 %")]
    assert words(np.ones((2, 32))) == [], "no room for 32"


@pytest.mark.parametrize(
    ("load", "steps", "message"),
    [
        ([[1, 1]], None, "at least 2 steps and 2 experts"),
        ([[1, 1], [1, 1]], [3, 3], "as many increasing steps"),
        ([[1, 1], [1, 1]], [1, 2, 3], "as many increasing steps"),
        ([[1, -1], [1, 1]], None, "no negative load"),
        ([[0, 0], [1, 1]], None, "every step must have some"),
        ([1, 1], None, "must have 2 dimensions"),
    ],
)
def test_a_load_that_is_none_is_refused(load, steps, message):
    with pytest.raises(ValueError, match=message):
        figures.load_over_time(load, steps)


# The expert-token heatmap: the routing map with scores under it.


def test_cells_are_the_scores_and_squares_the_slots():
    scores = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]])
    figure = figures.routing_map(
        [[0], [1]], [[0.7], [0.6]], [[True], [False]], n_experts=3, scores=scores
    )
    cells = named(figure, "probability")
    assert np.allclose(cells.z, scores[0]) and (cells.zmin, cells.zmax) == (0, 1)
    assert list(named(figure, "kept").x) == [0] and list(named(figure, "dropped").x) == [1]
    assert named(figure, "kept").marker.color == (theme.fade(theme.expert_color(0), 1.0),), (
        "over cells a square is solid"
    )
    assert named(figure, "dropped").marker.color == theme.CLEAR


def test_without_scores_the_routing_map_is_as_it_was():
    figure = figures.routing_map([[0], [1]], n_experts=2)
    assert (
        [trace.type for trace in figure.data] == ["scatter"] * 3
        and figure.layout.yaxis.domain is None
        and "xaxis9" not in figure.layout
    )


@pytest.mark.parametrize("scores", [[[0.5, 0.5]], [[0.5, 0.5, 0.0], [0.5, 0.6, -0.1]]])
def test_scores_that_do_not_fit_are_refused(scores):
    with pytest.raises(ValueError, match=r"must be \(2, 3\) numbers, at least 0"):
        figures.routing_map([[0], [1]], n_experts=3, scores=scores)


# Parameters.


@pytest.mark.parametrize("name", MODELS)
def test_tiles_hold_every_parameter_once(name):
    spec = MODELS[name]
    groups = parameter_groups(spec)
    assert sum(n for parts in groups.values() for n in parts.values()) == spec.total_params
    assert (
        sum(
            n for parts in groups.values() for part, n in parts.items() if part != "experts at rest"
        )
        == spec.active_params
    )
    names = {"shared": "shared experts", "dense": "dense FFN"}
    for part in ("attention", "router", "shared", "dense", "norms", "embedding", "head"):
        assert (
            sum(parts.get(names.get(part, part), 0) for parts in groups.values())
            == spec.parts[part]
        )


def test_layers_of_a_kind_stand_together():
    assert list(parameter_groups(MODELS["deepseek-v3"])) == [
        "58 MoE layers",
        "3 dense layers",
        "outside the layers",
    ]
    assert list(parameter_groups(MODELS["longcat-flash"])) == [
        "28 MoE + dense layers",
        "outside the layers",
    ]


def test_the_solid_band_is_as_high_as_the_active_share():
    spec = MODELS["mixtral-8x7b"]
    used, rest = figures.parameter_treemap(spec, name="mixtral").data
    share = spec.active_params / spec.total_params
    assert used.domain.y[0] == rest.domain.y[1] == pytest.approx(1 - share, rel=1e-12) and (
        rest.domain.y[0],
        used.domain.y[1],
    ) == (0, 1)
    assert used.values[0] == spec.active_params and rest.values == (
        spec.total_params - spec.active_params,
    )
    for group, n in zip(used.ids, used.values):
        children = [value for parent, value in zip(used.parents, used.values) if parent == group]
        assert not children or sum(children) == n
    assert len(set(used.ids)) == len(used.ids) and set(used.parents) <= {"", *used.ids}
    assert [
        trace.domain.y[0]
        for trace in figures.parameter_treemap(spec, name="mixtral", active_only=True).data
    ] == [0]


def test_the_line_above_tells_total_and_active():
    text = (
        figures.parameter_treemap(MODELS["deepseek-v3"], name="deepseek-v3")
        .layout.annotations[0]
        .text
    )
    assert text == "<b>deepseek-v3</b>: 671B parameters<br>a token uses 37.6B, 5.6 % (solid)"


# Roofline.


@pytest.mark.parametrize("chip", ACCELERATORS)
def test_points_lie_on_the_roof(chip):
    accelerator = ACCELERATORS[chip]
    points = [(str(m), intensity(m, 2048, 768)) for m in (1, 16, 256, 4096)]
    figure = figures.roofline(accelerator, {"expert": points})
    assert list(named(figure, "expert").y) == pytest.approx(
        [attainable_flops(m, 2048, 768, accelerator) for m in (1, 16, 256, 4096)], rel=1e-12
    )
    assert list(named(figure, "ridge").x) == [accelerator.ridge] * 2
    roof = named(figure, "roof")
    assert (
        roof.x[1] == accelerator.ridge
        and roof.y[0] / roof.x[0] == pytest.approx(accelerator.memory_bandwidth)
        and roof.y[1] == roof.y[2]
    )
    assert any(
        f"ridge<br> {accelerator.ridge:.0f}" in note.text for note in figure.layout.annotations
    )


def test_labels_of_points_that_crowd_are_left_out():
    text = named(
        figures.roofline(
            ACCELERATORS["h100"], {"a": [("1k", 500.0), ("2k", 510.0), ("4k", 4000.0)]}
        ),
        "a",
    )
    assert text.text == ("1k", "", "4k") and text.customdata == ("1k", "2k", "4k"), (
        "the table has them all"
    )


@pytest.mark.parametrize(
    ("products", "message"),
    [
        ({}, "has 0 names"),
        ({k: [] for k in "abc"}, "has 3 names"),
        ({"a": [("x", 0.0)]}, "above 0"),
    ],
)
def test_products_that_do_not_fit_are_refused(products, message):
    with pytest.raises(ValueError, match=message):
        figures.roofline(ACCELERATORS["h100"], products)


# Bytes per link.


def test_the_matrix_is_the_traffic_and_home_is_empty():
    figure = figures.link_bytes([[0, 2e6], [1e6, 0]], [30, 10])
    cells = named(figure, "bytes sent")
    assert (
        [list(row) for row in cells.z] == [[None, 2], [1, None]]
        and cells.meta == "MB"
        and "MB from rank" in figure.layout.annotations[0].text
    )
    assert list(named(figure, "rows").y) == [30, 10] and list(named(figure, "mean").y) == [20, 20]


def test_the_straggler_is_orange_and_named():
    figure = figures.link_bytes(np.zeros((3, 3)), [10, 40, 10])
    colors = named(figure, "rows").marker.color
    assert (
        colors[1] != colors[0] == colors[2]
        and figure.layout.annotations[1].text == "straggler: rank 1, 2.00 × the mean"
    )
    figure = figures.link_bytes(np.zeros((3, 3)), [0.1, 0.1, 0.1])
    assert len(set(named(figure, "rows").marker.color)) == 1 and figure.layout.annotations[
        1
    ].text.startswith("no straggler")


def test_a_rank_is_a_box_with_its_experts():
    figure = figures.link_bytes(
        np.zeros((2, 2)), [1, 1], experts_of_rank=contiguous(4, 2).experts_of_rank, ranks_per_node=1
    )
    discs = figure.data[-1]
    assert discs.marker.color == tuple(theme.expert_colors(4)) and [round(x) for x in discs.x] == [
        0,
        0,
        1,
        1,
    ]
    assert {shape.x0 for shape in figure.layout.shapes if shape.x0 == shape.x1} == {0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[0, 1]], [1, 1]), r"shape \(1, 2\)"),
        (([[0, -1], [1, 0]], [1, 1]), "no negative number"),
        (([[0, 1], [1, 0]], [1, -1]), "no negative number"),
    ],
)
def test_traffic_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        figures.link_bytes(*arguments)


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1k"),
        (7168, "7.17k"),
        (999_600, "1M"),
        (106e6, "106M"),
        (671_026_419_200, "671B"),
        (1.026e12, "1.03T"),
    ],
)
def test_counts_have_three_digits_and_a_letter(n, text):
    assert count(n) == text


@pytest.mark.parametrize(
    ("n", "unit"),
    [(1, "bytes"), (999, "bytes"), (1e3, "kB"), (115.6e6, "MB"), (1e9, "GB"), (5e13, "GB")],
)
def test_bytes_have_a_unit_one_reads(n, unit):
    assert in_bytes(n)[0] == unit
