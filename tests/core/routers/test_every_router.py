"""What every router must do, whatever it is called: the contract on drawn inputs, a layer round it, and five steps of training."""

import copy
import json
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_core import CapacityRule, LanguageModel, LMConfig, MixtureOfExperts
from moe_core.lm import next_token_loss
from moe_core.routers import ROUTERS

from ..helpers import close, config, experts_token_by_token, fast, mask, randn, seeded

NAMES = list(ROUTERS)
TOP_K = {  # what a router leaves no choice about
    name: f.default
    for name, router in ROUTERS.items()
    for f in fields(router.Options)
    if f.name == "top_k" and not f.init
}
STEERED = {"bias_update_rate": 0.1, "mean_ffn_experts": 1.0}
OPTIONS = {"hash": {"vocab_size": 32}, "zero_computation": STEERED}
LEARNS_OUTSIDE_THE_GRADIENT = {  # buffers that update may change
    "loss_free": {"expert_bias"},
    "zero_computation": {"expert_bias"},
    "relu": {"l1_coefficient"},
    "expert_threshold": {"cutoffs", "ema_weight", "steps"},
    "quantile_balancing": {"beta"},
}
KINDS = "drawn", "equal tokens", "no logits", "all 1e4", "all -1e4", "far apart"
every_router = pytest.mark.parametrize("name", NAMES)


def layer(name, D=8, E=4, K=2, **changes) -> MixtureOfExperts:
    """A layer with this router, all weights drawn: some routers start at zero, where everything is tied."""
    K = TOP_K.get(name, K)
    changes = {"router_options": OPTIONS.get(name, {}), **changes}
    moe = seeded(MixtureOfExperts, config(router=name, d_model=D, n_experts=E, top_k=K, **changes))
    with torch.no_grad():
        for i, parameter in enumerate(moe.router.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=i))
    return moe


@dataclass
class Situation:
    """Sizes, a seed, what the logits are like, whether some tokens are padding, dtype and mode."""

    B: int
    N: int
    E: int
    K: int
    seed: int
    kind: str
    padded: bool
    dtype: torch.dtype
    training: bool
    D: int = 4

    def inputs(self):
        x = randn(self.B, self.N, self.D, seed=self.seed, dtype=self.dtype)
        if self.kind == "equal tokens":
            x = x[:1, :1].expand(self.B, self.N, self.D).contiguous() if x.numel() else x
        if self.kind in ("all 1e4", "all -1e4"):
            x = torch.ones_like(x)
        token_ids = torch.randint(
            32, (self.B, self.N), generator=torch.Generator().manual_seed(self.seed)
        )
        return x, mask(self.B, self.N, seed=self.seed) if self.padded else None, token_ids

    def layer(self, name):
        E = max(self.E, TOP_K.get(name, 1))
        options = {**OPTIONS.get(name, {})}
        if name == "zero_computation":
            options["mean_ffn_experts"] = 0.5 * min(self.K, E)
        moe = layer(name, self.D, E, self.K, router_options=options).train(self.training)
        scale = {"no logits": 0.0, "far apart": 1e4}.get(self.kind, 1.0)
        with torch.no_grad():
            for parameter in moe.router.parameters():
                parameter *= scale
            if self.kind in ("all 1e4", "all -1e4") and moe.router.weight is not None:
                moe.router.weight.fill_((1 if self.kind == "all 1e4" else -1) * 1e4 / self.D)
        return moe.to(self.dtype)


@st.composite
def situations(draw) -> Situation:
    E = draw(st.integers(1, 5))
    return Situation(
        B=draw(st.integers(0, 2)),
        N=draw(st.integers(0, 5)),
        E=E,
        K=draw(st.integers(1, E)),
        seed=draw(st.integers(0, 99)),
        kind=draw(st.sampled_from(KINDS)),
        padded=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        training=draw(st.booleans()),
    )


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module, before):
    return {
        name for name, value in module.state_dict().items() if not torch.equal(value, before[name])
    }


@every_router
@fast
@given(situation=situations())
def test_the_contract_holds_and_only_kept_slots_reach_the_output(name, situation):
    moe, (x, padding_mask, token_ids) = situation.layer(name), situation.inputs()
    before = state(moe)
    y, routing = seeded(moe, x, padding_mask, token_ids)
    routing.check()
    assert changed(moe, before) == set()  # forward learns nothing
    assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all()
    assert routing.expert_weights.dtype == torch.promote_types(x.dtype, torch.float32)
    assert routing.real_tokens.equal(
        torch.ones(x.shape[:2], dtype=torch.bool) if padding_mask is None else padding_mask
    )
    assert (y[~routing.real_tokens] == 0).all() and (y[~routing.capacity_mask.any(-1)] == 0).all()
    # whatever stands in a slot that is not kept, the experts' output is the same to the bit
    other = replace(
        routing, expert_weights=routing.expert_weights.masked_fill(~routing.capacity_mask, 7.0)
    )
    assert torch.equal(moe.experts(x, routing), moe.experts(x, other))
    if x.dtype == torch.float64:
        by_token = experts_token_by_token(moe.experts, x, routing)
        assert close(moe.experts(x, routing), by_token)
    if not situation.training:
        again = moe(x, padding_mask, token_ids)
        assert torch.equal(again[0], y) and torch.equal(
            again[1].expert_indices, routing.expert_indices
        )


