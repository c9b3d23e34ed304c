"""The config that a design emits, in transformers: it loads, has the parameters counted, runs, and routes as the design says."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_core import MixtureOfExperts
from moe_tools.accounting import from_hf
from moe_tools.design import DesignBudget, design
from moe_tools.interop.families import config_of

from ..core.helpers import close

BUDGETS = {
    "1.5B": DesignBudget(active=1.5e9, tokens=200e9, gpus=64),
    "node limit": DesignBudget(active=37e9, total=671e9, tokens=14e12, gpus=2048, gpu="h200"),
    "tied": DesignBudget(active=300e6, tokens=20e9, gpus=8),
    "top-1": DesignBudget(active=500e6, tokens=20e9, gpus=8, top_k=1),
}
TINY = DesignBudget(active=600e3, tokens=1e8, gpus=1, vocab_size=256, seq_len=64)


def loaded(made, tmp_path):
    """The config as transformers reads it from a folder with the file that the command writes."""
    (tmp_path / "config.json").write_text(json.dumps(made.hf_config()))
    return AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("router", ["loss_free", "topk"])
@pytest.mark.parametrize("name", BUDGETS)
def test_the_emitted_config_loads_and_has_the_parameters_of_the_spec(name, router, tmp_path):
    made = design(replace(BUDGETS[name], router=router))
    config = loaded(made, tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == made.hf_config()["architectures"][0]
    assert sum(parameter.numel() for parameter in model.parameters()) == made.spec.total_params
    assert from_hf(config) == from_hf(made.hf_config()) == made.spec


@pytest.mark.parametrize(
    "router, top_k", [("loss_free", 2), ("topk", 2), ("loss_free", 1), ("topk", 1)]
)
def test_the_emitted_config_runs_forward_and_backward(router, top_k, tmp_path):
    made = design(replace(TINY, router=router, top_k=top_k))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(loaded(made, tmp_path))
    tokens = torch.randint(256, (2, 64))
    out = model(tokens, labels=tokens)
    assert out.logits.shape == (2, 64, 256) and torch.isfinite(out.loss)
    out.loss.backward()
    gates = [
        parameter.grad
        for name, parameter in model.named_parameters()
        if name.endswith("mlp.gate.weight")
    ]
    assert len(gates) == made.shape.n_layers and all(grad.abs().sum() > 0 for grad in gates)


def test_the_balance_loss_has_our_strength_in_their_convention(tmp_path):
    made = design(replace(TINY, router="topk"))
    config = loaded(made, tmp_path)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data.zero_()  # equal scores: the mean score of every expert is 1/E, whatever is chosen
    out = model(torch.randint(256, (2, 64)), labels=torch.randint(256, (2, 64)))
    assert float(config.router_aux_loss_coef * out.aux_loss.detach()) == pytest.approx(
        made.moe.aux_loss_weight, rel=1e-5
    )


def drawn_block(made, tmp_path):
    """The first MoE block of the emitted model, eager, with every number drawn at random, the selection bias too."""
    config = loaded(made, tmp_path)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    block = AutoModelForCausalLM.from_config(config).model.layers[0].mlp.eval()
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.normal_(0, 0.1)
    return block, config


def test_the_layer_config_is_the_one_that_interop_reads_off_the_emitted_model(tmp_path):
    made = design(replace(TINY, router="topk"))
    block, config = drawn_block(made, tmp_path)
    assert (
        replace(config_of(block, config), aux_loss_weight=0.01, z_loss_weight=0.001) == made.moe
    )  # losses are no part of a block


@pytest.mark.parametrize("router, top_k", [("loss_free", 4), ("topk", 4), ("loss_free", 1)])
def test_our_layer_and_the_emitted_block_give_the_same_numbers(router, top_k, tmp_path):
    made = design(replace(TINY, router=router, top_k=top_k))
    block, _ = drawn_block(made, tmp_path)
    theirs = block.state_dict()
    moe = MixtureOfExperts(made.moe).eval()
    names = {
        "router.weight": "gate.weight",
        "experts.gate_up_proj": "experts.gate_up_proj",
        "experts.down_proj": "experts.down_proj",
    }
    ours = {name: theirs[there] for name, there in names.items()}
    if router == "loss_free":
        ours["router.expert_bias"] = theirs["gate.e_score_correction_bias"]
        gate_up = [theirs[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up")]
        ours["shared_experts.gate_up_proj.weight"] = torch.cat(gate_up)
        ours["shared_experts.down_proj.weight"] = theirs["shared_experts.down_proj.weight"]
    moe.load_state_dict(ours)
    x = torch.randn(2, 32, made.shape.d_model)
    with torch.no_grad():
        expected, (y, _) = block(x), moe(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_with_groups_our_layer_and_the_emitted_block_choose_alike(tmp_path):
    """The node limit of a large design, on a small width: the groups are what is compared."""
    big = design(BUDGETS["node limit"])
    options = big.moe.router_options
    values = {
        **design(TINY).hf_config(),
        "n_routed_experts": big.shape.n_experts,
        "num_experts_per_tok": big.shape.top_k,
        "n_group": options["n_groups"],
        "topk_group": options["topk_groups"],
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = AutoConfig.from_pretrained(tmp_path)
    torch.manual_seed(0)
    block = AutoModelForCausalLM.from_config(config).model.layers[0].mlp
    moe = MixtureOfExperts(
        replace(big.moe, d_model=values["hidden_size"], d_ff=values["moe_intermediate_size"])
    )
    with torch.no_grad():
        block.gate.weight.normal_()
        block.gate.e_score_correction_bias.normal_(0, 0.1)
        moe.router.weight.copy_(block.gate.weight)
        moe.router.expert_bias.copy_(block.gate.e_score_correction_bias)
        x = torch.randn(1, 64, values["hidden_size"])
        routing = moe.router(x)
        _, weights, indices = block.gate(x)
    ours, theirs = (
        torch.zeros(64, big.shape.n_experts).scatter(1, i, w)
        for i, w in ((routing.expert_indices[0], routing.expert_weights[0]), (indices, weights))
    )
    assert close(ours, theirs)
    groups = (ours.view(64, options["n_groups"], -1).sum(-1) > 0).sum(-1)
    assert int(groups.max()) <= options["topk_groups"]
