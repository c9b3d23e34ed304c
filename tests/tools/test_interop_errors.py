"""What interop refuses, and in which words; on stand-ins, since blocks are known by the name of their class. Also the layouts."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import moe_core
from moe_core import MixtureOfExperts
from moe_tools.interop import hf, layouts
from moe_tools.interop.families import FAMILIES

from ..core.helpers import config, randn

D, F, E, K = 8, 6, 4, 2
CONFIG = SimpleNamespace(
    hidden_size=D,
    intermediate_size=F,
    num_local_experts=E,
    num_experts_per_tok=K,
    hidden_act="silu",
)


def module(name="Part", **tensors):
    """A module whose class has this name."""
    made = type(name, (nn.Module,), {})()
    for key, value in tensors.items():
        made.register_module(key, value) if isinstance(
            value, nn.Module
        ) else made.register_parameter(key, nn.Parameter(value))
    return made


def mixtral(d_ff=F, **changes):
    experts = {
        "gate_up_proj": randn(E, 2 * d_ff, D),
        "down_proj": randn(E, D, d_ff, seed=1),
        **changes,
    }
    return module(
        "MixtralSparseMoeBlock",
        gate=module(weight=randn(E, D, seed=2)),
        experts=module(**{key: value for key, value in experts.items() if value is not None}),
    )


def changed(**changes):
    return SimpleNamespace(**{**vars(CONFIG), **changes})


def test_the_stand_in_is_read():
    moe = hf.from_block(mixtral(), CONFIG)
    assert torch.equal(moe.experts.gate_up_proj, randn(E, 2 * F, D)) and torch.equal(
        moe.router.weight, randn(E, D, seed=2)
    )
    assert moe.config == config(d_model=D, d_ff=F, n_experts=E, top_k=K)


def test_a_config_of_several_parts_is_understood():
    whole = SimpleNamespace(text_config=CONFIG, hidden_size=99)
    assert hf.from_block(mixtral(), whole).config.d_model == D


@pytest.mark.parametrize(
    "call",
    [
        lambda block: hf.from_block(block, CONFIG),
        lambda block: hf.to_block(MixtureOfExperts(config()), block),
    ],
    ids=["from_block", "to_block"],
)
def test_an_unknown_family_is_named_and_the_known_ones_are_listed(call):
    with pytest.raises(
        ValueError, match="NllbMoeSparseMLP is no block that can be read; those known are Mixtral"
    ) as error:
        call(module("NllbMoeSparseMLP"))
    assert all(name in str(error.value) for name in FAMILIES)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"down_proj": None}, "MixtralSparseMoeBlock lacks the weight experts.down_proj"),
        (
            {"gate_up_proj_scale": torch.ones(E)},
            "MixtralSparseMoeBlock has unexpected weights: experts.gate_up_proj_scale",
        ),
        (
            {"gate_up_proj": randn(E, D, 2 * F)},
            r"experts.gate_up_proj has shape \(4, 8, 12\), must be \(4, 12, 8\)",
        ),
        (
            {"down_proj": randn(E + 1, D, F)},
            r"experts.down_proj has shape \(5, 8, 6\), must be \(4, 8, 6\)",
        ),
    ],
    ids=["missing", "unexpected", "transposed", "too many"],
)
def test_a_weight_that_is_missing_unexpected_or_of_another_shape(changes, message):
    with pytest.raises(ValueError, match=message):
        hf.from_block(mixtral(**changes), CONFIG)


def test_a_square_weight_is_read_as_its_family_declares_it():
    """D = 2F = 8: the shape cannot tell. The same numbers are another matrix to a family that keeps them the other way round."""
    square, config = mixtral(d_ff=4), changed(intermediate_size=4)
    weight = square.experts.gate_up_proj
    assert weight.shape[1] == weight.shape[2]
    assert torch.equal(hf.from_block(square, config).experts.gate_up_proj, weight)
    shared = {
        f"{name}_proj": module(weight=randn(4, D) if name != "down" else randn(D, 4))
        for name in ("gate", "up", "down")
    }
    turned = module(
        "Llama4TextMoe",
        router=module(weight=randn(E, D)),
        shared_expert=module(**shared),
        experts=module(gate_up_proj=weight, down_proj=randn(E, 4, D)),
    )
    moe = hf.from_block(turned, config)
    assert torch.equal(moe.experts.gate_up_proj, weight.mT) and not torch.equal(weight, weight.mT)
    back = hf.to_block(moe, turned)
    assert torch.equal(back.experts.gate_up_proj, weight)


@pytest.mark.parametrize(
    "name, option, value",
    [
        ("MixtralSparseMoeBlock", "router_jitter_noise", 0.1),
        ("GptOssMLP", "swiglu_alpha", 1.0),
        ("DeepseekV2Moe", "topk_method", "noaux_tc"),
        ("DeepseekV2Moe", "mlp_bias", True),
        ("DeepseekV4SparseMoeBlock", "mlp_bias", True),
        ("DeepseekV4SparseMoeBlock", "scoring_func", "sigmoid"),
        ("SwitchTransformersSparseMLP", "router_dtype", "bfloat16"),
    ],
)
def test_an_option_without_a_counterpart_is_refused(name, option, value):
    with pytest.raises(
        ValueError, match=f"{option}={value!r} of {name} has no counterpart here; known: "
    ):
        hf.from_block(module(name), SimpleNamespace(**{option: value}))


def test_every_demand_is_tested():
    demands = {(name, option) for name, family in FAMILIES.items() for option in family.demands}
    tested = {
        case[:2] for case in test_an_option_without_a_counterpart_is_refused.pytestmark[0].args[1]
    }
    assert demands == tested


def test_an_activation_without_a_counterpart_is_refused():
    with pytest.raises(
        ValueError,
        match="the activation 'gelu_new' of MixtralSparseMoeBlock has no counterpart here; known: silu, ",
    ):
        hf.from_block(mixtral(), changed(hidden_act="gelu_new"))


def test_the_config_of_another_model_is_refused():
    with pytest.raises(
        ValueError,
        match="SimpleNamespace is not the config of a MixtralSparseMoeBlock: .*num_local_experts",
    ):
        hf.from_block(mixtral(), SimpleNamespace(hidden_size=D, intermediate_size=F))
    with pytest.raises(ValueError, match=r"must be \(4, 40, 8\)"):
        hf.from_block(mixtral(), changed(intermediate_size=20))
    with pytest.raises(ValueError, match="top_k=9 must be between 1 and n_experts=4"):
        hf.from_block(mixtral(), changed(num_experts_per_tok=9))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"n_shared_experts": 1},
            "MixtralSparseMoeBlock has no place for shared_experts.down_proj.weight, shared_experts.gate_up_proj.weight",
        ),
        ({"router_options": {"bias": True}}, "no place for router.bias"),
        ({"n_experts": 5}, r"gate.weight has shape \(4, 8\), must be \(5, 8\)"),
        ({"glu": False}, r"gate_up_proj has shape \(4, 12, 8\), must be \(4, 6, 8\)"),
    ],
    ids=str,
)
def test_to_block_refuses_other_weights_and_leaves_the_block_alone(options, message):
    block, untouched = mixtral(), mixtral().state_dict()
    with pytest.raises(ValueError, match=message):
        hf.to_block(MixtureOfExperts(config(**{"d_model": D, "d_ff": F, **options})), block)
    assert all(torch.equal(tensor, untouched[key]) for key, tensor in block.state_dict().items())


def test_to_block_compares_the_options_if_it_gets_the_config():
    moe = MixtureOfExperts(
        config(d_model=D, d_ff=F, norm_topk_prob=False, aux_loss_weight=0.01, backend="loop")
    )
    hf.to_block(moe, mixtral())
    with pytest.raises(ValueError, match="norm_topk_prob=False of the layer is True in the block"):
        hf.to_block(moe, mixtral(), CONFIG)


def model(*blocks):
    made = module("TinyForCausalLM", layers=nn.ModuleList(module(mlp=block) for block in blocks))
    made.config = CONFIG
    return made


def test_convert_wants_blocks_it_knows():
    with pytest.raises(
        ValueError,
        match="TinyForCausalLM has no MoE block that can be read; those known are Mixtral",
    ):
        hf.convert(model(module("LlamaMLP", weight=randn(2, 2))))
    unknown = module("NllbMoeSparseMLP", experts=module(), router=module())
    with pytest.raises(
        ValueError, match="TinyForCausalLM has NllbMoeSparseMLP, no block that can be read"
    ):
        hf.convert(model(mixtral(), unknown))


def test_convert_changes_nothing_if_one_block_is_refused():
    broken = model(mixtral(), mixtral(down_proj=None))
    with pytest.raises(ValueError, match="lacks the weight"):
        hf.convert(broken)
    assert [type(layer.mlp).__name__ for layer in broken.layers] == ["MixtralSparseMoeBlock"] * 2
    assert all(parameter.device.type == "cpu" for parameter in broken.parameters())


def test_converting_twice_or_restoring_what_was_not_converted_is_refused():
    made = hf.convert(model(mixtral()))
    with pytest.raises(ValueError, match="has no MoE block"):
        hf.convert(made)
    with pytest.raises(ValueError, match="TinyForCausalLM has no converted block"):
        hf.restore(hf.restore(made))


LAYOUTS = [
    (layouts.same("a"), [torch.arange(6).view(2, 3)], torch.tensor([[0, 1, 2], [3, 4, 5]])),
    (layouts.transposed("a"), [torch.arange(6).view(2, 3)], torch.tensor([[0, 3], [1, 4], [2, 5]])),
    (layouts.interleaved("a"), [torch.arange(6).view(1, 6)], torch.tensor([[0, 2, 4, 1, 3, 5]])),
    (
        layouts.interleaved_and_transposed("a"),
        [torch.arange(8).view(1, 2, 4)],
        torch.tensor([[[0, 4], [2, 6], [1, 5], [3, 7]]]),
    ),  # columns 0 and 2 are gate, 1 and 3 are up
    (
        layouts.concatenated("a", "b"),
        [torch.tensor([[1, 2]]), torch.tensor([[3, 4]])],
        torch.tensor([[1, 2], [3, 4]]),
    ),
    (
        layouts.stacked("expert_{e}"),
        [torch.tensor([[1, 2]]), torch.tensor([[3, 4]])],
        torch.tensor([[[1, 2]], [[3, 4]]]),
    ),
]


@pytest.mark.parametrize("layout, theirs, ours", LAYOUTS)
def test_a_layout_by_hand_and_back(layout, theirs, ours):
    assert torch.equal(layout.read(theirs), ours)
    assert all(torch.equal(a, b) for a, b in zip(layout.write(ours), theirs, strict=True))
    assert len(layout.names_for(2)) == len(theirs)


def test_reading_blocks_needs_no_transformers():
    code = "import sys, moe_core.interop.hf; print('transformers' in sys.modules)"
    root = Path(moe_core.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
