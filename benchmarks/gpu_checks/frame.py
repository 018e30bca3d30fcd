"""Shared parts of all checks: findings, the place where they run, clocks and memory."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.runtime.ranks import Place

from .report import ERROR, FAILED, PASSED


@dataclass(frozen=True)
class Finding:
    """One result of a check: ``measured`` where nothing is right or wrong, only fast or slow."""

    case: str
    status: str
    figures: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    """The failure, or the reason for skipping it."""


@dataclass(frozen=True)
class Rates:
    """Best rates of this machine."""

    copy: float
    """Bytes per second, read plus written, of a large copy."""
    product: float
    """FLOP per second of a large bfloat16 product."""


@dataclass
class Bench:
    """The place where the checks run.

    Args:
        device: of all tensors.
        small: sizes that a CPU passes in seconds; they say that the code runs, not how fast.
        folder: for files.
        place: of the only rank.
        known: rates measured earlier in the same run.
    """

    device: torch.device
    small: bool
    folder: Path
    place: Place
    known: Rates | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def rates(self) -> Rates:
        return self.known or measure_rates(self)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Free memory that the case before has left."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def measure_rates(bench: Bench) -> Rates:
    """Copy and product rates, on random data and with inputs rotated beyond the cache."""
    count, side = (2**20, 256) if bench.small else (2**29, 8192)
    pairs = [torch.rand(2, count, device=bench.device).unbind() for _ in range(2)]
    copy_ms = min(milliseconds(bench, lambda i: pairs[i % 2][0].copy_(pairs[i % 2][1]), 10))
    bytes_moved = 2 * pairs[0][0].nbytes
    pairs.clear()
    factors = [torch.randn(2, side, side, device=bench.device).bfloat16().unbind() for _ in range(3)]
    product_ms = statistics.median(milliseconds(bench, lambda i: factors[i % 3][0] @ factors[i % 3][1], 10))
    return Rates(bytes_moved / copy_ms * 1e3, 2 * side**3 / product_ms * 1e3)


# ---------------------------------------------------------------- clocks


class Clock:
    """Marks in the stream of the device, and the times between them: events on a GPU, the host's clock elsewhere."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def mark(self) -> Any:
        if not self.bench.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two marks; the device must have been waited for."""
        return float(start.elapsed_time(end)) if self.bench.cuda else (end - start) * 1e3


def milliseconds(bench: Bench, call: Callable[[int], Any], repeats: int, warm_up: int = 3) -> list[float]:
    """Device time of ``call(i)``; all are queued before the first is waited for, so launches hide as in training."""
    clock, marks = Clock(bench), []
    for i in range(warm_up + repeats):
        start = clock.mark()
        call(i)
        marks.append((start, clock.mark()))
    bench.synchronize()
    return [clock.milliseconds(*pair) for pair in marks[warm_up:]]


Mark = Callable[[], Any]


def fastest_round(bench: Bench, queue: Callable[[Mark], Sequence[Any]], repeats: int, rounds: int = 3) -> list[float]:
    """Medians of the times between the marks that ``queue(mark)`` returns, and of the whole, in the fastest round.

    The calls of a round are queued before the first is waited for; several rounds, for other work on the host slows one
    or the other. The first two calls of a round count for nothing: the device has no work waiting yet.
    """
    clock, found = Clock(bench), list[list[float]]()
    for _ in range(rounds):
        runs = [queue(clock.mark) for _ in range(2 + repeats)][2:]
        bench.synchronize()
        pairs = [*pairwise(range(len(runs[0]))), (0, -1)]
        found.append([statistics.median(clock.milliseconds(marks[a], marks[b]) for marks in runs) for a, b in pairs])
    return min(found, key=lambda times: times[-1])


@contextmanager
def peak_memory(bench: Bench) -> Iterator[dict[str, float]]:
    """Largest growth of the memory in use inside, in MiB; left out on a CPU."""
    found: dict[str, float] = {}
    if bench.cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if bench.cuda else 0
    yield found
    if bench.cuda:
        torch.cuda.synchronize()
        found["peak_MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20


@contextmanager
def as_its_users(ours: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms as our trainer sets them for our layers, off for other people's."""
    on, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(on and ours, warn_only=warn)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(on, warn_only=warn)


# ---------------------------------------------------------------- comparisons


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest wanted value; 0 between empty tensors, NaN where one is NaN."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    if got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def within(case: str, errors: dict[str, float], limit: float, **figures: Any) -> Finding:
    """Passed if no error exceeds the limit (NaN does)."""
    bad = {name: error for name, error in errors.items() if not error <= limit}
    why = ", ".join(f"{name}: error {error:.1e} above {limit:.0e}" for name, error in bad.items())
    worst = max(errors.values(), default=0.0, key=lambda error: float("inf") if error != error else error)
    return Finding(case, FAILED if bad else PASSED, {"worst_error": worst, "limit": limit, **figures}, why)


def equal(case: str, same: dict[str, bool], **figures: Any) -> Finding:
    """Passed if everything is equal to the last bit."""
    other = [name for name, good in same.items() if not good]
    return Finding(case, FAILED if other else PASSED, figures, f"differ: {', '.join(other)}" if other else "")


# ---------------------------------------------------------------- errors


def attempt(
    case: str, call: Callable[[], Finding | Iterator[Finding]], out_of_memory: str = FAILED
) -> Iterator[Finding]:
    """Findings of ``call``; an exception becomes a finding of its own, so that it does not hide the cases after it.

    Args:
        case: the name of that finding.
        call: finds one thing or several.
        out_of_memory: the status where memory did not suffice.

    Raises:
        Exception: CUDA can do no more in this process.
    """
    try:
        found = call()
        yield from [found] if isinstance(found, Finding) else found
    except Exception as error:
        if poisons(error):
            raise
        traceback.print_exc()
        yield Finding(case, out_of_memory if lacks_memory(error) else ERROR, why=one_line(error))


def attempt_within(
    case: str, errors: Callable[..., dict[str, float]], limit: float, *arguments: Any
) -> Iterator[Finding]:
    """``within`` for what ``errors(*arguments)`` returns, or its exception."""
    return attempt(case, lambda: within(case, errors(*arguments), limit))


def one_line(error: BaseException) -> str:
    """Type and first line of an error, and the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}{place}"


def lacks_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


POISON = ("cuda error", "cuda driver error", "triton error [cuda]", "cublas_status", "nccl error", "device-side assert")


def poisons(error: BaseException) -> bool:
    """Whether CUDA can do no more in this process after the error; it can where memory alone did not suffice."""
    return not lacks_memory(error) and any(words in str(error).lower() for words in POISON)
