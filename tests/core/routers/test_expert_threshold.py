"""Expert threshold: the rule, its moving threshold, and what makes it causal and balanced at once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import moe_core
from moe_core import DropReason, Experts
from moe_core.routers.expert_choice import ExpertChoiceRouter
from moe_core.routers.expert_threshold import ExpertThresholdRouter

from ..helpers import about, cases, close, config, fast, randn, seeded


def router(**changes) -> ExpertThresholdRouter:
    return seeded(
        ExpertThresholdRouter, **{"d_model": 8, "n_experts": 4, "warmup_steps": 0, **changes}
    )


def identity(n_experts=2, cutoffs=None, **changes) -> ExpertThresholdRouter:
    """A router whose logits are its input; with these thresholds if given."""
    r = router(d_model=n_experts, n_experts=n_experts, **changes)
    with torch.no_grad():
        r.weight.copy_(torch.eye(n_experts))
    if cutoffs is not None:
        r.cutoffs.copy_(torch.tensor(cutoffs))
        r.ema_weight.fill_(1)
    return r


def state(r):
    return {name: value.clone() for name, value in r.state_dict().items()}


def unchanged(r, before) -> bool:
    return all(torch.equal(value, before[name]) for name, value in r.state_dict().items())


@fast
@given(
    cases(),
    st.sampled_from([1.0, 0.5, 0.3]),
    st.sampled_from([None, 0.0, 0.5, 2.0]),
    st.integers(0, 2),
    st.booleans(),
)
def test_every_routing_keeps_the_contract_through_warmup_and_after(
    case, fraction, band, warmup_steps, calibrated
):
    r = seeded(
        ExpertThresholdRouter,
        case.D,
        case.E,
        case.K * fraction,
        warmup_steps=warmup_steps,
        capacity_band=band,
        z_loss_weight=0.01,
        jitter_noise=0.1,
        seed=case.seed,
    )
    with torch.no_grad():
        r.weight *= case.scale
    if calibrated:
        r.calibrate([randn(2, 9, case.D, seed=1)])
    x, padding_mask = case.x(), case.padding_mask()
    for _ in range(3):
        routing = r(x, padding_mask).check()
        assert routing.expert_indices.shape == (case.B, case.N, case.E)
        r.update([routing, r(x[:1], None if padding_mask is None else padding_mask[:1]).check()])
        assert r.thresholds.isfinite().all()
    routing = r.eval()(x, padding_mask).check()
    assert torch.equal(
        routing.capacity_mask, (routing.logits > r.thresholds) & routing.real_tokens.unsqueeze(-1)
    )


def test_it_is_called_like_this():
    r = ExpertThresholdRouter(d_model=512, n_experts=16, expansion=1.0, ema_decay=0.99)
    r.calibrate([randn(2, 64, 512)])
    assert r.thresholds.shape == (16,)


# The rule


def test_a_token_goes_to_every_expert_whose_threshold_it_exceeds_with_a_sigmoid_as_weight():
    r = identity(cutoffs=[0.5, -1.0]).eval()
    x = torch.tensor([[[1.0, 0.0], [0.5, -2.0], [-3.0, -0.5]]])
    routing = r(x).check()
    assert routing.capacity_mask[0].tolist() == [
        [True, True],
        [False, False],
        [False, True],
    ]  # 0.5 does not exceed 0.5
    assert torch.equal(routing.expert_weights, x.sigmoid())  # not normalised
    assert routing.drop_reason[0, 1].tolist() == [DropReason.NOT_SELECTED] * 2


def test_before_any_update_a_threshold_is_zero_and_a_gate_of_a_half_decides():
    r = router().eval()
    assert r.thresholds.tolist() == [0.0] * 4
    routing = r(randn(2, 9, 8))
    assert torch.equal(routing.capacity_mask, routing.scores > 0.5)


def test_a_batch_is_routed_by_the_thresholds_from_before_it():
    r, shifted = identity(cutoffs=[0.0, 0.0], ema_decay=0.5), randn(1, 64, 2) + 5
    routing = r(shifted)
    assert routing.capacity_mask.all()  # all above 0, though half are below their own median
    r.update([routing])
    assert (r.thresholds > 2).all() and not r(shifted).capacity_mask.all()


def test_thresholds_are_a_copy():
    r = identity(cutoffs=[1.0, 2.0])
    r.thresholds.zero_()
    assert r.thresholds.tolist() == [1.0, 2.0]


def test_a_tokens_weight_gives_the_router_a_gradient():
    r, x = router(), randn(2, 16, 8)
    r.calibrate([x])
    routing = r(x)
    (routing.expert_weights * routing.capacity_mask).sum().backward()
    assert (r.weight.grad.abs().sum(-1) > 1e-3).all()


# The moving average


def test_the_cutoff_is_the_kth_largest_raw_logit():
    r, x = identity(n_experts=4, expansion=2.0), randn(2, 9, 4)
    r.update([r(x)])
    assert close(
        r.thresholds, x.flatten(0, 1).sort(0, descending=True).values[9 - 1]
    )  # k = 18 * 2 / 4


def test_the_average_of_a_constant_cutoff_is_that_cutoff_from_the_first_step_on():
    r, x = identity(n_experts=4, ema_decay=0.999), randn(2, 16, 4)
    cutoff = x.flatten(0, 1).sort(0, descending=True).values[8 - 1]
    for _ in range(5):
        r.update([r(x)])
        assert close(r.thresholds, cutoff)


def test_it_is_adams_bias_corrected_average():
    r, m = identity(n_experts=4, ema_decay=0.9), torch.zeros(4, dtype=torch.float64)
    for t in range(1, 30):
        x = randn(1, 32, 4, seed=t)
        r.update([r(x)])
        m = 0.9 * m + 0.1 * x[0].sort(0, descending=True).values[8 - 1].double()
        assert close(r.thresholds.double(), m / (1 - 0.9**t), dtype=torch.float32)
    assert r.steps == 29 and r.ema_weight.item() == about(1 - 0.9**29)


def test_an_update_is_one_step_to_the_mean_cutoff_whatever_the_number_of_micro_batches():
    for n in (1, 2, 5):
        r = identity(n_experts=4, cutoffs=[0.0] * 4, ema_decay=0.9)
        batches = [randn(1, 16, 4, seed=seed) for seed in range(n)]
        cutoff = torch.stack([x[0].sort(0, descending=True).values[4 - 1] for x in batches]).mean(0)
        r.update([r(x) for x in batches])
        assert r.steps == 1 and close(r.thresholds, 0.1 * cutoff)


def test_padding_and_micro_batches_of_padding_have_no_say():
    a, b, x = router(), router(), randn(2, 12, 8)
    padding_mask = torch.tensor([[True] * 8 + [False] * 4] * 2)
    a.update([a(x[:, :8])])
    b.update([b(x, padding_mask), b(100 * x, torch.zeros(2, 12, dtype=torch.bool)), b(x[:0])])
    assert close(a.thresholds, b.thresholds)


def test_an_update_without_a_real_token_only_counts_the_step():
    r = router()
    r.update([r(randn(2, 16, 8))])
    before = state(r)
    r.update([r(randn(1, 4, 8), torch.zeros(1, 4, dtype=torch.bool))])
    r.update([])
    assert (
        r.steps == 3
        and torch.equal(r.cutoffs, before["cutoffs"])
        and torch.equal(r.ema_weight, before["ema_weight"])
    )


@pytest.mark.parametrize("training", [True, False])
def test_forward_changes_no_state_however_often_it_runs(training):
    r = router(warmup_steps=1, capacity_band=0.5, jitter_noise=0.1)
    r.update([r(randn(2, 16, 8))])
    before = state(r)
    for seed in range(3):
        r.train(training)(randn(2, 16, 8, seed=seed))
    assert unchanged(r, before)


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_recomputation_in_the_backward_pass_changes_nothing_and_gives_the_same_gradients(
    steps_before,
):
    r, experts = router(warmup_steps=2, capacity_band=0.25), seeded(Experts, 8, 16, 4)
    for seed in range(steps_before):
        r.update([r(randn(2, 16, 8, seed=10 + seed))])
    before, x, gradients = state(r), randn(2, 16, 8), []
    for run in (lambda f: f(x), lambda f: checkpoint(f, x, use_reentrant=False)):
        r.zero_grad()
        run(lambda x: experts(x, r(x))).square().sum().backward()
        gradients.append(r.weight.grad.clone())
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0 and unchanged(r, before)


# Balance without a loss


def test_on_a_stationary_stream_every_expert_gets_its_share_without_an_auxiliary_loss():
    E, N, n_steps, n_eval, share = 8, 512, 150, 20000, 1 / 8
    # Two sources of chance: the tokens counted, and the cutoff's own error (its average holds about 2 / (1 - beta) batches).
    sigma = (share * (1 - share) * (1 / n_eval + 1 / (N * 2 / 0.02))) ** 0.5
    deviations = []
    for seed in range(5):
        r = router(n_experts=E, ema_decay=0.98, warmup_steps=10, seed=seed)
        with torch.no_grad():
            r.weight.copy_(
                randn(E, 8, seed=seed) * torch.arange(1, E + 1).view(-1, 1)
            )  # logits of very different scales
        stream, trained = torch.Generator().manual_seed(seed), []
        for _ in range(n_steps):
            routing = r(torch.randn(1, N, 8, generator=stream))
            assert routing.aux_loss == 0
            trained.append(routing.tokens_per_expert / N)
            r.update([routing])
        assert (
            torch.stack(trained[50:]).mean(0) - share
        ).abs().max() < 0.01  # in training too, warm-up over
        r.eval()
        load = r(torch.randn(1, n_eval, 8, generator=stream)).tokens_per_expert / n_eval
        deviations.append((load - share) / sigma)
    deviations = torch.stack(deviations)
    assert deviations.abs().max() < 3
    assert deviations.mean(0).abs().max() < 3 / 5**0.5  # and no expert is off on average


def test_the_published_write_ups_version_admits_84_percent_and_trains_no_router():
    x, E = randn(1, 4096, 16), 16
    r = router(d_model=16, n_experts=E)
    # As in the write-up: threshold "mean - std", said to be about the median, and a binary mask as the weight.
    logits = x @ r.weight.T
    mask = (logits > logits.mean(1, keepdim=True) - logits.std(1, keepdim=True)).float()
    assert mask.mean().item() == pytest.approx(0.841, abs=0.01)
    assert not mask.requires_grad  # the loss behind it never reaches the router
    # Ours, on the same tokens with the same weights.
    r.update([r(x)])
    routing = r.eval()(x)
    assert routing.capacity_mask.float().mean().item() == pytest.approx(1 / E, abs=0.001)
    experts = seeded(Experts, 16, 16, E)
    experts(x, routing).square().mean().backward()
    assert (r.weight.grad.abs().sum(-1) > 0).all()


def drift(step):
    """Logits that sink while the router is young, then stay: what an early threshold is too high for."""
    return randn(1, 128, 4, seed=step) - 0.5 * min(step, 12)


def test_without_warmup_sinking_logits_starve_the_experts_and_with_it_they_do_not():
    share = {}
    for warmup_steps in (0, 40):
        r = identity(n_experts=4, ema_decay=0.9, warmup_steps=warmup_steps)
        share[warmup_steps] = []
        for step in range(60):
            routing = r(drift(step))
            share[warmup_steps].append(routing.tokens_per_expert / 128)
            r.update([routing])
    young = torch.stack(share[0][6:13])
    assert young.mean() < 0.05 and (young == 0).any()
    assert (torch.stack(share[40][:40]) == 1 / 4).all()  # expert choice: exact
    assert torch.stack(share[40][50:]).mean().item() == pytest.approx(
        1 / 4, abs=0.03
    )  # and then thresholds that have settled


# Warm-up


def test_warmup_is_expert_choice_and_lasts_the_steps_it_was_given():
    r, x = router(warmup_steps=2), randn(2, 10, 8)
    choice = ExpertChoiceRouter(8, 4, score_func="sigmoid")
    choice.load_state_dict({"weight": r.weight})
    for step in range(4):
        routing = r(x)
        assert torch.equal(routing.capacity_mask, choice(x).capacity_mask) is (step < 2)
        r.update([r(randn(2, 10, 8, seed=step) + 1)])  # so that the thresholds do not fit x


def test_unless_told_otherwise_warmup_lasts_four_memories():
    assert [
        ExpertThresholdRouter(8, 4, ema_decay=beta).warmup_steps
        for beta in (0.0, 0.5, 0.95, 0.99, 0.999)
    ] == [4, 8, 80, 400, 4000]


def test_without_warmup_the_first_batch_is_expert_choice_since_there_is_no_threshold_yet():
    assert router()(randn(2, 10, 8)).tokens_per_expert.tolist() == [5] * 4


def test_eval_is_the_pure_threshold_during_warmup_too():
    r, x = router(warmup_steps=100), randn(2, 10, 8)
    r.update([r(x + 1)])
    routing = r.eval()(x)
    assert torch.equal(routing.capacity_mask, routing.logits > r.thresholds)


# Capacity band


@pytest.mark.parametrize(("cutoffs", "counts"), [([9.0, -9.0], [2, 6]), ([0.0, 0.0], None)])
def test_the_band_is_exact_and_keeps_the_best(cutoffs, counts):
    r, x = identity(cutoffs=cutoffs, capacity_band=0.5), randn(1, 8, 2)  # k = 4: from 2 to 6
    routing = r(x).check()
    above = (x > r.thresholds).sum((0, 1))
    expected = counts or above.clamp(2, 6).tolist()
    assert routing.tokens_per_expert.tolist() == expected and routing.capacity == 6
    for e in range(2):
        kept = routing.capacity_mask[0, :, e]
        assert x[0, kept, e].min() > x[0, ~kept, e].max()


def test_who_is_dropped_by_the_band_was_above_the_threshold_and_says_so():
    routing = identity(cutoffs=[9.0, -9.0], capacity_band=0.5)(randn(1, 8, 2))
    assert (routing.drop_reason[..., 1] == DropReason.OVER_CAPACITY).sum() == 2
    assert (routing.drop_reason[..., 0] == DropReason.NOT_SELECTED).sum() == 6
    assert routing.drop_rate.item() == about(2 / 10)


@pytest.mark.parametrize(
    ("band", "low", "high"),
    [(0.0, 5, 5), (0.25, 4, 6), (0.3, 4, 6), (0.4, 3, 7), (1.0, 0, 10), (3.0, 0, 20)],
)
def test_the_band_holds_whole_numbers_inside_it_only(band, low, high):
    x = randn(1, 20, 4)  # k = 5
    assert (
        identity(4, [99.0] * 4, capacity_band=band)(x).check().tokens_per_expert.tolist()
        == [low] * 4
    )
    assert (
        identity(4, [-99.0] * 4, capacity_band=band)(x).check().tokens_per_expert.tolist()
        == [high] * 4
    )


def test_the_band_counts_real_tokens_only():
    r, padding_mask = (
        identity(cutoffs=[-9.0, 9.0], capacity_band=0.5),
        torch.tensor([[True] * 8 + [False] * 8]),
    )
    assert r(randn(1, 16, 2), padding_mask).check().tokens_per_expert.tolist() == [6, 2]


def test_eval_has_no_band():
    r, x = identity(cutoffs=[9.0, -9.0], capacity_band=0.5).eval(), randn(1, 8, 2)
    assert r(x).tokens_per_expert.tolist() == [0, 8] and r(x).capacity is None


def test_without_a_band_training_is_the_threshold_as_in_eval():
    r, x = identity(cutoffs=[0.3, -0.2]), randn(2, 8, 2)
    assert torch.equal(r(x).capacity_mask, r.eval()(x).capacity_mask)


# Causal


def test_tokens_streamed_one_at_a_time_get_the_batchs_routes_and_outputs():
    moe = seeded(
        moe_core.MixtureOfExperts, config(router="expert_threshold", top_k=1.5, n_shared_experts=1)
    )
    for seed in range(3):
        moe.router.update([moe(randn(2, 16, 8, seed=seed))[1]])
    moe.eval()
    x = randn(3, 10, 8, seed=9)
    together, routing = moe(x)
    assert 0.2 < routing.capacity_mask.float().mean() < 0.6
    for b in range(3):
        for n in range(10):
            y, alone = moe(x[b : b + 1, n : n + 1])
            assert torch.equal(alone.capacity_mask[0, 0], routing.capacity_mask[b, n])
            assert close(y[0, 0], together[b, n])


def test_later_tokens_and_other_sequences_change_no_route_and_no_output_in_eval():
    r, experts = router().eval(), seeded(Experts, 8, 16, 4)
    r.calibrate([randn(4, 16, 8, seed=5)])
    x = randn(2, 10, 8)
    other = x.clone()
    other[0, 6:], other[1] = 50.0, -50.0
    a, b = r(x), r(other)
    assert torch.equal(a.capacity_mask[0, :6], b.capacity_mask[0, :6])
    assert close(experts(x, a)[0, :6], experts(other, b)[0, :6])


def test_the_shared_expert_enters_with_weight_one():
    moe = seeded(
        moe_core.MixtureOfExperts, config(router="expert_threshold", n_shared_experts=1)
    ).eval()
    x = randn(1, 6, 8)
    y, routing = moe(x)
    assert close(y, moe.experts(x, routing) + moe.shared_experts(x))


# Calibration


@pytest.mark.parametrize("expansion", [1.0, 1.5, 4.0])
def test_calibration_admits_exactly_the_share_of_the_pooled_tokens(expansion):
    r, batches = router(expansion=expansion), [randn(2, 10, 8, seed=s) * (s + 1) for s in range(5)]
    r.calibrate(batches)
    r.eval()
    assert sum(r(x).tokens_per_expert for x in batches).tolist() == [int(100 * expansion / 4)] * 4


def test_calibration_pools_tokens_so_that_their_grouping_does_not_matter():
    a, b, x = router(), router(), torch.cat([randn(2, 10, 8, seed=s) * (s + 1) for s in range(4)])
    a.calibrate([x])
    b.calibrate(iter(x.split(1)))
    assert close(a.thresholds, b.thresholds)


def test_calibration_leaves_out_padding_and_takes_no_jitter_and_keeps_the_mode():
    a, b, x = router(jitter_noise=0.5), router(), randn(2, 12, 8)
    padding_mask = torch.tensor([[True] * 8 + [False] * 4] * 2)
    a.calibrate([(100 * x, torch.zeros_like(padding_mask))] + [(x, padding_mask)])
    b.eval().calibrate([x[:, :8]])
    assert close(a.thresholds, b.thresholds) and a.training and not b.training


def test_updates_go_on_from_a_calibration_as_from_a_long_run():
    r, x = router(ema_decay=0.9), randn(2, 16, 8)
    r.calibrate([3 * x])
    before = r.thresholds
    r.update([r(x)])
    cutoff = r(x).logits.flatten(0, 1).sort(0, descending=True).values[8 - 1].detach()
    assert close(r.thresholds, 0.9 * before + 0.1 * cutoff)


def test_calibration_on_equal_tokens_admits_them_all_rather_than_none():
    r = router()
    with torch.no_grad():  # exact sums: equal tokens have equal logits wherever they stand
        r.weight.copy_((64 * r.weight).round() / 64)
    r.calibrate([torch.ones(1, 8, 8)])
    assert r.eval()(torch.ones(1, 8, 8)).capacity_mask.all()


@pytest.mark.parametrize(
    "batches",
    [[], [torch.ones(0, 4, 8)], [(torch.ones(1, 4, 8), torch.zeros(1, 4, dtype=torch.bool))]],
)
def test_calibration_without_a_real_token_is_refused(batches):
    with pytest.raises(ValueError, match="batches hold no real token"):
        router().calibrate(batches)


# State


def test_the_state_survives_saving_and_a_cast_to_bfloat16():
    r = router(warmup_steps=5)
    for seed in range(3):
        r.update([r(randn(2, 16, 8, seed=seed))])
    copy = router(warmup_steps=5)
    copy.load_state_dict(r.state_dict())
    assert unchanged(copy, state(r))
    r.bfloat16()
    assert r.cutoffs.dtype == torch.float32 and torch.equal(r.thresholds, copy.thresholds)


def test_reset_forgets_the_thresholds():
    r = router()
    r.update([r(randn(2, 16, 8))])
    r.reset_parameters()
    assert not r.thresholds.any() and r.steps == 0 and r.ema_weight == 0


@pytest.mark.parametrize("training", [True, False])
def test_no_tensor_is_read_on_the_way(training):
    with FakeTensorMode():
        r = ExpertThresholdRouter(8, 4, capacity_band=0.5, z_loss_weight=0.01).train(training)
        routing = r(torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool))
        (routing.expert_weights.sum() + routing.aux_loss).backward()
        r.update([routing])
        assert r.weight.grad.shape == r.weight.shape and r.cutoffs.shape == (4,)


RANK = """
import sys, torch, torch.distributed as dist
from moe_core.routers.expert_threshold import ExpertThresholdRouter
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
r = ExpertThresholdRouter(4, 4, ema_decay=0.9, warmup_steps=2)
with torch.no_grad():
    r.weight.copy_(torch.eye(4))
