"""Upcycling: what a Mixture-of-Experts made from a dense model is at step 0, and what it becomes."""

import pytest
import torch

from moe_core import CapacityRule, FeedForward, LanguageModel, LMConfig, MoEConfig
from moe_core.lm import next_token_loss
from moe_tools.interop.upcycling import upcycle

from ..core.helpers import config, randn, seeded

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE)


def dense(d_ff=16, dtype=torch.float32, **options):
    return seeded(FeedForward, 8, d_ff, **options).to(dtype)


def gap(a, b):
    return (a - b).abs().max().item()


@DTYPES
@pytest.mark.parametrize(
    "mlp",
    [
        {},
        {"glu": False},
        {"activation": "gelu"},
        {"activation": "relu2", "glu": False, "bias": True},
        {"activation": "quick_gelu", "glu_limit": 0.3, "up_offset": 1.0, "bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"top_k": 1},
        {"top_k": 4},
        {"router": "noisy_topk"},
        {"router": "loss_free"},
        {"router": "hash", "router_options": {"vocab_size": 7}},
        {"router_options": {"score_after_topk": True}, "norm_topk_prob": False},
        {"n_shared_experts": 2, "shared_gate": True},
        {"jitter_noise": 0.3},
        {
            "router_options": {
                "score_func": "sigmoid",
                "routed_scaling_factor": 2.5,
                "expert_bias": True,
            }
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_at_step_0_the_layer_is_the_dense_one(dtype, mlp, moe, training):
    ffn = dense(dtype=dtype, **mlp).train(training)
    layer = upcycle(ffn, config(**mlp, **moe), router_std=1.0)
    x = randn(2, 9, 8, dtype=dtype)
    y, routing = layer(x, token_ids=torch.arange(18).view(2, 9) % 7)
    routing.check()
    assert layer.training == training and y.dtype == dtype
    assert gap(y, ffn(x)) <= TOLERANCE[dtype]
    assert len(routing.expert_indices.unique()) > 1  # it does route


@DTYPES
@pytest.mark.parametrize("mlp", [{}, {"glu": False}, {"bias": True, "up_offset": 1.0}], ids=str)
@pytest.mark.parametrize("gamma", [1.0, 2.5])
@pytest.mark.parametrize(
    "slices, n_experts, top_k", [(2, 8, 2), (2, 8, 4), (3, 9, 3), (4, 8, 4), (16, 16, 16)]
)
def test_slices_chosen_together_add_up_to_the_dense_layer(
    dtype, mlp, gamma, slices, n_experts, top_k
):
    ffn, x = dense(48, dtype, **mlp), randn(3, 30, 8, dtype=dtype)
    router = {"router_options": {"routed_scaling_factor": gamma}}
    layer = upcycle(
        ffn, MoEConfig(8, 48 // slices, n_experts, top_k, **mlp, **router), router_std=1.0
    )
    y, routing = layer(x)
    assert gap(y, ffn(x)) <= 4 * TOLERANCE[dtype]
    copies = routing.expert_indices // slices
    assert (
        torch.nn.functional.one_hot(copies, n_experts // slices).sum(-2) % slices == 0
    ).all()  # whole copies


def test_a_dropped_slot_takes_its_weight_away():
    ffn, x = dense(), randn(2, 32, 8)
    layer = upcycle(ffn, config(capacity_factor=CapacityRule(factor=0.5)), router_std=1.0)
    y, routing = layer(x)
    kept = (routing.expert_weights * routing.capacity_mask).sum(-1, keepdim=True)
    assert (kept == 0).any() and (kept > 0.99).any()
    assert gap(y, kept * ffn(x)) <= 1e-6 and gap(y, ffn(x)) > 1e-2


@DTYPES
def test_a_language_model_gives_the_same_logits_and_shares_no_memory(dtype):
    lm = (
        seeded(LanguageModel, LMConfig(vocab_size=50, d_model=16, n_layers=2, n_heads=2, d_ff=24))
        .to(dtype)
        .eval()
    )
    tokens = torch.arange(40).view(2, 20)
    moe = upcycle(lm, MoEConfig(16, 24, 4, 2))
    logits, routings = moe(tokens)
    assert (
        gap(logits, lm(tokens)[0]) <= 10 * TOLERANCE[dtype]
        and len(routings) == 2
        and not moe.training
    )
    assert moe.config == LMConfig(
        vocab_size=50, d_model=16, n_layers=2, n_heads=2, moe=MoEConfig(16, 24, 4, 2)
    )
    theirs = dict(lm.named_parameters())
    for name, parameter in moe.named_parameters():
        if "feed_forward." not in name:
            assert torch.equal(parameter, theirs[name]) and parameter is not theirs[name]
    LanguageModel(moe.config).to(dtype).load_state_dict(moe.state_dict())  # an ordinary MoE model
    first, second = (block.feed_forward.router.weight for block in moe.blocks)
    assert not torch.equal(first, second)


def test_experts_part_in_training_though_nothing_told_them_apart():
    torch.manual_seed(0)
    lm = LanguageModel(LMConfig(vocab_size=50, d_model=16, n_layers=2, n_heads=2, d_ff=24))
    moe, tokens = upcycle(lm, MoEConfig(16, 24, 4, 2)), torch.randint(50, (4, 20))
    banks = [block.feed_forward.experts.gate_up_proj for block in moe.blocks]
    assert all((bank == bank[0]).all() for bank in banks)
    optimizer = torch.optim.SGD(moe.parameters(), lr=1.0)
    routers = [block.feed_forward.router.weight for block in moe.blocks]
    losses = []
    for step in range(3):
        loss = next_token_loss(moe(tokens)[0], tokens)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:  # equal experts: it makes no difference whom the router chooses
            assert all(router.grad.abs().max() < 1e-8 for router in routers)
            assert all(bank.grad.flatten(1).abs().amax(-1).min() > 1e-5 for bank in banks)
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert all(gap(bank[e], bank[0]) > 1e-5 for bank in banks for e in range(1, 4))
    assert all(router.grad.abs().max() > 1e-8 for router in routers)


def test_noise_parts_the_experts_in_proportion_to_their_weights():
    ffn = dense(64)
    with torch.no_grad():
        ffn.down_proj.weight *= 100
    layer = upcycle(ffn, config(d_ff=64), noise=0.1)
    for bank, weight in (
        (layer.experts.gate_up_proj, ffn.gate_up_proj.weight),
        (layer.experts.down_proj, ffn.down_proj.weight),
    ):
        noise = bank - weight
        assert (noise.flatten(1).std(-1) / weight.std()).tolist() == pytest.approx(
            [0.1] * 4, rel=0.15
        )
        assert gap(bank[0], bank[1]) > 0.01 * weight.std()
    x = randn(2, 9, 8)
    relative = gap(layer(x)[0], ffn(x)) / ffn(x).abs().max().item()
    assert 1e-3 < relative < 0.5


def test_a_generator_makes_it_reproducible_and_leaves_torchs_own_alone():
    ffn, state = dense(), torch.get_rng_state()
    one, two, other = (
        upcycle(ffn, config(), noise=0.1, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(state, torch.get_rng_state())
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]) and not torch.equal(
            tensor, other.state_dict()[name]
        )
    assert one.router.weight.std().item() == pytest.approx(0.02, rel=0.4)
    a, b = upcycle(ffn, config()), upcycle(ffn, config())
    assert not torch.equal(
        a.router.weight, b.router.weight
    )  # without one, torch's own: another draw each time


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"norm_topk_prob": False},
            r"router='topk' with norm_topk_prob=False has weights that do not sum to the same for all tokens",
        ),
        ({"router": "switch", "top_k": 1}, "router='switch' .* do not sum to the same"),
        (
            {
                "router_options": {"score_func": "sigmoid", "score_after_topk": True},
                "norm_topk_prob": False,
            },
            "do not sum to the same",
        ),
        ({"router_options": {"routed_scaling_factor": 0.0}}, "do not sum to the same"),
        ({"router_options": {"norm_eps": 0.1}}, "do not sum to the same"),
        ({"router": "expert_choice"}, "router='expert_choice' .* do not sum to the same"),
        (
            {"router": "zero_computation", "router_options": {"n_zero_experts": 2}},
            "sends tokens to experts that compute nothing",
        ),
        ({"router_options": {"weights_on": "input"}}, "weighs the input of the experts"),
        ({"d_model": 16}, "d_model=16 must be 8, the dense layer's"),
        ({"d_ff": 12}, "d_ff=12 must be 16, the dense layer's, or divide it"),
        ({"activation": "gelu"}, "activation='gelu' must be 'silu', the dense layer's"),
        ({"glu": False}, "glu=False must be True, the dense layer's"),
        ({"bias": True}, "bias=True must be False, the dense layer's"),
        ({"glu_limit": 7.0}, "glu_limit=7.0 must be None, the dense layer's"),
        ({"up_offset": 1.0}, "up_offset=1.0 must be 0.0, the dense layer's"),
        ({"d_ff": 8, "top_k": 3}, "top_k=3 must be a multiple of 2, the slices of d_ff=8 in 16"),
        ({"d_ff": 8, "n_experts": 5}, "n_experts=5 must be a multiple of 2"),
        (
            {"d_ff": 8, "n_experts": 6, "router_options": {"n_groups": 2}},
            "experts per group=3 must be a multiple of 2",
        ),
        (
            {"d_ff": 8, "router": "noisy_topk"},
            "slices that must be chosen together: only router='topk' does, not 'noisy_topk'",
        ),
    ],
    ids=str,
)
def test_what_would_not_be_the_dense_layer_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        upcycle(dense(), config(**options))


@pytest.mark.parametrize(
    "arguments", [{"noise": -0.1}, {"router_std": -1.0}, {"noise": float("nan")}]
)
def test_a_negative_number_is_refused(arguments):
    with pytest.raises(ValueError, match="must be at least 0"):
        upcycle(dense(), config(), **arguments)


def test_an_moe_model_is_not_dense():
    with pytest.raises(ValueError, match="MoE layers already"):
        upcycle(seeded(LanguageModel, LMConfig(d_model=8, n_layers=1, moe=config())), config())
