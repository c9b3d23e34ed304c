"""The book's kinds of figure: what they draw, and what they refuse."""

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from moe_book import figures, theme
from moe_book.frames import decode


def named(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


def test_an_expert_keeps_its_colour_from_figure_to_figure():
    load = figures.load_bars([1, 2, 3, 4]).data[0].marker.color
    scores = figures.score_bars([0.1, 0.2, 0.3, 0.4]).data[0].marker.color
    routed = named(figures.routing_map([[0], [1], [2], [3]], n_experts=4), "kept").marker.line.color
    assert (
        list(load) == list(scores) == list(routed) == [theme.expert_color(e, 8) for e in range(4)]
    )


@pytest.mark.parametrize("n_experts", [1, 8, 9, 64, 256])
def test_experts_have_different_colours(n_experts):
    assert len(set(theme.expert_colors(n_experts))) == n_experts


def test_an_expert_that_does_not_exist_has_no_colour():
    with pytest.raises(ValueError, match="e=8 must be between 0 and n_experts-1=7"):
        theme.expert_color(8, 8)


def test_a_dropped_token_is_hollow_and_a_weak_one_faint():
    figure = figures.routing_map(
        torch.tensor([[0, 1]]),
        torch.tensor([[0.75, 0.25]]),
        torch.tensor([[True, False]]),
        n_experts=2,
        tokens=["cat"],
    )
    kept, dropped = named(figure, "kept"), named(figure, "dropped")
    assert list(kept.x) == [0] and list(dropped.x) == [1]
    assert (
        kept.marker.color[0] == theme.fade(theme.expert_color(0), 0.8)
        and dropped.marker.color == theme.CLEAR
    )
    assert list(figure.layout.yaxis.ticktext) == ["cat"]


def test_slots_that_were_never_chosen_are_not_drawn():
    figure = figures.routing_map([[0, 1, 2]], chosen=[[True, False, True]], n_experts=3)
    assert list(named(figure, "kept").x) == [0, 2]


def test_a_batch_of_sequences_is_read_as_its_tokens():
    figure = figures.routing_map(
        torch.zeros(2, 3, 1, dtype=torch.long),
        torch.ones(2, 3, 1, dtype=torch.bfloat16),
        n_experts=1,
    )
    assert list(named(figure, "kept").y) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"expert_indices": [[0], [4]]},
            "expert_indices must be between 0 and n_experts-1=3, found 0 to 4",
        ),
        (
            {"expert_indices": [[0], [1]], "kept": [[True]]},
            r"kept has shape \(1, 1\); it must match expert_indices \(2, 1\)",
        ),
        (
            {"expert_indices": [[0], [1]], "tokens": ["a"]},
            "tokens has 1 labels; there are 2 tokens",
        ),
        ({"expert_indices": [0, 1]}, "must have 2 dimensions"),
    ],
)
def test_a_routing_map_names_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        figures.routing_map(**arguments, n_experts=4)


def test_capacity_and_uniform_load_are_dashed_lines_with_their_value():
    figure = figures.load_bars([4, 2], dropped=[2, 0], capacity=4, uniform=True)
    assert (named(figure, "capacity").y[0], named(figure, "uniform").y[0]) == (4, 4)
    assert (
        named(figure, "capacity").line.dash == "dash"
        and "capacity 4" in named(figure, "capacity").text[1]
    )
    assert named(figure, "dropped").marker.color == theme.CLEAR


def test_chosen_scores_are_solid():
    fill = figures.score_bars([0.5, 0.3, 0.2], chosen=[0, 2]).data[0].marker.color
    assert [c == theme.CLEAR for c in fill] == [False, True, False]
    assert (
        figures.score_bars([0.5, 0.3, 0.2], chosen=torch.tensor([True, False, True]))
        .data[0]
        .marker.color
        == fill
    )


def test_the_band_spans_the_seeds_and_the_line_is_their_mean():
    figure = figures.curves({"moe": [[1.0, 2.0], [3.0, 2.0]]})
    band, line = figure.data[:2]
    assert list(line.y) == [2, 2] and list(band.y) == [3, 2, 2, 1]
    assert not [t for t in figures.curves({"one": [1.0, 2.0]}).data if t.fill], (
        "a single run has no band"
    )


def test_names_of_lines_that_end_together_do_not_overlap():
    ends = [
        t.y[0]
        for t in figures.curves(
            {"a": [0.0, 1.0], "b": [2.0, 1.0], "c": [5.0, 1.0]}, height=360
        ).data
        if t.mode == "text"
    ]
    pixels = np.diff(sorted(ends)) * 300 / (5.0 * 1.12)
    assert (pixels >= 17).all()


