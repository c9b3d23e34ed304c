"""The training loop: it learns, it repeats itself, and its history can be stored."""

import json
import math

import pytest
import torch

from moe_book import corpus
from moe_book.training import History, evaluate, train
from moe_core import LanguageModel, LMConfig, MoEConfig

MOE = LMConfig(
    d_model=16,
    n_layers=2,
    n_heads=2,
    max_seq_len=32,
    moe=MoEConfig(d_model=16, d_ff=16, n_experts=4, top_k=2, aux_loss_weight=0.01),
)
CONFIGS = {"moe": MOE, "dense": MOE.dense_twin()}
# A model that knows nothing. Twenty batches gave 5.45 to 5.56; another processor draws other weights.
IGNORANT = pytest.approx(math.log(256), abs=0.3)


@pytest.fixture(scope="module")
def text():
    return corpus.load()


def run(config, text, steps=30, **changes):
    torch.manual_seed(0)
    model = LanguageModel(config)
    return model, train(
        model,
        text,
        **{
            "steps": steps,
            "batch_size": 4,
            "seq_len": 32,
            "lr": 2e-2,
            "progress": False,
            **changes,
        },
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_thirty_steps_lower_the_loss(kind, text):
    model, history = run(CONFIGS[kind], text)
    assert history.loss[0] == IGNORANT
    assert history.valid_loss[-1] < 4.0
    assert history.step == list(range(1, 31)) and history.eval_step == [30]
    assert (
        len(history.loss) == len(history.aux_loss) == len(history.load) == 30
        and history.seconds > 0
    )
    assert model.training


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_same_seed_gives_the_same_history(kind, text):
    (_, first), (_, second), (_, other) = (
        run(CONFIGS[kind], text, steps=4, seed=seed) for seed in (1, 1, 2)
    )
    assert (first.loss, first.valid_loss, first.load) == (
        second.loss,
        second.valid_loss,
        second.load,
    )
    assert first.loss != other.loss


def test_a_moe_logs_the_load_of_each_layer_and_a_dense_model_none(text):
    _, history = run(MOE, text, steps=2)
    assert len(history.load[0]) == 2 and all(
        sum(layer) == pytest.approx(1) for layer in history.load[0]
    )
    assert all(aux > 0 for aux in history.aux_loss)
    _, history = run(MOE.dense_twin(), text, steps=2)
    assert history.load == [[], []] and history.aux_loss == [0, 0]


def test_the_auxiliary_loss_is_trained_on_and_logged_apart(text):
    _, history = run(MOE, text, steps=1)
    assert history.loss[0] == IGNORANT  # cross-entropy alone
    assert history.aux_loss[0] == pytest.approx(0.02, rel=0.2)  # two layers near balance, 0.01 each


def test_held_out_loss_is_measured_when_asked_for_and_at_the_end(text):
    _, history = run(MOE.dense_twin(), text, steps=5, eval_every=2)
    assert history.eval_step == [2, 4, 5] and len(history.valid_loss) == 3


def test_evaluation_repeats_itself_and_leaves_the_model_in_its_mode(text):
    model = LanguageModel(MOE)
    for training in (True, False):
        model.train(training)
        losses = [evaluate(model, text, batches=2, batch_size=4, seq_len=32) for _ in range(2)]
        assert losses[0] == losses[1] and model.training == training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_can_look_at_one_domain(text):
    losses = {
        domain: evaluate(
            LanguageModel(MOE), text, batches=1, batch_size=2, seq_len=32, domain=domain
        )
        for domain in text.domains
    }
    assert len(set(losses.values())) == len(text.domains)


def test_evaluation_does_not_disturb_the_training_that_follows(text):
    _, plain = run(MOE, text, steps=4)
    _, watched = run(MOE, text, steps=4, eval_every=1)
    assert plain.loss == watched.loss


def test_on_step_sees_every_step_with_its_routings(text):
    seen = []
    run(
        MOE, text, steps=3, on_step=lambda step, model, routings: seen.append((step, len(routings)))
    )
    assert seen == [(1, 2), (2, 2), (3, 2)]


def test_routers_are_updated_once_a_step_each_with_its_own_routing(text):
    torch.manual_seed(0)
    model, updates = LanguageModel(MOE), []
    for layer, block in enumerate(model.blocks):
        router = block.feed_forward.router
        router.update = lambda routings, layer=layer, router=router: updates.append(
            (layer, len(routings))
        )
    train(model, text, steps=2, batch_size=2, seq_len=32, progress=False)
    assert updates == [(0, 1), (1, 1)] * 2


@pytest.mark.parametrize("steps", [0, 1])
def test_very_short_runs_work(steps, text):
    _, history = run(MOE.dense_twin(), text, steps=steps)
    assert len(history.loss) == len(history.valid_loss) == steps


def test_a_history_survives_json(text):
    _, history = run(MOE, text, steps=2)
    assert History(**json.loads(json.dumps(history.to_dict()))) == history
