"""Opening a checkpoint of any kind: the formats register themselves, and the folder tells which of them it is."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import vqmoe_ds.checkpoint.formats.deepspeed.reader
import vqmoe_ds.checkpoint.formats.huggingface.folder
import vqmoe_ds.checkpoint.formats.megatron.reader
import vqmoe_ds.checkpoint.formats.native_moe.reader
import vqmoe_ds.checkpoint.formats.portable  # noqa: F401 (each registers its format)
from vqmoe_ds.checkpoint.io.shards import check_inside
from vqmoe_ds.checkpoint.io.store import MANIFEST, best_of, find_newest, read_manifest, tags, verify, why_not_whole
from vqmoe_ds.checkpoint.reader import FORMATS, CheckpointReader, Format, check_described, sound
from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.runtime.files import why_missing

logger = logging.getLogger(__name__)


def open_checkpoint(path: str | Path) -> CheckpointReader:
    """Recognise and open a tag folder, a portable, Hugging Face, Megatron or native one, or a run folder.

    Of a run folder, or its ``checkpoints``, it is the newest tag that verifies, and a warning says what is wrong with a
    newer one; of a fine-tuning's it is the one that validated best, as in the report of that run, or the newest where
    none was validated.

    Raises:
        CheckpointError: nothing there, damaged, of a newer format, or of a kind that is not known.
    """
    path = Path(path)
    if not os.path.isdir(path):
        if os.path.lexists(path):
            what = "is a file" if os.path.isfile(path) else why_missing(path)
            raise CheckpointError(f"{path} {what}; give a run folder, or the folder of a checkpoint")
        raise CheckpointError(f"{path}: no such checkpoint folder")
    with sound(path):
        reader = _open(path)
        check_described(reader.config, reader.shapes, reader.path)
        # CheckpointReader does not guard these: damage that they meet has to show in here.
        _ = reader.samples, reader.has_optimizer, reader.optimizer_step()
    return reader


def verify_opened(reader: CheckpointReader) -> int:
    """Compare every file of an opened checkpoint with its checksum; returns how many there are.

    Raises:
        CheckpointError: one differs, or a checkpoint of this kind has no checksums.
    """
    if not (reader.path / MANIFEST).exists():
        raise CheckpointError(f"{reader.path} has no checksums, being a {reader.kind} checkpoint; leave out --verify")
    return len(verify(reader.path)["files"])


def _open(path: Path) -> CheckpointReader:
    # With a manifest it is one of ours: a native DeepSpeed-MoE tag, for one, has files of the same names as our tags.
    if not (path / MANIFEST).exists():
        foreign = _format_of(path, sealed=False)
        if foreign is not None:
            return foreign.open(path)
        path = _tag_under(path)
    manifest = _checked_manifest(path)
    ours = _format_of(path, sealed=True)
    if ours is None:
        raise CheckpointError(f"{path} holds neither a DeepSpeed checkpoint nor a portable one")
    return ours.open(path, manifest)


def _format_of(path: Path, sealed: bool) -> Format | None:
    """The format of a folder, by the names of the formats where several recognise it, so that import order is free."""
    known = (entry for _, entry in sorted(FORMATS.items()) if entry.sealed is sealed)
    return next((entry for entry in known if entry.recognises(path)), None)


def _checked_manifest(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    for key in ("step", "layout", "config", "files"):
        if key not in manifest:
            raise CheckpointError(f"{path / MANIFEST} says nothing of {key}: it is not a manifest of this trainer")
    for name, expected in manifest["files"].items():
        check_inside(path, name)
        # Sizes alone: verify compares checksums, which takes a reading of every byte.
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != expected["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes instead of {expected['bytes']}"
            raise CheckpointError(f"{path}: {name} {state}; copy it again, or take an earlier checkpoint")
    return manifest


def _tag_under(path: Path) -> Path:
    reasons: list[str] = []
    for folder in (path, path / "checkpoints"):
        if (best := _best_of_finetuning(folder)) is not None:
            return best
        found = find_newest(folder)
        if found.path is not None:
            if found.passed_over:
                logger.warning(f"{found.passed_over[0]}; {found.path.name} is taken instead")
            return found.path
        reasons += found.passed_over
    if reasons:
        raise CheckpointError(f"{path} holds no checkpoint that verifies; the newest: {reasons[0]}")
    raise CheckpointError(
        f"{path} holds no finished checkpoint of this trainer: give a folder global_step… or the run folder above it"
    )


def _best_of_finetuning(folder: Path) -> Path | None:
    """The tag that validated best; None: none was validated, or the run is no fine-tuning.

    Raises:
        CheckpointError: the mark of the best, or the tag itself, is damaged; another must not pass for it.
    """
    if not _is_finetuning(folder):
        return None
    try:
        name = best_of(folder)[0]
        reason = why_not_whole(folder / name) if name is not None else None
    except CheckpointError as error:
        reason = str(error)
    if reason is not None:
        raise CheckpointError(f"{reason}; it is what validated best: copy it again, or name another checkpoint")
    return folder / name if name is not None else None


def _is_finetuning(folder: Path) -> bool:
    for tag in tags(folder):
        try:
            # An older tag of the run tells the same where the newest manifest is damaged.
            config = read_manifest(tag).get("config")
        except CheckpointError:
            continue
        section = config.get("finetune") if isinstance(config, dict) else None
        return isinstance(section, dict) and section.get("checkpoint") is not None
    return False
