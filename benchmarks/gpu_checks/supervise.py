"""Runs checks in another process, which is ended when one of them outlasts its deadline.

A check may hang inside a CUDA call, with Python's lock held: no signal handler, exception or thread of that process
gets it out. So this process, which never touches the GPU, watches the results come and starts the next check in a new
process where one hangs, or dies. Standard library alone.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from .report import BAD, BEGINS, ENDS, ERROR, SKIPPED, TIMEOUT, Check, Line

START = 120.0
"""Seconds for a process to import everything and to start NCCL."""
BETWEEN = 15.0
"""Seconds from the end of a check to the start of the next, or to the end of the process."""
LOOK = 0.1
"""Seconds between two looks at the results."""


class Supervisor:
    """One run of several checks.

    Args:
        command: runs the checks named by ``--checks`` and appends its results to ``path``.
        path: a file of JSON lines.
        trace: where that process writes its stack at SIGUSR1.
        checks: to run, in order.
        seconds: for all of them.
    """

    def __init__(self, command: list[str], path: Path, trace: Path, checks: list[Check], seconds: float) -> None:
        self.command, self.path, self.trace, self.waiting = command, path, trace, list(checks)
        self.seconds, self.end = seconds, time.monotonic() + seconds
        self.printed, self.complete = 0, True

    def run(self) -> int:
        """Returns the exit code; results are printed as they come."""
        while self.waiting:
            if time.monotonic() >= self.end:
                self._skip_rest()
            elif self._run_process() == 2:
                return 2
        return int(not self.complete or any(line["status"] in BAD for line in read_lines(self.path)))

    def _run_process(self) -> int:
        """One process, until it ends by itself or is ended; 2 where it cannot run here, else 0."""
        numbers = [str(check.number) for check in self.waiting]
        process = subprocess.Popen([*self.command, "--checks", *numbers], stdout=sys.stderr)
        current: Check | None = None
        since, left = time.monotonic(), len(self.waiting)
        try:
            while True:
                ended = process.poll() is not None  # before the last lines are read
                for line in self._new_lines():
                    if line["status"] == BEGINS:
                        current, since = next(c for c in self.waiting if c.number == line["check"]), time.monotonic()
                    elif line["status"] == ENDS:
                        self.waiting, current = self.waiting[1:], None
                        since = time.monotonic()
                if ended:
                    break
                idle = current is None and left > len(self.waiting)  # it may hang as it ends: no check is lost by that
                limit = since + (current.seconds if current else BETWEEN if idle else START)
                if time.monotonic() > min(limit, self.end):
                    if current or (time.monotonic() > limit and not idle):
                        self._stop(process, current, time.monotonic() - since)
                    return 0
                time.sleep(LOOK)
        finally:
            process.kill()
            process.wait()
        if process.returncode == 2 and not self.printed:
            return 2  # it has said why
        if current is not None or left == len(self.waiting):
            how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
            self._give_up(current, ERROR, f"the process ended with {how}")
        return 0

    def _stop(self, process: subprocess.Popen[bytes], current: Check | None, seconds: float) -> None:
        process.send_signal(signal.SIGUSR1)  # faulthandler writes where it is, whatever it waits for
        time.sleep(0.5)
        process.kill()
        process.wait()
        for _ in self._new_lines():
            pass
        self._give_up(current, TIMEOUT, f"not done after {seconds:.0f} s, in {self._where()}")

    def _give_up(self, current: Check | None, status: str, why: str) -> None:
        """Record the check that was running, and go on with the next; all of them where none could start."""
        for check in [current] if current else self.waiting:
            self._write(check, status, why)
        self.waiting = self.waiting[1:] if current else []
        self._new_lines()

    def _skip_rest(self) -> None:
        for check in self.waiting:
            self._write(check, SKIPPED, f"the {self.seconds / 60:g} minutes were up; run it alone with --checks")
        self.waiting, self.complete = [], False
        self._new_lines()

    def _write(self, check: Check, status: str, why: str) -> None:
        line = {"check": check.number, "case": check.title, "status": status, "figures": {}, "why": why}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _new_lines(self) -> list[Line]:
        """Lines that came since the last look, printed."""
        lines = read_lines(self.path)
        fresh, self.printed = lines[self.printed :], len(lines)
        for line in fresh:
            if line["status"] != BEGINS:
                print(json.dumps(line), flush=True)
        return fresh

    def _where(self) -> str:
        text = self.trace.read_text(encoding="utf-8") if self.trace.exists() else ""
        frames = re.findall(r'File "(.+?)", line (\d+) in (.+)', text)
        if not frames:
            return "an unknown place"
        ours = next((frame for frame in frames if "site-packages" not in frame[0]), frames[0])
        return f"{Path(ours[0]).name}:{ours[1]} {ours[2]}"


def read_lines(path: Path) -> list[Line]:
    """All whole lines; one that is being written is left for the next look."""
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]
