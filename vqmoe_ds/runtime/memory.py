"""This machine's memory, asked before anything is made that may not fit it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import overload

from vqmoe_ds.runtime.errors import ConfigError, UserError, shown

GIB = 1 << 30
_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = ("memory.max", "memory.limit_in_bytes")
_ANONYMOUS = ("anon ", "total_rss ")
"""File with the limit of a control group, and line with what it and those below it use, of version 2 and 1."""


def total_bytes() -> int:
    """Bytes that the processes of this machine, or of this container, may have together."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *(limit for limit, _ in _groups())])


def free_bytes() -> int:
    """Bytes that this process may still take: what the machine has left, within its control groups."""
    free = _number(1 << 62, "MemAvailable:", "/proc/meminfo") << 10
    # Anonymous memory alone: memory.current also counts the page cache, which the kernel gives back.
    return min([free, *(max(0, limit - _number(0, _ANONYMOUS, group / "memory.stat")) for limit, group in _groups())])


def check_room(needed: float, what: str, remedy: str, kind: type[UserError]) -> None:
    """Refuse what would not fit.

    Args:
        needed: bytes.
        what: subject of the sentence.
        remedy: its end.
        kind: of the error.

    Raises:
        UserError: of that kind.
    """
    free = free_bytes()
    if needed > free:
        raise kind(f"{what} needs {_gib(needed)} of memory, this machine has {_gib(free)} left; {remedy}")


@overload
def parse_memory(text: str, option: str) -> int: ...
@overload
def parse_memory(text: str | None, option: str) -> int | None: ...
def parse_memory(text: str | None, option: str) -> int | None:
    """Bytes of ``"256MiB"``, ``"4GB"`` or a plain number; None of None.

    Args:
        option: where it was given, for the sentence.

    Raises:
        ConfigError: something else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)\s*(?:([KMGT]?)(i?)B)?", text.strip(), re.ASCII | re.IGNORECASE)
    if match is not None:
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index((match[2] or " ").upper()))
        if size:
            return size
    raise ConfigError(f"{option} {shown(text)} is no size; write it like 256MiB or 4GB")


def _groups() -> list[tuple[int, Path]]:
    """Limit and folder of every control group that this process is in and that has one."""
    told, folders = _read("/proc/self/cgroup"), dict[Path, None]()
    for root, kind in ((_CGROUP, "0:"), (_CGROUP / "memory", r"\d+:(?:\S+,)?memory(?:,\S+)?")):
        own = re.search(f"^{kind}:/(.*)$", told, re.MULTILINE)
        group = root / own[1] if own else root
        folders |= dict.fromkeys((group, *group.parents))  # in a container the path may be the host's, and not be here
    found = [(_read(folder / name).strip(), folder) for folder in folders for name in _LIMITS]
    # No limit is ``max`` in version 2, and in version 1 a number beyond any machine, which ``min`` passes over.
    return [(int(text), folder) for text, folder in found if text.isdigit()]


def _gib(count: float) -> str:
    return f"{count / GIB:,.1f} GiB" if count < 1 << 70 else f"more than {1 << 40:,} GiB"


def _number(otherwise: int, name: str | tuple[str, ...], path: str | Path) -> int:
    """The number after a name, or one of several, at the start of a line."""
    found = [line.split()[1] for line in _read(path).splitlines() if line.startswith(name)]
    return int(found[0]) if found else otherwise


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