def x(seed):
    return torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(seed))
seen = []
r.update([r(x(rank))]); seen.append(r.thresholds)                                     # both have tokens
r.update([r(x(2), torch.full((1, 16), rank == 0)), *[r(x(3))][: rank == 0]]); seen.append(r.thresholds)  # rank 1 has padding only
r.calibrate([x(4 + rank)]); seen.append(r.thresholds)
torch.save((torch.stack(seen), r.steps), out)
"""


@pytest.mark.processes
def test_ranks_agree_on_one_threshold_made_of_all_their_tokens(tmp_path):
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                RANK,
                str(i),
                str(tmp_path / "store"),
                str(tmp_path / f"{i}.pt"),
            ],
            cwd=Path(moe_core.__file__).parents[1],
        )
        for i in range(2)
    ]
    assert [rank.wait(timeout=600) for rank in ranks] == [0, 0]
    (first, steps), (second, _) = (torch.load(tmp_path / f"{i}.pt") for i in range(2))
    assert torch.equal(first, second) and steps == 2

    def kth(seed, k=4):
        return (
            torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(seed))[0]
            .sort(0, descending=True)
            .values[k - 1]
        )

    step_1 = (kth(0) + kth(1)) / 2
    step_2 = (0.9 * 0.1 * step_1 + 0.1 * (kth(2) + kth(3)) / 2) / (1 - 0.9**2)
    calibrated = sum((kth(seed) + kth(seed, 5)) / 2 for seed in (4, 5)) / 2
    assert close(first, torch.stack([step_1, step_2, calibrated]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expansion": 0.0}, "expansion=0.0 must be above 0 and at most n_experts=4"),
        ({"expansion": 5}, "expansion=5 must be above 0 and at most n_experts=4"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must be at least 0.0 and below 1.0"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be a whole number, at least 0"),
        ({"capacity_band": -0.5}, "capacity_band=-0.5 must be at least 0"),
    ],
)
def test_an_argument_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        router(**changes)


def test_nan_in_the_input_is_refused_by_check():
    x = randn(1, 4, 8)
    x[0, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        router()(x).check()
