"""The harness itself: it must report a failing, dying or hanging rank instead of passing or waiting."""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests import conftest
from tests.distributed import RankFailure, _free_port, run_ranks


def _sum_of_ranks(rank: int, world: int, offset: int) -> tuple[int, float, bool]:
    total = torch.tensor([float(rank + offset)])
    dist.all_reduce(total)
    same_draw = [torch.zeros(1) for _ in range(world)]
    dist.all_gather(same_draw, torch.rand(1))
    return rank, total.item(), len({draw.item() for draw in same_draw}) == world


def test_ranks_talk_and_answer_in_order() -> None:
    assert run_ranks(4, _sum_of_ranks, 10) == [(rank, 46.0, True) for rank in range(4)]


def _fail_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("only here")
    dist.barrier()


def test_failure_of_one_rank_is_raised_with_its_traceback() -> None:
    with pytest.raises(RankFailure, match="(?s)rank 1 failed.*_fail_on_one.*only here"):
        run_ranks(2, _fail_on_one)


def _die_on_one(rank: int, world: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def test_dead_rank_is_named() -> None:
    with pytest.raises(RankFailure, match="rank [01] (died|failed)") as caught:
        run_ranks(2, _die_on_one)
    assert caught.value.__notes__ == ["ranks that died, with their exit codes: {1: 3}"]


def _hang_on_one(rank: int, world: int) -> None:
    if rank == 1:
        time.sleep(60)


def test_hanging_rank_is_killed_at_the_timeout() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"ranks \[1\] did not finish within 3 s"):
        run_ranks(2, _hang_on_one, timeout=3)
    assert time.monotonic() - start < 20


def test_a_port_is_kept_for_the_rank_that_will_listen_at_it() -> None:
    port = _free_port()
    with socket.socket() as other, pytest.raises(OSError) as caught:
        other.bind(("127.0.0.1", port))
    assert caught.value.errno == errno.EADDRINUSE
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_workers_begin_with_the_longest_files(pytestconfig: pytest.Config) -> None:
    """``make test`` gives each worker of pytest-xdist one file after the other, in the order of collection."""
    folder = Path(conftest.__file__).parent
    assert [name for name in conftest.LONGEST if not (folder / name).is_file()] == []
    short, long = ["data/test_a.py", "data/test_b.py"], list(conftest.LONGEST[:3])
    names = [short[0], *reversed(long), short[1]]
    for workers, wanted in (({}, names), ({"workerinput": {}}, [*long, *short])):
        items = [SimpleNamespace(path=folder / name, name=number, keywords={}) for name in names for number in (1, 2)]
        config = SimpleNamespace(getoption=pytestconfig.getoption, **workers)
        conftest.pytest_collection_modifyitems(config, items)
        assert [(item.path, item.name) for item in items] == [(folder / name, n) for name in wanted for n in (1, 2)]