@every_router
@fast
@given(situation=situations())
def test_update_changes_what_it_should_and_keeps_it_finite(name, situation):
    moe, (x, padding_mask, token_ids) = situation.layer(name), situation.inputs()
    routing, before = moe(x, padding_mask, token_ids)[1], state(moe)
    moe.router.update([routing])
    allowed = {f"router.{buffer}" for buffer in LEARNS_OUTSIDE_THE_GRADIENT.get(name, ())}
    assert changed(moe, before) <= allowed
    assert all(value.isfinite().all() for value in moe.state_dict().values())
    moe.eval()(x, padding_mask, token_ids)[1].check()


@every_router
def test_update_moves_all_of_the_state_on_an_ordinary_batch_and_nothing_without_one(name):
    moe, x, token_ids = layer(name), randn(4, 16, 8) + 0.5, torch.arange(64).view(4, 16) % 32
    before = state(moe)
    moe.router.update([])
    assert changed(moe, before) <= {
        "router.steps"
    }  # an optimiser step has passed: the warm-up of the thresholds counts it
    moe.router.update([moe(x, None, token_ids)[1]])
    assert changed(moe, before) == {
        f"router.{buffer}" for buffer in LEARNS_OUTSIDE_THE_GRADIENT.get(name, ())
    }


@every_router
def test_state_survives_a_state_dict_and_a_copy(name):
    moe, x, token_ids = layer(name), randn(4, 16, 8), torch.arange(64).view(4, 16) % 32
    for _ in range(3):
        moe.router.update([moe(x, None, token_ids)[1]])
    other = seeded(MixtureOfExperts, moe.config, seed=1)
    other.load_state_dict(moe.state_dict())
    y, routing = moe.eval()(x, None, token_ids)
    for twin in (other.eval(), copy.deepcopy(moe)):
        y_twin, routing_twin = twin(x, None, token_ids)
        assert torch.equal(y_twin, y) and torch.equal(
            routing_twin.capacity_mask, routing.capacity_mask
        )


@every_router
def test_state_is_float32_whatever_the_default_dtype_is_and_whatever_is_assigned_to_it(name):
    torch.set_default_dtype(torch.bfloat16)
    try:
        moe = layer(name)
    finally:
        torch.set_default_dtype(torch.float32)
    narrow = {key: v.bfloat16() if v.is_floating_point() else v for key, v in state(moe).items()}
    for assign in (False, True):
        moe.load_state_dict(narrow, assign=assign)
        for buffer in moe.router.buffers():
            assert buffer.dtype == torch.float32 or not buffer.is_floating_point()


@every_router
def test_the_output_teaches_the_router_and_every_expert_gets_a_gradient(name):
    moe, x, token_ids = (
        layer(name),
        randn(4, 16, 8).requires_grad_(),
        torch.arange(64).view(4, 16) % 32,
    )
    y, routing = seeded(moe, x, None, token_ids)
    (y * randn(4, 16, 8, seed=5)).sum().backward()
    assert (
        x.grad.isfinite().all() and moe.experts.down_proj.grad.flatten(1).abs().sum(1).gt(0).all()
    )
    if (
        name == "hash"
    ):  # weights are 1/K whatever the token looks like; see its own tests for the learned ones
        assert not routing.expert_weights.requires_grad
    else:
        assert moe.router.weight.grad.isfinite().all() and moe.router.weight.grad.abs().sum() > 0


@every_router
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_no_number_is_refused_by_the_check(name, bad):
    moe, x, token_ids = layer(name).eval(), randn(2, 4, 8), torch.arange(8).view(2, 4)
    x[1, 2, 3] = bad
    if name == "hash":  # it never looks at the token
        routing, other = (
            moe.router(x, None, token_ids).check(),
            moe.router(randn(2, 4, 8), None, token_ids),
        )
        assert torch.equal(routing.expert_indices, other.expert_indices)
        return
    with pytest.raises(ValueError, match="NaN or infinity"):
        moe.router(x).check()


