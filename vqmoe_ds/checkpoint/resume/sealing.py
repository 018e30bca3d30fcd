"""Sealing a checkpoint in a thread, while training goes on: to disk, checksums, manifest, name, and what may go.

The ranks' threads talk over a gloo group of their own, so nothing gets between the collectives of training. The
checkpoint bears another name until it is sealed: a process that dies earlier leaves what was saved before. Files and
their folder are flushed to disk before the manifest is written, which after a power cut vouches for nothing else.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vqmoe_ds.checkpoint.io.store import checksums, files_of, known_whole, write_manifest
from vqmoe_ds.checkpoint.resume.retention import SAVING, owner_of, publish, remove, retired
from vqmoe_ds.runtime.errors import TrainingHalted, reason_of
from vqmoe_ds.runtime.files import sync_folder
from vqmoe_ds.runtime.ranks import Place, from_first, several_ranks
from vqmoe_ds.runtime.watchdog import of_communication


class Sealing:
    """Seals ``tag`` from now on. All ranks share the reading: every one takes some of the files.

    Args:
        tag: a checkpoint whose files all ranks have written to ``written_to(tag)``.
        state: what the manifest says beside the checksums.
        place: this rank's.
        keep_last: as ``run.keep_last``.
        keep_every: as ``run.keep_every``.
        on_sealed: called on rank 0 as soon as the checkpoint exists.

    Attributes:
        note: after ``finish``, a sentence for the user, on rank 0.
    """

    note: str | None = None

    def __init__(
        self,
        tag: Path,
        state: dict[str, Any],
        place: Place,
        keep_last: int,
        keep_every: int,
        on_sealed: Callable[[], None] | None = None,
    ) -> None:
        self.tag, self._state, self._place = tag, state, place
        self._keep_last, self._keep_every, self._on_sealed = keep_last, keep_every, on_sealed
        # Here and not in the thread: making a group is a collective of all ranks, in the order of the others.
        self._group = _own_group() if several_ranks() else None
        self._error: Exception | None = None
        # A daemon: it may wait for a lost peer for long, and the interpreter would wait for it at its end.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def done_within(self, seconds: float) -> bool:
        """Wait for at most ``seconds``; returns whether ``finish`` would now return, or raise, at once."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for the end.

        Raises:
            TrainingHalted: it failed; what was saved before is untouched.
        """
        self._thread.join()
        if self._error is not None:
            raise as_halted(self._error, self.tag)

    def _run(self) -> None:
        try:
            self._seal()
        except Exception as error:  # the training thread's to tell
            self._error = error

    def _seal(self) -> None:
        tag, saving, rank = self.tag, written_to(self.tag), self._place.rank
        sync_files(saving, self._place.local_rank, self._place.local_world_size)
        # A rank answers when its files are flushed: what rank 0 does below comes after the flushes of all.
        files = self._shared_checksums(saving, rank)
        if rank == 0:
            sync_folder(saving)
            write_manifest(saving, {"owner": owner_of(tag.parent), **self._state}, files)
            self.note = publish(saving, tag)
            # So that retired, below, does not read again what was hashed just now.
            known_whole(tag)
            if self._on_sealed is not None:
                self._on_sealed()
        # All ranks come here, also where nothing is to go: whether to read back is one answer for all.
        old = from_first(retired(tag.parent, self._keep_last, self._keep_every) if rank == 0 else [], self._group)
        # Now by another rank: what counts is what the next job will read.
        if old and self._shared_checksums(tag, rank + 1) != files:
            raise OSError("it reads back otherwise than it was written")
        if rank == 0:
            remove(old)
        if self._group is not None:
            dist.barrier(self._group)

    def _shared_checksums(self, folder: Path, rank: int) -> dict[str, Any]:
        """``checksums`` of all files, on all ranks."""
        if self._group is None:
            return checksums(folder)
        world = dist.get_world_size()
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, checksums(folder, rank % world, world), group=self._group)
        return dict(sorted((name, entry) for part in parts for name, entry in part.items()))


def written_to(tag: Path) -> Path:
    """Folder of the files of a tag until it is sealed."""
    return tag.with_name(SAVING + tag.name)


def sync_files(folder: Path, part: int, parts: int) -> None:
    """Flush every ``parts``-th file to disk. A host flushes what was written on it, so its ranks share all files."""
    for path in sorted(files_of(folder))[part::parts]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def as_halted(error: Exception, tag: Path) -> Exception:
    """The error to raise in training: the same where a peer was lost, else one that names the checkpoint."""
    if of_communication(error) or not isinstance(error, (OSError, RuntimeError)):
        return error
    reason = reason_of(error)
    halted = TrainingHalted(
        f"checkpoint {tag} could not be written ({reason}); earlier checkpoints in {tag.parent} are untouched; "
        "make room or bring it back, and start the same command again",
        local=True,
    )
    halted.__cause__ = error
    return halted


@functools.cache
def _own_group() -> Any:
    """Made once, by all ranks together."""
    return dist.new_group(backend="gloo")
