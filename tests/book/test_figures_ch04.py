"""The block of chapter 4: who meets whom, and who is left out."""

import pytest

from moe_book.figures import ch04


def ways(figure, trace):
    """The polylines of a trace, as tuples of y."""
    lines, line = [], []
    for y in figure.data[trace].y:
        if y is None:
            lines.append(tuple(line))
            line = []
        else:
            line.append(y)
    return lines


def test_attention_leads_from_no_later_token_to_an_earlier_one():
    lines = ways(ch04.block("MoE"), 1)
    assert len(lines) == 4 + 3 + 2 + 1
    assert all(line[0] <= line[-1] for line in lines)


def test_in_the_second_place_nobody_leaves_his_lane():
    for second in ch04.SECOND:
        assert all(line[0] == line[-1] for line in ways(ch04.block(second), 2))


def test_a_token_without_a_place_visits_no_box_and_keeps_its_stream():
    full, short = (ch04.block(second) for second in ch04.SECOND[1:])
    assert len(full.data[3].x) == 8 and len(short.data[3].x) == 6
    assert full.data[0].y == short.data[0].y


def test_every_frame_has_the_same_traces():
    assert {len(ch04.block(second).data) for second in ch04.SECOND} == {6}


def test_an_unknown_second_place_is_refused():
    with pytest.raises(ValueError, match="second='router' must be one of"):
        ch04.block("router")
