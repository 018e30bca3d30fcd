"""This process's place in the run, from whichever launcher started it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Global rank, ranks in all, rank on this machine and ranks on this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def find_place(local_rank: int | None = None) -> Place:
    """Read ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` as the deepspeed launcher and torchrun set them.

    A process started by plain ``python`` is a run of one rank; the variables are then set for it.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    environ = os.environ
    local = int(environ.get("LOCAL_RANK", local_rank or 0))
    world = int(environ["WORLD_SIZE"])
    local_world = int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or world)
    environ.setdefault("LOCAL_SIZE", str(local_world))  # without it DeepSpeed starts a process at every ZeRO-3 gather
    return Place(int(environ["RANK"]), world, local, local_world)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
