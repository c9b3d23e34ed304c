"""The balance loss of the Mixtral family, as transformers computes it, is K times ours; and it pools over layers, ours does not."""

import pytest
import torch

from moe_core import TopKRouter, losses

from ..core.helpers import about

mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")


def routed(n_experts, top_k, seed, padding_mask=None):
    torch.manual_seed(seed)
    router = TopKRouter(16, n_experts, top_k)
    return router, router(3 * torch.randn(3, 7, 16), padding_mask)


def theirs(routings, top_k, padding_mask=None):
    logits = tuple(routing.logits.flatten(0, 1) for routing in routings)
    attention_mask = None if padding_mask is None else padding_mask.long()
    return mixtral.load_balancing_loss_func(logits, routings[0].n_experts, top_k, attention_mask)


@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 1), (8, 2), (8, 7), (16, 4)])
@pytest.mark.parametrize("padded", [False, True])
def test_one_layers_loss_is_theirs_after_conversion_value_and_gradient(n_experts, top_k, padded):
    padding_mask = torch.arange(7) < torch.tensor([7, 4, 1]).view(3, 1) if padded else None
    gradients, values = [], []
    for loss in (
        lambda r: losses.convert_loss(
            losses.load_balance(r), "moe_core", "huggingface", n_experts=n_experts, top_k=top_k
        ),
        lambda r: theirs([r], top_k, padding_mask),
    ):
        router, routing = routed(n_experts, top_k, 0, padding_mask)
        values.append(loss(routing))
        values[-1].backward()
        gradients.append(router.weight.grad)
    assert torch.allclose(*values, rtol=1e-5) and torch.allclose(*gradients, atol=1e-6)
    assert gradients[0].abs().max() > 1e-3


def test_of_two_layers_collapsed_in_opposite_ways_theirs_sees_a_balanced_one():
    layers = []
    for expert in (0, 1):
        router = TopKRouter(1, 2, 1)
        with torch.no_grad():
            router.weight.copy_(
                torch.tensor([[50.0], [-50.0]] if expert == 0 else [[-50.0], [50.0]])
            )
        layers.append(router(torch.ones(1, 4, 1)))
    assert theirs(layers, 1).item() == about(1)
    assert [losses.load_balance(layer).item() for layer in layers] == [about(2), about(2)]
