"""Checkpoints that exist only when they are whole.

A tag is a folder of DeepSpeed's own files, so DeepSpeed's tools work on it, plus ``manifest.json`` with the size
and SHA-256 of every file and, in its first line, of itself. A tag without a manifest that verifies does not exist for
resume. What is listed is judged before it is opened: links, FIFOs and devices are never read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.runtime.files import kind_of, list_tree, open_regular, sha256_of, write_atomically

MANIFEST = "manifest.json"
FORMAT = 2
"""2: the first line holds the SHA-256 of the lines below. 1 has none, and is read as ever."""
LARGEST = 64 << 20
"""Bytes of a manifest, at most: that of 100,000 files has 15 million."""

# 18 digits fit 64 bits. Without ASCII, digits of other scripts would name steps, too: int() reads them.
_TAG = re.compile(r"global_step(\d{1,18})", re.ASCII)
# What write_sealed writes, byte for byte.
_FIRST_LINE = re.compile(rb'\{"checksum": "([0-9a-f]{64})",\n')
_whole: dict[Path, Any] = {}
"""Tags that this process has found whole, with the stamps of their files at that time."""


@dataclass(frozen=True)
class Found:
    """The checkpoint to resume from, and the newer ones that were passed over, each with the reason."""

    path: Path | None
    passed_over: list[str]


def tag_name(step: int) -> str:
    return f"global_step{step:07d}"


def step_of(name: str) -> int | None:
    """The step that a tag's name states; None: it is no tag's name."""
    match = _TAG.fullmatch(name)
    return int(match[1]) if match else None


def tags(folder: Path) -> list[Path]:
    """Paths in a folder that bear a tag's name, the highest step first; none where there is no such folder.

    Raises:
        CheckpointError: the folder cannot be listed.
    """
    try:
        found = [(step, name) for name in os.listdir(folder) if (step := step_of(name)) is not None]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}") from None
    return [folder / name for _, name in sorted(found, reverse=True)]


def files_of(tag: Path) -> list[Path]:
    """The regular files of a tag, but for its manifest; links are not followed."""
    paths = [tag / name for name in list_tree(tag, hidden=True)[0]]
    return [path for path in paths if path.name != MANIFEST and kind_of(path) == "a file"]


def checksums(tag: Path, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """Size and SHA-256, by name, of every ``parts``-th file of a tag from number ``part`` on, the largest first."""
    # Every rank has to come to the same order, or a file is hashed twice and another never; largest first, so that the
    # shares are alike.
    paths = sorted(files_of(tag), key=lambda path: (-path.stat().st_size, path))
    return {
        path.relative_to(tag).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(paths[part::parts])
    }


# ---------------------------------------------------------------- the manifest


def write_manifest(tag: Path, state: dict[str, Any], files: dict[str, Any] | None = None) -> None:
    """Seal a finished checkpoint: ``state`` (step, layout, configuration) and the ``checksums`` of all files."""
    write_sealed(tag / MANIFEST, {**state, "files": checksums(tag) if files is None else files})


def read_manifest(tag: Path) -> dict[str, Any]:
    """The manifest of a tag as ``write_manifest`` was given it; its files are not looked at.

    Raises:
        CheckpointError: none there, not readable, of a newer format, or not what was written.
    """
    try:
        return read_sealed(tag / MANIFEST)
    except FileNotFoundError:
        raise CheckpointError(f"{tag} has no {MANIFEST}: it was never finished") from None


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """A JSON object whose first line is the checksum of the lines below it."""
    # With an indent the opening brace has a line of its own, in the place of which the checksum's line comes.
    below = json.dumps({"format": FORMAT, **content}, indent=1).removeprefix("{\n") + "\n"
    checksum = hashlib.sha256(below.encode()).hexdigest()
    write_atomically(path, f'{{"checksum": "{checksum}",\n{below}')


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what ``write_sealed`` was given, or the JSON object of format 1 without a checksum.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it cannot be read, or is not what was written.
    """
    try:
        with open_regular(path) as file:
            raw = file.read(LARGEST + 1)
    # Left as it is: callers tell by it that there is no such file, which need not be damage.
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if len(raw) > LARGEST:
        raise CheckpointError(f"{path} is not a manifest: it has more than {LARGEST >> 20} MiB")
    line = _FIRST_LINE.match(raw)
    if line and hashlib.sha256(raw[line.end() :]).hexdigest() != line[1].decode():
        raise CheckpointError(f"{path} does not match its own checksum")
    try:
        content = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a manifest")
    content.pop("checksum", None)
    number = content.pop("format", 0)
    if not isinstance(number, int) or number > FORMAT:
        raise CheckpointError(
            f"{path.parent} is of format {str(number)[:20]}; this version reads up to {FORMAT}: update vqmoe_ds"
        )
    if number == FORMAT and not line:  # no single flipped bit makes a 1 of it
        raise CheckpointError(f"{path} has lost the checksum of its own")
    return content


