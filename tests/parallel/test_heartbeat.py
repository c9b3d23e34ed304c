"""Who is missing: found by counting, without anybody having to fail."""

import time
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore

from moe_tools.pretrain import PretrainConfig, heartbeat
from moe_tools.pretrain.heartbeat import Heartbeat
from moe_tools.pretrain.training_run import _rank_lost


@pytest.fixture
def start(monkeypatch):
    """start(rank, n_ranks) -> Heartbeat. While ``missing`` waits, each of them that beats does so, however busy the machine is."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = []

    def wait(_seconds):
        for one in started:
            before = one._beats()[one.rank]
            while one._thread.is_alive() and one._beats()[one.rank] == before:
                time.sleep(0.01)

    def start(rank, n_ranks):
        started.append(Heartbeat(store, rank, n_ranks))
        return started[-1]

    monkeypatch.setattr(Heartbeat, "EVERY", 0.02)
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(sleep=wait))
    yield start
    for one in started:
        one.leave()


def test_a_rank_that_stops_is_missing_and_one_that_left_is_not(start):
    first, second, third = (start(rank, 3) for rank in range(3))
    assert first.missing() == []
    second._done.set()  # as if its process had been killed: it says nothing more
    second._thread.join()
    assert first.missing() == third.missing() == [1]
    third.leave()
    third._thread.join()
    assert first.missing() == [1] and first.left() == [2]


def test_a_rank_that_never_came_is_missing(start):
    assert start(0, 2).missing() == [1]


def test_an_error_of_this_rank_alone_is_not_blamed_on_the_others(start, tmp_path):
    first, second = (start(rank, 2) for rank in range(2))
    config = PretrainConfig(out=str(tmp_path))
    lost = _rank_lost(RuntimeError("out of memory"), first, config, 3)
    assert str(lost).startswith("rank 0: failed while all other ranks are there in step 3") and str(
        lost
    ).endswith("Cause: out of memory")
    first.leave()
    lost = _rank_lost(RuntimeError("closed by peer"), second, config, 3)
    assert str(lost).startswith("rank 1: rank 0 of 2 ended before in step 3")
