"""TopKRouter's presets against the Hugging Face blocks of the same families, with the same random weights.

bfloat16 inputs: a block of theirs holds float32 parameters or bfloat16 ones.
- Float32 parameters, inputs that bfloat16 can hold: everything is equal as in float32; only the gradient of our input is
  bfloat16 itself, so equal to its rounding.
- Bfloat16 parameters: DeepSeek-V2, V3 and Switch compute logits in float32 as we do, and are equal (Switch rounds the
  probability to bfloat16 before it takes the largest). The others round the logits to bfloat16, which may change the choice: theirs
  are ours, rounded; and from their logits we choose the same experts with the same weights, up to the rounding of the weights.
"""

import pytest
import torch

from moe_core.capacity import CapacityRule

from .families import CASES, FAMILIES, Pair, dense, gap, pair_of, randn

BF16 = 2.0**-8  # half the distance between neighbours, relative
EVERY_CASE = pytest.mark.parametrize(
    "name, shape, seed, dtype",
    CASES,
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)
SHAPE = {
    name: (2, 9, 16, 8, 4, 1, 1, 1) if family.top_1_only else (2, 9, 16, 8, 16, 4, 4, 2)
    for name, family in FAMILIES.items()
}


@EVERY_CASE
def test_the_same_experts_are_chosen_with_the_same_weights(name, shape, seed, dtype):
    pair, x = pair_of(name, shape, seed), randn(*shape[:3], seed=seed, dtype=dtype)
    ours, theirs = pair.router(x).check(), pair.their_routing(x.float())
    assert gap(ours.logits.flatten(0, 1), theirs.logits) <= 1e-5
    assert torch.equal(dense(ours) != 0, theirs.dense != 0)
    assert gap(dense(ours), theirs.dense) <= 1e-5
    if theirs.indices is not None and not name.startswith(
        "deepseek"
    ):  # those do not sort the slots of a token
        assert torch.equal(ours.expert_indices.flatten(0, 1), theirs.indices)


@EVERY_CASE
def test_outputs_and_gradients_are_equal(name, shape, seed, dtype):
    pair, x = pair_of(name, shape, seed), randn(*shape[:3], seed=seed, dtype=dtype)
    our_x, their_x = x.clone().requires_grad_(), x.float().requires_grad_()
    ours, theirs = pair.our_output(our_x.float(), pair.router(our_x)), pair.their_output(their_x)
    assert gap(ours, theirs) <= 1e-5

    loss_of = (
        randn(*shape[:3], seed=seed + 7) / pair.router.routed_scaling_factor
    )  # gradients of the order of 1 in all families
    parameters = [pair.router.weight, *([] if pair.router.bias is None else [pair.router.bias])]
    their_parameters = [pair.gate_weight, *([] if pair.router.bias is None else [pair.gate.bias])]
    our_gradients = torch.autograd.grad((ours * loss_of).sum(), [our_x, *parameters])
    their_gradients = torch.autograd.grad((theirs * loss_of).sum(), [their_x, *their_parameters])
    size = their_gradients[0].abs().max().item()
    assert size > 0.1 and (
        shape[5] == 1 or all(gradient.abs().max() > 1e-3 for gradient in their_gradients)
    )  # K = 1: may be 0
    assert gap(our_gradients[0], their_gradients[0]) <= (
        1e-5 if dtype == torch.float32 else 2 * BF16 * min(size, 1)
    )
    for our_gradient, their_gradient in zip(our_gradients[1:], their_gradients[1:]):
        assert gap(our_gradient, their_gradient) <= 1e-5


@EVERY_FAMILY
def test_a_block_in_bfloat16_routes_like_ours_up_to_the_precision_of_its_logits(name):
    shape = SHAPE[name]
    pair, x = Pair(name, shape, seed=3), randn(4, 64, shape[2], seed=3, dtype=torch.bfloat16)
    pair.block.bfloat16()
    for tensor in pair.gate.buffers():  # a model that is loaded keeps this one in float32
        tensor.data = pair.router.expert_bias.clone()
    pair.router.bfloat16()
    ours, theirs = pair.router(x).check(), pair.their_routing(x)
    our_logits = ours.logits.flatten(0, 1)
    if pair.family.float32_logits:
        assert theirs.logits.dtype == torch.float32 and gap(our_logits, theirs.logits) <= 1e-5
        same = dense(ours) != 0
        if name == "switch":  # rounded probabilities may tie, and the first of them wins
            rounded = ours.scores.flatten(0, 1).bfloat16()
            same = torch.nn.functional.one_hot(rounded.argmax(-1), shape[4]) != 0
            assert torch.equal(theirs.dense, rounded * same)
        assert torch.equal(same, theirs.dense != 0)
        assert name == "switch" or gap(dense(ours), theirs.dense) <= 1e-5
        return
    assert theirs.logits.float().sub(our_logits).abs().le(2 * BF16 * our_logits.abs() + 1e-5).all()
    from_theirs = theirs.logits.float().unsqueeze(0)  # (1, T, E)
    scores = pair.router.scores_of(from_theirs)
    if name == "deepseek_v4":  # here the scores are bfloat16 too
        scores = pair.router.scores_of(theirs.logits).float().unsqueeze(0)
    indices = pair.router.select(from_theirs if pair.router.score_after_topk else scores)
    weights = pair.router.weigh(from_theirs, scores, indices)
    ours_of_theirs = torch.zeros_like(from_theirs).scatter(-1, indices, weights)[0]
    untied = (
        theirs.logits.float().sort(-1).values.diff(dim=-1).min(-1).values > 0
    )  # equal logits: any of them may be taken
    assert untied.sum() > 100
    assert torch.equal(ours_of_theirs[untied] != 0, theirs.dense[untied] != 0)
    exact = theirs.dense.dtype == torch.float32
    assert (
        (ours_of_theirs - theirs.dense)[untied]
        .abs()
        .le(1e-5 if exact else 4 * BF16 * ours_of_theirs[untied] + 1e-6)
        .all()
    )


