"""What a folder of checkpoints keeps, and that a kill between any two steps loses nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.checkpoint.test_store import STATE, make
from vqmoe_ds.checkpoint.io.store import MANIFEST, find_newest, read_best, tag_name, write_best, write_manifest
from vqmoe_ds.checkpoint.resume import retention
from vqmoe_ds.checkpoint.resume.retention import clear_leftovers, owner_of, publish, remove, retired
from vqmoe_ds.checkpoint.resume.sealing import written_to


def ours(folder, step, text="weights"):
    return make(folder, step, text, {**STATE, "owner": owner_of(folder)})


def steps(folder):
    return [int(path.name[11:]) for path in sorted(folder.glob("global_step*"))]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_the_newest_stay_and_what_is_not_sealed_is_not_touched(folder):
    for step in (1, 2, 3, 4):
        ours(folder, step)
    (folder / tag_name(4) / MANIFEST).unlink()
    remove(retired(folder, 2))
    assert steps(folder) == [2, 3, 4]
    assert retired(folder, 0) == []


def test_every_mth_and_the_best_stay_for_good(folder):
    for step in range(1, 9):
        ours(folder, step)
    assert read_best(folder) == (None, float("inf"))
    write_best(folder, tag_name(2), 1.5)
    assert read_best(folder) == (tag_name(2), 1.5)
    remove(retired(folder, 1, keep_every=3))
    assert steps(folder) == [2, 3, 6, 8]


def test_damaged_tags_of_higher_steps_neither_count_nor_go(folder):
    for step in (1, 2, 3, 8, 9):
        ours(folder, step)
    (folder / tag_name(9) / "a.pt").write_text("WEIGHTS")  # of the same size
    (folder / tag_name(8) / "a.pt").unlink()
    (folder / tag_name(1) / "b.pt").write_text("cut")
    assert retired(folder, 1) == [folder / tag_name(2)]
    assert retired(folder, 2) == []


def test_the_tag_that_latest_names_stays_whatever_is_newer(folder):
    for step in (2, 8, 9):
        ours(folder, step)
    (folder / "latest").write_text(tag_name(2))
    assert retired(folder, 1) == [folder / tag_name(8)]


def test_while_the_mark_of_the_best_cannot_be_read_nothing_goes(folder):
    for step in (1, 2, 3):
        ours(folder, step)
    assert len(retired(folder, 1)) == 2
    (folder / "best").write_text('{"tag"')
    assert retired(folder, 1) == []


def test_what_no_run_in_this_folder_wrote_neither_counts_nor_goes(folder, tmp_path):
    make(folder, 1)  # no owner, as before there was one
    make(folder, 2, state={**STATE, "owner": "0" * 32})
    os.rename(ours(folder, 77), folder / tag_name(3))  # another step's
    (ours(folder, 4) / "notes.txt").write_text("mine")
    os.mkfifo(ours(folder, 5) / "pipe")
    (folder / tag_name(6)).symlink_to(ours(tmp_path, 6))
    os.mkfifo(folder / tag_name(7))
    (folder / "global_step0000008.bak").mkdir()
    (folder / "global_stepx").write_text("")
    for step in (20, 21, 22):
        ours(folder, step)
    assert retired(folder, 2) == [folder / tag_name(20)]
    (folder / "owner").write_text("damaged")
    assert retired(folder, 1) == []


def test_a_run_reads_each_older_tag_once_and_only_where_it_depends_on_it(folder, monkeypatch):
    for step in range(1, 5):
        ours(folder, step)
    read = []
    whole = retention.why_not_whole
    monkeypatch.setattr(retention, "why_not_whole", lambda tag: read.append(tag.name) or whole(tag))
    retired(folder, 4)
    assert read == []
    write_best(folder, tag_name(1), 1.0)
    retired(folder, 2)
    assert tag_name(1) not in read


def test_leftovers_of_a_kill_are_cleared_and_nothing_else(folder, tmp_path):
    ours(tmp_path, 5)
    for name in (".saving-global_step0000004", ".removing-global_step0000002", ".removing-global_step0000002-2"):
        (folder / name).mkdir()
        (folder / name / "a.pt").write_text("half")
        os.mkfifo(folder / name / "pipe")
    (folder / ".saving-global_step0000005").symlink_to(tmp_path / tag_name(5))
    (folder / ".removing-notes").mkdir()
    os.mkfifo(folder / ".saving-global_step0000006")
    (folder / "set-aside-global_step0000001").mkdir()
    clear_leftovers(folder)
    left = {".saving-global_step0000005", ".removing-notes", ".saving-global_step0000006"}
    assert {path.name for path in folder.iterdir()} == {*left, "set-aside-global_step0000001"}
    assert find_newest(tmp_path).path == tmp_path / tag_name(5)


# ---------------------------------------------------------------- kills


class Killed(BaseException):
    pass


def sealed_beside(folder: Path, step: int) -> Path:
    """A checkpoint that is complete but for its name."""
    saving = written_to(folder / tag_name(step))
    saving.mkdir()
    (saving / "a.pt").write_text("new")
    write_manifest(saving, {**STATE, "step": step, "owner": owner_of(folder)})
    return saving


def _latest_is_there(folder: Path) -> bool:
    return not (folder / "latest").exists() or (folder / (folder / "latest").read_text() / MANIFEST).exists()


CALLS = ((os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "fsync"))


@pytest.mark.parametrize("before", ["nothing", "whole", "damaged"])
def test_killed_before_any_call_latest_names_a_tag_that_is_there_and_an_older_one_stays(tmp_path, before, monkeypatch):
    """The whole of publishing step 8 and retiring step 2, stopped before each call that changes the disk, in turn."""
    for limit in range(100):
        folder, seen = tmp_path / str(limit), []
        folder.mkdir()
        for step in (2, 4):
            ours(folder, step)
        (folder / "latest").write_text(tag_name(4))
        if before != "nothing":
            ours(folder, 8)
            (folder / "latest").write_text(tag_name(8))
        if before == "damaged":
            (folder / tag_name(8) / "a.pt").write_text("WEIGHTS")
        saving = sealed_beside(folder, 8)

        def counted(call, seen=seen, limit=limit):
            def replacement(*args, **kwargs):
                if len(seen) == limit:
                    raise Killed
                seen.append(call)
                return call(*args, **kwargs)

            return replacement

        with monkeypatch.context() as patch:
            for module, name in CALLS:
                patch.setattr(module, name, counted(getattr(module, name)))
            try:
                note = publish(saving, folder / tag_name(8))
                remove(retired(folder, 1))
                ended = True
            except Killed:
                ended = False
        assert _latest_is_there(folder), limit
        assert find_newest(folder).path in {folder / tag_name(4), folder / tag_name(8)}
        if ended:
            break
        clear_leftovers(folder)  # as the next save does
        assert not list(folder.glob(".removing-*"))
    assert ended and limit > 5
    assert (folder / tag_name(8) / "a.pt").read_text() == "new" and not (folder / tag_name(8) / "b.pt").exists()
    assert (folder / "latest").read_text() == tag_name(8)
    assert steps(folder) == [8]
    aside = folder / "set-aside-global_step0000008"
    assert aside.exists() == (before == "damaged")
    if before == "damaged":
        assert (aside / "a.pt").read_text() == "WEIGHTS"
        assert "is now set-aside-global_step0000008" in note and "does not match its checksum" in note


@pytest.mark.parametrize("kind", ["fifo", "link", "file", "unfinished"])
def test_whatever_bears_the_name_of_a_new_tag_is_set_aside_untouched(folder, tmp_path, kind):
    tag = folder / tag_name(8)
    elsewhere = ours(tmp_path, 8)
    make_it = {"fifo": os.mkfifo, "link": lambda p: p.symlink_to(elsewhere), "file": Path.touch, "unfinished": os.mkdir}
    make_it[kind](tag)
    (folder / "set-aside-global_step0000008").mkdir()  # the first name is taken
    assert "is now set-aside-global_step0000008-2" in publish(sealed_beside(folder, 8), tag)
    assert os.path.lexists(folder / "set-aside-global_step0000008-2")
    assert find_newest(folder).path == tag and find_newest(tmp_path).path == elsewhere