@pytest.mark.parametrize("sizes", [[4, 8, 64], [0.003, 0.7], [1.0005, 1000.7]])
def test_on_a_logarithmic_axis_an_explorers_digits_leave_the_names_inside(sizes):
    shown = decode(figures.curves({"a": sizes}, sizes, log_x=True).to_plotly_json())
    low, high = shown["layout"]["xaxis"]["range"]
    every = np.log10([x for trace in shown["data"] for x in trace["x"]])
    assert low < every.min() and every.max() < high
    assert every.min() - low < 0.01 and high - every.max() < 0.01


def test_a_simplex_has_its_experts_at_the_corners():
    figure = figures.simplex(torch.eye(3))
    tokens = named(figure, "tokens")
    assert np.allclose(tokens.x, [0, 1, 0.5]) and np.allclose(tokens.y, [0, 0, np.sqrt(3) / 2])
    with pytest.raises(ValueError, match="probabilities that sum to 1"):
        figures.simplex([[0.5, 0.5, 0.5]])


def test_a_histogram_sums_to_one_and_shows_the_threshold():
    figure = figures.score_histogram({0: [0.1, 0.2], 3: [0.9]}, threshold=0.5)
    assert sum(named(figure, "expert 0").y) == pytest.approx(1)
    assert named(figure, "expert 3").line.color == theme.expert_color(3)
    assert list(named(figure, "threshold 0.5").x) == [0.5, 0.5]


def test_text_keeps_its_order_and_breaks_between_words():
    passage = figures.text_in_color(list("ab c\nd"), [0, 1, 2, 0, 1, 2], n_experts=3)
    assert passage.words == ["a", "b", "·", "c", "⏎", "d"] and passage.experts == [0, 1, 2, 0, 1, 2]
    assert passage.groups == [2, 1, 2, 1]
    assert figures.text_in_color(["the", " cat", "s"], [0, 0, 0], n_experts=1).groups == [1, 2], (
        "a token that begins with a space begins a word"
    )
    assert figures.text_in_color(["the", "cat"], [0, 0], n_experts=1).groups == [1, 1], (
        "words without spaces stand alone"
    )


def test_a_token_has_its_experts_colour_and_is_hollow_when_dropped():
    page = figures.text_in_color(["cat", "<b>"], [1, 0], n_experts=4, kept=[True, False]).html()
    assert f'<span class="moe-token" style="--c:{theme.expert_color(1, 4)}">cat</span>' in page
    assert (
        f'<span class="moe-token moe-hollow" style="--c:{theme.expert_color(0, 4)}">&lt;b&gt;</span>'
        in page
    )
    assert "expert 0" in page and "dropped</span>" in page, "the legend"


def test_amounts_tint_one_hue_and_the_ramp_is_fixed():
    passage = figures.text_in_color(["a", "b"], amount=torch.tensor([0.0, 1.5]), amount_max=3)
    assert passage.amount == [0, 1.5] and passage.amount_max == 3
    assert (
        "--a:0%" in passage.html()
        and "--a:35%" in passage.html()
        and "experts per token 0" in passage.html()
    )
    assert figures.text_in_color(["a"], amount=[2.0]).amount_max == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs experts or amount"),
        ({"experts": [0, 1]}, "n_experts must be given"),
        ({"experts": [0], "n_experts": 2}, "tokens has 2 entries; experts has 1"),
        (
            {"experts": [0, 2], "n_experts": 2},
            "experts must be between 0 and n_experts-1=1, found 0 to 2",
        ),
        ({"amount": [1, -1]}, "amount must be 0 or more"),
        ({"amount": [1, 1], "kept": [True]}, "tokens has 2 entries; kept has 1"),
    ],
)
def test_text_names_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        figures.text_in_color(["a", "b"], **arguments)


@pytest.mark.parametrize(
    "figure",
    [
        figures.routing_map([[0]], n_experts=1),
        figures.load_bars([1]),
        figures.score_bars([1]),
        figures.curves({"a": [1, 2]}),
        figures.simplex(np.eye(3)),
        figures.score_histogram([0.1]),
    ],
    ids=["routing_map", "load_bars", "score_bars", "curves", "simplex", "score_histogram"],
)
def test_each_kind_is_a_figure_on_a_clear_ground(figure):
    assert isinstance(figure, go.Figure)
    assert figure.layout.template.layout.paper_bgcolor == theme.CLEAR and figure.layout.height


def test_a_token_that_looks_like_a_tag_stays_what_it_is():
    figure = figures.routing_map([[0], [1], [0]], n_experts=2, tokens=["<br>", "&lt;", "a<b"])
    assert list(figure.layout.yaxis.ticktext) == ["&lt;br&gt;", "&amp;lt;", "a&lt;b"]
