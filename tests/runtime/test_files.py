"""Files that are there whole or not at all, and folders that cannot be made."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from vqmoe_ds.data import stdlib_text
from vqmoe_ds.data.recipes import fetch_recipe
from vqmoe_ds.runtime.errors import ConfigError, DataError
from vqmoe_ds.runtime.files import check_target, make_folder, user_cache, why_missing, write_atomically


def test_a_name_that_is_no_utf8_does_not_end_a_report_and_bytes_stay(tmp_path: Path) -> None:
    write_atomically(tmp_path / "report.md", "run of caf\udce9, ü\n")
    assert (tmp_path / "report.md").read_bytes() == "run of caf\\udce9, ü\n".encode()
    write_atomically(tmp_path / "report.md", b"\xff\r\n")
    assert (tmp_path / "report.md").read_bytes() == b"\xff\r\n"


def test_what_is_no_file_is_no_target(tmp_path: Path) -> None:
    """A rename would put a file in its place, also in that of a device."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    for path in ("file", "new"):
        check_target("--json", tmp_path / path)
    cases = {"link": "is a link", "fifo": "is a FIFO", "file/x": "lies in no folder", "n" * 250: "has too long a name"}
    for path, reason in (cases | {"/dev/null": "is a device"}).items():
        with pytest.raises(ConfigError, match=f"--json .* {reason}.*; name a file in a folder that exists"):
            check_target("--json", tmp_path / path)


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


def test_a_user_without_a_home_has_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(stdlib_text, "build_stdlib_text", lambda: b"some text")
    assert stdlib_text.stdlib_text() == b"some text" and os.listdir(user_cache())
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    monkeypatch.setattr(stdlib_text, "build_stdlib_text", lambda: b"another")
    assert stdlib_text.stdlib_text() == b"another"
    with pytest.raises(DataError, match="sotu cannot be kept in ~/.cache .there is no home.; .* --cache_dir"):
        fetch_recipe("sotu")
