"""Early exits of a rank: on request, for a missing peer, or with an error, and never without a sentence."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from vqmoe_ds.runtime.console import Console
from vqmoe_ds.runtime.errors import TRY_AGAIN, TrainingHalted, UserError
from vqmoe_ds.runtime.parents import watch_launcher
from vqmoe_ds.runtime.ranks import Place, likely_rank
from vqmoe_ds.runtime.stopping import STOP


def watch_peers(
    place: Place, console: Console, seconds: float, hint: str = "the same command goes on from the last checkpoint"
) -> AbstractContextManager[Any]:
    """Context in which a missing rank ends the others within ``seconds``, with a sentence that names it."""
    if place.world_size == 1:
        return nullcontext()
    from vqmoe_ds.runtime.meeting import PeerLost
    from vqmoe_ds.runtime.watchdog import Watchdog

    def leave(lost: PeerLost) -> None:
        os._exit(leave_together(console.fail(lost), place))

    return Watchdog(place, seconds, leave, hint)


def hear_early(remedy: str = "the same command goes on") -> None:
    """Let a signal end the process with ``TRY_AGAIN`` while its modules are still being imported."""

    def leave(reason: str) -> None:
        if likely_rank() == 0:
            with suppress(OSError):
                print(f"stopped by {reason}; {remedy}", flush=True)
        os._exit(TRY_AGAIN)

    STOP.listen(leave)


def hear_requests(place: Place, console: Console, remedy: str = "the same command goes on") -> None:
    """Let a signal, or the end of the launcher, end the process with ``TRY_AGAIN`` (``runtime/stopping.py``)."""

    def leave(reason: str) -> None:
        console.close_progress()
        console.drop_log()
        console.say(f"stopped by {reason}; {remedy}")
        # Else the others would take this rank for missing, and leave with 76 instead of TRY_AGAIN.
        if STOP.announce is not None:
            STOP.announce(reason)
        os._exit(leave_together(TRY_AGAIN, place))

    STOP.listen(leave)
    watch_launcher(STOP.request)


def cannot_write(error: OSError, state: str) -> UserError:
    """The sentence for a disk that is full, a file system that became read-only, a run folder that was moved."""
    where = error.filename or "a file of the run"
    return TrainingHalted(
        f"{where} cannot be read or written ({error.strerror or error}); {state}; make room or bring it back, "
        "and start the same command again",
        local=True,
    )


def leave_together(code: int, place: Place) -> int:
    """Give rank 0 time to print before the launcher, seeing one rank gone, ends the others."""
    if place.rank != 0:
        time.sleep(1.5)
    return code
