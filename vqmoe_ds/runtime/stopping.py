"""Requests to stop: a signal, Ctrl-C, or a launcher that is gone.

Where nothing would be lost, a request ends the process at once; the training loop defers it until its step is finished
and saved. Python runs signal handlers in the main thread alone, and not while that waits in C++ for another rank. So a
thread of its own reads which signals have arrived (``signal.set_wakeup_fd``).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from vqmoe_ds.runtime.errors import TRY_AGAIN

# Of launchers, of SLURM before a time limit (--signal=B:USR1), of the keyboard, and of a terminal that closes.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
KILLED_BY_USER = 128 + signal.SIGINT
"""Exit code after Ctrl-C pressed twice: nothing is saved."""


class Interrupted(Exception):
    """A measurement is given up because a rank was asked to stop; raised on all ranks together."""


class StopRequests:
    """Requests to stop that this process was given, and whether it may leave at once.

    Attributes:
        reason: who asked, while a request is deferred.
        announce: tells the other ranks that this one leaves and why; the watchdog's.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.announce: Callable[[str], None] | None = None
        self._leave: Callable[[str], None] = _leave_quietly
        self._deferring = False
        self._lock = threading.Lock()
        self._pipe: tuple[int, int] | None = None

    def listen(self, leave: Callable[[str], None]) -> None:
        """Start to hear requests. Call in the main thread; signals that are ignored (``nohup``) stay ignored.

        Args:
            leave: given the reason; must end the process. Called from a thread.
        """
        self._leave = leave
        if self._pipe is not None:
            return
        self._pipe = os.pipe()
        # The C handler writes here at every signal: a full pipe must not block the main thread.
        os.set_blocking(self._pipe[1], False)
        for number in SIGNALS:
            # Handlers of others, and nohup's SIG_IGN, are choices of whoever started this process.
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, _only_wake)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._read, args=self._pipe[:1], name="signals", daemon=True).start()

    def request(self, reason: str) -> None:
        """Leave, or note it while requests are deferred."""
        # The lock closes the gap in which a request would be noted just after ``act`` had looked for one.
        with self._lock:
            if self._deferring:
                self.reason = self.reason or reason
                return
        # Outside of the lock: ``leave`` talks to other ranks, and a second request must not wait for them.
        self._leave(reason)

    def defer(self) -> None:
        """Note requests (``reason``) from now on, as there is something to save."""
        with self._lock:
            self._deferring = True

    def act(self) -> None:
        """Let a request end the process from now on, as nothing would be lost; one that was noted does so now."""
        with self._lock:
            self._deferring, reason = False, self.reason
        if reason is not None:
            self._leave(reason)

    def _read(self, pipe: int) -> None:
        while True:
            for number in os.read(pipe, 64):
                # The pipe hears of every signal that has a handler in Python, also of others.
                if number not in SIGNALS:
                    continue
                if number == signal.SIGINT and self.reason is not None:
                    os._exit(KILLED_BY_USER)  # no clean-up: the first request may be what hangs
                self.request(signal.Signals(number).name)

    def _forget(self) -> None:
        """Reset the signals of a forked child: they end it like any process, and its parent's pipe hears of none."""
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                if signal.getsignal(number) is _only_wake:
                    signal.signal(number, signal.SIG_DFL)


def _only_wake(number: int, frame: Any) -> None:
    """Handle a signal in Python, without which the interpreter does not write to the wake-up file."""


def _leave_quietly(reason: str) -> None:
    os._exit(TRY_AGAIN)


STOP = StopRequests()
"""Requests of this process."""
