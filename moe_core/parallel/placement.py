"""Placement: which rank holds which expert. Plain Python; nothing here moves a tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..validate import at_least, whole


@dataclass(frozen=True)
class Placement:
    """The experts of each rank, in the order in which they lie in its bank.

    Every rank has the same number of places P, so each needs the same memory. An expert may stand on several ranks (a hot one, so
    that its rows are shared out), but not twice on one.

    Attributes:
        experts_of_rank: R tuples of P expert numbers.

    Raises:
        ValueError: ranks have different numbers of places, an expert is no whole number, is missing, or stands twice on a rank.
    """

    experts_of_rank: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        object.__setattr__(self, "experts_of_rank", tuple(map(tuple, self.experts_of_rank)))
        sizes = {len(experts) for experts in self.experts_of_rank}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(
                f"experts_of_rank={self.experts_of_rank} must give every rank the same number of experts, at least 1"
            )
        for rank, experts in enumerate(self.experts_of_rank):
            for expert in experts:
                whole(0, **{f"experts_of_rank[{rank}]": expert})
        held = {expert for experts in self.experts_of_rank for expert in experts}
        if held != set(range(len(held))):
            raise ValueError(
                f"experts_of_rank={self.experts_of_rank} must hold every expert from 0 to {max(held)}"
            )
        for rank, experts in enumerate(self.experts_of_rank):
            if len(set(experts)) < len(experts):
                raise ValueError(f"experts_of_rank[{rank}]={experts} must not hold an expert twice")

    @property
    def n_ranks(self) -> int:
        """R."""
        return len(self.experts_of_rank)

    @property
    def places_per_rank(self) -> int:
        """P, the experts in one rank's bank."""
        return len(self.experts_of_rank[0])

    @cached_property
    def places_of_expert(self) -> tuple[tuple[int, ...], ...]:
        """For each expert its places, counted through all ranks: place rank * P + p."""
        places = [expert for experts in self.experts_of_rank for expert in experts]
        return tuple(
            tuple(place for place, held in enumerate(places) if held == expert)
            for expert in range(self.n_experts)
        )

    @cached_property
    def n_experts(self) -> int:
        """E."""
        return 1 + max(map(max, self.experts_of_rank))

    @property
    def replicated(self) -> tuple[int, ...]:
        """The experts that stand on several ranks."""
        return tuple(
            expert for expert, places in enumerate(self.places_of_expert) if len(places) > 1
        )

    @cached_property
    def in_order(self) -> bool:
        """True where rows sorted by expert are sorted by rank already."""
        return sum(self.experts_of_rank, ()) == tuple(range(self.n_experts))


def contiguous(n_experts: int, n_ranks: int) -> Placement:
    """Rank 0 holds the first E/R experts, rank 1 the next ones. Raises ValueError where R does not divide E."""
    per_rank = _share(n_experts, n_ranks)
    return Placement(
        tuple(tuple(range(rank * per_rank, (rank + 1) * per_rank)) for rank in range(n_ranks))
    )


def round_robin(n_experts: int, n_ranks: int) -> Placement:
    """Expert e lives on rank e mod R. Raises ValueError where R does not divide E."""
    _share(n_experts, n_ranks)
    return Placement(tuple(tuple(range(rank, n_experts, n_ranks)) for rank in range(n_ranks)))


def by_load(load: Sequence[float], n_ranks: int, *, replicas: int = 0) -> Placement:
    """Even out a measured load: the busiest expert first, each to the rank that has least to do and a place left.

    Args:
        load: (E,) rows (or shares) of each expert, as measured.
        n_ranks: R.
        replicas: places for additional copies. Each goes to the expert with the most load per copy; its rows are shared out evenly.

    Raises:
        ValueError: a load is negative or not finite, R does not divide E + replicas, or there would be more copies of every expert than
            ranks.

    Source: greedy longest-processing-time scheduling (Graham 1969), with equally many places on each rank.
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
            raise ValueError(
                f"replicas={replicas} must be at most {n_experts * (n_ranks - 1)}: a rank holds an expert once"
            )
        copies[max(free, key=lambda e: load[e] / copies[e])] += 1
    ranks: list[list[int]] = [[] for _ in range(n_ranks)]
    busy = [0.0] * n_ranks
    for expert in sorted(
        range(n_experts), key=lambda e: (-copies[e] if copies[e] > 1 else 0, -load[e] / copies[e])
    ):
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
