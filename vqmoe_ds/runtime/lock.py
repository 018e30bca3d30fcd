"""The lock that admits one job at a time to a run folder.

Rank 0 holds a POSIX record lock on ``run.lock`` for as long as it lives. The kernel frees it however the process
ends, on file systems that carry such locks between hosts (NFS, Lustre with ``flock``, GPFS, BeeGFS with ACLs) on all
of them. Where a file system keeps locks to one host, or knows none, the holder's heartbeat decides: it touches the file
every ``BEAT`` seconds, and a newcomer from another host watches it for ``PATIENCE`` seconds. No clocks are compared.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from vqmoe_ds.runtime.errors import ConfigError

BEAT, PATIENCE = 5.0, 15.0


class Heartbeat:
    """Touches an open file every ``beat`` seconds until ``stop``, so that others see that this process lives."""

    def __init__(self, file: int, beat: float) -> None:
        self._file, self._beat = file, beat
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True, name="heartbeat")
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _keep_beating(self) -> None:
        while not self._stopped.wait(self._beat):
            with suppress(OSError):  # a full or read-only disk: who works there meets it too, and says so
                os.utime(self._file)


class RunLock:
    """The lock of a run folder, held from construction until ``release`` or the end of the process.

    Raises:
        ConfigError: another job that lives holds it.
    """

    def __init__(self, run_dir: Path, beat: float = BEAT, patience: float = PATIENCE) -> None:
        self.run_dir = run_dir
        # Not inherited by fork, and not by programs that are started.
        self._file = os.open(run_dir / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        # A record lock goes as soon as this process closes any descriptor of the file: nothing but this object may open
        # it, and what is read or touched goes through this descriptor.
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal(self._holder()) from None
        except OSError:
            pass  # this file system knows no locks: only the heartbeat speaks
        # The lock is ours, which between hosts may only mean that locks do not travel on this file system.
        holder = self._holder()
        if holder and not self._same_place(holder) and self._beats(patience):
            raise self._refusal(holder)
        self._write({**identity(), "since": datetime.now().isoformat(timespec="seconds")})
        self._heartbeat = Heartbeat(self._file, beat)

    def release(self) -> None:
        """Let the next job in at once."""
        # Before the close: the number of a closed descriptor may soon be that of another file.
        self._heartbeat.stop()
        # A holder that is named here would be watched for a heartbeat by the next job.
        self._write({})
        os.close(self._file)

    def _beats(self, patience: float) -> bool:
        before, deadline = os.stat(self._file).st_mtime_ns, time.monotonic() + patience
        while time.monotonic() < deadline:
            time.sleep(min(0.2, patience))
            if os.stat(self._file).st_mtime_ns != before:
                return True
        return False

    def _same_place(self, holder: dict[str, Any]) -> bool:
        """Whether the lock, which was free, speaks for the holder's death: within a host it always does.

        So does a restart of the same SLURM job, which ends the job before it; another step of the job ends nothing.
        """
        mine = identity()
        same_job = mine["slurm_job"] is not None and mine["slurm_job"] == holder.get("slurm_job")
        restarted = same_job and mine["slurm_restart"] != holder.get("slurm_restart")
        return restarted or has_ended(holder)

    def _holder(self) -> dict[str, Any]:
        return parsed(os.pread(self._file, 10_000, 0))

    def _refusal(self, holder: dict[str, Any]) -> ConfigError:
        who = f"process {holder.get('pid')} on {holder.get('host')}" if holder else "another process"
        if holder.get("slurm_job"):
            who += f" (SLURM job {holder['slurm_job']})"
        since = f" since {holder['since']}" if "since" in holder else ""
        return ConfigError(
            f"run folder {self.run_dir} is in use by {who}{since}; wait for its end or choose another --run_dir"
        )

    def _write(self, holder: dict[str, Any]) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(holder).encode() if holder else b"", 0)


def identity() -> dict[str, Any]:
    """What a lock says of this process."""
    slurm = {"slurm_job": os.environ.get("SLURM_JOB_ID"), "slurm_restart": os.environ.get("SLURM_RESTART_COUNT")}
    return {"host": socket.gethostname(), "pid": os.getpid(), **slurm}


def parsed(text: bytes) -> dict[str, Any]:
    """The ``identity`` in a lock; empty where it holds none, or something else."""
    try:
        holder = json.loads(text or b"{}")
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def has_ended(holder: dict[str, Any]) -> bool:
    """Whether the process of an ``identity`` was one of this host and is no more."""
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(holder.get("pid")), 0)  # type: ignore[arg-type]
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return True
    except PermissionError:
        pass
    return False
