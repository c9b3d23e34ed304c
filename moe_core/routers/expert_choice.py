"""ExpertChoiceRouter: each expert takes the tokens it likes best. Balanced, and not causal."""

from dataclasses import KW_ONLY, dataclass, replace

from torch import Tensor

from ..routing import Routing
from ..validate import expansion_fits, one_of
from .base import Router, RouterOptions, checked_padding_mask
from .token_shares import as_fraction, ceil_share, take_best

SCORES = ("softmax", "sigmoid")
SCOPES = ("batch", "sequence")


@dataclass(frozen=True)
class ExpertChoiceOptions(RouterOptions, fixed=("capacity_factor", "aux_loss_weight")):
    """The arguments of ``ExpertChoiceRouter``."""

    expansion: float = 1.0
    _: KW_ONLY
    score_func: str = "softmax"
    scope: str = "batch"

    def __post_init__(self):
        super().__post_init__()
        expansion_fits(self.expansion, self.n_experts)
        one_of(SCORES, score_func=self.score_func)
        one_of(SCOPES, scope=self.scope)


class ExpertChoiceRouter(Router):
    r"""Expert choice: the experts choose, each of them exactly c tokens.

    .. math:: S = \mathrm{softmax}(h), \quad I_e = \mathrm{topc}_t\,(S_{t,e}),
              \quad c = \Big\lceil \frac{T G}{E} \Big\rceil,
              \quad w_{t,e} = S_{t,e} \text{ for } t \in I_e

    A token may be taken by any number of experts, G on average, also by none. The load is 1/E each
    by construction. c counts real tokens and padding is never chosen. Ties go to the earlier token.

    **Not causal.** Whether a token is taken depends on all tokens it competes with: later ones of
    its sequence and, with scope="batch", other sequences; in eval too. A language model that trains
    so reads the future. ``ExpertThresholdRouter`` is the causal relative.

    Args, besides ``Router``'s:
        expansion: G, the mean number of experts per token, 0 < G <= E; the paper's capacity factor.
        score_func: "softmax" over the experts of a token, as published, or "sigmoid" of each logit.
        scope: "batch": an expert chooses among all B*N tokens. "sequence": c of N in each sequence.

    Source: Zhou et al. 2022 (arXiv 2202.09368), section 3.2.
    """

    Options = ExpertChoiceOptions
    top_k_is_a_mean = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.share = as_fraction(self.expansion) / self.n_experts  # of the tokens, for each expert

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, token_ids=None) -> Routing:
        """Route tokens (B, N, D); K = E slots per token, ``selected_mask`` says who was chosen."""
        logits_BNE = self.logits(x)
        softmax = self.score_func == "softmax"
        scores_BNE = logits_BNE.softmax(-1) if softmax else logits_BNE.sigmoid()
        B, N, E = logits_BNE.shape
        pools, size = (1, B * N) if self.scope == "batch" else (B, N)
        # Each expert chooses once from every pool of tokens.
        real_PS = checked_padding_mask(padding_mask, x).reshape(pools, size)
        count_PE = ceil_share(real_PS.sum(-1, keepdim=True), self.share).expand(-1, E)
        chosen_BNE = take_best(scores_BNE.view(pools, size, E), real_PS, count_PE).view(B, N, E)
        choice = self.every_expert(x), scores_BNE, logits_BNE, scores_BNE, padding_mask
        routing = self.routing(*choice, selected_BNK=chosen_BNE)
        # By shapes alone, the most an expert could take: nobody is dropped.
        capacity = ceil_share(size, self.share)
        routing = replace(routing, capacity=capacity, capacity_scope=self.scope)
        return self.add_losses(routing)
