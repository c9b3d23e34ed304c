"""Placement: which rank holds which expert. Plain Python; nothing here moves a tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..validate import at_least, whole


@dataclass(frozen=True)
class Placement:
    """The experts of each rank, R tuples of P expert numbers, in the order of its bank.

    Every rank holds the same number P, so each needs the same memory. An expert may stand on
    several ranks (a hot one, so that its rows are shared out), but not twice on one. Raises
    ValueError otherwise, and where an expert is missing.
    """

    experts_of_rank: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        object.__setattr__(self, "experts_of_rank", tuple(map(tuple, self.experts_of_rank)))
        sizes = {len(experts) for experts in self.experts_of_rank}
        found = f"experts_of_rank={self.experts_of_rank}"
        if len(sizes) != 1 or 0 in sizes:
            wanted = "give every rank the same number of experts, at least 1"
            raise ValueError(f"{found} must {wanted}")
        for rank, experts in enumerate(self.experts_of_rank):
            for expert in experts:
                whole(0, **{f"experts_of_rank[{rank}]": expert})
        held = {expert for experts in self.experts_of_rank for expert in experts}
        if held != set(range(len(held))):
            raise ValueError(f"{found} must hold every expert from 0 to {max(held)}")
        for rank, experts in enumerate(self.experts_of_rank):
            if len(set(experts)) < len(experts):
                raise ValueError(f"experts_of_rank[{rank}]={experts} must not hold an expert twice")

    @property
    def n_ranks(self) -> int:
        return len(self.experts_of_rank)

    @property
    def places_per_rank(self) -> int:
        return len(self.experts_of_rank[0])

    @cached_property
    def places_of_expert(self) -> tuple[tuple[int, ...], ...]:
        """For each expert its places, counted through all ranks: place rank * P + p."""
        found: list[list[int]] = [[] for _ in range(self.n_experts)]
        for place, expert in enumerate(sum(self.experts_of_rank, ())):
            found[expert].append(place)
        return tuple(map(tuple, found))

    @cached_property
    def n_experts(self) -> int:
        """How many different experts the ranks hold."""
        return 1 + max(map(max, self.experts_of_rank))

    @property
    def replicated(self) -> tuple[int, ...]:
        """The experts that stand on several ranks."""
        return tuple(e for e, places in enumerate(self.places_of_expert) if len(places) > 1)

    @cached_property
    def in_order(self) -> bool:
        """True where rows sorted by expert are sorted by rank already."""
        return sum(self.experts_of_rank, ()) == tuple(range(self.n_experts))


def contiguous(n_experts: int, n_ranks: int) -> Placement:
    """Rank 0 holds the first E/R experts, rank 1 the next; ValueError where R does not divide E."""
    per_rank = _share(n_experts, n_ranks)
    first = range(0, n_experts, per_rank)
    return Placement(tuple(tuple(range(start, start + per_rank)) for start in first))


def round_robin(n_experts: int, n_ranks: int) -> Placement:
    """Expert e lives on rank e mod R; ValueError where R does not divide E."""
    _share(n_experts, n_ranks)
    return Placement(tuple(tuple(range(rank, n_experts, n_ranks)) for rank in range(n_ranks)))


def by_load(load: Sequence[float], n_ranks: int, *, replicas: int = 0) -> Placement:
    """Even out a measured load (E,): the busiest expert first, to the rank that has least to do.

    ``replicas`` are places for additional copies; each goes to the expert with the most load per
    copy, whose rows are then shared out evenly. Raises ValueError where a load is negative or not
    finite, R does not divide E + replicas, or an expert would need more copies than ranks.
    Source: greedy longest-processing-time scheduling (Graham 1969), as many places on each rank.
    """
    load = [float(value) for value in load]
    whole(0, replicas=replicas)
    at_least(0, **{f"load[{expert}]": value for expert, value in enumerate(load)})
    n_experts = len(load)
    places = _share(n_experts + replicas, n_ranks, "n_experts + replicas")
    copies = [1] * n_experts
    for _ in range(replicas):
        free = [e for e in range(n_experts) if copies[e] < n_ranks]
        if not free:
            most = f"at most {n_experts * (n_ranks - 1)}: a rank holds an expert once"
            raise ValueError(f"replicas={replicas} must be {most}")
        copies[max(free, key=lambda e: load[e] / copies[e])] += 1
    ranks: list[list[int]] = [[] for _ in range(n_ranks)]
    busy = [0.0] * n_ranks

    def copied_first(e: int) -> tuple[int, float]:
        return -copies[e] if copies[e] > 1 else 0, -load[e] / copies[e]

    for expert in sorted(range(n_experts), key=copied_first):
        free = [rank for rank in range(n_ranks) if len(ranks[rank]) < places]
        # Copies first go where most places are left: then there is always a rank for each of them.
        free.sort(key=lambda rank: (len(ranks[rank]) if copies[expert] > 1 else 0, busy[rank]))
        for rank in free[: copies[expert]]:
            ranks[rank].append(expert)
            busy[rank] += load[expert] / copies[expert]
    return Placement(tuple(tuple(sorted(experts)) for experts in ranks))


def _share(n_experts: int, n_ranks: int, name: str = "n_experts") -> int:
    whole(1, **{name: n_experts, "n_ranks": n_ranks})
    if n_experts % n_ranks:
        raise ValueError(f"n_ranks={n_ranks} must divide {name}={n_experts}")
    return n_experts // n_ranks
