"""Bounded waiting for the other ranks: at the start, and for one that dies, stops or is cut off later.

Collectives cannot tell a slow peer from a lost one, so every rank shows life by a thread that counts up its own key of
a ``TCPStore`` on rank 0. Rank 0 watches the keys and writes its verdict there; the others watch rank 0 by whether the
store answers. Whoever learns that a rank is missing prints one sentence and leaves with ``PeerLost.exit_code``. A rank
that leaves with an error of its own says so first, so that the others leave with its code instead.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout

from vqmoe_ds.device import Seat, contradiction, seat
from vqmoe_ds.errors import ConfigError, UserError
from vqmoe_ds.train.ranks import Place

CPU = torch.device("cpu")


class PeerLost(UserError):
    """A rank went missing, or the ranks never found each other."""

    exit_code = 76

    def __init__(self, message: str, exit_code: int = exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def meet(place: Place, backend: str, seconds: float, device: torch.device = CPU, trouble: str | None = None) -> None:
    """Set up the default process group; the ranks find each other at ``MASTER_ADDR:MASTER_PORT``.

    Args:
        seconds: for which they wait for each other.
        device: this rank's, already the current one.
        trouble: why this rank cannot run on it: then all ranks leave with that sentence.

    Raises:
        ConfigError: a rank is in trouble, the ranks' devices do not go together, or NCCL does not start.
        PeerLost: rank 0 cannot be reached, or not all ranks came in time.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
        verdict = _compare_devices(store, place, seat(device, trouble))
        if not verdict:
            _start_backend(backend, place, device, store)
    except (RuntimeError, ValueError, OSError) as error:  # those of torch.distributed are RuntimeErrors
        reason = str(error).splitlines()[0]
        what = f"rank {place.rank} on {socket.gethostname()} cannot reach rank 0 at {address}:{port}"
        if place.rank == 0:
            what = f"not all {place.world_size} ranks came to rank 0 at {address}:{port} within {seconds:g} s"
        if "EADDRINUSE" in str(error):
            what = f"port {port} of rank 0 at {address} is taken: set MASTER_PORT to a free one"
        lost = PeerLost(f"{what} ({reason}); look at the other ranks' logs, MASTER_ADDR, MASTER_PORT and firewalls")
        lost.local = place.local_rank == 0
        raise lost from None
    if verdict:
        raise ConfigError(verdict)


def _compare_devices(store: Any, place: Place, here: Seat) -> str:
    """What keeps the ranks from running on their devices, the same on all of them; empty: nothing."""
    if place.world_size == 1:
        return contradiction([here]) or ""
    store.set(f"seat{place.rank}", json.dumps(asdict(here)))
    if place.rank == 0:
        found = store.multi_get([f"seat{rank}" for rank in range(place.world_size)])
        verdict = contradiction([Seat(**json.loads(text)) for text in found]) or ""
        store.set("seats", verdict)
        if verdict:  # rank 0 carries the store: the others read the verdict before it leaves
            with suppress(RuntimeError):
                store.multi_get([f"seen{rank}" for rank in range(1, place.world_size)])
        return verdict
    verdict = store.get("seats").decode()
    store.set(f"seen{place.rank}", "1")
    return verdict


def _start_backend(backend: str, place: Place, device: torch.device, store: Any) -> None:
    # A bound device makes NCCL connect now, and not to GPU 0 of every rank; a single rank has nobody to connect to.
    bound = device if backend == "nccl" and place.world_size > 1 else None
    try:
        dist.init_process_group(
            backend,
            timeout=default_pg_timeout,
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            device_id=bound,
        )
    except (RuntimeError, ValueError) as error:  # ValueError: PyTorch has NCCL, and no GPU
        if backend != "nccl":
            raise
        failed = ConfigError(
            f"NCCL does not start on rank {place.rank} ({device} of {socket.gethostname()}): "
            f"{str(error).splitlines()[0]}; run again with NCCL_DEBUG=INFO to see why, and try NCCL_SOCKET_IFNAME=(the "
            "network between the nodes), NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1"
        )
        failed.local = place.local_rank == 0
        raise failed from None