# ---------------------------------------------------------------- what is whole


def verify(tag: Path) -> dict[str, Any]:
    """The manifest of a tag whose files are all there and unchanged.

    Raises:
        CheckpointError: naming the first file that is missing, cut short or altered.
    """
    manifest = read_manifest(tag)
    try:
        # Before the files are read: what is written meanwhile gives other stamps, so that it is read again.
        stamps = _stamps(tag)
    except OSError as error:
        raise CheckpointError(f"{tag} cannot be listed: {error.strerror}") from None
    wrong = _malformed(manifest)
    if wrong is not None:
        raise CheckpointError(f"{tag / MANIFEST} is damaged: {wrong} is not what this trainer writes")
    for name, expected in manifest["files"].items():
        damage = _damage(tag / name, expected)
        if damage is not None:
            raise CheckpointError(f"{tag}: {name} {damage}")
    _whole[tag.absolute()] = stamps
    return manifest


def known_whole(tag: Path) -> None:
    """Note that a tag has just been read or written whole, so that it need not be read again to know it."""
    _whole[tag.absolute()] = _stamps(tag)


def why_not_whole(tag: Path) -> str | None:
    """Why a tag does not verify; None: it does, or did in this process, and nothing touched it since."""
    try:
        if kind_of(tag) != "a folder":
            return f"{tag} is {kind_of(tag)}, not a folder"
        if _whole.get(tag.absolute()) != _stamps(tag):
            verify(tag)
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{tag} cannot be read: {error.strerror}"
    return None


def find_newest(folder: Path) -> Found:
    """The newest tag under ``folder`` whose manifest verifies."""
    passed_over: list[str] = []
    for tag in tags(folder):
        reason = why_not_whole(tag)
        if reason is None:
            return Found(tag, passed_over)
        passed_over.append(reason)
    return Found(None, passed_over)


def _malformed(manifest: dict[str, Any]) -> str | None:
    """The first entry that has not the form of a manifest's: one of format 1 may have any."""
    for key, kind in {"step": int, "samples": int, "layout": dict, "config": dict, "files": dict}.items():
        # The first manifests have no samples, for which consumed_samples has a default.
        value = manifest.get(key, 0 if key == "samples" else None)
        if not isinstance(value, kind) or (isinstance(value, int) and value < 0):
            return key
    for name, entry in manifest["files"].items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not isinstance(entry, dict) or {*entry} != {"bytes", "sha256"}:
            return f"files.{name[:80]}"
    return None


def _damage(path: Path, expected: dict[str, Any]) -> str | None:
    """The damage of a file, as the end of a sentence that its name begins; None: it is sound."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected["bytes"]:
                return f"has {size} bytes instead of {expected['bytes']}"
            same = hashlib.file_digest(file, "sha256").hexdigest() == expected["sha256"]
            return None if same else "does not match its checksum"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError:
        return "cannot be the name of a file"


def _stamps(tag: Path) -> list[tuple[Any, ...]]:
    """Stamps that change when a file of a tag is touched: names, sizes, times."""
    files, others = list_tree(tag, hidden=True)
    paths = sorted(tag / name for name in (*files, *others))
    # mtime can be set back, as cp -p and rsync do; ctime cannot.
    return [(path, (at := os.lstat(path)).st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino) for path in paths]


# ---------------------------------------------------------------- the best one


def read_best(folder: Path) -> tuple[str | None, float]:
    """Name and validation loss of the best checkpoint so far; (None, infinity): none is known."""
    try:
        return best_of(folder)
    except CheckpointError:
        return None, math.inf


def best_of(folder: Path) -> tuple[str | None, float]:
    """``read_best``, of a mark that is absent or readable.

    Raises:
        CheckpointError: there is a mark that cannot be read, so that any tag may be the best.
    """
    try:
        best = read_sealed(folder / "best")
    except (FileNotFoundError, NotADirectoryError):
        return None, math.inf
    tag, loss = best.get("tag"), best.get("validation_loss")
    if {*best} != {"tag", "validation_loss"} or not isinstance(tag, str) or step_of(tag) is None:
        raise CheckpointError(f"{folder / 'best'} names no checkpoint")
    if not isinstance(loss, (int, float)):
        raise CheckpointError(f"{folder / 'best'} has no validation loss")
    return tag, float(loss)


def forget_best_after(folder: Path, step: int) -> None:
    """Drop the mark of a best checkpoint that the run, resumed at ``step``, has not reached: it is found again."""
    best = read_best(folder)[0]
    if best is not None and (step_of(best) or 0) > step:
        (folder / "best").unlink()


def write_best(folder: Path, tag: str, validation_loss: float) -> None:
    write_sealed(folder / "best", {"tag": tag, "validation_loss": validation_loss})
