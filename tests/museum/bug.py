"""What an exhibit is, and the small inputs the exhibits share."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_core import Routing, TopKRouter


@dataclass(frozen=True)
class Bug:
    """A bug that somebody shipped, beside the implementation that does not have it.

    Attributes:
        number: of the bug in the museum; variants of one bug share it.
        title: the bug in half a sentence.
        symptom: what one sees from outside.
        cause: what is wrong in the code.
        source: the threads in which it was found.
        mutant: the implementation with the bug.
        healthy: moe_core's, called in the same way.
        check: the property that tells them apart: ``check(implementation)`` raises AssertionError on the mutant.
        shows: a regular expression for what the check says of the mutant.
    """

    number: int
    title: str
    symptom: str
    cause: str
    source: str
    mutant: Callable
    healthy: Callable
    check: Callable[[Callable], None]
    shows: str

    @property
    def caught_by(self) -> str:
        """The property in words."""
        return inspect.getdoc(self.check)

    @property
    def code(self) -> str:
        """The mutant's source."""
        return inspect.getsource(self.mutant)

    def verdict(self, implementation: Callable) -> str | None:
        """What the check says: None when all is well, else how it failed. A crash is a symptom like any other."""
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.check(implementation)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def is_seen_in(self, implementation: Callable) -> bool:
        """Whether the check fails, and for this bug's reason."""
        return re.search(self.shows, self.verdict(implementation) or "") is not None


def reads_logits(router):
    """The router with an identity weight: what goes in as x, (B, N, E), comes out as the logits."""
    with torch.no_grad():
        router.weight.copy_(torch.eye(*router.weight.shape))
    return router


def route(logits: Tensor, top_k: int = 1, padding_mask: Tensor | None = None, **options) -> Routing:
    """A routing with these logits, (B, N, E), by softmax and top-k."""
    E = logits.shape[-1]
    return reads_logits(TopKRouter(E, E, top_k, **{"norm_topk_prob": False, **options})).to(
        logits.dtype
    )(logits, padding_mask)


def certain(experts: list[int], n_experts: int) -> Tensor:
    """Logits (1, N, E) that send token n to experts[n] with a probability of practically 1."""
    return 50.0 * torch.eye(n_experts)[torch.tensor(experts)].unsqueeze(0)
