"""Placement: every expert has a place, every rank the same number of places, and a measured load is evened out."""

from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_core.parallel import Placement, by_load, contiguous, round_robin

from ..core.helpers import fast


def busy(placement, load):
    """What each rank has to do, when the copies of an expert share its load."""
    copies = [len(places) for places in placement.places_of_expert]
    return [sum(load[e] / copies[e] for e in experts) for experts in placement.experts_of_rank]


@st.composite
def loads(draw, most_ranks=4):
    """(load, R, replicas) that fit together: ties and zeros are common."""
    n_ranks, places = draw(st.integers(1, most_ranks)), draw(st.integers(1, 4))
    replicas = draw(
        st.integers(0, n_ranks * places - places)
    )  # at least P experts remain, so that no rank holds one twice
    load = draw(
        st.lists(
            st.one_of(st.integers(0, 3), st.floats(0, 1e6)),
            min_size=n_ranks * places - replicas,
            max_size=n_ranks * places - replicas,
        )
    )
    return load, n_ranks, replicas


def test_contiguous_round_robin_and_by_load_of_six_experts_by_hand():
    assert contiguous(6, 3).experts_of_rank == ((0, 1), (2, 3), (4, 5))
    assert round_robin(6, 3).experts_of_rank == ((0, 3), (1, 4), (2, 5))
    # Busiest first: 9 to rank 0, 8 to rank 1, 5 to rank 2; then 4 joins the 5, 2 the 8, and 1 the 9.
    assert by_load([1, 9, 2, 8, 4, 5], 3).experts_of_rank == ((0, 1), (2, 3), (4, 5))
    assert by_load([9, 8, 5, 4, 2, 1], 3).experts_of_rank == ((0, 5), (1, 4), (2, 3))


def test_a_copy_goes_to_the_expert_with_most_load_per_copy():
    placement = by_load([6, 2, 1, 1, 1, 1], 4, replicas=2)  # 6 alone, then 3 + 3, then 2 + 2 + 2
    assert placement.replicated == (0,)
    assert len(placement.places_of_expert[0]) == 3
    assert max(busy(placement, [6, 2, 1, 1, 1, 1])) == 3  # the mean: 12 / 4


def test_places_count_through_all_ranks():
    placement = Placement(((2, 0), (0, 1)))
    assert (placement.n_ranks, placement.places_per_rank, placement.n_experts) == (2, 2, 3)
    assert placement.places_of_expert == ((1, 2), (3,), (0,))
    assert placement.replicated == (0,) and not placement.in_order


def test_rows_sorted_by_expert_are_sorted_by_rank_only_where_the_placement_is_in_order():
    for order in permutations(range(4)):
        placement = Placement((order[:2], order[2:]))
        assert placement.in_order == (order == (0, 1, 2, 3))
    assert (
        contiguous(8, 2).in_order
        and contiguous(8, 1).in_order
        and round_robin(8, 8).in_order
        and round_robin(8, 1).in_order
    )
    assert not round_robin(8, 2).in_order
    assert not Placement(((0, 1), (0, 1))).in_order  # a copy is out of order, too


def test_lists_are_taken_and_placements_with_the_same_experts_are_equal():
    assert Placement([[0, 1], [2, 3]]) == contiguous(4, 2) == by_load([4, 1, 2, 2], 2)
    assert hash(Placement([[0, 1], [2, 3]])) == hash(contiguous(4, 2))


def test_greedy_is_not_always_best_by_hand():
    load = [3, 3, 0, 2, 2, 2]
    assert max(busy(contiguous(6, 2), load)) == 6 < max(busy(by_load(load, 2), load)) == 7


