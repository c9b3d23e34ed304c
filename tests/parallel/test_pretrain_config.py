"""PretrainConfig: what a run can be told, from a file and from flags, and what it refuses."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_core import CapacityRule, MoEConfig
from moe_tools.pretrain import PretrainConfig
from moe_tools.pretrain.pretrain_config import from_command_line
from moe_tools.pretrain.trainer import learning_rate

from ..core.helpers import fast

TOML = """
steps = 7
lr = 0.01
global_balance = true
placement = "round_robin"

[moe]
capacity_factor = 1.25
router_options = {norm_eps = 0.5}
"""


def refusal(capsys, *argv):
    """What the command line says when it refuses, with exit status 2."""
    with pytest.raises(SystemExit) as error:
        from_command_line(list(argv))
    assert error.value.code == 2
    return capsys.readouterr().err


def test_the_defaults_are_a_run():
    config = PretrainConfig()
    assert PretrainConfig.from_dict({}) == config and from_command_line([]) == (config, False)
    model = config.model()
    assert (model.d_model, model.n_layers, model.n_heads, model.max_seq_len, model.vocab_size) == (
        128,
        2,
        4,
        128,
        256,
    )
    assert model.moe == MoEConfig(128, 256, 8, 2, aux_loss_weight=0.01)


def test_a_config_survives_json():
    config = PretrainConfig(
        steps=3,
        router="expert_choice",
        top_k=1.5,
        aux_loss_weight=None,
        moe={"router_options": {"scope": "batch"}},
    )
    assert PretrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert set(config.to_dict()) == {field.name for field in dataclasses.fields(PretrainConfig)}


def test_the_model_is_the_one_that_was_asked_for():
    config = PretrainConfig(
        d_model=64,
        n_layers=3,
        n_heads=2,
        d_ff=32,
        n_experts=6,
        top_k=3,
        n_shared_experts=1,
        seq_len=17,
        moe={"capacity_factor": {"factor": 1.25, "eval_factor": 2.0}, "bias": True},
    )
    model = config.model()
    assert (model.n_layers, model.n_heads, model.max_seq_len) == (3, 2, 17)
    assert model.moe == MoEConfig(
        64,
        32,
        6,
        3,
        n_shared_experts=1,
        capacity_factor=CapacityRule(1.25, 2.0),
        bias=True,
        aux_loss_weight=0.01,
    )


@pytest.mark.parametrize(
    ("router", "given", "weight"),
    [
        ("topk", None, 0.01),
        ("topk", 0.0, 0.0),
        ("topk", 0.5, 0.5),
        ("loss_free", None, None),
        ("expert_choice", None, 0.0),
    ],
)
def test_the_balance_loss_is_what_was_said_or_what_the_router_has(router, given, weight):
    found = PretrainConfig(router=router, aux_loss_weight=given).model().moe.aux_loss_weight
    assert found == (
        MoEConfig(8, 8, 8, 2, router=router).aux_loss_weight if weight is None else weight
    )


def test_k_may_be_a_fraction_only_where_it_is_a_mean():
    assert PretrainConfig(router="expert_choice", top_k=1.5).model().moe.top_k == 1.5
    assert type(PretrainConfig(top_k=2.0).model().moe.top_k) is int
    with pytest.raises(ValueError, match="top_k=2.5 must be between 1 and n_experts=8"):
        PretrainConfig(top_k=2.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must be a whole number, at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number, at least 1"),
        ({"ep_size": 0}, "ep_size=0 must be a whole number, at least 1"),
        ({"save_every": 0}, "save_every=0 must be a whole number, at least 1"),
        ({"eval_every": -1}, "eval_every=-1 must be a whole number, at least 0"),
        ({"micro_batch_size": -1}, "micro_batch_size=-1 must be a whole number, at least 0"),
        ({"seed": -1}, "seed=-1 must be a whole number, at least 0"),
        ({"threads": -1}, "threads=-1 must be a whole number, at least 0"),
        ({"replicas": -1}, "replicas=-1 must be a whole number, at least 0"),
        ({"seq_len": 1}, "seq_len=1 must be at least 2: the last token is only predicted"),
        ({"lr": -0.1}, "lr=-0.1 must be at least 0 and finite"),
        ({"lr": float("nan")}, "lr=nan must be at least 0 and finite"),
        ({"weight_decay": float("inf")}, "weight_decay=inf must be at least 0 and finite"),
        ({"max_grad_norm": 0}, "max_grad_norm=0 must be more than 0"),
        ({"timeout": 0}, "timeout=0 must be more than 0"),
        ({"timeout": float("inf")}, "timeout=inf must be at least 0 and finite"),
        ({"global_balance": 1}, "global_balance=1 must be True or False"),
        (
            {"placement": "random"},
            "placement='random' must be one of 'contiguous', 'round_robin', 'by_load'",
        ),
        ({"precision": "float16"}, "precision='float16' must be one of 'float32', 'bfloat16'"),
        ({"ep_size": 3}, r"ep_size=3 must divide n_experts \+ replicas = 8"),
        ({"replicas": 2, "ep_size": 2}, "replicas=2 needs placement='by_load', not 'contiguous'"),
        (
            {"replicas": 1, "placement": "by_load", "ep_size": 2},
            r"ep_size=2 must divide n_experts \+ replicas = 9",
        ),
        ({"router": "nearest"}, "router='nearest' must be one of"),
        ({"top_k": 9}, "top_k=9 must be between 1 and n_experts=8"),
        ({"n_heads": 5}, r"d_model=128 must be a multiple of 2 \* n_heads=10"),
        (
            {"global_balance": True, "aux_loss_weight": 0.0},
            "global_balance=True needs a balance loss: aux_loss_weight above 0",
        ),
        (
            {"global_balance": True, "router": "loss_free"},
            "global_balance=True needs a balance loss: .* not 'loss_free'",
        ),
        (
            {
                "aux_loss_weight": 0.1,
                "router": "hash",
                "moe": {"router_options": {"vocab_size": 256}},
            },
            "aux_loss_weight=0.1 must be 0.0",
        ),
        (
            {"moe": {"d_ff": 8, "top_k": 1}},
            "must not hold d_ff, top_k: give it as an option of its own",
        ),
        ({"moe": {"capacity": 1}}, "unknown keys in MoEConfig: capacity"),
        (
            {"moe": {"router_options": {"temperature": 2}}},
            r"router_options\['temperature'\]: router='topk' has no such option",
        ),
    ],
)
def test_a_run_that_cannot_be_is_refused_when_it_is_described(options, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"step": 3, "learning_rate": 1},
            "unknown keys in PretrainConfig: learning_rate, step; known are steps, out,",
        ),
        ({"steps": 3.0}, "steps=3.0 must be of type int"),
        ({"steps": "3"}, "steps='3' must be of type int"),
        ({"steps": True}, "steps=True must be of type int"),
        ({"lr": "fast"}, "lr='fast' must be of type float"),
        ({"lr": True}, "lr=True must be of type float"),
        ({"lr": None}, "lr=None must be of type float"),
        ({"global_balance": 0}, "global_balance=0 must be of type bool"),
        ({"moe": [1]}, r"moe=\[1\] must be of type dict"),
        ({"out": 5}, "out=5 must be of type str"),
        ({"aux_loss_weight": "0"}, "aux_loss_weight='0' must be of type float"),
    ],
)
def test_unknown_keys_and_values_of_another_type_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig.from_dict(values)


def test_a_whole_number_will_do_where_a_fraction_may_stand_and_none_where_it_is_the_default():
    assert PretrainConfig.from_dict(
        {"lr": 1, "aux_loss_weight": None, "top_k": 2}
    ) == PretrainConfig(lr=1)


def test_options_come_from_json_and_toml_alike(tmp_path):
    toml, plain = tmp_path / "run.toml", tmp_path / "run.json"
    toml.write_text(TOML)
    plain.write_text(
        json.dumps(
            {
                "steps": 7,
                "lr": 0.01,
                "global_balance": True,
                "placement": "round_robin",
                "moe": {"capacity_factor": 1.25, "router_options": {"norm_eps": 0.5}},
            }
        )
    )
    expected = PretrainConfig(
        steps=7,
        lr=0.01,
        global_balance=True,
        placement="round_robin",
        moe={"capacity_factor": 1.25, "router_options": {"norm_eps": 0.5}},
    )
    assert (
        from_command_line(["--config", str(toml)])
        == from_command_line(["--config", str(plain)])
        == (expected, False)
    )


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    (tmp_path / "run.toml").write_text(TOML)
    config, resume = from_command_line(
        [
            "--config",
            str(tmp_path / "run.toml"),
            "--steps",
            "9",
            "--no-global-balance",
            "--resume",
            "--moe",
            '{"bias": true}',
            "--aux-loss-weight",
            "0",
        ]
    )
    assert resume and config == PretrainConfig(
        steps=9, lr=0.01, placement="round_robin", moe={"bias": True}, aux_loss_weight=0.0
    )


def test_every_option_has_a_flag_that_sets_it():
    other = {
        "steps": 3,
        "out": "there",
        "text": "here.txt",
        "seed": 4,
        "batch_size": 6,
        "micro_batch_size": 3,
        "seq_len": 8,
        "lr": 0.5,
        "weight_decay": 0.25,
        "max_grad_norm": 2.0,
        "d_model": 24,
        "n_layers": 1,
        "n_heads": 3,
        "d_ff": 5,
        "n_experts": 10,
        "top_k": 1.0,
        "n_shared_experts": 2,
        "router": "switch",
        "aux_loss_weight": 0.125,
        "moe": {"bias": True},
        "global_balance": True,
        "ep_size": 4,
        "placement": "by_load",
        "replicas": 2,
        "precision": "bfloat16",
        "eval_every": 0,
        "save_every": 7,
        "keep": 3,
        "timeout": 1.5,
        "threads": 2,
    }
    default = PretrainConfig()
    assert set(other) == set(default.to_dict()) and all(
        value != getattr(default, name) for name, value in other.items()
    )
    argv = [
        part
        for name, value in other.items()
        for part in (
            [f"--{name.replace('_', '-')}"]
            + (
                []
                if value is True
                else [json.dumps(value) if isinstance(value, dict) else str(value)]
            )
        )
    ]
    assert from_command_line(argv) == (PretrainConfig(**other), False)


def test_the_help_says_what_every_option_means_and_its_default(capsys):
    with pytest.raises(SystemExit) as error:
        from_command_line(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert error.value.code == 0
    for field in dataclasses.fields(PretrainConfig):
        assert (
            f"--{field.name.replace('_', '-')} " in said
            or f"--{field.name.replace('_', '-')}," in said
        )
        assert " ".join(field.metadata["help"].split()) in said
    assert (
        "(default: 200)" in said
        and "torchrun --standalone --nproc-per-node 2 -m moe_tools.pretrain" in said
    )


def test_a_flag_cut_short_is_no_flag(capsys):
    assert "unrecognized arguments: --step 5" in refusal(capsys, "--step", "5")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--experts", "8"], "unrecognized arguments: --experts"),
        (["--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--steps", "0"], "steps=0 must be a whole number, at least 1"),
        (["--moe", "{bias}"], "argument --moe: invalid"),
        (["--moe", "[1]"], "moe=[1] must be of type dict"),
        (["--placement", "far"], "placement='far' must be one of"),
    ],
)
def test_a_wrong_flag_ends_the_program_with_the_reason(argv, message, capsys):
    assert message in refusal(capsys, *argv)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", '{"step": 3}', "unknown keys in PretrainConfig: step"),
        ("run.toml", "step = 3", "unknown keys in PretrainConfig: step"),
        ("run.json", "[3]", "must hold a table of options"),
        ("run.json", "{", "Expecting"),
        ("run.toml", "steps", "Expected"),
        ("run.toml", 'steps = "3"', "steps='3' must be of type int"),
        ("run.json", '{"lr": NaN}', "lr=nan must be at least 0 and finite"),
        ("run.toml", "lr = -1", "lr=-1 must be at least 0"),
        ("run.json", "\x00", "Expecting value"),
    ],
)
def test_a_wrong_file_ends_the_program_with_the_reason(name, text, message, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert message in refusal(capsys, "--config", str(tmp_path / name))


def test_a_file_that_is_not_there_ends_the_program_with_the_reason(tmp_path, capsys):
    assert "No such file or directory" in refusal(capsys, "--config", str(tmp_path / "none.json"))


def test_micro_batches_by_hand():
    assert PretrainConfig(batch_size=16).micro_batches(1) == (1, 16)
    assert PretrainConfig(batch_size=16).micro_batches(4) == (1, 4)
    assert PretrainConfig(batch_size=16, micro_batch_size=2).micro_batches(4) == (2, 2)
    assert PretrainConfig(batch_size=16, micro_batch_size=16).micro_batches(1) == (1, 16)


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "world"),
    [(16, 0, 3), (2, 0, 4), (16, 3, 1), (16, 4, 8), (8, 16, 1)],
)
def test_a_batch_that_cannot_be_cut_into_equal_parts_is_refused(
    batch_size, micro_batch_size, world
):
    with pytest.raises(
        ValueError, match=f"batch_size={batch_size} must be a multiple of .*{world} ranks"
    ):
        PretrainConfig(batch_size=batch_size, micro_batch_size=micro_batch_size).micro_batches(
            world
        )


@fast
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_the_parts_of_a_batch_are_the_batch(n_micro, size, world):
    assert PretrainConfig(batch_size=n_micro * size * world, micro_batch_size=size).micro_batches(
        world
    ) == (n_micro, size)


def test_the_learning_rate_by_hand():
    config = PretrainConfig(steps=100, lr=1.0)  # warm-up: five steps
    assert [learning_rate(step, config) for step in range(1, 6)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0]
    )
    assert learning_rate(100, config) == pytest.approx(0.1)
    assert learning_rate(5 + 95 / 2, config) == pytest.approx(
        0.55
    )  # half of the way down the cosine


@fast
@given(st.integers(1, 400), st.floats(0, 1))
def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth(steps, lr):
    config = PretrainConfig(steps=steps, lr=lr)
    rates = [learning_rate(step, config) for step in range(1, steps + 1)]
    top = max(1, steps // 20)
    assert rates[top - 1] == pytest.approx(lr) and all(
        0 <= rate <= lr * (1 + 1e-12) for rate in rates
    )
    assert rates[:top] == sorted(rates[:top]) and rates[top - 1 :] == sorted(
        rates[top - 1 :], reverse=True
    )
    if steps > top:
        assert rates[-1] == pytest.approx(lr / 10)
