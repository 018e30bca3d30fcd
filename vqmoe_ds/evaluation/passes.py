"""What a command tells while it goes over data."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO


class Passes:
    """Progress of passes over data: bars on a terminal; in a log, lines of passes that take long.

    Args:
        file: where they go.
        unit: what is counted.
        hidden: say nothing, as on ranks above 0.
    """

    def __init__(self, file: TextIO, unit: str = "window", hidden: bool = False) -> None:
        self.file, self.unit, self.hidden, self.said = file, unit, hidden, time.monotonic()

    def __call__(self, name: str, total: int) -> Callable[[int], Any]:
        from tqdm import tqdm

        file, done = self.file, 0
        if self.hidden or file.isatty():
            return tqdm(total=total, desc=name, unit=self.unit, file=file, disable=self.hidden, leave=False).update

        def tell(count: int, every: float = 10.0) -> None:
            nonlocal done
            done += count
            if time.monotonic() - self.said >= every:
                self.said = time.monotonic()
                with suppress(OSError):  # a terminal that has gone
                    print(f"{name}: {done:,} of {total:,} {self.unit}s", file=file, flush=True)

        # Sooner at the start of a pass: an attack may be at its first batch for minutes.
        tell(0, every=1.0)
        return tell
