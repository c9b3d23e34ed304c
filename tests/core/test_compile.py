"""torch.compile of the whole layer: one graph, the same numbers."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_core import MixtureOfExperts

from .helpers import close, config, randn, seeded

pytestmark = pytest.mark.own_bits
# What torch generates it compiles with its own folder on the command line, and does not quote it.
BACKEND = "aot_eager" if " " in torch.__path__[0] else "inductor"


def step(call, moe, x):
    """Output, and the gradients of x and every parameter."""
    x = x.detach().requires_grad_()
    y, routing = call(x)
    return y, *torch.autograd.grad(y.square().sum() + routing.aux_loss, (x, *moe.parameters()))


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options, backend",
    [
        ({}, BACKEND),
        ({"capacity_factor": 1.0}, BACKEND),
        # What is in the graph differs little: traced, and not compiled once more.
        ({"capacity_factor": 1.0, "backend": "padded"}, "aot_eager"),
        ({"bias": True, "n_shared_experts": 1}, "aot_eager"),
    ],
    ids=str,
)
def test_the_compiled_layer_is_one_graph_with_equal_numbers(options, backend):
    moe, x = seeded(MixtureOfExperts, config(aux_loss_weight=0.01, **options)), randn(2, 6, 8)
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(moe, fullgraph=True, backend=graphs)
    for a, b in zip(step(compiled, moe, x), step(moe, moe, x)):
        assert close(a, b)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("dynamic", [None, True])
def test_eleven_lengths_need_three_graphs_at_most(dynamic):
    moe = seeded(MixtureOfExperts, config(aux_loss_weight=0.01))
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, fullgraph=True, dynamic=dynamic, backend=graphs)
    for length in range(6, 17):
        x = randn(2, length, 8, seed=length)
        for a, b in zip(step(compiled, moe, x), step(moe, moe, x)):
            assert close(a, b)
    assert graphs.frame_count <= 3


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 1.0}], ids=str)
def test_fake_bfloat16_on_a_device_is_one_graph_too(options):
    """As it would be traced on a GPU, which is not here: shapes and dtypes only, and the grouped matmul in the graph."""
    torch.set_default_dtype(torch.bfloat16)
    graphs = CompileCounterWithBackend("aot_eager")
    try:
        with FakeTensorMode(), torch.device("meta"):
            moe = MixtureOfExperts(config(aux_loss_weight=0.01, **options))
            y, routing = torch.compile(moe, fullgraph=True, backend=graphs)(
                torch.randn(2, 3, 8, requires_grad=True)
            )
            (y.square().sum() + routing.aux_loss).backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert graphs.frame_count == 1 and y.dtype == torch.bfloat16 and y.shape == (2, 3, 8)
    calls = [
        str(node.target) for node in graphs.graphs[0].graph.nodes if node.op == "call_function"
    ]
    assert (
        sum("grouped_mm" in call for call in calls) == 2 and moe.experts.down_proj.grad is not None
    )
