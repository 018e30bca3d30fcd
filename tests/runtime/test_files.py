"""Files that are there whole or not at all, and folders that cannot be made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vqmoe_ds.runtime.files import make_folder, why_missing, write_atomically


def test_a_name_that_is_no_utf8_does_not_end_a_report(tmp_path: Path) -> None:
    write_atomically(tmp_path / "report.md", "run of caf\udce9, ü\n")
    assert (tmp_path / "report.md").read_bytes() == "run of caf\\udce9, ü\n".encode()


def test_an_interrupted_writer_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "report.md", "old")

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as inside, pytest.raises(KeyboardInterrupt):
        inside.setattr(os, "fsync", interrupt)
        write_atomically(tmp_path / "report.md", "new")
    assert os.listdir(tmp_path) == ["report.md"] and (tmp_path / "report.md").read_bytes() == b"old"


def test_what_is_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "file").write_bytes(b"")
    assert why_missing(tmp_path / "link") == "is a link to gone, which does not exist"
    assert why_missing(tmp_path / "nothing") == "does not exist"
    for place, reason in (("link", "is a link to gone, which does not exist"), ("file", "is not a folder")):
        for below in ("", "runs/x"):
            with pytest.raises(OSError) as caught:
                make_folder(tmp_path / place / below)
            assert caught.value.strerror == f"{tmp_path / place} {reason}"
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