@every_router
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_batch_that_is_no_number_leaves_finite_state_and_a_sequence_of_it_is_no_token(name, bad):
    x, token_ids = randn(4, 16, 8), torch.arange(64).view(4, 16) % 32
    spoiled = x.clone()
    spoiled[1] = bad
    of_three = torch.ones(4, 16, dtype=torch.bool)
    of_three[1] = False
    seen, masked = layer(name), layer(name)
    if name == "base":  # it solves for the assignment, and refuses
        with pytest.raises(ValueError, match="scores hold NaN or infinity"):
            seen.router(spoiled)
        return
    seen.router.update([seen.router(spoiled, None, token_ids)])
    masked.router.update([masked.router(x, of_three, token_ids)])
    if name in ("expert_threshold", "quantile_balancing"):
        for buffer, other in zip(seen.router.buffers(), masked.router.buffers()):
            assert torch.equal(buffer, other)
    for _ in range(3):
        seen.router.update([seen.router(torch.full_like(x, bad), None, token_ids)])
        seen.router.update([seen.router(x, None, token_ids)])
    assert all(value.isfinite().all() for value in seen.state_dict().values())
    assert seen.eval().router(x, None, token_ids).check().selected_mask.any()


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_a_mask_that_is_a_view_is_a_mask(name, training):
    moe, x, token_ids = layer(name).train(training), randn(3, 7, 8), torch.arange(21).view(3, 7)
    wide = torch.arange(8) < torch.tensor([[8], [5], [3]])
    for view in (wide[:, :-1], wide[:, :-1].t().contiguous().t(), wide[1, :7].expand(3, 7)):
        y, routing = seeded(moe, x, view, token_ids)
        same, other = seeded(moe, x, view.contiguous(), token_ids)
        assert torch.equal(y, same)
        assert torch.equal(routing.capacity_mask, other.capacity_mask)
        moe.router.update([routing])


@every_router
def test_a_batch_of_nothing_but_padding_gives_zero_and_finite_losses(name):
    moe, x, token_ids = (
        layer(name),
        randn(2, 4, 8).requires_grad_(),
        torch.zeros(2, 4, dtype=torch.int64),
    )
    y, routing = moe(x, torch.zeros(2, 4, dtype=torch.bool), token_ids)
    (y.sum() + routing.check().aux_loss).backward()
    assert (y == 0).all() and not routing.selected_mask.any() and (x.grad == 0).all()
    assert routing.aux_loss == 0


def language_model(name, **changes) -> LanguageModel:
    moe = config(
        router=name,
        d_model=16,
        d_ff=12,
        top_k=TOP_K.get(name, 2),
        **{"router_options": OPTIONS.get(name, {}), **changes},
    )
    return seeded(
        LanguageModel,
        LMConfig(vocab_size=32, d_model=16, n_layers=2, n_heads=2, max_seq_len=8, moe=moe),
    )


@every_router
def test_a_language_model_learns_a_batch_in_five_steps(name):
    lm, tokens = (
        language_model(name),
        torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(0)),
    )
    optimizer, losses = torch.optim.AdamW(lm.parameters(), lr=1e-2), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(5):
            logits, routings = lm(tokens)
            loss = next_token_loss(logits, tokens)
            optimizer.zero_grad()
            (loss + sum(routing.check().aux_loss for routing in routings)).backward()
            optimizer.step()
            for block, routing in zip(lm.blocks, routings):
                block.feed_forward.router.update([routing])
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(value.isfinite().all() for value in lm.state_dict().values())


@every_router
def test_a_config_with_this_router_survives_json_and_says_its_defaults(name):
    cfg = layer(name).config
    assert type(cfg).from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert "default" not in cfg.to_dict().values()
    router = layer(name).router
    for field in ("aux_loss_weight", "z_loss_weight", "jitter_noise", "top_k"):
        assert getattr(router, field, getattr(cfg, field)) == getattr(cfg, field)
    assert router.capacity_rule.factor == CapacityRule.of(cfg.capacity_factor).factor
    if ROUTERS[name].top_k_is_a_mean:
        assert router.expansion == cfg.top_k


RUNS_UNTIL_DONE = {"base", "sinkhorn"}  # an assignment and an iteration to a tolerance, in training


@every_router
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_router_never_waits_for_a_tensors_value(name, padded, training):
    """Under FakeTensorMode reading a value raises, as it would stall a GPU."""
    router, x, token_ids = (
        layer(name).router.train(training),
        randn(2, 8, 8),
        torch.zeros(2, 8, dtype=torch.int64),
    )
    padding_mask = torch.ones(2, 8, dtype=torch.bool) if padded else None
    with FakeTensorMode(allow_non_fake_inputs=True):
        if name in RUNS_UNTIL_DONE and training:
            with pytest.raises(
                Exception,
                match="aten._local_scalar_dense|aten.nonzero|data-dependent|DataDependent",
            ):
                router(x, padding_mask)
        else:
            routing = router(x, padding_mask, token_ids)
            assert routing.aux_loss.shape == ()
