"""A checkpoint is sealed while training goes on, by real ranks; it exists when it is sealed, not before."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.layouts import Layout, Training, save
from tests.distributed import run_ranks
from vqmoe_ds.checkpoint.io.store import MANIFEST, find_newest, read_best, verify, write_best
from vqmoe_ds.checkpoint.resume import sealing
from vqmoe_ds.checkpoint.resume.session import begin_save, choose
from vqmoe_ds.runtime.errors import TrainingHalted


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
    assert pending.done_within(0)
    with pytest.raises(TrainingHalted):  # at every look
        pending.finish()
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
    assert found.passed_over == [] and (tmp_path / "run" / ".saving-global_step0000001").is_dir()


def _flush_in_order(rank: int, world: int, folder: str) -> list[str]:
    training, path, seen = Training(folder, Layout(2, 1, world), rank), Path(folder) / "run", []
    sync, rename = os.fsync, os.replace

    def name(path: str) -> str:
        return path.removeprefix(str(Path(folder) / "run")).lstrip("/")

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        seen.append(f"sync {name(os.readlink(f'/proc/self/fd/{descriptor}'))}")

    def replace(old: Any, new: Any) -> None:
        rename(old, new)
        seen.append(f"rename {name(str(old))} {name(str(new))}")

    training.save(path)  # the folder gets its owner
    training.train(1)
    os.fsync, os.replace = fsync, replace
    save(training.session, path, 1, keep_last=0)
    return seen


@pytest.mark.parametrize("world", [1, 2])
def test_files_are_on_disk_before_their_folder_that_before_the_manifest_and_that_before_the_name(tmp_path, world):
    answers = run_ranks(world, _flush_in_order, str(tmp_path))
    saving, tag = ".saving-global_step0000001", "global_step0000001"
    seen = answers[0]
    flushed = {
        name for answer in answers for name in answer if name.startswith(f"sync {saving}/") and ".json" not in name
    }
    written = {f"sync {saving}/{path.name}" for path in (tmp_path / "run" / tag).iterdir() if path.name != MANIFEST}
    assert flushed == written and len(written) > 3
    order = [
        f"sync {saving}",
        f"sync {saving}/.{MANIFEST}.tmp",
        f"rename {saving}/.{MANIFEST}.tmp {saving}/{MANIFEST}",
        f"sync {saving}",
        f"rename {saving} {tag}",
        "sync ",
        "sync .latest.tmp",
        "rename .latest.tmp latest",
        "sync ",
    ]
    assert [name for name in seen if name not in flushed] == order
    assert max(seen.index(name) for name in flushed if name in seen) < seen.index(f"sync {saving}")
    assert set(answers[-1][: len(flushed)]) <= flushed, "the others flush files alone"


def _pass_a_damaged_one(rank: int, world: int, folder: str) -> list[Any]:
    """Steps 1 to 3 are saved, 2 and 3 are damaged, and the run goes on from 1 with ``keep_last=1``."""
    path = Path(folder) / "run"
    training = Training(folder, Layout(2, 1, world), rank)
    through = []
    for step in range(1, 4):
        through += training.train(1)
        save(training.session, path, step, keep_last=0)
    if rank == 0:
        for step in (2, 3):
            damaged = next((path / f"global_step000000{step}").glob("zero_pp_rank*"))
            damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    tag, passed_over = choose(path, "auto", rank)
    assert tag is not None and tag.name == "global_step0000001" and len(passed_over) == 2
    training.restore(tag)
    again, notes = training.train(1), []
    pending = begin_save(training.session, path, 2, keep_last=1)
    pending.finish()
    notes.append(pending.note)
    assert choose(path, str(path / "global_step0000002"), rank)[0] == path / "global_step0000002"
    return [
        through[1:2],
        again,
        notes,
        sorted(p.name for p in path.glob("*global_step*")),
        (path / "latest").read_text(),
    ]


@pytest.mark.parametrize("world", [1, 2])
def test_a_save_over_a_damaged_tag_sets_it_aside_and_is_not_retired_for_a_damaged_newer_one(tmp_path, world):
    answers = run_ranks(world, _pass_a_damaged_one, str(tmp_path))
    for through, again, _, names, latest in answers:
        assert again == through
        assert names == ["global_step0000002", "global_step0000003", "set-aside-global_step0000002"]
        assert latest == "global_step0000002"
    assert "is now set-aside-global_step0000002" in answers[0][2][0]
    found = find_newest(tmp_path / "run")
    assert found.path == tmp_path / "run" / "global_step0000002"
    assert set(verify(found.path)["files"]) == {path.name for path in found.path.iterdir()} - {MANIFEST}, (
        "nothing mixed"
    )
