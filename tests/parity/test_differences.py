"""The table "how they differ" is measured on our presets; the same experiments on the Hugging Face blocks find the same."""

from dataclasses import asdict

import pytest
import torch

from moe_tools.router_differences import N_EXPERTS, differences, measure

from .families import FAMILIES, Pair

ROWS = {row["name"]: row for row in differences()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_is_true_of_the_hugging_face_block(name):
    router = ROWS[name]["router"]
    shape = (1, 1, N_EXPERTS, 4, N_EXPERTS, router.top_k, router.n_groups, router.topk_groups)
    pair = Pair(name, shape)
    with torch.no_grad():
        pair.gate_weight.copy_(torch.eye(N_EXPERTS))  # x is the logits

    @torch.no_grad()
    def weigh(logits_TE):
        return pair.their_routing(logits_TE.unsqueeze(0)).dense

    theirs = measure(
        weigh,
        N_EXPERTS,
        bias=getattr(pair.gate, "bias", None),
        expert_bias=getattr(pair.gate, "e_score_correction_bias", None),
        n_groups=router.n_groups,
    )
    ours = asdict(ROWS[name]["facts"])
    assert {key: value for key, value in asdict(theirs).items()} == {
        key: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        for key, value in ours.items()
    }
