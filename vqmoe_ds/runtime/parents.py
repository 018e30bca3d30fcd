"""The processes that started this rank: a launcher that is killed must not leave ranks behind.

``deepspeed`` starts ``deepspeed.launcher.launch``, which starts the ranks; either may be killed alone, and neither then
tells the ranks. torchrun and mpirun (or its daemon on another host) are a rank's parent. Of a killed srun SLURM itself
ends the ranks, at once.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 1.0
"""Seconds between two looks."""
_LAUNCHER = re.compile(
    r"(.*/)?(deepspeed|deepspeed.pt|ds|torchrun|mpirun|mpiexec|mpiexec.hydra|orterun|prterun|orted|prted|hydra_pmi_proxy"
    r"|hydra_bstrap_proxy|accelerate|slurm/node\.py|tools/compare_routers\.py"
    r"|vqmoe-compare-routers|vqmoe_ds\.commands\.compare_routers)"
    r"|.*/deepspeed/launcher/(launch|runner)\.py|deepspeed\.launcher\.(launch|runner)|torch\.distributed\.(run|launch)"
)
_NODE_OF_DEEPSPEED = re.compile(r"deepspeed\.launcher\.launch|.*/deepspeed/launcher/launch\.py")
_SET_FOR_RANKS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")
"""Variables that DeepSpeed's node process and torchrun give to their ranks, and do not have themselves."""
_BEFORE_SCRIPT = 4
"""Words of a command line within which a launcher names itself: ``python -u -m deepspeed.launcher.launch``."""


@dataclass(frozen=True)
class Process:
    """A process, told from a later one of the same number by the time it started."""

    pid: int
    parent: int
    session: int
    started: int
    """Clock ticks after the system's start."""
    words: tuple[str, ...]

    @property
    def exiting(self) -> bool:
        """Whether its memory is gone already, while its children still name it as their parent."""
        return not any(self.words)

    @property
    def launches(self) -> bool:
        return any(_LAUNCHER.fullmatch(word) for word in self.words)

    @property
    def is_deepspeed_node(self) -> bool:
        """Whether it is the process that ``deepspeed`` runs on every node, the ranks' parent."""
        return any(_NODE_OF_DEEPSPEED.fullmatch(word) for word in self.words)


def process(pid: int) -> Process | None:
    """A process by its entry in /proc; None where it is gone (a zombie too), or where there is no /proc."""
    try:
        # Behind the last parenthesis: the program's name before it may hold blanks and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        if fields[0] in "ZX":
            return None
        return Process(pid, int(fields[1]), int(fields[3]), int(fields[19]), tuple(words[:_BEFORE_SCRIPT]))
    except (OSError, ValueError, IndexError):
        return None


def launchers() -> list[Process]:
    """This process's parent, and the ones above, as far as they are launchers; the nearest first."""
    found: list[Process] = []
    above = process(os.getppid())
    while above is not None and above.launches:
        found.append(above)
        above = process(above.parent)
    return found


def watch_launcher(gone: Callable[[str], None]) -> None:
    """Call ``gone`` with a clause, from a thread, when a launcher of this rank has ended without ending it."""
    watched = launchers()
    clause = _gone_already(watched)
    if clause is None and not watched:
        return

    def look() -> None:
        while (reason := clause or _missing(watched)) is None:
            time.sleep(INTERVAL)
        gone(reason)

    threading.Thread(target=look, name="launcher", daemon=True).start()


def _missing(watched: list[Process]) -> str | None:
    above = os.getppid()
    for launcher in watched:
        now = process(launcher.pid)
        if above != launcher.pid or now is None or now.started != launcher.started:
            return f"the end of its launcher (process {launcher.pid})"
        above = now.parent
    return None


def _gone_already(watched: list[Process]) -> str | None:
    """A clause on a launcher that ended while this process was starting: another process has its children now."""
    oldest = watched[-1] if watched else process(os.getpid())
    variable = next((name for name in _SET_FOR_RANKS if name in os.environ), None)
    if oldest is None or variable is None or (watched and not watched[-1].is_deepspeed_node):
        return None
    heir = process(oldest.parent)
    gone = oldest.parent == 1 if heir is None else heir.exiting or heir.session != oldest.session
    if not watched:  # In a container process 1 is often of this session; a wrapper may have a session of its own.
        gone = (gone or oldest.parent == 1) and not _was_started_with(variable, oldest.parent)
    return "the end of its launcher" if gone else None


def _was_started_with(variable: str, pid: int) -> bool:
    """Whether a process has a rank's environment: a wrapper that stands between the launcher and its rank."""
    try:
        return f"\0{variable}=".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # another user's
        return False
