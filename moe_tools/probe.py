"""Does a token's output depend on tokens it must not see? Change them and look.

A dropless top-k router answers each token alone. Capacity, expert choice and their kin let tokens
compete, and competition is a channel: what another token is decides where this one goes. In a
causal language model a token then sees the future; in serving, an answer depends on who else is in
the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moe_core.metrics import expert_sets
from moe_core.routing import Routing
from moe_core.validate import at_least, whole


@dataclass(frozen=True)
class Effect:
    """What a change of other tokens did to the tokens that were left alone.

    Attributes:
        max_change: the largest absolute change of any of their outputs.
        rerouted: the share of them that got other experts than before (0 where no Routing is
            returned).
        depends: an expert changed, or an output by more than the probe's tolerance.
    """

    max_change: float
    rerouted: float
    depends: bool


@dataclass(frozen=True)
class Dependence:
    """What a token's output depends on; None where the input is too small to tell.

    Attributes:
        later_tokens, earlier_tokens: other values there, in the token's own sequence.
        other_sequences: other values in all other sequences of the batch.
        n_later_tokens: the later tokens cut off, in a batch of this sequence alone: what token by
            token generation does.
        n_sequences: the other sequences taken away.
    """

    later_tokens: Effect | None
    earlier_tokens: Effect | None
    other_sequences: Effect | None
    n_later_tokens: Effect | None
    n_sequences: Effect | None

    @property
    def causal(self) -> bool:
        """No token sees a later one of its sequence."""
        return not _depends(self.later_tokens)

    @property
    def batch_invariant(self) -> bool:
        """A sequence's outputs are the same with any batch around it, or none."""
        return not (_depends(self.other_sequences) or _depends(self.n_sequences))

    @property
    def streams(self) -> bool:
        """A sequence may be fed in pieces: later tokens do not matter, nor that they exist."""
        return self.causal and not _depends(self.n_later_tokens)

    def __repr__(self) -> str:
        lines = [f"{'A token depends on':<28}{'':>4}{'change':>10}{'rerouted':>11}"]
        for field in fields(self):
            effect, name = (
                getattr(self, field.name),
                field.name.removeprefix("n_").replace("_", " "),
            )
            name = f"number of {name}" if field.name.startswith("n_") else name
            if effect is None:
                lines.append(f"  {name:<26} not asked: the input is too small")
            else:
                answer = "yes" if effect.depends else "no"
                lines.append(
                    f"  {name:<26}{answer:>4}{effect.max_change:>10.2g}{effect.rerouted:>11.1%}"
                )
        return "\n".join(lines)


