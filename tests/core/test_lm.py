"""The language model: causal, comparable with its dense twin, and trained on the right target."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_core import FeedForward, LanguageModel, LMConfig, MixtureOfExperts
from moe_core.lm import CausalAttention, next_token_loss

from .helpers import about, close, config, randn, seeded


def lm_config(**moe) -> LMConfig:
    return LMConfig(
        vocab_size=32,
        d_model=16,
        n_layers=2,
        n_heads=2,
        max_seq_len=8,
        moe=config(d_model=16, d_ff=12, **moe),
    )


def model(cfg: LMConfig) -> LanguageModel:
    """With every parameter larger than at the usual start, so that nothing hides behind small numbers."""
    lm = seeded(LanguageModel, cfg)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter *= 5 if parameter.ndim > 1 else 1
    return lm


def tokens(B=2, N=8, seed=0):
    return torch.randint(32, (B, N), generator=torch.Generator().manual_seed(seed))


def test_next_token_loss_of_a_case_by_hand():
    logits = torch.log(torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [1 / 3, 1 / 3, 1 / 3]]]))
    # position 0 predicts token 1 (p = 0.2), position 1 predicts token 2 (p = 0.6); position 2 predicts nothing
    expected = -(math.log(0.2) + math.log(0.6)) / 2
    assert next_token_loss(logits, torch.tensor([[0, 1, 2]])).item() == about(expected)


def test_next_token_loss_of_even_logits_is_the_logarithm_of_the_vocabulary():
    assert next_token_loss(
        torch.zeros(2, 5, 256), torch.zeros(2, 5, dtype=torch.int64)
    ).item() == about(math.log(256))


def test_next_token_loss_is_float32_for_bfloat16_logits():
    logits = randn(1, 3, 32, dtype=torch.bfloat16)
    assert torch.equal(
        next_token_loss(logits, tokens(1, 3)), next_token_loss(logits.float(), tokens(1, 3))
    )


def test_the_loss_at_the_start_is_close_to_that_of_a_guess():
    lm = seeded(LanguageModel, lm_config())
    assert next_token_loss(lm(tokens(8))[0], tokens(8)).item() == pytest.approx(
        math.log(32), abs=0.05
    )


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("changed", [1, 4, 7])
def test_a_later_token_never_changes_earlier_logits_when_dropless(dense, changed):
    cfg = lm_config(n_shared_experts=1)
    lm, seen, other = model(cfg.dense_twin() if dense else cfg).double(), tokens(), tokens()
    other[:, changed] = (other[:, changed] + 1) % 32
    a, b = lm(seen)[0], lm(other)[0]
    assert close(a[:, :changed], b[:, :changed])
    assert (a[:, changed:] - b[:, changed:]).abs().amax(
        -1
    ).min() > 1e-6  # and the instrument sees a change


def test_a_later_token_never_changes_earlier_logits_with_capacity_in_a_batch_of_one():
    lm, seen, other = model(lm_config(capacity_factor=0.5)).double(), tokens(1), tokens(1)
    other[:, 5:] = (other[:, 5:] + 7) % 32
    assert close(lm(seen)[0][:, :5], lm(other)[0][:, :5])


def test_a_sequence_does_not_depend_on_the_others_of_its_batch_when_dropless():
    lm = model(lm_config()).double()
    assert close(lm(tokens())[0][1:], lm(tokens()[1:])[0])


def test_attention_depends_on_distances_not_on_positions():
    attention = seeded(CausalAttention, 16, 2, 64).double()
    q, k = randn(1, 2, 1, 8, dtype=torch.float64), randn(1, 2, 1, 8, seed=1, dtype=torch.float64)
    rotated = lambda h: attention._rotate(h.expand(1, 2, 64, 8))
    scores = rotated(q) @ rotated(k).transpose(-2, -1)
    for distance in (0, 1, 5):
        diagonal = scores.diagonal(-distance, -2, -1)
        same = diagonal[..., :1].expand_as(diagonal)
        assert close(diagonal, same, dtype=torch.float32)  # the angles are float32
    assert not torch.allclose(scores[..., 5, 4], scores[..., 5, 3], atol=1e-3)


def test_an_moe_model_returns_one_routing_a_layer_and_a_dense_one_none():
    logits, routings = model(lm_config())(tokens())
    assert logits.shape == (2, 8, 32) and len(routings) == 2
    assert all(routing.check().expert_indices.shape == (2, 8, 2) for routing in routings)
    assert model(lm_config().dense_twin())(tokens())[1] == []


def test_the_padding_mask_reaches_every_router():
    padding_mask = torch.ones(2, 8, dtype=torch.bool)
    padding_mask[1, 5:] = False
    logits, routings = model(lm_config())(tokens(), padding_mask)
    assert all(routing.check().tokens_per_expert.sum() == 26 for routing in routings)
    assert close(logits[padding_mask], model(lm_config())(tokens())[0][padding_mask])


def flops(cfg: LMConfig) -> int:
    with FlopCounterMode(display=False) as counter:
        model(cfg)(tokens())
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"top_k": 1},
        {"n_shared_experts": 2},
        {"top_k": 4, "aux_loss_weight": 0.01},
        {"glu": False, "activation": "relu2"},
    ],
    ids=str,
)
def test_the_dense_twin_costs_the_same_matrix_products_but_for_the_router(moe):
    T, D, E = 2 * 8, 16, 4
    for backend in ("loop", "fused", "padded"):  # padded multiplies empty places too
        cfg = lm_config(backend=backend, **moe)
        more = flops(cfg) - flops(cfg.dense_twin()) - cfg.n_layers * 2 * T * D * E
        assert more == 0 if backend != "padded" else more >= 0


def test_a_training_step_costs_three_times_the_forward_pass():
    for backend in ("loop", "fused"):
        lm = model(lm_config(backend=backend))
        with FlopCounterMode(display=False) as counter:
            lm(tokens())[0].sum().backward()
        assert counter.get_total_flops() == 3 * flops(lm_config(backend=backend))


def test_the_dense_twin_differs_in_the_feed_forward_layers_only():
    cfg = lm_config(top_k=2, n_shared_experts=1)
    twin = cfg.dense_twin()
    assert (twin.d_ff, twin.moe) == (36, None)
    assert lm_config(glu=False, activation="relu").dense_twin().to_dict()["activation"] == "relu"
    moe, dense = seeded(LanguageModel, cfg), seeded(LanguageModel, twin)
    rest = lambda lm: {n: p.shape for n, p in lm.named_parameters() if ".feed_forward." not in n}
    assert rest(moe) == rest(dense)
    assert isinstance(moe.blocks[0].feed_forward, MixtureOfExperts) and isinstance(
        dense.blocks[0].feed_forward, FeedForward
    )


def test_a_dense_model_has_no_twin():
    with pytest.raises(ValueError, match="the model is dense already"):
        lm_config().dense_twin().dense_twin()


def test_what_writes_to_the_residual_stream_starts_smaller():
    cfg = LMConfig(
        vocab_size=64, d_model=64, n_layers=8, moe=config(d_model=64, d_ff=64, n_shared_experts=1)
    )
    for lm in (seeded(LanguageModel, cfg), seeded(LanguageModel, cfg.dense_twin())):
        for name, parameter in lm.named_parameters():
            if parameter.ndim > 1:
                writes = "out_proj" in name or "down_proj" in name
                assert parameter.std().item() == pytest.approx(
                    0.005 if writes else 0.02, rel=0.15
                ), name
            else:
                assert (parameter == 1).all()


def test_a_router_that_prescribes_its_start_keeps_it():
    noisy, base = (
        seeded(LanguageModel, lm_config(router="noisy_topk")),
        seeded(LanguageModel, lm_config(router="base", top_k=1)),
    )
    for block in (*noisy.blocks, *base.blocks):
        router = block.feed_forward.router
        if block in [*noisy.blocks]:
            assert all((weight == 0).all() for weight in router.parameters())
        else:
            assert close(
                router.weight @ router.weight.T, 0.01 * torch.eye(4)
            )  # orthogonal rows of length 0.1
    assert noisy.blocks[0].feed_forward.experts.down_proj.std().item() == pytest.approx(
        0.01, rel=0.2
    )  # the rest as always


def test_the_tokens_reach_a_hash_router_in_every_layer():
    lm = model(lm_config(router="hash", router_options={"vocab_size": 32}))
    for block, routing in zip(lm.blocks, lm(tokens())[1]):
        assert torch.equal(routing.expert_indices, block.feed_forward.router.table[tokens()])


def test_the_dense_twin_of_a_fraction_of_an_expert_is_as_wide():
    assert (
        lm_config(router="relu", top_k=1.25, n_shared_experts=1).dense_twin().d_ff == 27
    )  # 2.25 * 12


def test_input_and_output_embeddings_are_one():
    lm = model(lm_config().dense_twin())
    lm(torch.zeros(1, 2, dtype=torch.int64))[0].sum().backward()
    assert (
        lm.embedding.weight.grad[1:].abs().sum(-1) > 0
    ).all()  # tokens 1 to 31 went in nowhere, they only come out


def test_every_parameter_gets_a_finite_gradient():
    lm = model(lm_config(aux_loss_weight=0.01, n_shared_experts=1))
    logits, routings = lm(tokens())
    (next_token_loss(logits, tokens()) + sum(routing.aux_loss for routing in routings)).backward()
    for name, parameter in lm.named_parameters():
        assert (
            parameter.grad is not None
            and parameter.grad.isfinite().all()
            and parameter.grad.abs().sum() > 0
        ), name


def test_a_model_trains_under_autocast():
    lm = model(lm_config(n_shared_experts=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = next_token_loss(lm(tokens())[0], tokens())
    loss.backward()
    assert loss.dtype == torch.float32 and all(
        p.dtype == p.grad.dtype == torch.float32 for p in lm.parameters()
    )


def test_a_model_survives_its_state_dict():
    lm, other = model(lm_config()), LanguageModel(lm_config())
    other.load_state_dict(lm.state_dict())
    assert torch.equal(lm(tokens())[0], other(tokens())[0])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1, 1)])
def test_a_batch_may_be_empty(dense, shape):
    cfg = lm_config().dense_twin() if dense else lm_config()
    assert model(cfg)(torch.zeros(shape, dtype=torch.int64))[0].shape == (*shape, 32)


def test_a_sequence_too_long_is_refused():
    with pytest.raises(ValueError, match="sequence length 9 must be at most max_seq_len=8"):
        model(lm_config())(tokens(1, 9))


@pytest.mark.parametrize("reset_first", [False, True])
def test_a_model_made_without_memory_and_filled_from_a_state_dict_is_the_same(reset_first):
    lm = model(lm_config())
    with torch.device("meta"):
        other = LanguageModel(lm_config())
    other.to_empty(device="cpu")
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.data.fill_(torch.nan)  # to_empty leaves whatever was there; made visible
    if reset_first:
        other.reset_parameters()
        assert all(tensor.isfinite().all() for tensor in (*other.parameters(), *other.buffers()))
    other.load_state_dict(lm.state_dict())
    assert torch.equal(other(tokens())[0], lm(tokens())[0])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_text_has_the_same_logits_loss_and_gradients_alone_and_padded(side, dense):
    cfg = lm_config(aux_loss_weight=0.0)
    lm, text = model(cfg.dense_twin() if dense else cfg), tokens(1, 5)
    before = {"left": 3, "right": 0, "both": 1}[side]
    padded = torch.full((1, 8), 7)
    padded[:, before : before + 5] = text
    real = (torch.arange(8) >= before) & (torch.arange(8) < before + 5)
    losses, gradients, logits = [], [], []
    for row, mask in ((text, None), (padded, real[None]), ((padded + 1) % 32, real[None])):
        if mask is not None:
            row = row.clone()
            row[:, before : before + 5] = text
        out, _ = lm(row, mask)
        logits.append(out if mask is None else out[:, before : before + 5])
        losses.append(next_token_loss(out, row, mask))
        gradients.append(torch.autograd.grad(losses[-1], list(lm.parameters()), allow_unused=True))
    for other in (1, 2):
        assert close(logits[other], logits[0]) and close(losses[other], losses[0])
        for a, b in zip(gradients[other], gradients[0]):
            assert close(a, b, size=1.0)


def test_where_nothing_is_to_be_predicted_the_loss_is_zero_and_one_token_is_refused():
    lm, rows = model(lm_config()), tokens()
    logits, _ = lm(rows)
    for loss in (
        next_token_loss(logits, torch.full_like(rows, -100)),
        next_token_loss(logits, rows, torch.zeros_like(rows, dtype=torch.bool)),
        next_token_loss(logits[:0], rows[:0]),
    ):
        assert loss.item() == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, logits, retain_graph=True))
    with pytest.raises(ValueError, match=r"tokens of shape \(2, 1\) hold no next token"):
        next_token_loss(logits[:, :1], rows[:, :1])
