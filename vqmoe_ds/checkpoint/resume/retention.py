"""Retention: the checkpoints that a folder keeps, and how names in it change hands.

Only what a run in this folder wrote is ever deleted: its tags' manifests hold the ``owner`` of the folder. A folder
that is being written or removed has another name than a tag's, so that a tag is there whole or not at all, and what a
kill left behind is known. ``latest`` names a tag that is there, or is not there itself, between any two steps.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path

from vqmoe_ds.checkpoint.io.store import MANIFEST, best_of, read_manifest, step_of, tags, why_not_whole
from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.runtime.files import kind_of, open_regular, sync_folder, write_atomically

LATEST = "latest"
SAVING, REMOVING, ASIDE = ".saving-", ".removing-", "set-aside-"
"""Prefixes of a tag that is being written, is being removed, or was in the way of a new one."""


def owner_of(folder: Path) -> str:
    """The name that the manifests of all tags written in a folder share; made on first use."""
    text = _read_line(folder / "owner")
    if not re.fullmatch("[0-9a-f]{32}", text):
        # Also where the file is damaged: the tags of its lost name are then of no run, and never deleted.
        text = uuid.uuid4().hex
        write_atomically(folder / "owner", text + "\n")
    return text


def retired(folder: Path, keep_last: int, keep_every: int = 0) -> list[Path]:
    """Tags that may go: not the ``keep_last`` newest (0 keeps all), the best, ``latest``'s, nor every m-th step's.

    Tags that do not verify, or that no run in this folder wrote, neither count nor go. Those that this process has not
    read yet are read, where it depends on them.

    Args:
        keep_every: tags of steps divisible by it stay; 0: none does for that.
    """
    try:
        kept = {best_of(folder)[0], _read_line(folder / LATEST)}
    except CheckpointError:  # any may be the best
        return []
    owner = owner_of(folder)
    ours = [tag for tag in tags(folder) if _why_not_ours(tag, owner) is None] if keep_last else []
    counted, gone = 0, []
    for tag in ours if len(ours) > keep_last else []:
        step = step_of(tag.name) or 0
        stays = tag.name in kept or (keep_every > 0 and step % keep_every == 0)
        # why_not_whole comes last, as it may read the whole tag.
        if counted == keep_last and not stays and why_not_whole(tag) is None:
            gone.append(tag)
        elif counted < keep_last and why_not_whole(tag) is None:
            counted += 1
    # The oldest first: after a kill in between, what is left is the newest.
    return gone[::-1]


def remove(gone: list[Path]) -> None:
    """Delete tags; one that is half deleted bears another name."""
    for tag in gone:
        shutil.rmtree(_renamed(tag, REMOVING), ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Delete what a kill left of this folder's own writing and removing; links and files of such names are not ours."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        for prefix in (SAVING, REMOVING):
            name = entry.name.removeprefix(prefix).partition("-")[0]
            if entry.name.startswith(prefix) and step_of(name) is not None and kind_of(entry) == "a folder":
                shutil.rmtree(entry, ignore_errors=True)


def publish(saving: Path, tag: Path) -> str | None:
    """Give a sealed checkpoint its name. What bears it goes if it is this folder's own and whole, or is set aside.

    Returns:
        What was set aside, and why, as a sentence.
    """
    folder, old, note = tag.parent, None, None
    if os.path.lexists(tag):
        if _read_line(folder / LATEST) == tag.name:
            # Before the tag gives up its name, also on disk: latest must not name what is not there.
            (folder / LATEST).unlink()
            sync_folder(folder)
        reason = _why_not_ours(tag, owner_of(folder)) or why_not_whole(tag)
        old = _renamed(tag, ASIDE if reason else REMOVING)
        note = f"{tag.name} was there already and is now {old.name} ({reason})" if reason else None
    # A folder cannot be renamed onto one with files in it, so the old one is out of the way by now. The new name is on
    # disk before latest names it.
    os.replace(saving, tag)
    sync_folder(folder)
    write_atomically(folder / LATEST, tag.name)
    if old is not None and note is None:
        shutil.rmtree(old, ignore_errors=True)
    return note


def _why_not_ours(tag: Path, owner: str) -> str | None:
    """Why a tag may hold what no run in this folder wrote; None: its manifest names the owner and all that is in it."""
    try:
        if kind_of(tag) != "a folder":
            return f"it is {kind_of(tag)}"
        manifest = read_manifest(tag)
    except (CheckpointError, OSError) as error:
        return str(error)
    if manifest.get("owner") != owner or manifest.get("step") != step_of(tag.name):
        return "no run in this folder wrote it"
    inside = {path.relative_to(tag).as_posix() for path in tag.rglob("*")} - {MANIFEST}
    strange = min(inside - {*manifest.get("files", {})}, default=None)
    return None if strange is None else f"it holds {strange}, which is not of the checkpoint"


def _renamed(tag: Path, prefix: str) -> Path:
    """The tag under the first name of its kind that is free."""
    target, number = tag.with_name(prefix + tag.name), 1
    while os.path.lexists(target):
        number += 1
        target = tag.with_name(f"{prefix}{tag.name}-{number}")
    os.replace(tag, target)
    return target


def _read_line(path: Path) -> str:
    """A short file's only line; empty where there is none to read."""
    try:
        with open_regular(path) as file:
            return file.read(4096).decode().strip()
    except (OSError, ValueError):
        return ""
