"""Chapter 3's figures: every slot is a row of its expert's colour, and the product of the two matrices is a diagonal."""

import pytest
import torch

from moe_book.figures import ch03
from moe_core import DispatchPlan, TopKRouter


def routing(T=6, E=4, K=2, **options):
    torch.manual_seed(0)
    x = torch.randn(1, T, 8, dtype=torch.float64)
    return TopKRouter(8, E, K, **options).double()(x)


def test_the_sorted_column_has_each_tokens_copies_by_expert_and_later_columns_are_hidden():
    routed = routing()
    figure = ch03.sorting(routed, stage=2, rows=24)
    squares = [
        trace for trace in figure.data if trace.type == "scatter" and trace.mode == "markers+text"
    ]
    plan = DispatchPlan(routed)
    assert list(squares[2].text) == [str(t) for t in plan.token_A.tolist()]
    assert list(squares[2].marker.color) == sorted(squares[1].marker.color)
    assert [trace.visible for trace in squares] == [True, True, True, False]
    blocks = next(trace for trace in figure.data if trace.type == "bar")
    assert not blocks.visible and list(blocks.y) == pytest.approx(
        [max(0, n - 0.1) for n in plan.counts_E.tolist()]
    )


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="stage=5 must be 0 to 4, and A=12 at most rows=24"):
        ch03.sorting(routing(), stage=5, rows=24)
    with pytest.raises(ValueError, match="A=12 at most rows=8"):
        ch03.sorting(routing(), stage=0, rows=8)


def test_the_product_of_combine_and_dispatch_shows_the_sums_of_the_weights():
    P_AT = torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    figure = ch03.product(P_AT, P_AT.T * torch.tensor([0.25, 1.0, 0.5]), [0, 0, 1], rows=4)
    assert list(figure.data[-1].text) == [".75", "1"]
    assert list(figure.data[2].x) == list(figure.data[2].y) == [0, 1]  # nothing off the diagonal


def test_padding_fills_every_expert_up_to_the_fullest():
    figure = ch03.padding([5, 0, 2], top=6)
    solid, hollow = figure.data[:2]
    assert [a + b for a, b in zip(solid.y, hollow.y)] == [5, 5, 5] and list(figure.data[2].y) == [
        5,
        5,
    ]
