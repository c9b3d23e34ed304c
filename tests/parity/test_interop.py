"""from_block, to_block, convert and restore against the Hugging Face blocks and models themselves."""

import copy

import pytest
import torch

from moe_tools.interop import hf
from moe_tools.interop.blocks import read

from .families import FAMILIES, SHAPES, gap, hf_block, hf_config, randn
from .models import LAYERS, MODELS, hf_model, router_logits, run

EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)
SHAPE = {
    name: (2, 9, 16, 8, 16, 1 if family.top_1_only else 4, 4, 2)
    for name, family in FAMILIES.items()
}  # D = 2F
QUIET = {"switch": {"router_jitter_noise": 0.0}}  # without what is random in training
VARIANTS = [
    *[(name, shape, {}) for name, family in FAMILIES.items() for shape in family.shapes()],
    ("mixtral", SHAPES[0], {"hidden_act": "gelu"}),
    ("olmoe", SHAPES[0], {"norm_topk_prob": True, "hidden_act": "relu"}),
    ("qwen2_moe", SHAPES[0], {"norm_topk_prob": True, "shared_expert_intermediate_size": 8}),
    ("qwen3_moe", SHAPES[0], {"norm_topk_prob": False}),
    ("gpt_oss", SHAPES[0], {"swiglu_limit": 0.3}),
    ("deepseek_v4", SHAPES[0], {"swiglu_limit": 0.3}),
    (
        "deepseek_v2",
        SHAPES[0],
        {
            "topk_method": "greedy",
            "n_group": None,
            "topk_group": None,
            "routed_scaling_factor": 1.5,
        },
    ),
    ("deepseek_v2", SHAPES[0], {"n_shared_experts": 1}),
    ("deepseek_v3", SHAPES[0], {"norm_topk_prob": False, "n_shared_experts": 3}),
    ("deepseek_v3", SHAPES[0], {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}),
    ("switch", (3, 8, 16, 8, 4, 1, 1, 1), {"router_bias": True}),
    ("switch", (3, 8, 16, 8, 4, 1, 1, 1), {"expert_capacity": 2}),
    ("switch", (3, 8, 16, 8, 4, 1, 1, 1), {"dense_act_fn": "gelu"}),
]


def theirs(name, shape, seed=0, **changes):
    """A block, its config, and the block as ours."""
    changes = {**QUIET.get(name, {}), **changes}
    block, config = hf_block(name, shape, seed, **changes), hf_config(name, shape, **changes)
    return block, config, hf.from_block(block, config)


def output_of(block, x, *more):
    y = block(x, *more)
    return (y[0] if isinstance(y, tuple) else y).view(x.shape)


def gradients(module):
    return {
        key: torch.zeros_like(p) if p.grad is None else p.grad
        for key, p in module.named_parameters()
    }


def close(ours, theirs):
    return gap(ours, theirs) <= 1e-5


@pytest.mark.parametrize("training, seed", [(False, 0), (True, 1)], ids=["eval", "train"])
@pytest.mark.parametrize("name, shape, changes", VARIANTS, ids=str)
def test_outputs_and_all_gradients_are_equal(name, shape, changes, seed, training):
    block, config, moe = theirs(name, shape, seed, **changes)
    block.train(training), moe.train(training)
    x = randn(*shape[:3], seed=seed)
    gamma = max(
        1.0, getattr(config, "routed_scaling_factor", 1.0)
    )  # DeepSeek-V2's outputs are of the order of 16
    loss_of = randn(*shape[:3], seed=seed + 7) / gamma
    our_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, routing = moe(our_x)
    routing.check()
    their_y = output_of(block, their_x)
    assert y.abs().max() > 0.1 and close(y / gamma, their_y / gamma)
    (y * loss_of).sum().backward()
    (their_y * loss_of).sum().backward()
    assert our_x.grad.abs().max() > 0.1 and close(our_x.grad, their_x.grad)
    expected = read(block, moe, {**block.state_dict(), **gradients(block)})
    for key, parameter in moe.named_parameters():
        assert parameter.grad.abs().max() > 1e-3 or shape[5] == 1 or shape[5] == shape[4], key
        assert close(parameter.grad, expected[key]), key


