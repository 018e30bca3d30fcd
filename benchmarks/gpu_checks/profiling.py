"""Check 9: where the device spends a step of ours, and how long it waits for the host."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .frame import Bench, Finding, as_its_users, attempt
from .report import FAILED, MEASURED, SKIPPED
from .steps import AUTO_EP, FUSED, OURS, sizes_of, variant

TOP = 12


def run(bench: Bench) -> Iterator[Finding]:
    for name in (OURS, AUTO_EP):
        yield from attempt(name, partial(_profile, bench, name), out_of_memory=FAILED if name == OURS else SKIPPED)


def _profile(bench: Bench, name: str) -> Iterator[Finding]:
    tokens = sizes_of(bench).tokens[0]
    with as_its_users(name == OURS), variant(bench, name, FUSED) as steps:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
        steps.step(tokens)
        bench.synchronize()
        with profile(activities=activities) as profiler:
            steps.step(tokens)
            bench.synchronize()
    yield Finding(f"{name}, {tokens} tokens, top kernels", MEASURED, {"top": _top(bench, profiler)})
    if bench.cuda:
        yield Finding(f"{name}, {tokens} tokens, idle share", MEASURED, _idle(profiler))
    else:
        yield Finding(f"{name}, {tokens} tokens, idle share", SKIPPED, why="a CPU has no queue that runs empty")


def _top(bench: Bench, profiler: Any) -> list[dict[str, Any]]:
    """The kernels (on a CPU the operations) that take most time by themselves."""
    key = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
    rows = [row for row in profiler.key_averages() if not row.is_user_annotation]  # it spans the kernels inside
    rows = sorted(rows, key=lambda row: -float(getattr(row, key)))[:TOP]
    return [{"name": row.key[:90], "calls": row.count, "ms": float(getattr(row, key)) / 1e3} for row in rows]


def _idle(profiler: Any) -> dict[str, float]:
    """Share of the time from the first kernel to the end of the last in which none ran."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    if not spans:
        return {}
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = end - spans[0][0]
    return {"idle_share": 1 - busy / whole, "busy_ms": busy / 1e3, "whole_ms": whole / 1e3, "kernels": len(spans)}
