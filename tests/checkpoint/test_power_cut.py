"""Power cuts at random moments of saving: the newest checkpoint that was reported sealed is there, whole.

The run folder is on an ext4 file system in a file. A cut is ext4's own shutdown (``EXT4_IOC_SHUTDOWN``) without a flush
of its journal: from then on nothing reaches the file, and what had not been flushed is gone at the next mount.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.layouts import Layout, Training
from tests.distributed import run_ranks
from vqmoe_ds.checkpoint.io.store import find_newest, step_of, tags, verify
from vqmoe_ds.checkpoint.resume import sealing
from vqmoe_ds.checkpoint.resume.session import begin_save
from vqmoe_ds.runtime.errors import CheckpointError, TrainingHalted

MINUTES = float(os.environ.get("VQMOE_FUZZ_MINUTES", "0"))
CUTS = 5
"""Without VQMOE_FUZZ_MINUTES."""
SHUTDOWN, NO_FLUSH = 0x8004587D, 2
"""``EXT4_IOC_SHUTDOWN`` and ``EXT4_GOING_FLAGS_NOLOGFLUSH`` (Linux, fs/ext4/ext4.h)."""
HARDEST = "data=writeback,noauto_da_alloc,commit=300"
"""ext4 flushes by itself as little as it can: as file systems without its favours do."""
MOUNTS = [HARDEST, "data=ordered,commit=300", "data=ordered,commit=1", "data=writeback,commit=1", "data=journal"]


@dataclass
class Disk:
    """An ext4 file system of 96 MiB; ``runs`` is a folder in it."""

    folder: Path

    def __post_init__(self) -> None:
        self.image, self.point, self.mounted = self.folder / "image", self.folder / "disk", False
        self.point.mkdir()
        with open(self.image, "wb") as file:
            file.truncate(96 << 20)
        _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", self.image)

    @property
    def runs(self) -> Path:
        return self.point / "runs"

    def mount(self, options: str) -> None:
        _run("mount", "-o", f"loop,{options}", self.image, self.point)
        self.mounted = True

    def unmount(self) -> None:
        if self.mounted:
            _run("umount", self.point)
            self.mounted = False

    def cut(self) -> None:
        descriptor = os.open(self.point, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", NO_FLUSH))
        finally:
            os.close(descriptor)


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    missing = [name for name in ("mkfs.ext4", "mount", "umount") if shutil.which(name) is None]
    if os.geteuid() or missing:
        pytest.skip(f"needs root and mkfs.ext4, to mount a file system of its own ({missing or 'not root'})")
    try:
        made = Disk(tmp_path)
        made.mount(HARDEST)
    except OSError as error:
        pytest.skip(f"a file system in a file cannot be had here: {error}")
    try:
        made.runs.mkdir()
        os.sync()  # the folder itself is no subject of these tests
        made.unmount()
        yield made
    finally:
        made.unmount()


# ---------------------------------------------------------------- a life from mount to cut


@dataclass(frozen=True)
class Cut:
    """When the power goes: before a flush or a rename, counted from a save on, or some time after that."""

    save: int
    call: int
    """A save makes some twenty of them."""
    delay: float
    """Seconds."""

    @classmethod
    def any(cls, chance: random.Random) -> Cut:
        return cls(chance.randint(1, 5), chance.randint(1, 24), chance.choice([0.0, 0.0, chance.uniform(0, 0.1)]))

    def arm(self, disk: Disk) -> None:
        """Count from now on."""
        left = self.call

        def counted(function: Callable[..., None]) -> Callable[..., None]:
            def call(*args: Any) -> None:
                nonlocal left
                left -= 1
                if left == 0 and self.delay:
                    threading.Timer(self.delay, disk.cut).start()
                elif left == 0:
                    disk.cut()
                function(*args)

            return call

        os.fsync, os.replace = counted(os.fsync), counted(os.replace)


@dataclass
class Life:
    """What one process did until the power went."""

    resumed: tuple[int, str] | None = None
    """Step and weights that it began with."""
    weights: dict[int, str] = field(default_factory=dict)
    """By step, of what was saved."""
    sealed: list[int] = field(default_factory=list)
    """Steps reported as sealed."""
    ended: str = "by itself"


def _weights(training: Training) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(training.session.model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _live(rank: int, world: int, disk: Disk, cut: Cut, break_it: Callable[[], None] | None) -> Life:
    """Resume, train and save until the power goes; the disk alone decides when that is noticed."""
    if break_it is not None:
        break_it()
    life, newest = Life(), find_newest(disk.runs).path
    training = Training(str(disk.folder), Layout(2, 1, 1), rank)
    if newest is not None:
        training.restore(newest)
        life.resumed = (training.step, _weights(training))
    for number in range(1, cut.save + 200):
        training.train(1)
        step = training.step
        life.weights[step] = _weights(training)
        if number == cut.save:
            cut.arm(disk)
        try:
            begin_save(
                *(training.session, disk.runs, step, 2), on_sealed=lambda step=step: life.sealed.append(step)
            ).finish()
        except (TrainingHalted, OSError) as error:
            life.ended = str(error)
            break
    return life


class Record:
    """What must be on the disk, as the lives so far reported it."""

    def __init__(self) -> None:
        self.newest, self.weights = 0, dict[int, str]()

    def live(self, disk: Disk, cut: Cut, options: str, break_it: Callable[[], None] | None = None) -> Life:
        """One life, a cut, and the check of what came through."""
        disk.mount(options)
        (life,) = run_ranks(1, _live, disk, cut, break_it, timeout=60)
        disk.unmount()
        assert life.ended != "by itself", "the power went, and saving noticed nothing"
        if life.resumed is not None:
            step, weights = life.resumed
            assert self.weights[step] == weights, f"step {step} holds other weights than were saved"
        for step, weights in life.weights.items():
            assert self.weights.setdefault(step, weights) == weights, f"step {step} came out otherwise after a resume"
        self.newest = max([self.newest, *life.sealed])
        disk.mount("data=ordered")
        self.check(disk.runs)
        disk.unmount()
        return life

    def check(self, runs: Path) -> None:
        """Every tag is whole, the last that was reported sealed is among them, and ``latest`` names one."""
        found = tags(runs)
        for tag in found:
            verify(tag)
        steps = [step_of(tag.name) for tag in found]
        assert max(steps, default=0) >= self.newest, f"step {self.newest} was reported sealed; there are {steps}"
        if self.newest:
            assert (runs / "latest").read_text() in [tag.name for tag in found]


@pytest.mark.timeout(300 + 60 * MINUTES)
def test_the_newest_sealed_checkpoint_outlives_power_cuts_at_random_moments(disk, capsys):
    chance, record, tried, sealed = random.Random(), Record(), 0, 0
    seed = chance.randrange(1 << 32) if MINUTES else 0
    chance.seed(seed)
    deadline = time.monotonic() + 60 * MINUTES
    while tried < CUTS or time.monotonic() < deadline:
        options = chance.choice(MOUNTS)
        try:
            life = record.live(disk, Cut.any(chance), options)
        except (AssertionError, CheckpointError) as error:
            raise AssertionError(f"cut {tried + 1} of seed {seed}, mounted with {options}: {error}") from error
        tried, sealed = tried + 1, sealed + len(life.sealed)
    assert sealed >= tried, "too few checkpoints were sealed for the cuts to say anything"
    with capsys.disabled():
        print(f"\npower cuts: {tried} tried, 0 failed, {sealed} checkpoints sealed (seed {seed})")


def _flush_nothing() -> None:
    os.fsync = lambda descriptor: None


def _flush_no_files() -> None:
    sealing.sync_files = lambda *args: None


@pytest.mark.parametrize("break_it", [_flush_nothing, _flush_no_files])
def test_without_the_flushes_a_power_cut_loses_what_was_sealed(disk, break_it):
    """Or else the test above could not fail."""
    with pytest.raises((AssertionError, CheckpointError), match="was reported sealed|has 0 bytes|is missing|checksum"):
        Record().live(disk, Cut(4, 3, 0.0), HARDEST, break_it)