def test_a_layer_of_deepseek_v4_that_looks_experts_up():
    shape, layers = (
        SHAPE["deepseek_v4"],
        {"mlp_layer_types": ["hash_moe", "moe"], "num_hidden_layers": 2},
    )
    config = hf_config("deepseek_v4", shape, vocab_size=30, swiglu_limit=0.3, **layers)
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4SparseMoeBlock

    block = DeepseekV4SparseMoeBlock(config, 0).eval()
    for index, (key, tensor) in enumerate(block.state_dict().items()):
        random = randn(*tensor.shape, seed=index)
        tensor.copy_(
            randn(30, shape[4], seed=9).topk(shape[5]).indices
            if "tid2eid" in key
            else random / tensor.shape[-1] ** 0.5
        )
    moe, x, ids = (
        hf.from_block(block, config),
        randn(*shape[:3], seed=0),
        torch.arange(18).view(2, 9),
    )
    y, routing = moe(x, token_ids=ids)
    assert close(y, block(x, ids)) and torch.equal(
        routing.check().expert_indices, block.gate.tid2eid[ids]
    )


@EVERY_FAMILY
def test_to_block_is_the_inverse(name):
    block, config, moe = theirs(name, SHAPE[name])
    other = hf_block(name, SHAPE[name], seed=5, **QUIET.get(name, {}))
    assert hf.to_block(moe, other, config) is other
    for key, tensor in block.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key


@EVERY_FAMILY
def test_a_training_step_on_either_side_is_the_same(name):
    block, _, moe = theirs(name, SHAPE[name])
    x = randn(*SHAPE[name][:3], seed=0)
    for module, forward in ((moe, lambda x: moe(x)[0]), (block, lambda x: output_of(block, x))):
        optimizer = torch.optim.SGD(module.train().parameters(), lr=0.01)
        forward(x).square().mean().backward()
        optimizer.step()
    before = hf_block(name, SHAPE[name], **QUIET.get(name, {})).state_dict()
    trained = hf.to_block(moe, copy.deepcopy(block)).state_dict()
    assert any(gap(tensor, before[key]) > 1e-4 for key, tensor in trained.items())
    for key, tensor in block.state_dict().items():
        assert gap(trained[key], tensor) <= 1e-5, key


@EVERY_FAMILY
def test_the_copy_is_independent_and_has_the_blocks_dtype_mode_and_frozen_parts(name):
    block = hf_block(name, SHAPE[name]).bfloat16().train()
    block.experts.requires_grad_(False)
    state = torch.get_rng_state()
    moe = hf.from_block(block, hf_config(name, SHAPE[name]))
    assert torch.equal(torch.get_rng_state(), state)
    assert moe.training and all(module.training for module in moe.modules())
    for key, parameter in moe.named_parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.is_contiguous()
        assert parameter.requires_grad == (not key.startswith("experts."))
    if name.startswith("deepseek_v") and name != "deepseek_v2":
        assert moe.router.expert_bias.dtype == torch.float32
    memory = {tensor.data_ptr() for tensor in block.state_dict().values()}
    assert not memory & {tensor.data_ptr() for tensor in moe.state_dict().values()}


def test_in_bfloat16_outputs_differ_by_its_precision_where_the_same_experts_are_chosen():
    block = hf_block("mixtral", SHAPE["mixtral"]).bfloat16()
    moe, x = (
        hf.from_block(block, hf_config("mixtral", SHAPE["mixtral"])),
        randn(4, 50, 16, seed=0, dtype=torch.bfloat16),
    )
    (y, routing), (_, _, indices) = moe(x), block.gate(x)
    same = (routing.expert_indices == indices.view(4, 50, -1)).all(-1)
    assert same.float().mean() > 0.9 and y.dtype == torch.bfloat16
    assert gap(y[same], block(x)[same]) <= 2**-5 * min(1, y.abs().max().item())


def test_switchs_dropout_and_jitter_are_carried_over():
    block, config = (
        hf_block("switch", SHAPE["switch"], dropout_rate=0.25),
        hf_config("switch", SHAPE["switch"], dropout_rate=0.25),
    )
    moe = hf.from_block(block, config)
    assert (
        moe.experts.dropout == 0.25
        and moe.router.jitter_noise == config.router_jitter_noise == 0.01
    )
    x = randn(*SHAPE["switch"][:3], seed=0)
    assert close(moe(x)[0], output_of(block, x))  # in eval neither does anything
    assert gap(moe.train()(x)[0], moe(x)[0]) > 1e-3


EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