@fast
@given(loads())
def test_every_placement_by_load_is_valid_and_every_place_is_used(drawn):
    load, n_ranks, replicas = drawn
    placement = by_load(load, n_ranks, replicas=replicas)
    assert placement.n_ranks == n_ranks and placement.n_experts == len(load)
    assert (
        n_ranks * placement.places_per_rank
        == len(load) + replicas
        == sum(map(len, placement.places_of_expert))
    )
    for expert, places in enumerate(placement.places_of_expert):
        ranks = [place // placement.places_per_rank for place in places]
        assert len(set(ranks)) == len(ranks) >= 1
        assert all(
            placement.experts_of_rank[rank][place % placement.places_per_rank] == expert
            for rank, place in zip(ranks, places)
        )


@fast
@given(loads())
def test_ranks_differ_by_at_most_the_busiest_copy(drawn):
    load, n_ranks, replicas = drawn
    placement = by_load(load, n_ranks, replicas=replicas)
    most = max(value / len(places) for value, places in zip(load, placement.places_of_expert))
    assert max(busy(placement, load)) - min(busy(placement, load)) <= most * (1 + 1e-9)


@fast
@given(st.lists(st.integers(0, 20), min_size=8, max_size=8), st.sampled_from([4, 2]))
def test_with_two_places_a_rank_no_other_placement_has_a_lighter_straggler(load, n_ranks):
    load = load[: 2 * n_ranks]
    best = min(
        max(sum(load[e] for e in order[i : i + 2]) for i in range(0, len(load), 2))
        for order in _pairings(tuple(range(len(load))))
    )
    assert max(busy(by_load(load, n_ranks), load)) == best
    assert best <= max(busy(contiguous(len(load), n_ranks), load))


def _pairings(experts):
    if not experts:
        yield ()
    for i in range(1, len(experts)):
        for rest in _pairings(experts[1:i] + experts[i + 1 :]):
            yield (experts[0], experts[i], *rest)


@fast
@given(st.lists(st.integers(0, 9), min_size=4, max_size=4), st.sampled_from([0, 4, 8]))
def test_no_other_way_to_spend_the_copies_leaves_less_to_the_busiest_one(load, replicas):
    placement = by_load(load, 4, replicas=replicas)
    best = min(
        max(value / n for value, n in zip(load, copies))
        for copies in product(range(1, 5), repeat=4)
        if sum(copies) == 4 + replicas
    )
    assert (
        max(value / len(places) for value, places in zip(load, placement.places_of_expert)) == best
    )


@fast
@given(loads())
def test_the_same_load_in_any_unit_gives_the_same_placement(drawn):
    load, n_ranks, replicas = drawn
    assert by_load([2 * value for value in load], n_ranks, replicas=replicas) == by_load(
        load, n_ranks, replicas=replicas
    )


@fast
@given(st.integers(1, 6), st.integers(1, 6))
def test_round_robin_puts_expert_e_on_rank_e_mod_r(n_ranks, places):
    placement = round_robin(n_ranks * places, n_ranks)
    assert all(
        expert % n_ranks == rank
        for rank, experts in enumerate(placement.experts_of_rank)
        for expert in experts
    )
    assert sorted(sum(placement.experts_of_rank, ())) == list(range(n_ranks * places))


@pytest.mark.parametrize(
    ("experts_of_rank", "message"),
    [
        ((), r"experts_of_rank=\(\) must give every rank the same number of experts, at least 1"),
        (((), ()), "the same number of experts, at least 1"),
        (((0, 1), (2,)), "the same number of experts, at least 1"),
        (((0, 2),), "must hold every expert from 0 to 2"),
        (((1,), (0,), (0,), (3,)), "must hold every expert from 0 to 3"),
        (((1, 2), (0, 0)), r"experts_of_rank\[1\]=\(0, 0\) must not hold an expert twice"),
        (((0, -1),), r"experts_of_rank\[0\]=-1 must be a whole number, at least 0"),
        (((0,), (1.0,)), r"experts_of_rank\[1\]=1.0 must be a whole number"),
        (((False,), (True,)), r"experts_of_rank\[0\]=False must be a whole number"),
    ],
)
def test_a_placement_that_is_none_is_refused(experts_of_rank, message):
    with pytest.raises(ValueError, match=message):
        Placement(experts_of_rank)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: contiguous(4, 3), "n_ranks=3 must divide n_experts=4"),
        (lambda: round_robin(4, 3), "n_ranks=3 must divide n_experts=4"),
        (lambda: contiguous(0, 1), "n_experts=0 must be a whole number, at least 1"),
        (lambda: round_robin(4, 0), "n_ranks=0 must be a whole number, at least 1"),
        (lambda: by_load([], 1), "=0 must be a whole number, at least 1"),
        (lambda: by_load([1, 1, 1], 2), r"n_ranks=2 must divide n_experts \+ replicas=3"),
        (lambda: by_load([1, -1], 1), r"load\[1\]=-1.0 must be at least 0 and finite"),
        (lambda: by_load([1, float("nan")], 1), r"load\[1\]=nan must be at least 0 and finite"),
        (lambda: by_load([float("inf"), 1], 1), r"load\[0\]=inf must be at least 0 and finite"),
        (lambda: by_load([1, 1], 2, replicas=-2), "replicas=-2 must be a whole number, at least 0"),
        (
            lambda: by_load([1, 1], 2, replicas=4),
            "replicas=4 must be at most 2: a rank holds an expert once",
        ),
    ],
)
def test_what_cannot_be_placed_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