class Watchdog:
    """Shows this rank's life to the others and leaves with a sentence when one of them is missing.

    Args:
        place: this rank.
        timeout: seconds without a sign of life after which a rank is missing.
        leave: called from a thread with the verdict; must end the process.
        mend: what the user may do then.
    """

    def __init__(self, place: Place, timeout: float, leave: Callable[[PeerLost], None], mend: str) -> None:
        self.place, self.timeout, self._leave, self.mend = place, timeout, leave, mend
        self.interval = min(2.0, timeout / 6)
        self.grace = min(timeout, 3 * self.interval + 1)
        """Patience with a silent rank once a collective has failed."""
        self.verdict: PeerLost | None = None
        self._stopped = threading.Event()
        self._answered = time.monotonic()
        self._store, self._hosts = _open_store(place, timeout)
        self._threads = [threading.Thread(target=self._talk, daemon=True, name="watchdog")]
        if place.rank != 0:
            # A store that hangs must not hang who watches it.
            self._threads.append(threading.Thread(target=self._watch_first, daemon=True, name="watchdog of rank 0"))
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """All is done and nobody misses anybody any more; or an error: a peer's absence is put into words.

        Raises:
            PeerLost: instead of the error of a collective.
        """
        if error is None:
            dist.barrier()
            self._stopped.set()
        elif of_communication(error):
            raise self._explain(error) from error
        else:
            self._stopped.set()
            if getattr(error, "local", True):  # else all ranks meet it at once
                self._tell(error)

    def _tell(self, error: BaseException) -> None:
        """Let the others know that this rank leaves because of an error of its own."""
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        text = f"rank {self.place.rank} on {self._hosts[self.place.rank]} failed ({what}); the others leave with it"
        self._publish(PeerLost(text, getattr(error, "exit_code", 1)))

    def _explain(self, error: BaseException) -> PeerLost:
        """Why a collective failed: wait for the verdict, for which silent ranks now have less time."""
        with suppress(RuntimeError):  # the talking thread meets the same
            self._store.add("suspicion", 1)
        deadline = time.monotonic() + 2 * self.grace + self.interval
        while self.verdict is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.verdict is not None:  # the thread that reached it tells the others, and then ends this process
            time.sleep(30)
            return self.verdict
        reason = str(error).splitlines()[0]
        return PeerLost(f"the connection between ranks broke although all live ({reason}); {self.mend}")

    # ------------------------------------------------------------ the talking thread

    def _talk(self) -> None:
        watch = _Watch(self) if self.place.rank == 0 else None
        beats = 0
        while not self._stopped.wait(self.interval):
            beats += 1
            try:
                self._store.set(_beat(self.place.rank), str(beats))
                lost = watch.look() if watch else self._read_verdict()
                self._answered = time.monotonic()
            except RuntimeError:  # the store is gone, and with it rank 0
                lost = self.missing(0, "its connection closed")
            if lost is not None and not self._stopped.is_set():
                return self._conclude(lost)

    def _read_verdict(self) -> PeerLost | None:
        if not self._store.check(["verdict"]):
            return None
        code, text = json.loads(self._store.get("verdict"))
        return PeerLost(text, code)

    def _watch_first(self) -> None:
        while not self._stopped.wait(self.interval):
            if time.monotonic() - self._answered > self.timeout:
                return self._conclude(self.missing(0, f"no sign of life for {self.timeout:g} s"))

    def missing(self, rank: int, how: str) -> PeerLost:
        return PeerLost(f"rank {rank} on {self._hosts[rank]} is missing ({how}); the others leave; {self.mend}")

    def _conclude(self, lost: PeerLost) -> None:
        # Who speaks: rank 0, or if that is the missing one, somebody on every host.
        first_is_missing = self.place.rank != 0 and lost.args[0].startswith("rank 0 ")
        lost.local = first_is_missing and (self.place.local_rank == 0 or self.place.rank == 1)
        self.verdict = lost
        if self.place.rank == 0:
            self._publish(lost)
        self._leave(lost)

    def _publish(self, lost: PeerLost) -> None:
        """Write the verdict, once; rank 0 stays until the others have read it."""
        try:
            if self._store.add("verdicts", 1) == 1:
                self._store.set("verdict", json.dumps([lost.exit_code, str(lost)]))
        except RuntimeError:
            return
        if self.place.rank == 0:
            time.sleep(2 * self.interval)


class _Watch:
    """Rank 0's view of the others."""

    def __init__(self, dog: Watchdog) -> None:
        self.dog, self.others = dog, list(range(1, dog.place.world_size))
        self.seen: dict[int, tuple[bytes, float]] = {rank: (b"", time.monotonic()) for rank in self.others}
        self.looked = time.monotonic()

    def look(self) -> PeerLost | None:
        """Read all signs of life; the verdict of a rank that left by itself, or on one that is silent for too long."""
        dog, now = self.dog, time.monotonic()
        told = dog._read_verdict()
        if told is not None:
            return told
        if now - self.looked > dog.timeout / 2:  # this rank itself was stopped: others deserve another look
            self.seen = {rank: (value, now) for rank, (value, _) in self.seen.items()}
        self.looked = now
        patience = dog.grace if dog._store.add("suspicion", 0) else dog.timeout
        for rank, value in zip(self.others, dog._store.multi_get([_beat(r) for r in self.others]), strict=True):
            if value != self.seen[rank][0]:
                self.seen[rank] = (value, now)
            elif now - self.seen[rank][1] > patience:
                return dog.missing(rank, f"no sign of life for {now - self.seen[rank][1]:.0f} s")
        return None


def _open_store(place: Place, timeout: float) -> tuple[Any, list[str]]:
    """A store on rank 0 of its own, so that no other user's waiting blocks it, and the host of every rank."""
    patience = timedelta(seconds=max(timeout, 10.0))
    host, store = os.environ["MASTER_ADDR"], None
    here: list[Any] = [0, socket.gethostname()]
    if place.rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
        here[0] = store.port
    everybody: list[Any] = [None] * place.world_size
    dist.all_gather_object(everybody, here)
    if store is None:
        store = dist.TCPStore(host, everybody[0][0], is_master=False, wait_for_workers=False, timeout=patience)
    store.set(_beat(place.rank), "0")
    dist.barrier()
    return store, [name for _, name in everybody]


def _beat(rank: int) -> str:
    return f"beat{rank}"


def of_communication(error: BaseException) -> bool:
    """Whether a collective failed, as it does when a peer is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))
