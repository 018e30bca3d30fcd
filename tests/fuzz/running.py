"""Runs a reader on mutated inputs, each within a limit of time and memory, and keeps an input that fails.

Without ``VQMOE_FUZZ_MINUTES`` every run tries the same inputs; with it, new ones for a share of so many minutes.
"""

from __future__ import annotations

import os
import pickle
import random
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

SECONDS = 10
"""Of one input, at most."""
MEMORY = 1 << 30
"""Bytes by which the process may grow over one input."""


class TooLong(BaseException):
    """An input took more than ``SECONDS``; no ``except Exception`` of a reader catches it."""


def fuzz(
    reader: str,
    corpus: Sequence[Any],
    mutate: Callable[[Any, random.Random], Any],
    read: Callable[[Any], Any],
    allowed: tuple[type[Exception], ...],
    count: int = 150,
    share: float = 0.05,
) -> None:
    """Give ``read`` mutations of ``corpus``; what it raises must be one of ``allowed``, with one line as its message.

    Args:
        reader: a name, also part of the seeds.
        corpus: good inputs, bytes or values; each is tried unchanged too.
        mutate: as ``mutate.mutated`` and ``mutate.mutated_value``.
        count: mutations in a short run.
        share: part of ``VQMOE_FUZZ_MINUTES`` that this reader gets.

    Raises:
        AssertionError: an input failed; the message names its seed and the file that holds it.
    """
    minutes = float(os.environ.get("VQMOE_FUZZ_MINUTES", 0))
    end, first = time.monotonic() + 60 * minutes * share, int(time.time() * 1000) if minutes else 0
    tried = 0
    for value in corpus:
        _try(reader, "unchanged", value, read, allowed)
    while time.monotonic() < end if minutes else tried < count:
        seed = f"{reader}:{first + tried}"
        rng = random.Random(seed)
        _try(reader, seed, mutate(rng.choice(corpus), rng), read, allowed)
        tried += 1
    print(f"fuzz: {tried} inputs to {reader}, 0 failed")


def _try(reader: str, seed: str, value: Any, read: Callable[[Any], Any], allowed: tuple[type[Exception], ...]) -> None:
    before = _resident()
    try:
        with _time_limit():
            read(value)
        problem = None
    except allowed as error:
        problem = _unclear(str(error))
    except (Exception, TooLong, RecursionError):
        problem = traceback.format_exc(limit=-12)[-6000:]
    grown = _resident() - before
    if grown > MEMORY:
        problem = f"grew by {grown / 2**20:.0f} MiB"
    if problem is not None:
        raise AssertionError(f"{reader}, seed {seed}, input kept as {_keep(reader, value)}: {problem}")


def _unclear(message: str) -> str | None:
    """Why a message is no clear sentence; None: it is."""
    if not message.strip():
        return "the message is empty"
    if not message.isprintable():
        return f"the message is not one line of text: {message[:1000]!r}"
    return f"the message has {len(message)} characters: {message[:1000]}" if len(message) > 2000 else None


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong(f"took more than {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, SECONDS)  # the test's own timeout, perhaps
    started = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 0.01) if left else 0)
        signal.signal(signal.SIGALRM, handler)


def _resident() -> int:
    """Most bytes that were resident so far; what an input frees again counts too."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _keep(reader: str, value: Any) -> str:
    name = "".join(letter if letter.isalnum() else "-" for letter in reader)
    with tempfile.NamedTemporaryFile(prefix=f"vqmoe-fuzz-{name}-", delete=False) as file:
        file.write(value if isinstance(value, bytes) else pickle.dumps(value))
    return file.name
