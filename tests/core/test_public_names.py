"""The calls that readers write down, word for word, and what importing the core costs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import torch

import moe_core
from moe_core import Experts, MixtureOfExperts, MoEConfig, Routing, TopKRouter
from moe_core.routers import ROUTERS

from .helpers import randn

OPTIONS = {"hash": {"vocab_size": 32}, "zero_computation": {"ffn_ratio": 0.75}}


def test_the_router_and_the_experts_are_called_like_this():
    x = randn(1, 2, 2048)
    with torch.device("meta"):  # 400 million parameters that nobody needs to draw
        router = TopKRouter(
            d_model=2048,
            n_experts=8,
            top_k=2,
            capacity_factor=1.25,
            aux_loss_weight=0.01,
            jitter_noise=0.0,
        )
        experts = Experts(
            d_model=2048,
            d_ff=8192,
            n_experts=8,
            activation="silu",
            glu=True,
            drop_path=0.0,
            ep_size=1,
        )
    router, experts = router.to_empty(device="cpu"), experts.to_empty(device="cpu")
    router.reset_parameters()
    routing = router(x)  # .expert_indices .expert_weights .capacity_mask .aux_loss
    y = experts(x, routing)  # (B, N, D)
    assert (
        routing.expert_indices.shape
        == routing.expert_weights.shape
        == routing.capacity_mask.shape
        == (1, 2, 2)
    )
    assert routing.aux_loss.shape == () and y.shape == (1, 2, 2048)


def test_the_layer_is_called_like_this():
    config = MoEConfig(
        d_model=512, d_ff=2048, n_experts=8, top_k=2, capacity_factor=1.25, router="topk"
    )  # validated, serialisable
    moe = MixtureOfExperts(config)  # moe.router, moe.experts, moe.shared_experts
    x = randn(1, 3, 512)
    y, routing = moe(x)
    assert y.shape == x.shape and isinstance(routing, Routing)
    assert (
        isinstance(moe.router, TopKRouter)
        and isinstance(moe.experts, Experts)
        and moe.shared_experts is None
    )


def test_every_public_name_exists_and_is_documented():
    for name in moe_core.__all__:
        assert getattr(moe_core, name).__doc__, name


def test_every_public_function_and_class_is_documented_a_property_may_speak_for_itself():
    missing = []
    for path in Path(moe_core.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            private = isinstance(node, ast.ClassDef) and node.name.startswith("_")
            inside = (
                node.body if isinstance(node, (ast.Module, ast.ClassDef)) and not private else []
            )
            for item in inside:
                if (
                    isinstance(item, (ast.FunctionDef, ast.ClassDef))
                    and not item.name.startswith("_")
                    and not any(ast.unparse(d) == "property" for d in item.decorator_list)
                    and not ast.get_docstring(item)
                ):
                    missing.append(f"{path.name}: {item.name}")
    assert missing == []


def new_modules(code: str) -> set[str]:
    """The modules that a fresh process has loaded after this code, and had not after ``import torch``."""
    program = f"import json, sys, torch\nbefore = set(sys.modules)\n{code}\nprint(json.dumps([*(set(sys.modules) - before)]))"
    root = Path(moe_core.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


def of(packages: tuple[str, ...], modules: set[str]) -> list[str]:
    """Those of the modules that are these packages or lie in them."""
    return sorted(m for m in modules if any(f"{m}.".startswith(f"{p}.") for p in packages))


# What takes seconds to load, and a layer that is not compiled does not need.
COMPILER = ("torch._dynamo", "torch._inductor", "torch._functorch.aot_autograd", "sympy")


def test_importing_the_core_costs_next_to_nothing_beside_torch():
    found = new_modules("import moe_core")
    assert of(COMPILER, found) == []
    assert len(found) < 200, sorted(found)


def test_importing_the_core_imports_nothing_that_draws_or_downloads_nor_what_is_made_of_it():
    heavy = "plotly ipywidgets anywidget transformers datasets matplotlib pandas moe_book moe_tools"
    assert of(tuple(heavy.split()), new_modules("import moe_core")) == []


def test_a_first_step_of_a_layer_does_not_load_the_compiler():
    step = """
from moe_core import MixtureOfExperts, MoEConfig
y, routing = MixtureOfExperts(MoEConfig(d_model=16, d_ff=32, n_experts=4, top_k=2))(torch.randn(2, 3, 16))
(y.square().sum() + routing.aux_loss).backward()
"""
    assert of(COMPILER, new_modules(step)) == []


def test_a_config_builds_no_router(monkeypatch):
    def never(*_args, **_kwargs):
        raise AssertionError("a config has made a table for 129,280 tokens")

    monkeypatch.setattr(moe_core.routers.hash, "balanced_table", never)
    state = torch.get_rng_state()
    sizes = dict(d_model=64, d_ff=64, n_experts=8, top_k=2)
    MoEConfig(**sizes, router="hash", router_options={"vocab_size": 129280})
    for name in ROUTERS:
        top_k = 1 if name in ("switch", "base") else 2
        options = OPTIONS.get(name, {})
        MoEConfig(**{**sizes, "top_k": top_k}, router=name, router_options=options)
    assert torch.equal(torch.get_rng_state(), state)
