"""Figures of chapter 5 that have something to get wrong."""

import numpy as np
import pytest

from moe_book.figures import ch05


def named(figure, name):
    (trace,) = [trace for trace in figure.data if trace.name == name]
    return trace


def test_tokens_have_the_colour_of_the_row_with_the_largest_dot_product():
    figure = ch05.one_way([[1, 0], [2, 0.1], [0, 3]], [[1, 0], [0, 1]])
    colors = named(figure, "tokens").marker.color
    assert colors[0] == colors[1] != colors[2]
    assert list(named(figure, "load").y) == pytest.approx([2 / 3, 1 / 3], abs=1e-3)


def test_tokens_are_drawn_at_length_one_and_the_longest_row_fits():
    figure = ch05.one_way([[5, 0], [0, 0.1]], [[30, 40], [1, 0]])
    tokens = named(figure, "tokens")
    assert np.hypot(tokens.x, tokens.y) == pytest.approx([1, 1])
    assert np.hypot(named(figure, "row 0").x[1], named(figure, "row 0").y[1]) < 1.3


def test_a_probability_goes_down_where_the_price_is_above_the_expected_one():
    figure = ch05.prices([0.75, 0.25, 0, 0], [0.25] * 4, [0.2, 0.6, 0.1, 0.1])
    assert set(named(figure, "expected price").y) == {0.3}
    assert list(named(figure, "direction").text) == ["down", "up", "up", "up"]


def test_at_balance_every_probability_stays():
    figure = ch05.prices([0.25] * 4, [0.25] * 4, [0.2, 0.6, 0.1, 0.1])
    assert set(named(figure, "direction").text) == {"stays"}


def test_everybody_is_done_when_the_busiest_is():
    figure = ch05.waiting([0.5, 0.25, 0.25, 0], longest=4)
    done = np.add(named(figure, "works").x, named(figure, "waits").x)
    assert done == pytest.approx([2, 2, 2, 2])
