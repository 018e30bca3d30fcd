"""Sealing a checkpoint in a thread, while training goes on: checksums, manifest, and which older ones may go.

The ranks' threads talk over a gloo group of their own, so nothing gets between the collectives of training. Until the
manifest is there the checkpoint does not exist: a process that dies earlier leaves what was saved before.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vqmoe_ds.checkpoint.store import checksums, remove, retired, write_manifest
from vqmoe_ds.errors import TrainingHalted
from vqmoe_ds.files import write_atomically
from vqmoe_ds.train.ranks import from_first
from vqmoe_ds.train.watchdog import of_communication


class Sealing:
    """Seals ``tag`` from now on. All ranks share the reading: every one takes some of the files.

    Args:
        tag: a checkpoint whose files all ranks have written.
        state: what the manifest says beside the checksums.
        rank: this rank.
        keep_last: as ``run.keep_last``.
        keep_every: as ``run.keep_every``.
        on_sealed: called on rank 0 as soon as the checkpoint exists.
    """

    def __init__(
        self,
        tag: Path,
        state: dict[str, Any],
        rank: int,
        keep_last: int,
        keep_every: int,
        on_sealed: Callable[[], None] | None = None,
    ) -> None:
        self.tag, self._state, self._rank = tag, state, rank
        self._keep_last, self._keep_every, self._on_sealed = keep_last, keep_every, on_sealed
        self._group = _own_group() if _several() else None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Return at once.

        Raises:
            TrainingHalted: it failed; what was saved before is untouched.
        """
        if self._error is not None:
            raise as_halted(self._error, self.tag)

    def finish(self) -> None:
        """Wait for the end; raises as ``check``."""
        self._thread.join()
        self.check()

    def _run(self) -> None:
        try:
            self._seal()
        except Exception as error:  # the training thread's to tell
            self._error = error

    def _seal(self) -> None:
        tag, first = self.tag, self._rank == 0
        files = self._shared_checksums(self._rank)
        if first:
            write_manifest(tag, self._state, files)
            write_atomically(tag.parent / "latest", tag.name)
            if self._on_sealed is not None:
                self._on_sealed()
        old = from_first(retired(tag.parent, self._keep_last, self._keep_every) if first else [], self._group)
        # Now by another rank: what counts is what the next job will read.
        if old and self._shared_checksums(self._rank + 1) != files:
            raise OSError("it reads back otherwise than it was written")
        if first:
            remove(old)
        if self._group is not None:
            dist.barrier(self._group)

    def _shared_checksums(self, rank: int) -> dict[str, Any]:
        """``checksums`` of all files, on all ranks."""
        if self._group is None:
            return checksums(self.tag)
        world = dist.get_world_size()
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, checksums(self.tag, rank % world, world), group=self._group)
        return dict(sorted((name, entry) for part in parts for name, entry in part.items()))


def as_halted(error: Exception, tag: Path) -> Exception:
    """What training tells its user; the error itself where a peer was lost, which is not the checkpoint's fault."""
    if of_communication(error) or not isinstance(error, (OSError, RuntimeError)):
        return error
    reason = str(error).splitlines()[0]
    halted = TrainingHalted(
        f"checkpoint {tag} could not be written ({reason}); earlier checkpoints in {tag.parent} are untouched; "
        "free some space and start again to resume from the newest"
    )
    halted.local = True
    halted.__cause__ = error
    return halted


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


@functools.cache
def _own_group() -> Any:
    """Made once, by all ranks together."""
    return dist.new_group(backend="gloo")
