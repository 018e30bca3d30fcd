"""Ranks that are killed, stopped or fail: the others leave in time and name them. Real processes, real signals."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import _free_port
from vqmoe_ds.runtime.errors import TrainingHalted
from vqmoe_ds.runtime.meeting import PeerLost, meet
from vqmoe_ds.runtime.ranks import Place
from vqmoe_ds.runtime.watchdog import Watchdog

TIMEOUT = 2.0
context = multiprocessing.get_context("fork")


def _train(rank: int, world: int, folder: Path, port: int, fault: str) -> None:
    """All-reduce for ever, as a training does; what this rank would print and return goes to a file."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    place = Place(rank, world, rank, world)

    def leave(lost: BaseException) -> None:
        speaks = rank == 0 or getattr(lost, "local", True)
        (folder / f"{rank}.left").write_text(f"{speaks} {lost}")
        os._exit(getattr(lost, "exit_code", 1))

    try:
        meet(place, "gloo", 20)
        with Watchdog(place, TIMEOUT, leave, "start it again"):
            for step in range(10_000):
                dist.all_reduce(torch.ones(8))
                (folder / f"{rank}.step").write_text(str(step))
                if fault == "defect" and rank == 1 and step == 5:
                    raise ZeroDivisionError("a defect")
                if fault == "everybody" and step == 5:
                    raise TrainingHalted("a sentence of all ranks")
                if fault == "none" and step == 5:
                    break
                time.sleep(0.01)
    except BaseException as error:
        leave(error)
    os._exit(0)


def _world(folder: Path, fault: str, world: int = 3) -> list[Any]:
    port = _free_port()
    ranks = [context.Process(target=_train, args=(r, world, folder, port, fault), daemon=True) for r in range(world)]
    for rank in ranks:
        rank.start()
    return ranks


def _after(fault: str, folder: Path, disturb: Callable[[Any], None], who: int) -> tuple[list[int | None], float]:
    """Exit codes of the survivors, and how long they took to leave."""
    ranks = _world(folder, fault)
    try:
        deadline = time.monotonic() + 40
        while not all((folder / f"{rank}.step").exists() for rank in range(3)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        started = time.monotonic()
        disturb(ranks[who])
        survivors = [rank for number, rank in enumerate(ranks) if number != who]
        for rank in survivors:
            rank.join(30)
        return [rank.exitcode for rank in survivors], time.monotonic() - started
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _spoken(folder: Path) -> list[str]:
    """What the user gets to see."""
    texts = [path.read_text() for path in sorted(folder.glob("*.left"))]
    return [text.removeprefix("True ") for text in texts if text.startswith("True ")]


@pytest.mark.parametrize("who", [0, 2])
def test_a_killed_rank_is_named_and_the_others_leave_soon(tmp_path, who):
    codes, seconds = _after("", tmp_path, lambda rank: rank.kill(), who)
    assert codes == [76, 76]
    assert seconds < 15
    (sentence,) = _spoken(tmp_path)
    assert sentence.startswith(f"rank {who} on {os.uname().nodename} is missing")
    assert sentence.endswith("the others leave; start it again")


@pytest.mark.parametrize("who", [0, 2])
def test_a_stopped_rank_is_named_after_the_timeout(tmp_path, who):
    codes, seconds = _after("", tmp_path, lambda rank: os.kill(rank.pid, signal.SIGSTOP), who)
    assert codes == [76, 76]
    assert TIMEOUT - 1 < seconds < TIMEOUT + 8
    (sentence,) = _spoken(tmp_path)
    assert sentence.startswith(f"rank {who} on ")
    assert "no sign of life for" in sentence


def test_a_short_stop_is_forgiven(tmp_path):
    def pause(rank: Any) -> None:
        os.kill(rank.pid, signal.SIGSTOP)
        time.sleep(TIMEOUT / 3)
        os.kill(rank.pid, signal.SIGCONT)
        time.sleep(TIMEOUT)
        assert not list(tmp_path.glob("*.left"))
        rank.kill()

    _after("", tmp_path, pause, 1)


def test_a_rank_with_a_defect_takes_the_others_along_with_its_own_exit_code(tmp_path):
    ranks = _world(tmp_path, "defect")
    for rank in ranks:
        rank.join(40)
    assert [rank.exitcode for rank in ranks] == [1, 1, 1], "requeueing would meet the same defect"
    sentence, traceback = _spoken(tmp_path)
    assert "rank 1 on" in sentence and "failed (ZeroDivisionError: a defect)" in sentence
    assert traceback == "a defect"


def test_an_error_of_all_ranks_stays_what_it_is(tmp_path):
    ranks = _world(tmp_path, "everybody")
    for rank in ranks:
        rank.join(40)
    assert [rank.exitcode for rank in ranks] == [3, 3, 3]
    assert _spoken(tmp_path) == ["a sentence of all ranks"]


def test_ranks_that_are_done_part_in_peace(tmp_path):
    ranks = _world(tmp_path, "none")
    for rank in ranks:
        rank.join(40)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert not list(tmp_path.glob("*.left"))


@pytest.mark.parametrize(
    ("rank", "sentence"),
    [(0, "not all 2 ranks came to rank 0 at 127.0.0.1:"), (1, "cannot reach rank 0 at 127.0.0.1:")],
)
def test_waiting_for_ranks_that_never_come_is_bounded(monkeypatch, rank, sentence):
    for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", _free_port())):
        monkeypatch.setenv(name, str(value))
    started = time.monotonic()
    with pytest.raises(PeerLost, match=sentence) as caught:
        meet(Place(rank, 2, 0, 1), "gloo", 1.5)
    assert caught.value.exit_code == 76
    assert time.monotonic() - started < 15


def test_a_name_that_nobody_resolves_is_given_up_in_time(monkeypatch):
    """Resolvers know no limit, and PyTorch asks them again and again."""
    for name, value in (("RANK", 1), ("WORLD_SIZE", 2), ("MASTER_ADDR", "nowhere.invalid"), ("MASTER_PORT", 29511)):
        monkeypatch.setenv(name, str(value))
    started = time.monotonic()
    with pytest.raises(PeerLost, match="cannot reach rank 0 at nowhere.invalid:29511"):
        meet(Place(1, 2, 1, 2), "gloo", 2.0)
    assert time.monotonic() - started < 8


def test_ranks_of_one_host_listen_on_loopback_alone(tmp_path):
    ranks = _world(tmp_path, "", 2)
    try:
        deadline = time.monotonic() + 40
        while not all((tmp_path / f"{rank}.step").exists() for rank in range(2)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        heard = [address for rank in ranks for address in _listening(rank.pid)]
        assert heard and all(address in ("0100007F", "0" * 24 + "0100007F") for address in heard)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _listening(pid: int) -> list[str]:
    """Addresses of a process's own listening sockets, as /proc writes them."""
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    inodes = {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:[")}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]
