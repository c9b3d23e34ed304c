"""The cost of an all-to-all: published volumes and times, networks by hand, and what must hold for any traffic."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from moe_core.metrics import expert_sets
from moe_core.parallel import Placement, by_load, contiguous, round_robin
from moe_tools.accounting.network import Network, uniform_bytes

from ..core.helpers import fast, randn, routing_of

H800 = Network()  # 8 ranks a node, NVLink 160 GB/s, InfiniBand 50 GB/s


def sent(bytes_RR):
    """Bytes that each rank sends to others."""
    return (bytes_RR.sum(1) - bytes_RR.diagonal()).tolist()


def test_a_dispatch_of_deepseek_v3_moves_462_mb_a_rank_in_9_25_ms():
    bytes_RR = uniform_bytes(
        4096, 8, 2 * 7168, 64
    )  # 4096 tokens, top-8, width 7168, bfloat16, 64 ranks
    assert sent(bytes_RR) == pytest.approx([4096 * 8 * 7168 * 2 * 63 / 64] * 64)
    assert sent(bytes_RR)[0] == pytest.approx(462.4e6, rel=1e-4)
    on_one_link = Network(ranks_per_node=1, inter_bandwidth=50e9)
    assert on_one_link.flat(bytes_RR) == pytest.approx(9.25e-3, rel=1e-3)
    assert on_one_link.flat(bytes_RR) == pytest.approx(sent(bytes_RR)[0] / 50e9)


def test_fp8_and_four_nodes_a_token_make_it_115_6_mb_in_2_31_ms():
    bytes_RR = uniform_bytes(4096, 4, 7168, 64)
    assert sent(bytes_RR)[0] == pytest.approx(115.6e6, rel=1e-4)
    assert Network(ranks_per_node=1).flat(bytes_RR) == pytest.approx(2.31e-3, rel=1e-3)


def test_the_default_network_is_an_h800_node_on_infiniband():
    one_gb = torch.zeros(16, 16)
    one_gb[0, 7] = 1e9
    assert H800.flat(one_gb) == pytest.approx(1 / 160)
    one_gb[0, 7], one_gb[0, 8] = 0, 1e9
    assert H800.flat(one_gb) == pytest.approx(1 / 50)


@pytest.mark.parametrize(("n_ranks", "m"), [(4, 2), (8, 2), (64, 8), (16, 16), (6, 1)])
def test_two_levels_send_fewer_messages(n_ranks, m):
    small = uniform_bytes(1, 1, 1e-9, n_ranks)  # all latency
    network = Network(m, 1e9, 1e9, intra_latency=1.0, inter_latency=1.0)
    if m == 1:  # no messages inside
        assert network.flat(small) == pytest.approx(n_ranks - 1)
    assert network.hierarchical(small) == pytest.approx((n_ranks / m - 1) + (m - 1))
    one_link = Network(1, 1e9, 1e9, inter_latency=1.0)
    assert one_link.flat(small) == pytest.approx(n_ranks - 1)


@fast
@given(st.integers(1, 20), st.floats(0, 1e6), st.floats(0.01, 100), st.floats(0, 10))
def test_uniform_on_one_kind_of_link_it_is_r_minus_1_alpha_plus_v_over_beta(
    n_ranks, row_bytes, bandwidth, latency
):
    bytes_RR = uniform_bytes(3, 2, row_bytes, n_ranks)
    V = 3 * 2 * row_bytes * (n_ranks - 1) / n_ranks
    expected = (n_ranks - 1) * latency + V / bandwidth if V else 0.0
    assert Network(1, 1.0, bandwidth, 0.0, latency).flat(bytes_RR) == pytest.approx(expected)
    assert Network(n_ranks, bandwidth, 1.0, latency, 0.0).flat(bytes_RR) == pytest.approx(expected)


# Two nodes of two ranks: 0 1 | 2 3. Inside 4 bytes a second and half a second a message, between nodes 1 byte and 2 seconds.
SMALL = Network(2, intra_bandwidth=4.0, inter_bandwidth=1.0, intra_latency=0.5, inter_latency=2.0)
BY_HAND = torch.tensor([[9, 8, 3, 1], [4, 9, 0, 5], [2, 0, 9, 0], [0, 1, 0, 9]])


def test_flat_on_two_nodes_by_hand():
    # Inside: 0 sends 8 in 0.5 + 8/4 = 2.5 s. Between: 0 sends 3 and 1, two messages, 2*2 + 4 = 8 s; 3 receives 1 and 5: 2*2 + 6 = 10 s.
    assert SMALL.flat(BY_HAND) == 10.0
    assert SMALL.flat(BY_HAND.T) == 10.0  # combine takes as long as dispatch
    inside_only = BY_HAND.clone()
    inside_only[:2, 2:] = inside_only[2:, :2] = 0
    assert SMALL.flat(inside_only) == 2.5


def test_two_levels_on_two_nodes_by_hand():
    # Inside, to the rank with the receiver's place: 0 -> 1 for {1, 3}: 8 + 1 = 9 in 0.5 + 9/4; 1 -> 0 for {0, 2}: 4; 3 -> 2: 0; 2 -> 3: 0.
    # On node 1, 2 -> 3 for {1, 3}: 0, and 3 -> 2 for {0, 2}: 0. So 2.75 s.
    # Between: place 0 (ranks 0 and 2): 0 -> 2 carries 3 + 0, 2 -> 0 carries 2 + 0; place 1: 1 -> 3 carries 1 + 5, 3 -> 1 carries 0 + 1.
    assert SMALL.hierarchical(BY_HAND) == 2.75 + (2.0 + 6.0)


def test_a_token_crosses_to_a_node_once_by_hand():
    # Experts 0 1 | 2 3, one a rank. Rank 0: a token to 2 and 3, one to 1 and 3, one to 0. The others have no token.
    routings = [routing_of([[[2, 3], [1, 3], [0, 0]]], 4)] + [
        routing_of(torch.zeros(0, 3, 2, dtype=torch.int64), 4)
    ] * 3
    placement = contiguous(4, 4)
    seconds, inter_bytes = SMALL.node_limited(routings, placement, row_bytes=8)
    assert inter_bytes == 2 * 8  # instead of three copies
    # 0 -> 2 carries two rows: 2 + 16 s. Inside: 2 -> 3 hands on two rows, 0.5 + 16/4; 0 -> 1 one row meanwhile.
    assert seconds == (2.0 + 16.0) + (0.5 + 4.0)
    three_to_one = [
        routing_of([[[0, 1], [1, 0], [0, 1]]], 4) if rank == 2 else routings[1] for rank in range(4)
    ]
    assert SMALL.node_limited(three_to_one, placement, row_bytes=8) == (2.0 + 24.0 + 0.5 + 6.0, 24)


def test_a_token_crosses_to_the_rank_of_its_own_place_by_hand():
    # Ranks 0 and 1 have a token each for expert 2: 0 -> 2 and 1 -> 3 side by side, then 3 -> 2 inside.
    routings = [routing_of([[[2]]], 4)] * 2 + [
        routing_of(torch.zeros(0, 1, 1, dtype=torch.int64), 4)
    ] * 2
    assert SMALL.node_limited(routings, contiguous(4, 4), row_bytes=8) == (
        (2.0 + 8.0) + (0.5 + 2.0),
        8,
    )


def test_the_busiest_rank_may_be_the_one_that_receives():
    """Every rank of nodes 1 and 2 has one token for node 0: each sends one row, but rank 0 gets two."""
    network = Network(1, inter_bandwidth=1.0)
    routings = [routing_of([[[0]]], 3), routing_of([[[0]]], 3), routing_of([[[0]]], 3)]
    assert network.node_limited(routings, contiguous(3, 3), row_bytes=5) == (10.0, 10)


@st.composite
def traffic(draw):
    """(network, bytes): any matrix, zeros included, and nodes that divide the ranks."""
    m, nodes = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    numbers = st.integers(0, 1000)
    rows = [[draw(numbers) for _ in range(m * nodes)] for _ in range(m * nodes)]
    speed, wait = st.floats(0.5, 100), st.sampled_from([0.0, 0.1, 3.0])
    return Network(m, draw(speed), draw(speed), draw(wait), draw(wait)), torch.tensor(rows)


@fast
@given(traffic())
def test_costs_are_those_of_the_pairs_of_ranks_one_by_one(drawn):
    """The matrices of the package against loops over ranks."""
    network, bytes_RR = drawn
    R, m = len(bytes_RR), network.ranks_per_node
    n = bytes_RR.tolist()
    near = lambda s, r: s // m == r // m
    cost = lambda s, r: (
        (
            network.intra_latency + n[s][r] / network.intra_bandwidth
            if near(s, r)
            else network.inter_latency + n[s][r] / network.inter_bandwidth
        )
        if s != r and n[s][r]
        else 0.0
    )
    busy = [
        sum(cost(*pair) for pair in pairs)
        for rank in range(R)
        for inside in (True, False)
        for pairs in (
            [(rank, r) for r in range(R) if near(rank, r) == inside],
            [(s, rank) for s in range(R) if near(s, rank) == inside],
        )
    ]
    assert network.flat(bytes_RR) == pytest.approx(max(busy))
    first, second = torch.zeros(2, R, R)
    for s in range(R):
        for r in range(R):
            gate = s // m * m + r % m  # on the sender's node, at the receiver's place
            first[s, gate] += n[s][r]
            second[gate, r] += n[s][r]
    assert network.hierarchical(bytes_RR) == pytest.approx(
        network.flat(first) + network.flat(second)
    )


@fast
@given(traffic())
def test_more_bytes_never_take_less_time_and_home_is_free(drawn):
    network, bytes_RR = drawn
    for time in (network.flat, network.hierarchical):
        more = bytes_RR + torch.eye(len(bytes_RR), dtype=torch.int64) * 10**6
        assert time(more) == time(bytes_RR)
        assert time(2 * bytes_RR) >= time(bytes_RR) >= 0
        assert time(torch.zeros_like(bytes_RR)) == 0
    assert network.flat(bytes_RR.T) == pytest.approx(network.flat(bytes_RR))


@st.composite
def routed(draw):
    """(network, placement, routings): top-K of drawn scores, some ranks without tokens, some slots over capacity."""
    m, nodes = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    R = m * nodes
    E, K = R * draw(st.integers(1, 2)), draw(st.integers(1, 4))
    K = min(K, E)
    placement = draw(
        st.sampled_from([contiguous(E, R), round_robin(E, R), by_load(list(range(E)), R)])
    )
    routings = []
    for rank in range(R):
        scores = randn(draw(st.integers(0, 2)), 3, E, seed=draw(st.integers(0, 99)))
        reasons = (randn(*scores.shape[:2], K, seed=rank) > 1.0).to(torch.int8)  # 1: over capacity
        routings.append(routing_of(scores.topk(K).indices, E, reasons=reasons))
    return Network(m, 4.0, 1.0, 0.1, 1.0), placement, routings


def copies(routings, placement, per_node):
    """(R, places) rows that each rank sends to each rank, or (per_node) each token once to each node: counted token by token."""
    count = torch.zeros(placement.n_ranks, placement.n_ranks, dtype=torch.int64)
    for rank, routing in enumerate(routings):
        for experts, kept in zip(
            routing.expert_indices.flatten(0, 1).tolist(),
            routing.capacity_mask.flatten(0, 1).tolist(),
        ):
            owners = [
                placement.places_of_expert[e][0] // placement.places_per_rank
                for e, keep in zip(experts, kept)
                if keep
            ]
            for owner in {owner // per_node for owner in owners} if per_node else owners:
                count[rank, owner * per_node if per_node else owner] += 1
    return count


@fast
@given(routed())
def test_once_a_node_never_sends_more_between_nodes_than_once_an_expert(drawn):
    network, placement, routings = drawn
    m = network.ranks_per_node
    _, most = network.node_limited(routings, placement, row_bytes=8)
    near_RR = (
        torch.arange(placement.n_ranks).unsqueeze(0) // m
        == torch.arange(placement.n_ranks).unsqueeze(1) // m
    )
    every_expert = 8 * copies(routings, placement, 0).masked_fill(near_RR, 0)
    once = 8 * copies(routings, placement, m)
    once_out = once.masked_fill(near_RR, 0).sum(1)
    assert bool((once_out <= every_expert.sum(1)).all())
    # What is received depends on the place of the sender; what is sent does not.
    assert (
        once_out.max()
        <= most
        <= max(once_out.max(), 8 * sum(len(r.expert_indices.flatten(0, 1)) for r in routings))
    )
    K, nodes = routings[0].top_k, placement.n_ranks // m
    for rank, routing in enumerate(routings):
        assert once[rank].sum() <= 8 * min(K, nodes) * routing.expert_indices[..., 0].numel()


@fast
@given(routed())
def test_with_one_rank_a_node_and_one_expert_a_rank_node_limited_is_flat(drawn):
    _, placement, routings = drawn
    assume(placement.places_per_rank == 1)
    network, bytes_RR = (
        Network(1, inter_bandwidth=2.0, inter_latency=0.5),
        8 * copies(routings, placement, 0),
    )
    seconds, most = network.node_limited(routings, placement, row_bytes=8)
    assert seconds == pytest.approx(network.flat(bytes_RR))
    bytes_RR.fill_diagonal_(0)
    assert most == max(bytes_RR.sum(0).max(), bytes_RR.sum(1).max())


def test_inside_one_node_nothing_crosses():
    routings = [routing_of([[[0, 3], [1, 2]]], 4)] * 4
    seconds, inter_bytes = Network(4, 4.0, 1.0).node_limited(
        routings, contiguous(4, 4), row_bytes=8
    )
    assert inter_bytes == 0 and seconds == Network(4, 4.0, 1.0).flat(
        8 * copies(routings, contiguous(4, 4), 0)
    )


def test_only_kept_slots_travel():
    over = routing_of([[[2], [3]]], 4, reasons=[[[1], [0]]])
    assert expert_sets(over, kept=True).sum() == 1
    assert (
        Network(1, inter_bandwidth=1.0).node_limited([over] * 4, contiguous(4, 4), row_bytes=1)[1]
        == 3
    )  # rank 3 gets one from each


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks_per_node": 0}, "ranks_per_node=0 must be a whole number, at least 1"),
        ({"intra_bandwidth": 0}, "intra_bandwidth=0 must be more than 0 bytes per second"),
        ({"inter_bandwidth": float("nan")}, "inter_bandwidth=nan must be more than 0"),
        ({"intra_latency": -1}, "intra_latency=-1 must be at least 0 and finite"),
        ({"inter_latency": float("inf")}, "inter_latency=inf must be at least 0 and finite"),
    ],
)
def test_a_network_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Network(**options)


@pytest.mark.parametrize(
    "bytes_RR",
    [
        torch.zeros(0, 0),
        torch.zeros(2, 3),
        torch.zeros(4),
        [[0, -1], [0, 0]],
        [[0, float("nan")], [0, 0]],
    ],
)
def test_bytes_that_are_no_square_of_numbers_are_refused(bytes_RR):
    for time in (Network(1).flat, Network(1).hierarchical):
        with pytest.raises(
            ValueError, match=r"bytes_RR of shape .* must be \(R, R\) numbers, at least 0"
        ):
            time(bytes_RR)


def test_nodes_must_divide_the_ranks_and_every_rank_has_a_routing():
    routing = routing_of([[[0]]], 4)
    with pytest.raises(ValueError, match="ranks_per_node=3 must divide the 4 ranks"):
        Network(3).hierarchical(torch.ones(4, 4))
    with pytest.raises(ValueError, match="ranks_per_node=3 must divide the 4 ranks"):
        Network(3).node_limited([routing] * 4, contiguous(4, 4), 1)
    with pytest.raises(
        ValueError, match="experts must be 4, one for each rank, to the placement's 4 experts"
    ):
        Network(2).node_limited([routing] * 3, contiguous(4, 4), 1)
    with pytest.raises(ValueError, match="to the placement's 8 experts"):
        Network(2).node_limited([routing] * 4, contiguous(8, 4), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 1, 1, 2), "tokens_per_rank=-1"),
        ((1, -1, 1, 2), "copies=-1"),
        ((1, 1, float("nan"), 2), "row_bytes=nan"),
        ((1, 1, 1, 0), "n_ranks=0"),
    ],
)
def test_a_dispatch_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        uniform_bytes(*arguments)


def test_copies_of_an_expert_do_not_change_who_gets_its_rows():
    """The first copy counts: a what-if without replication."""
    twice, routings = Placement(((0, 1), (0, 2))), [routing_of([[[0], [2]]], 3)] * 2
    assert Network(1, inter_bandwidth=1.0).node_limited(routings, twice, row_bytes=1) == (1.0, 1)
