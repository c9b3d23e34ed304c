"""The bench of the log's cost measures what it says."""

import pytest

from moe_tools.bench import log_cost


def test_it_times_steps_and_the_share_spent_in_the_log():
    found = log_cost.measure("router bench", every=2, rounds=2)
    assert set(found) == {"step_ms", "ratio", "share_in_add"}
    assert found["step_ms"] > 0 and 0 < found["share_in_add"] < 1


@pytest.mark.parametrize(
    "arguments", [dict(size="huge"), dict(size="chapter", every=1), dict(size="chapter", rounds=0)]
)
def test_what_cannot_be_measured_is_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        log_cost.measure(**arguments)
