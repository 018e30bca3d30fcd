"""Bounded waiting for other ranks: for one that dies, stops or is cut off in the middle of a run.

Collectives cannot tell a slow peer from a lost one, so every rank shows life by a thread that counts up its own key of
a ``TCPStore`` on rank 0. Rank 0 watches the keys and writes its verdict there; the others watch rank 0 by whether the
store answers. Whoever learns that a rank is missing prints one sentence and leaves with ``PeerLost.exit_code``. A rank
that leaves with an error of its own says so first, so that the others leave with its code instead.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from vqmoe_ds.runtime.errors import TRY_AGAIN, reason_of
from vqmoe_ds.runtime.meeting import PeerLost, open_store
from vqmoe_ds.runtime.parents import process
from vqmoe_ds.runtime.ranks import Place
from vqmoe_ds.runtime.stopping import STOP


class Watchdog:
    """Shows this rank's life to the others and leaves with a sentence when one of them is missing.

    Args:
        place: this rank.
        timeout: seconds without a sign of life after which a rank is missing.
        leave: called from a thread with the verdict; must end the process.
        hint: advice to the user for then.
    """

    def __init__(self, place: Place, timeout: float, leave: Callable[[PeerLost], None], hint: str) -> None:
        self.place, self.timeout, self._leave, self.hint = place, timeout, leave, hint
        # At least six signs of life within the timeout: that one is late does not make a rank missing.
        self.interval = min(1.0, timeout / 6)
        self.grace = min(timeout, 3 * self.interval + 1)
        """Seconds of patience with a silent rank once a collective has failed."""
        self.verdict: PeerLost | None = None
        self._stopped = threading.Event()
        self._answered = time.monotonic()
        self._store, self._peers = _open_store(place, timeout)
        self._threads = [threading.Thread(target=self._talk, daemon=True, name="watchdog")]
        if place.rank != 0:
            # A store that hangs must not hang who watches it.
            self._threads.append(threading.Thread(target=self._watch_first, daemon=True, name="watchdog of rank 0"))
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Watchdog:
        STOP.announce = self._announce
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Stop watching once all ranks are done; after an error say which peer is absent.

        Raises:
            PeerLost: instead of the error of a collective.
        """
        STOP.announce = None
        if error is None:
            # All stop watching together: a rank that left first would be missed by those still at work.
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
        self._publish(self._own("failed", what, getattr(error, "exit_code", 1)))

    def _announce(self, reason: str) -> None:
        """Let the others know that this rank was asked to leave at once."""
        self._publish(self._own("was stopped", reason, TRY_AGAIN))

    def _own(self, what: str, why: str, code: int) -> PeerLost:
        here = self._peers[self.place.rank].host
        return PeerLost(f"rank {self.place.rank} on {here} {what} ({why}); the others leave with it", code)

    def _explain(self, error: BaseException) -> PeerLost:
        """The reason why a collective failed: wait for the verdict, for which silent ranks now have less time."""
        with suppress(RuntimeError):  # the talking thread meets the same
            self._store.add("suspicion", 1)
        deadline = time.monotonic() + 2 * self.grace + self.interval
        while self.verdict is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.verdict is not None:  # the thread that reached it tells the others, and then ends this process
            time.sleep(30)
            return self.verdict
        reason = reason_of(error)
        return PeerLost(f"the connection between ranks broke although all live ({reason}); {self.hint}")

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
            # After the barrier at the end rank 0 and its store may be gone, and nobody is missing.
            if lost is not None and not self._stopped.is_set():
                return self._conclude(lost)

    def _read_verdict(self) -> PeerLost | None:
        # get would wait for a key that nobody has set.
        if not self._store.check(["verdict"]):
            return None
        code, text, rank = json.loads(self._store.get("verdict"))
        return PeerLost(text, code, rank)

    def _watch_first(self) -> None:
        while not self._stopped.wait(self.interval):
            if time.monotonic() - self._answered > self.timeout:
                return self._conclude(self.missing(0, f"no sign of life for {self.timeout:g} s"))

    def missing(self, rank: int, how: str) -> PeerLost:
        where = f"rank {rank} on {self._peers[rank].host}"
        return PeerLost(f"{where} is missing ({how}); the others leave; {self.hint}", rank=rank)

    def _conclude(self, lost: PeerLost) -> None:
        # Launchers wait for a rank that is stopped or hangs, half a minute or for ever.
        if lost.rank is not None and self._peers[lost.rank].host == self._peers[self.place.rank].host:
            self._peers[lost.rank].end()
        # Who speaks: rank 0, or if that is the missing one, somebody on every host.
        first_is_missing = self.place.rank != 0 and lost.rank == 0
        lost.local = first_is_missing and (self.place.local_rank == 0 or self.place.rank == 1)
        self.verdict = lost
        if self.place.rank == 0:
            self._publish(lost)
        self._leave(lost)

    def _publish(self, lost: PeerLost) -> None:
        """Write the verdict, once; rank 0 stays until the others have read it."""
        # The first verdict stands: later ones are mostly consequences of it.
        try:
            # The store adds atomically: of several ranks with a verdict one gets the 1.
            if self._store.add("verdicts", 1) == 1:
                self._store.set("verdict", json.dumps([lost.exit_code, str(lost), lost.rank]))
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
        # Before the signs of life: a rank that told why it leaves falls silent, too.
        told = dog._read_verdict()
        if told is not None:
            return told
        if now - self.looked > dog.timeout / 2:  # this rank itself was stopped: others deserve another look
            self.seen = {rank: (value, now) for rank, (value, _) in self.seen.items()}
        self.looked = now
        # Adding nothing reads the counter; get would wait where nobody has suspected anything.
        suspicious = dog._store.add("suspicion", 0)
        for rank in self.others if suspicious else ():
            if dog._peers[rank].is_gone_from(dog._peers[0].host):
                return dog.missing(rank, "its process ended")
        patience = dog.grace if suspicious else dog.timeout
        for rank, value in zip(self.others, dog._store.multi_get([_beat(r) for r in self.others]), strict=True):
            if value != self.seen[rank][0]:
                self.seen[rank] = (value, now)
            elif now - self.seen[rank][1] > patience:
                return dog.missing(rank, f"no sign of life for {now - self.seen[rank][1]:.0f} s")
        return None


