"""setup(): the same numbers for everybody, and the preset of the machine."""

import random

import numpy as np
import pytest
import torch

from moe_book import Book, setup


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("MOE_BOOK_SCALE", raising=False)
    yield
    torch.set_printoptions(profile="default")


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_a_seed_fixes_random_numpy_and_torch():
    setup(3)
    first = draws()
    setup(3)
    assert draws() == first
    setup(4)
    assert all(a != b for a, b in zip(draws(), first))


def test_the_scale_follows_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert setup(1) == Book(device="cpu", scale="cpu", seed=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert setup() == Book(device="cuda", scale="gpu", seed=0)


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_the_environment_overrides_the_scale_and_pick_follows_it(scale, monkeypatch):
    monkeypatch.setenv("MOE_BOOK_SCALE", scale)
    assert setup().scale == scale and setup().pick(cpu=1, gpu=2) == {"cpu": 1, "gpu": 2}[scale]


def test_an_unknown_scale_is_refused(monkeypatch):
    monkeypatch.setenv("MOE_BOOK_SCALE", "tpu")
    with pytest.raises(ValueError, match="MOE_BOOK_SCALE='tpu' must be 'cpu' or 'gpu'"):
        setup()


def test_one_thread_so_that_a_busy_machine_does_not_slow_the_chapters_down():
    torch.set_num_threads(2)
    setup()
    assert torch.get_num_threads() == 1
