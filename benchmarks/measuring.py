"""Clocks, memory and tables of all benchmarks. Imports nothing heavy: child processes inherit its size."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would start at the parent's size
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def write_json(target: str | None, runs: list[dict[str, Any]]) -> None:
    """Write the measurements as ``--json`` asks: to a file, to standard output for ``-``, or not at all."""
    if not target:
        return
    text = json.dumps(runs, indent=1)
    if target == "-":
        print(text)
    else:
        Path(target).write_text(text, encoding="utf-8")
