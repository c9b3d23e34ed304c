"""What the tests of the token-choice routers share: a router with drawn parameters, and what each must survive."""

import torch

from ..helpers import randn, seeded


def drawn(make, *args, scale=1.0, seed=0, training=True, **options):
    """make(*args, **options) with normal parameters times ``scale``: some routers start at zero, where everything is tied."""
    router = seeded(make, *args, **options).train(training)
    with torch.no_grad():
        for i, parameter in enumerate(router.parameters()):
            parameter.copy_(scale * randn(*parameter.shape, seed=seed + i))
    return router


def survives(router, case, *extra) -> bool:
    """Finite gradients in training and in eval, and state that forward leaves alone. Raises where a routing breaks the contract."""
    before, finite = {name: value.clone() for name, value in router.state_dict().items()}, True
    for training in (True, False):
        routing = seeded(router.train(training), case.x(), case.padding_mask(), *extra).check()
        assert routing.expert_indices.shape == (case.B, case.N, router.top_k)
        total = routing.expert_weights.square().sum() + routing.aux_loss
        if total.requires_grad:
            router.zero_grad()
            total.backward()
            finite &= all(
                parameter.grad is None or bool(parameter.grad.isfinite().all())
                for parameter in router.parameters()
            )
    return finite and all(
        torch.equal(value, before[name]) for name, value in router.state_dict().items()
    )
