"""Figures of chapter 8 that have something to get wrong."""

import pytest

from moe_book import theme
from moe_book.figures import ch08

D = [-0.1, 0.1, 0.1, 0.3, 0.5]


def named(figure, name):
    (trace,) = [trace for trace in figure.data if trace.name == name]
    return trace


def test_tokens_right_of_the_border_go_to_expert_0_and_the_loads_say_so():
    figure = ch08.border(D, [0.0, 0.2], step=1)
    zero, one = theme.expert_colors(2)
    assert list(named(figure, "tokens").marker.color) == [one, one, one, zero, zero]
    assert list(named(figure, "loads").text) == ["expert 1: 3", "expert 0: 2"]
    assert list(named(figure, "border").x) == [0.2, 0.2]


def test_only_tokens_that_the_border_has_just_passed_are_outlined():
    figure = ch08.border(D, [0.0, 0.2, 0.0], step=2)
    lines = named(figure, "tokens").marker.line.color
    assert [color == theme.INK for color in lines] == [False, True, True, False, False]
    first = named(ch08.border(D, [0.0, 0.2], step=0), "tokens").marker.line.color
    assert theme.INK not in first


def test_equal_tokens_are_stacked_and_the_way_ends_where_the_border_stands():
    figure = ch08.border(D, [0.0, 0.2, 0.4], step=1)
    assert list(named(figure, "tokens").y) == [1, 1, 2, 1, 1]
    way = named(figure, "way")
    assert list(way.x) == pytest.approx([0, 0.2]) and list(way.y) == [0, 1]


def test_the_border_stays_on_the_page_at_every_step():
    low, high = ch08.border(D, [0.0, 0.4], step=0).layout.xaxis.range
    assert low < -0.2 and high > 0.8