@dataclass(frozen=True)
class Peer:
    """A rank's process."""

    host: str
    pid: int
    started: int | None
    """``Process.started``, by which a later process of the same number is another."""

    @staticmethod
    def here() -> Peer:
        me = process(os.getpid())
        return Peer(socket.gethostname(), os.getpid(), None if me is None else me.started)

    def is_gone_from(self, host: str) -> bool:
        """Whether it was on this host, where this is called, and is no more."""
        there = process(self.pid)
        return self.host == host and self.started is not None and (there is None or there.started != self.started)

    def end(self) -> None:
        """Wake it soon, if it is stopped, and kill it if it does not leave then; called on its host.

        Not at once: the others have to leave first, whose verdict it would contradict and whose exit code the launcher
        shall take.
        """
        there = process(self.pid)
        if there is None or there.started != self.started or self.pid == os.getpid():
            return
        with suppress(OSError):
            later = ["sh", "-c", f"sleep 2; kill -CONT {self.pid}; sleep 3; kill -KILL {self.pid}"]
            # A process of its own, in a session of its own: this one leaves before the time is up.
            nothing = subprocess.DEVNULL
            subprocess.Popen(later, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)


def _open_store(place: Place, timeout: float) -> tuple[Any, list[Peer]]:
    """A store on rank 0 of its own, so that no other user's waiting blocks it, and the process of every rank."""
    patience, address = max(timeout, 10.0), os.environ["MASTER_ADDR"]
    store = open_store(address, 0, True, patience) if place.rank == 0 else None
    everybody: list[Any] = [None] * place.world_size
    # Not by deepspeed.comm: with comms_logger in the JSON it ends the process at this collective, with code 0.
    dist.all_gather_object(everybody, (store.port if store is not None else 0, Peer.here()))
    if store is None:
        store = open_store(address, everybody[0][0], False, patience)
    store.set(_beat(place.rank), "0")
    # Every key is there before anybody looks: ``multi_get`` would wait for one that is not.
    dist.barrier()
    return store, [peer for _, peer in everybody]


def _beat(rank: int) -> str:
    return f"beat{rank}"


def of_communication(error: BaseException) -> bool:
    """Whether a collective failed, as it does when a peer is gone."""
    # gloo reports a lost connection as a plain RuntimeError, which only its text tells from others.
    text = str(error)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))