def test_bfloat16_logits_would_change_the_choice_of_some_tokens():
    flips = 0
    for seed in range(3):
        pair, x = (
            Pair("mixtral", SHAPE["mixtral"], seed),
            randn(8, 64, 16, seed=seed, dtype=torch.bfloat16),
        )
        pair.block.bfloat16()
        pair.router.bfloat16()
        flips += int(
            ((dense(pair.router(x)) != 0) != (pair.their_routing(x).dense != 0)).any(-1).sum()
        )
    assert 0 < flips < 3 * 512 * 0.1  # some, and not many: why the router computes in float32


# What makes each family its own: the parity above would notice each of these.


@pytest.mark.parametrize(
    "name, change",
    [
        ("switch", {"norm_topk_prob": True}),
        ("mixtral", {"norm_topk_prob": False}),
        ("olmoe", {"norm_topk_prob": True}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("granite", {"score_after_topk": False}),
        ("gpt_oss", {"score_after_topk": False}),
        ("llama4", {"score_func": "softmax"}),
        ("llama4", {"norm_topk_prob": True}),
        ("deepseek_v2", {"routed_scaling_factor": 1.0}),
        ("deepseek_v2", {"norm_topk_prob": True}),
        ("deepseek_v2", {"n_groups": 1, "topk_groups": 1}),
        ("deepseek_v2", {"group_score": "top2_sum"}),
        ("deepseek_v3", {"group_score": "max"}),
        ("deepseek_v3", {"norm_topk_prob": False}),
        ("deepseek_v3", {"score_func": "softmax"}),
        ("deepseek_v3", {"n_groups": 1, "topk_groups": 1}),
        ("deepseek_v4", {"score_func": "sigmoid"}),
        ("deepseek_v4", {"routed_scaling_factor": 2.5}),
    ],
    ids=str,
)
def test_another_option_is_another_router(name, change):
    shape = SHAPE[name]
    pair, x = Pair(name, shape), randn(*shape[:3], seed=0)
    for option, value in change.items():
        assert getattr(pair.router, option) != value
        setattr(pair.router, option, value)
    assert gap(dense(pair.router(x)), pair.their_routing(x).dense) > 1e-2


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "deepseek_v4"])
def test_a_bias_left_at_zero_is_another_router(name):
    pair, x = Pair(name, SHAPE[name]), randn(*SHAPE[name][:3], seed=0)
    pair.router.reset_parameters()
    with torch.no_grad():
        pair.router.weight.copy_(pair.gate_weight)
    assert not torch.equal(dense(pair.router(x)) != 0, pair.their_routing(x).dense != 0)


def test_the_weight_on_the_other_side_of_the_expert_gives_another_output():
    for name in ("llama4", "olmoe"):
        pair, x = Pair(name, SHAPE[name]), randn(*SHAPE[name][:3], seed=0)
        pair.router.weights_on = "output" if name == "llama4" else "input"
        assert gap(pair.our_output(x, pair.router(x)), pair.their_output(x)) > 1e-2


def test_biased_scores_below_zero_stay_inside_the_groups():
    """DeepSeek-V3 masks with -inf; with 0, experts outside the groups would beat negative ones inside."""
    pair, x = Pair("deepseek_v3", SHAPE["deepseek_v3"]), randn(*SHAPE["deepseek_v3"][:3], seed=0)
    pair.gate.e_score_correction_bias -= 5
    pair.router.load_state_dict(pair.router_state())
    ours, theirs = pair.router(x), pair.their_routing(x)
    assert (
        torch.equal(dense(ours) != 0, theirs.dense != 0) and gap(dense(ours), theirs.dense) <= 1e-5
    )
    groups = (ours.expert_indices // 4).sort(-1).values
    assert (groups.diff(dim=-1) != 0).sum(-1).max() <= 1  # at most two groups a token


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_switch_drops_the_same_tokens_and_leaves_exactly_zero(capacity):
    """Their capacity is a constant per sequence."""
    shape = (3, 8, 16, 8, 4, 1, 1, 1)
    rule = CapacityRule(expert_capacity=capacity, scope="sequence")
    pair, x = (
        Pair("switch", shape, capacity=rule, expert_capacity=capacity),
        randn(3, 8, 16, seed=0),
    )
    routing, theirs, their_y = pair.router(x).check(), pair.their_routing(x), pair.their_output(x)
    assert (
        torch.equal(dense(routing) != 0, theirs.dense != 0)
        and gap(dense(routing), theirs.dense) <= 1e-5
    )
    y, lost = pair.our_output(x, routing), ~routing.capacity_mask[..., 0]
    assert lost.any() and gap(y, their_y) <= 1e-5
    assert (y[lost] == 0).all() and (their_y[lost] == 0).all()
