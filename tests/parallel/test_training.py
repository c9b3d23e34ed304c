"""One training run, however its ranks are arranged: the same losses; and each rank holds its part alone."""

import pytest
import torch

from moe_tools.pretrain import PretrainConfig, Trainer

from .programs import train

SMALL = dict(
    d_model=32,
    d_ff=32,
    n_layers=2,
    n_heads=2,
    n_experts=8,
    top_k=2,
    seq_len=32,
    batch_size=8,
    micro_batch_size=2,
    steps=30,
    lr=1e-2,
)
STEPS = 3
MODES = {
    "balance loss of each micro-batch": {"aux_loss_weight": 0.05},
    "global balance loss": {"aux_loss_weight": 0.05, "global_balance": True},
    "loss-free bias": {
        "router": "loss_free",
        "moe": {"router_options": {"bias_update_rate": 0.05}},
    },
    "capacity and z-loss": {"moe": {"capacity_factor": 1.0, "z_loss_weight": 0.01}},
    "noise": {"router": "noisy_topk"},
}
ARRANGEMENTS = [
    (2, 1),
    (2, 2),
    (4, 1),
    (4, 2),
    (4, 4),
]  # processes, ep_size: DP only, EP only, and DP=2 x EP=2


@pytest.fixture(scope="module")
def alone():
    """mode -> three steps in one process, four micro-batches each."""
    return {
        name: train(0, (PretrainConfig(**SMALL, **options), STEPS))
        for name, options in MODES.items()
        if name != "noise"
    }


@pytest.mark.parametrize(("n_ranks", "ep_size"), ARRANGEMENTS)
@pytest.mark.parametrize("mode", [name for name in MODES if name != "noise"])
def test_losses_gradients_and_held_out_loss_are_those_of_one_process(
    gangs, alone, mode, n_ranks, ep_size
):
    config = PretrainConfig(**SMALL, **MODES[mode], ep_size=ep_size)
    wanted = alone[mode]
    for result in gangs(n_ranks).run(train, (config, STEPS)):
        for found, record in zip(result["records"], wanted["records"], strict=True):
            for name in ("loss", "aux_loss"):
                assert found[name] == pytest.approx(record[name], abs=1e-5), (name, found["step"])
            assert found["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-4)
            assert found["load"] == record["load"] and found["drop_rate"] == pytest.approx(
                record["drop_rate"]
            )
        assert result["valid_loss"] == pytest.approx(wanted["valid_loss"], abs=1e-5)
        assert all(
            torch.equal(bias, other)
            for bias, other in zip(result["biases"], wanted["biases"], strict=True)
        )


def test_the_three_steps_move_the_model_and_the_bias(alone):
    """Else the test above would compare what never changed."""
    for result in alone.values():
        first, *_, last = [record["loss"] for record in result["records"]]
        assert last < first - 0.5
    assert all(bias.abs().max() > 0.04 for bias in alone["loss-free bias"]["biases"])


def test_global_and_micro_batch_balance_are_different_losses(alone):
    a, b = (
        alone[name]["records"]
        for name in ("global balance loss", "balance loss of each micro-batch")
    )
    assert abs(a[0]["aux_loss"] - b[0]["aux_loss"]) > 1e-4


@pytest.mark.parametrize(("n_ranks", "ep_size"), [(2, 2), (4, 2), (4, 4)])
def test_a_rank_holds_one_rth_of_the_experts_and_of_their_optimiser_state(
    gangs, alone, n_ranks, ep_size
):
    mode = "capacity and z-loss"
    whole = alone[mode]
    assert (
        whole["expert_bytes"] == 2 * 8 * 3 * 32 * 32 * 4
        and whole["state_bytes"] == 2 * whole["expert_bytes"]
    )
    for result in gangs(n_ranks).run(
        train, (PretrainConfig(**SMALL, **MODES[mode], ep_size=ep_size), 1)
    ):
        assert (
            result["expert_bytes"] * ep_size == whole["expert_bytes"]
            and result["state_bytes"] * ep_size == whole["state_bytes"]
        )


def test_every_rank_draws_noise_of_its_own_and_the_same_again(gangs):
    config = PretrainConfig(**SMALL, **MODES["noise"], ep_size=2)
    runs = [gangs(2).run(train, (config, 2)) for _ in range(2)]
    losses = [[record["loss"] for record in result["records"]] for run in runs for result in run]
    assert losses[0] == losses[1] == losses[2] == losses[3]


def test_ranks_with_other_options_are_told_at_the_start(gangs):
    outcomes = gangs(2).outcomes(train_unlike, SMALL)
    assert all(
        not ok and "ranks [1] were started with other options than rank 0" in text
        for ok, text in outcomes
    )


def train_unlike(rank, options):
    Trainer(PretrainConfig(**{**options, "lr": 0.1 + rank}))


def test_ep_size_must_divide_the_processes(gangs):
    outcomes = gangs(2).outcomes(train, (PretrainConfig(**SMALL, ep_size=4), 1))
    assert all(not ok and "ep_size=4 must divide the 2 processes" in text for ok, text in outcomes)


def test_one_process_cannot_spread_experts_and_says_what_can():
    with pytest.raises(
        ValueError, match="ep_size=2 needs 2 processes: torchrun --standalone --nproc-per-node 2"
    ):
        Trainer(PretrainConfig(**SMALL, ep_size=2))