def probe(
    module: Callable, x: Tensor, *, trials: int = 8, tolerance: float = 1e-5, seed: int = 0
) -> Dependence:
    """Change some tokens, keep the others, and measure whether the others' outputs move.

    Args:
        module: a router (x -> Routing), a layer (x -> (y, Routing)), a model (x -> (y, list of
            Routings)) or any function of x alone (x -> y), in the mode it is in: eval, as a rule.
            It is called without gradient and always with the same random numbers, so that noise is
            not taken for dependence (but for the two questions about numbers of tokens: a call of
            another shape draws other noise). For a router, a token's output is the weight it gives
            each expert.
        x: (B, N, D) float, or (B, N) int64. Changed tokens are drawn from x's own tokens with the
            signs (of floats) flipped at random, so they are as large as real ones; larger and more
            varied x show more.
        trials: sequences and cuts to try for each question.
        tolerance: a larger change of an output counts as dependence. Matmuls of another shape round
            differently.
        seed: of the changes, the cuts, and the generator during each call.

    Returns:
        A ``Dependence``. "No" means that no trial found one: a proof only of a yes.

    Raises:
        ValueError: trials or tolerance is out of range, or x is not (B, N) or (B, N, D).
    """
    whole(1, trials=trials)
    at_least(0, tolerance=tolerance)
    if x.ndim not in (2, 3) or x.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be (B, N) or (B, N, D) and not empty")
    B, N = x.shape[:2]
    random = torch.Generator().manual_seed(seed)
    call = _Call(module, seed)
    before = call(x)
    found = {field.name: [] for field in fields(Dependence)}
    for trial in range(trials):
        b = trial % B
        others = torch.arange(B) != b
        if N > 1:
            cut = int(torch.randint(1, N, (), generator=random))
            later, earlier = x.clone(), x.clone()
            later[b, cut:] = _changed(x, random)[b, cut:]
            earlier[b, :cut] = _changed(x, random)[b, :cut]
            found["later_tokens"].append(_compare(before, call(later), (b, slice(0, cut))))
            found["earlier_tokens"].append(_compare(before, call(earlier), (b, slice(cut, N))))
            alone = x[b : b + 1]
            found["n_later_tokens"].append(
                _compare(call(alone), call(alone[:, :cut]), (0, slice(0, cut)))
            )
        if B > 1:
            other = torch.where(
                others.to(x.device).view(B, *[1] * (x.ndim - 1)), _changed(x, random), x
            )
            found["other_sequences"].append(_compare(before, call(other), (b, slice(0, N))))
            here = tuple(part[b : b + 1] for part in before)
            found["n_sequences"].append(_compare(here, call(x[b : b + 1]), (0, slice(0, N))))
    return Dependence(**{name: _sum_up(pairs, tolerance) for name, pairs in found.items()})


class _Call:
    """Calls a module without gradient, from the same state of the random generators every time."""

    def __init__(self, module: Callable, seed: int):
        self.module, self.seed = module, seed

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (B, N, anything), and each token's experts (B, N, those of all layers)."""
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            y = self.module(x)
        y, routings = (
            y if isinstance(y, tuple) else (None, y) if isinstance(y, Routing) else (y, [])
        )
        routings = [routings] if isinstance(routings, Routing) else list(routings or [])
        if y is None:
            y = _weight_of_each_expert(routings[0])
        sets = [expert_sets(routing, kept=True) for routing in routings]
        return y, torch.cat(sets, -1) if sets else y.new_zeros(*x.shape[:2], 0, dtype=torch.bool)


def _weight_of_each_expert(routing: Routing) -> Tensor:
    weights_BNK = routing.expert_weights.masked_fill(~routing.capacity_mask, 0)
    return torch.zeros_like(routing.scores, dtype=weights_BNK.dtype).scatter_add_(
        -1, routing.expert_indices, weights_BNK
    )


def _changed(x: Tensor, random: torch.Generator) -> Tensor:
    """x's own tokens in a random order and, for floats, with random signs."""
    tokens = x.flatten(0, 1)
    drawn = tokens[torch.randint(len(tokens), (len(tokens),), generator=random).to(x.device)].view(
        x.shape
    )
    if not x.is_floating_point():
        return drawn
    signs = torch.randint(2, x.shape, generator=random).to(x.device, x.dtype) * 2 - 1
    return drawn * signs


def _compare(
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], where: tuple
) -> tuple[float, int, int]:
    """Largest change of an output, tokens with other experts, and tokens looked at."""
    (y, experts), (y_after, experts_after) = before, after
    moved = (experts[where] != experts_after[where]).any(-1)
    change = (
        (y[where].double() - y_after[where].double()).abs().nan_to_num(nan=torch.inf)
    )  # NaN is a change like no other
    return float(change.max()), int(moved.sum()), moved.numel()


def _sum_up(pairs: list[tuple[float, int, int]], tolerance: float) -> Effect | None:
    if not pairs:
        return None
    change, moved, looked_at = (
        max(p[0] for p in pairs),
        sum(p[1] for p in pairs),
        sum(p[2] for p in pairs),
    )
    return Effect(
        max_change=change, rerouted=moved / looked_at, depends=moved > 0 or change > tolerance
    )


def _depends(effect: Effect | None) -> bool:
    return effect is not None and effect.depends
