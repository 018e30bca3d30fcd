"""Checkpoints that exist only when they are whole.

A tag is a folder of DeepSpeed's own files, so DeepSpeed's tools work on it, plus ``manifest.json`` with the size
and SHA-256 of every file, written last by rename. A tag without a manifest that verifies does not exist for
resume; the pointer ``latest`` moves, and old tags go, only after the new manifest is in place.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqmoe_ds.errors import CheckpointError
from vqmoe_ds.files import sha256_of, write_atomically

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Found:
    """The checkpoint to resume from, and the newer ones that were passed over, each with the reason."""

    path: Path | None
    passed_over: list[str]


def tag_name(step: int) -> str:
    return f"global_step{step:07d}"


def checksums(tag: Path, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """Size and SHA-256, by name, of every ``parts``-th file of a tag from number ``part`` on, the largest first."""
    paths = [path for path in tag.rglob("*") if path.is_file() and path.name != MANIFEST]
    paths.sort(key=lambda path: (-path.stat().st_size, path))
    return {
        path.relative_to(tag).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(paths[part::parts])
    }


def write_manifest(tag: Path, state: dict[str, Any], files: dict[str, Any] | None = None) -> None:
    """Seal a finished checkpoint: ``state`` (step, layout, configuration) and the ``checksums`` of all files."""
    files = checksums(tag) if files is None else files
    write_atomically(tag / MANIFEST, json.dumps({"format": FORMAT, **state, "files": files}, indent=1))


def read_manifest(tag: Path) -> dict[str, Any]:
    """The manifest of a tag, unverified.

    Raises:
        CheckpointError: none there, or not readable.
    """
    try:
        manifest: dict[str, Any] = json.loads((tag / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{tag} has no {MANIFEST}: it was never finished") from None
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{tag / MANIFEST} cannot be read: {error}") from None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{tag / MANIFEST} is not a manifest")
    if manifest.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"{tag} is of format {manifest['format']}; this version reads up to {FORMAT}: update vqmoe_ds"
        )
    return manifest


def verify(tag: Path) -> dict[str, Any]:
    """The manifest of a tag whose files are all there and unchanged.

    Raises:
        CheckpointError: naming the first file that is missing, cut short or altered.
    """
    manifest = read_manifest(tag)
    for name, expected in manifest["files"].items():
        path = tag / name
        if not path.is_file():
            raise CheckpointError(f"{tag}: {name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{tag}: {name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        if sha256_of(path) != expected["sha256"]:
            raise CheckpointError(f"{tag}: {name} does not match its checksum")
    return manifest


def find_newest(folder: Path) -> Found:
    """The newest tag under ``folder`` whose manifest verifies."""
    passed_over: list[str] = []
    for tag in sorted(folder.glob("global_step*"), reverse=True):
        try:
            verify(tag)
            return Found(tag, passed_over)
        except CheckpointError as error:
            passed_over.append(str(error))
    return Found(None, passed_over)


def retired(folder: Path, keep_last: int, keep_every: int = 0) -> list[Path]:
    """Sealed tags that may go: not the ``keep_last`` newest (0 keeps all), nor the best, nor every m-th step.

    Args:
        keep_every: tags of steps divisible by it stay; 0: none does for that.
    """
    if keep_last == 0:
        return []
    best = read_best(folder)[0]
    sealed = sorted(tag for tag in folder.glob("global_step*") if (tag / MANIFEST).exists())
    return [
        tag
        for tag in sealed[:-keep_last]
        if tag.name != best and not (keep_every and _step(tag.name) % keep_every == 0)
    ]


def remove(tags: list[Path]) -> None:
    for tag in tags:
        (tag / MANIFEST).unlink()  # first: a half-removed tag must not look whole
        shutil.rmtree(tag, ignore_errors=True)


def read_best(folder: Path) -> tuple[str | None, float]:
    """Name and validation loss of the best checkpoint so far; (None, infinity) before the first."""
    try:
        best = json.loads((folder / "best").read_text())
        return str(best["tag"]), float(best["validation_loss"])
    except (OSError, ValueError, KeyError):
        return None, float("inf")


def forget_best_after(folder: Path, step: int) -> None:
    """Drop the mark of a best checkpoint that the run, resumed at ``step``, has not reached: it is found again."""
    best = read_best(folder)[0]
    if best is not None and _step(best) > step:
        (folder / "best").unlink()


def write_best(folder: Path, tag: str, validation_loss: float) -> None:
    write_atomically(folder / "best", json.dumps({"tag": tag, "validation_loss": validation_loss}) + "\n")


def _step(name: str) -> int:
    return int(name.removeprefix("global_step"))