@EVERY_MODEL
@pytest.mark.parametrize("ran_before", [False, True])
def test_a_converted_model_gives_the_same_logits_and_router_logits(name, ran_before):
    model = hf_model(name)
    expected = run(copy.deepcopy(model))
    if ran_before:  # transformers hangs its hooks onto the routers when it first runs
        run(model)
    assert hf.convert(model) is model
    assert sum(isinstance(module, hf.ConvertedBlock) for module in model.modules()) == LAYERS.get(
        name, 2
    )
    assert not any(type(module).__name__ in hf.FAMILIES for module in model.modules())
    output = run(model)
    assert expected.logits.abs().max() > 0.5 and gap(output.logits, expected.logits) <= 1e-4
    ours, theirs = router_logits(output), router_logits(expected)
    assert len(ours) == len(theirs) > 0 and all(gap(a, b) <= 1e-4 for a, b in zip(ours, theirs))
    for key in (key for key in expected if key.endswith("aux_loss")):
        assert gap(output[key], expected[key]) <= 1e-5


@EVERY_MODEL
def test_a_converted_model_trains_as_before_and_can_be_restored(name):
    original, model = hf_model(name).train(), hf.convert(hf_model(name).train())
    labels = torch.arange(14).view(2, 7) if name == "switch" else torch.arange(22).view(2, 11)
    for module in (original, model):
        for dropout in (part for part in module.modules() if isinstance(part, torch.nn.Dropout)):
            dropout.p = 0.0
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        run(module, labels=labels).loss.backward()
        optimizer.step()
    hf.restore(model)
    assert [type(module) for module in model.modules()] == [
        type(module) for module in original.modules()
    ]
    expected, before = original.state_dict(), hf_model(name).state_dict()
    assert list(model.state_dict()) == list(expected) and any(
        gap(expected[key], before[key]) > 1e-3 for key in expected
    )
    for key, tensor in model.state_dict().items():
        assert gap(tensor, expected[key]) <= 1e-4 and tensor.is_contiguous(), key
    assert all(
        parameter.device.type == "cpu" and parameter.requires_grad
        for parameter in model.parameters()
    )
    assert gap(run(model.eval()).logits, run(original.eval()).logits) <= 1e-3


def test_a_round_trip_changes_nothing_and_the_model_can_be_saved(tmp_path):
    model = hf_model("qwen2_moe")
    expected = run(model)
    hf.restore(hf.convert(model))
    again = run(model)
    assert torch.equal(again.logits, expected.logits) and len(router_logits(again)) == 2
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, use_safetensors=True)
    # transformers may run the experts of a loaded model another way
    assert gap(run(loaded.eval()).logits, expected.logits) <= 1e-5
    assert gap(run(hf.convert(loaded)).logits, expected.logits) <= 1e-4


def test_a_converted_model_generates_the_same_tokens_and_shows_its_routings():
    model, tokens = hf_model("mixtral"), torch.arange(1, 12).view(1, 11)
    expected = model.generate(tokens, max_new_tokens=5, do_sample=False)
    hf.convert(model)
    routings = []
    for module in model.modules():
        if isinstance(module, hf.ConvertedBlock):
            module.moe.register_forward_hook(
                lambda module, args, output: routings.append(output[1].check())
            )
    assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=False), expected)
    assert len(routings) == 2 * 5 and repr(model)


@EVERY_FAMILY
def test_a_converted_model_is_saved_as_the_model_it_was_and_comes_back(name, tmp_path):
    model = hf_model(name)
    names = {key: tensor.shape for key, tensor in model.state_dict().items()}
    expected = run(model).logits
    hf.convert(model)
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == names
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, use_safetensors=True)
    assert gap(run(loaded.eval()).logits, expected) <= 1e-5

    other = hf.convert(hf_model(name, seed=1)).eval()
    assert gap(run(other).logits, expected) > 1e-3
    other.load_state_dict(model.state_dict())
    assert gap(run(other).logits, expected) <= 1e-4


def test_a_converted_model_can_be_pickled_and_copied(tmp_path):
    model = hf.convert(hf_model("mixtral"))
    torch.save(model, tmp_path / "model.pt")
    expected = run(model)  # after this transformers has hooks that nobody can pickle
    # our own file, just written
    for other in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        again = run(other)
        assert torch.equal(again.logits, expected.logits)
        assert len(router_logits(again)) == len(router_logits(expected))


def test_a_block_without_its_weights_is_refused():
    model = hf_model("mixtral")
    block = model.model.layers[1].mlp
    block.experts.to("meta")
    with pytest.raises(ValueError, match="holds no weights: experts.gate_up_proj, experts.down"):
        hf.from_block(block, model.config)
    with pytest.raises(ValueError, match="brought into memory first"):
        hf.convert(model)
    assert not any(isinstance(module, hf.ConvertedBlock) for module in model.modules())
