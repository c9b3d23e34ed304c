"""Every bug of the museum is caught by its check, and moe_core has none of them."""

import pytest
import torch

from . import MUSEUM

NUMBERS = {
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
    11,
    14,
    15,
    16,
    17,
    18,
    19,
    20,
    21,
    22,
    23,
    24,
    25,
    26,
    28,
    29,
    30,
}
each = pytest.mark.parametrize("bug", MUSEUM, ids=lambda bug: f"{bug.number} {bug.title}")


@each
def test_moe_core_is_healthy(bug):
    assert bug.verdict(bug.healthy) is None


@each
def test_the_check_catches_the_bug_for_the_right_reason(bug):
    assert bug.is_seen_in(bug.mutant), bug.verdict(bug.mutant)


@each
def test_an_exhibit_explains_itself(bug):
    texts = bug.title, bug.symptom, bug.cause, bug.source, bug.caught_by
    assert all(isinstance(text, str) and len(text) > 5 for text in texts)
    assert len(bug.code.strip().splitlines()) <= 20


def test_these_bugs_are_on_show():
    assert {bug.number for bug in MUSEUM} == NUMBERS
    assert len({bug.title for bug in MUSEUM}) == len(MUSEUM)


def test_a_visit_leaves_the_random_generator_alone():
    state = torch.get_rng_state()
    MUSEUM[0].verdict(MUSEUM[0].healthy)
    assert torch.equal(torch.get_rng_state(), state)
