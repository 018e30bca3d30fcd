"""A checkpoint exists only when it is whole."""

import json

import pytest

from vqmoe_ds.checkpoint.store import (
    MANIFEST,
    find_newest,
    read_best,
    remove,
    retired,
    tag_name,
    verify,
    write_best,
    write_manifest,
)
from vqmoe_ds.errors import CheckpointError


def make(folder, step, text="weights"):
    tag = folder / tag_name(step)
    tag.mkdir(parents=True)
    (tag / "a.pt").write_text(text)
    (tag / "b.pt").write_text("more " + text)
    write_manifest(tag, {"step": step})
    return tag


def test_the_newest_whole_tag_is_found_and_the_others_are_named_with_the_reason(tmp_path):
    good = make(tmp_path, 10)
    (make(tmp_path, 20) / "a.pt").unlink()
    (make(tmp_path, 30) / "a.pt").write_text("short")
    (make(tmp_path, 40) / "b.pt").write_text("more WEIGHTS")
    (make(tmp_path, 50) / MANIFEST).unlink()
    (make(tmp_path, 60) / MANIFEST).write_text('{"format": 1, "fi')
    newer = make(tmp_path, 70) / MANIFEST
    newer.write_text(json.dumps({**json.loads(newer.read_text()), "format": 2}))
    found = find_newest(tmp_path)
    assert found.path == good
    reasons = "\n".join(found.passed_over)
    for part in ("format 2", "cannot be read", "never finished", "checksum", "bytes instead of", "is missing"):
        assert part in reasons
    assert len(found.passed_over) == 6


def test_verify_accepts_what_was_written(tmp_path):
    assert verify(make(tmp_path, 10))["step"] == 10


def test_an_empty_folder_has_nothing(tmp_path):
    assert find_newest(tmp_path).path is None
    assert find_newest(tmp_path / "none").path is None


def test_the_newest_sealed_tags_stay_and_nothing_unsealed_is_touched(tmp_path):
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    (tmp_path / tag_name(4) / MANIFEST).unlink()
    remove(retired(tmp_path, 2))
    assert sorted(p.name for p in tmp_path.iterdir()) == [tag_name(2), tag_name(3), tag_name(4)]
    assert retired(tmp_path, 0) == []


def test_every_mth_and_the_best_stay_for_good(tmp_path):
    for step in range(1, 9):
        make(tmp_path, step)
    assert read_best(tmp_path) == (None, float("inf"))
    write_best(tmp_path, tag_name(2), 1.5)
    assert read_best(tmp_path) == (tag_name(2), 1.5)
    remove(retired(tmp_path, 1, keep_every=3))
    assert sorted(p.name for p in tmp_path.glob("global*")) == [tag_name(step) for step in (2, 3, 6, 8)]


def test_a_manifest_is_replaced_whole(tmp_path):
    tag = make(tmp_path, 1)
    (tag / "c.pt").write_text("c")
    write_manifest(tag, {"step": 1})
    assert set(verify(tag)["files"]) == {"a.pt", "b.pt", "c.pt"}
    assert not list(tag.glob(".*.tmp"))
    with pytest.raises(CheckpointError, match=r"c\.pt is missing"):
        (tag / "c.pt").unlink()
        verify(tag)
