"""What all tests share: one thread, as the stored notebooks have (sums in another order round otherwise), and no fixed global state."""

import os

import pytest

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")


@pytest.fixture(scope="session")
def gangs():
    """gangs(R): R real processes that wait for programs; made when first asked for, and ended with the tests."""
    from tests.gang import Gang

    made = {}

    def gang(n_ranks: int) -> Gang:
        if n_ranks not in made or made[n_ranks].closed:
            made[n_ranks] = Gang(n_ranks)
        return made[n_ranks]

    yield gang
    for one in made.values():
        one.close()
