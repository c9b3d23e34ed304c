"""One training step: what the lines written out would do, the routers' own update included."""

import copy

import torch

from moe_core import LanguageModel, LMConfig
from moe_core.lm import next_token_loss, train_step

from .helpers import config, seeded

SIZES = dict(vocab_size=32, d_model=16, n_layers=2, n_heads=2, max_seq_len=8)


def moe_model(**moe) -> LanguageModel:
    return seeded(LanguageModel, LMConfig(**SIZES, moe=config(d_model=16, d_ff=12, **moe)))


def tokens(seed=0):
    return torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(seed))


def step(model, tokens_BN, padding_mask=None, **options):
    """A step of plain gradient descent at rate 1: what a parameter loses is its clipped gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return train_step(model, optimizer, tokens_BN, padding_mask, **options)


def test_a_step_descends_on_the_loss_plus_the_auxiliary_losses():
    model = moe_model(aux_loss_weight=0.1, z_loss_weight=0.01)
    by_hand = copy.deepcopy(model)
    loss, routings = step(model, tokens(), max_grad_norm=1e9)
    logits, expected = by_hand(tokens())
    cross_entropy = next_token_loss(logits, tokens())
    (cross_entropy + sum(routing.aux_loss for routing in expected)).backward()
    assert torch.equal(loss, cross_entropy) and not loss.requires_grad
    assert len(routings) == len(expected) == 2
    for mine, its in zip(model.parameters(), by_hand.parameters()):
        assert torch.equal(mine, its - its.grad)


def test_the_gradients_of_the_step_before_are_gone():
    model, twin = moe_model(), moe_model()
    next_token_loss(model(tokens(1))[0], tokens(1)).backward()
    step(model, tokens())
    step(twin, tokens())
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_max_grad_norm_bounds_how_far_a_step_goes():
    model = moe_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step(model, tokens(), max_grad_norm=1e-2)
    moved = [old - new.detach() for old, new in zip(before, model.parameters())]
    length = torch.cat([change.flatten() for change in moved]).norm()
    assert 0.9e-2 < float(length) < 1.1e-2  # float32 weights round what is taken from them


def test_a_step_updates_what_the_routers_learn_outside_the_gradient():
    model = moe_model(router="loss_free")
    step(model, tokens())
    for block in model.blocks:
        assert block.feed_forward.router.expert_bias.abs().max() > 0


def test_a_step_counts_all_micro_batches_once():
    model, one_by_hand = moe_model(router="loss_free"), moe_model(router="loss_free")
    routings = [model(tokens(seed))[1] for seed in range(3)]
    model.update_routers(routings)
    for layer, block in enumerate(one_by_hand.blocks):
        block.feed_forward.router.update([micro_batch[layer] for micro_batch in routings])
    for mine, its in zip(model.buffers(), one_by_hand.buffers()):
        assert torch.equal(mine, its)


def test_padding_reaches_the_routers():
    mask = torch.arange(8).expand(2, -1) < 6
    _, routings = step(moe_model(), tokens(), mask)
    assert all(torch.equal(routing.real_tokens, mask) for routing in routings)


def test_a_dense_model_takes_the_same_step():
    model = seeded(LanguageModel, LMConfig(**SIZES, d_ff=24))
    first, routings = step(model, tokens())
    second, _ = step(model, tokens())
    assert routings == [] and second < first
