"""Chapter 6's figures: who stands where in the queues."""

import pytest

from moe_book import theme
from moe_book.figures import ch06


def trace(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


def test_who_got_in_stands_below_the_line_and_who_did_not_is_hollow_above_it():
    figure = ch06.queues(
        [0, 0, 1, 0, 0],
        [False, True, True, True, False],
        n_experts=2,
        capacity=2,
        tokens=list("abcde"),
    )
    inside, outside = trace(figure, "got in"), trace(figure, "dropped")
    assert sorted(zip(inside.x, inside.y, inside.customdata)) == [
        (0, 0.5, "b"),
        (0, 1.5, "d"),
        (1, 0.5, "c"),
    ]
    assert sorted(zip(outside.x, outside.y, outside.customdata)) == [(0, 2.5, "a"), (0, 3.5, "e")]
    assert outside.marker.color == theme.CLEAR and set(outside.marker.line.color) == {
        theme.expert_color(0)
    }
    assert list(figure.data[-1].y) == [2, 2] and figure.data[-1].line.dash == "dash"


def test_a_queue_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="the queue of expert 1 has 3 tokens; rows=2"):
        ch06.queues([1, 1, 1], [True] * 3, n_experts=2, capacity=3, rows=2)


def test_drop_rates_are_shares_on_a_fixed_axis():
    figure = ch06.drop_profile({"position": [[0.0, 0.5], [0.0, 0.7]]}, x_title="part", top=0.8)
    assert list(trace(figure, "position").y) == pytest.approx([0.0, 0.6]) and list(
        figure.layout.yaxis.range
    ) == [0, 0.8]


LOADS = [[5, 1, 2, 0], [2, 2, 2, 2]]


def test_without_a_capacity_all_gpus_wait_for_the_busiest():
    figure = ch06.timeline(LOADS, capacity=None, longest=7)
    works, waits = trace(figure, "works on a token"), trace(figure, "has none")
    assert len(works.x) == 16 and len(waits.x) == 5 * 4 + 2 * 4 - 16
    starts = [round(x - 0.08, 9) for x, e in zip(works.base, works.y) if e == 0]
    assert sorted(starts) == [0, 1, 2, 3, 4, 5, 6]
    assert list(figure.data[2].x[::3]) == [5, 7] and set(figure.data[3].text) == {""}


def test_with_a_capacity_every_batch_takes_as_long_and_the_rest_is_counted():
    figure = ch06.timeline(LOADS, capacity=2, longest=7)
    assert list(figure.data[2].x[::3]) == [2, 4]
    assert list(figure.data[3].text) == [" 3 dropped", "", "", ""]
    assert len(trace(figure, "works on a token").x) == 16 - 3


def test_a_timeline_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="take 7; longest=6"):
        ch06.timeline(LOADS, capacity=None, longest=6)
