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


def write_manifest(tag: Path, state: dict[str, Any]) -> None:
    """Seal a finished checkpoint: ``state`` (step, layout, configuration) and a checksum of every file."""
    files = {
        path.relative_to(tag).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(tag.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
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


def retire(folder: Path, keep_last: int) -> None:
    """Remove all but the ``keep_last`` newest sealed tags (0 keeps all); unsealed ones are left alone."""
    if keep_last == 0:
        return
    sealed = sorted(tag for tag in folder.glob("global_step*") if (tag / MANIFEST).exists())
    for tag in sealed[:-keep_last]:
        (tag / MANIFEST).unlink()  # first: a half-removed tag must not look whole
        shutil.rmtree(tag, ignore_errors=True)
