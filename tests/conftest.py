"""What all tests share: one thread, as the stored notebooks have (sums in another order round otherwise), and no fixed global state."""

import os

import pytest

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")


def pytest_addoption(parser):
    parser.addoption(
        "--last-bits",
        type=int,
        metavar="SEED",
        help="end sums on other last bits: tests/last_bits.py",
    )


def pytest_configure(config):
    for line in (
        "own_bits: compares with code that --last-bits cannot reach",
        "processes: starts several processes that work together",
    ):
        config.addinivalue_line("markers", line)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    """Tests with several processes of their own run one after another: with ``--dist loadgroup`` on one worker."""
    for item in items:
        if "gangs" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.processes)
        if item.get_closest_marker("processes"):
            item.add_marker(pytest.mark.xdist_group("processes"))


def pytest_collection_finish(session):
    if session.config.getoption("loadgroup", False) and session.items:
        grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
        if grouped and not any("@" in item.nodeid for item in grouped):
            raise pytest.UsageError(
                "this pytest and pytest-xdist keep no groups together: use those of requirements.txt"
            )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    seed = item.config.getoption("--last-bits")
    if seed is None or item.get_closest_marker("own_bits"):
        return (yield)
    from tests.last_bits import LastBits

    with LastBits(seed):
        return (yield)


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


# Here, since with xdist the process that prints reads no conftest further down.
def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.stats.get("passed", [])  # from all workers
    steps = [value for report in reports for key, value in report.user_properties if key == "step"]
    if steps:
        terminalreporter.section(
            "from a slider's step to its figure, median in ms (measured, not asserted)"
        )
        for name, milliseconds in steps:
            terminalreporter.write_line(f"{milliseconds:6.1f}  {name}")
