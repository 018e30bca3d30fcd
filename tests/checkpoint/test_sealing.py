"""A checkpoint is sealed while training goes on, by real ranks; it exists when it is sealed, not before."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.layouts import Layout, Training
from tests.distributed import run_ranks
from vqmoe_ds.checkpoint import sealing
from vqmoe_ds.checkpoint.session import begin_save
from vqmoe_ds.checkpoint.store import MANIFEST, find_newest, read_best, verify, write_best
from vqmoe_ds.errors import TrainingHalted


def held_back(may_read: threading.Event) -> Any:
    """Checksums that wait until they may."""
    read = sealing.checksums

    def checksums(*args: Any) -> Any:
        assert may_read.wait(60)
        return read(*args)

    return checksums


def _seal_slowly(rank: int, world: int, folder: str) -> dict[str, Any]:
    training, path, may_read = Training(folder, Layout(2, world, world), rank), Path(folder) / "run", threading.Event()
    training.train(1)
    old = training.save(path)
    training.train(1)
    sealing.checksums = held_back(may_read)
    pending = begin_save(
        training.session, path, 2, keep_last=1, on_sealed=lambda: write_best(path, "global_step0000002", 1)
    )
    through = training.train(2)  # collectives of training, and those of the thread that waits
    meanwhile = {
        "newest": find_newest(path).path,
        "sealed": (pending.tag / MANIFEST).exists(),
        "best": read_best(path)[0],
    }
    may_read.set()
    pending.finish()
    verify(pending.tag)
    training.restore(pending.tag)
    again = training.train(2)
    return {"old": old, "tag": pending.tag, "through": through, "again": again, "left": old.exists(), **meanwhile}


@pytest.mark.parametrize("world", [1, 2])
def test_training_goes_on_while_a_checkpoint_is_sealed(tmp_path, world):
    for answer in run_ranks(world, _seal_slowly, str(tmp_path)):
        assert answer["newest"] == answer["old"] and not answer["sealed"] and answer["best"] is None
        assert answer["again"] == answer["through"], "what was saved is the state before the steps in between"
        assert not answer["left"], "the old one goes when the new one has been read back"
    assert read_best(tmp_path / "run")[0] == "global_step0000002"
    assert (tmp_path / "run" / "latest").read_text() == "global_step0000002"


def _fail(rank: int, world: int, folder: str) -> str:
    training, path = Training(folder, Layout(0, 1, 1), rank), Path(folder) / "run"
    training.save(path)
    training.train(1)

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    sealing.checksums = full
    pending = begin_save(training.session, path, 1, keep_last=1)
    with pytest.raises(TrainingHalted, match="No space left") as error:
        pending.finish()
    with pytest.raises(TrainingHalted):  # at every look
        pending.check()
    return str(error.value)


def test_a_failure_in_between_is_told_and_leaves_what_was_there(tmp_path):
    (sentence,) = run_ranks(1, _fail, str(tmp_path))
    assert "global_step0000001 could not be written" in sentence and "earlier checkpoints" in sentence
    assert find_newest(tmp_path / "run").path == tmp_path / "run" / "global_step0000000"


def _be_killed(folder: str) -> None:
    def work(rank: int, world: int) -> None:
        training, path = Training(folder, Layout(0, 1, 1), rank), Path(folder) / "run"
        training.save(path)
        training.train(1)
        sealing.checksums = held_back(threading.Event())
        begin_save(training.session, path, 1, keep_last=1)
        training.train(1)
        (Path(folder) / "reached").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    run_ranks(1, work)


def test_killed_while_it_is_sealed_the_run_goes_on_from_the_one_before(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_be_killed, args=(str(tmp_path),))
    process.start()
    process.join(100)
    assert (tmp_path / "reached").exists()
    found = find_newest(tmp_path / "run")
    assert found.path == tmp_path / "run" / "global_step0000000"
    assert len(found.passed_over) == 1 and "never finished" in found.passed_over[0]
