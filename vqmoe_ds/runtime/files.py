"""Files that are there whole or not at all, and their checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from vqmoe_ds.runtime.errors import CheckpointError, ConfigError, UserError

_LONGEST_NAME = 200
"""Bytes of a file's name, of which file systems take 255, what is put before and behind it meanwhile included."""
SMALL = 64 << 20
"""Bytes of a file that is read whole (a description, a table, an index of names), at most."""


def user_cache() -> Path:
    """The package's folder in the user's cache: ``$XDG_CACHE_HOME/vqmoe_ds``, by default below ``~/.cache``.

    Raises:
        FileNotFoundError: there is no home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqmoe_ds"
    except RuntimeError:  # as with a uid that has no name, in a container
        raise FileNotFoundError(errno.ENOENT, "there is no home") from None


def own_mark() -> str:
    """Host and number of this process, for temporary names in folders that other machines or containers share."""
    return f"{socket.gethostname()}.{os.getpid()}"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write to a temporary name, flush to disk and rename: readers see the old file or the new one, also after a
    power cut."""
    if isinstance(content, str):
        # Bytes of a file's name that are no UTF-8 reach a text as half surrogates, which no encoding has.
        content = content.encode(errors="backslashreplace")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # a FIFO in its place would be waited for, a link be followed
    # Not by tempfile, whose files only their owner may read.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            # Before the rename, which may reach the disk sooner than the data it makes valid.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(target: Path, force: bool, kind: type[UserError] = CheckpointError) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its name at the end, and vanishes if there is none.

    Args:
        kind: of the errors.

    Raises:
        UserError: of that kind: ``target`` exists without ``force``, the disk is full, or what it replaces stays.
    """
    if os.path.lexists(target) and not force:
        raise kind(f"{target} exists; choose another folder, or give --force to replace it")
    # Beside the target, as a rename does not cross file systems.
    temporary = target.with_name(f".{target.name}.{own_mark()}.tmp")
    old: Path | None = None
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if force and os.path.lexists(target):
            old = target.with_name(f".{target.name}.{own_mark()}.old")
            # A folder cannot be renamed onto one with files in it; the old one goes when the new one is in its place.
            target.rename(old)
            try:
                temporary.rename(target)
            except BaseException:
                old.rename(target)
                raise
        else:
            temporary.rename(target)
    except OSError as error:
        raise kind(f"{target} could not be written ({error.strerror or error}); nothing was left behind") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        if old is not None:
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    except OSError as error:
        raise kind(
            f"{target} is written, but {old}, which it replaces, cannot be removed ({error.strerror or error}); "
            "remove it"
        ) from None


def write_json(path: Path, content: Any, indent: int = 1) -> None:
    """Write JSON as ``write_atomically`` writes."""
    write_atomically(path, json.dumps(content, indent=indent) + "\n")


def check_target(option: str, path: str | Path | None) -> None:
    """Refuse the name of a file that could not be written in the end, before there is anything to write.

    Args:
        option: that names it.
        path: the file; None: none is asked for.

    Raises:
        ConfigError: something else than a file has the name, or it lies in no folder that can be written to.
    """
    if path is None:
        return
    folder, name = os.path.split(os.path.abspath(path))
    # A rename would put a file in the place of a link or, as root, of a device.
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        reason = f"is {kind_of(path)}"
    elif not os.path.isdir(folder):
        reason = "lies in no folder that exists"
    elif not os.access(folder, os.W_OK):
        reason = "lies in a folder that cannot be written to"
    elif len(os.fsencode(name)) > _LONGEST_NAME:
        reason = "has too long a name"
    else:
        return
    raise ConfigError(f"{option} {path} {reason}; name a file in a folder that exists")


def check_targets(targets: Mapping[str, str | None], sources: Iterable[str | None] = ()) -> None:
    """``check_target`` for every output of a command; none may be another, or a file that it reads.

    Args:
        targets: files by the option that names each.
        sources: files and folders that are read.

    Raises:
        ConfigError: one could not be written, or would be written over.
    """
    taken = {os.path.realpath(source): "a file that is read" for source in sources if source is not None}
    for option, path in targets.items():
        check_target(option, path)
        if path is not None:
            if use := taken.get(os.path.realpath(path)):
                raise ConfigError(f"{option} {path} is also {use}, which would be written over; name another file")
            taken[os.path.realpath(path)] = f"that of {option}"


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk: which names there are, and what they stand for."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot, and need not
            raise
    finally:
        os.close(descriptor)


def open_regular(path: str | Path, links: bool = False, flags: int = 0) -> BufferedReader:
    """Open a regular file to read it; anything else (a FIFO, a device, a folder) is refused and never waited for.

    Args:
        links: follow links, as where the user named the file or keeps a model in a cache of links.
        flags: more of ``os.open``.

    Raises:
        OSError: it is something else, is not there, cannot be read, or no file can have such a name.
    """
    try:
        if not stat.S_ISREG(os.stat(path, follow_symlinks=links).st_mode):
            raise OSError(errno.EINVAL, f"it is {kind_of(path, links)}, not a regular file")
        # It may have become something else since.
        descriptor = os.open(path, flags | os.O_RDONLY | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW))
    except ValueError:
        raise OSError(errno.EINVAL, "it cannot be the name of a file") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no longer a regular file")
    return open(descriptor, "rb")


def read_small(path: str | Path, limit: int = SMALL) -> bytes:
    """All bytes of a regular file that nothing makes larger than ``limit``; links are followed.

    Raises:
        OSError: as ``open_regular``, or it is larger.
    """
    with open_regular(path, links=True) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than the {limit:,} bytes that such a file may have")
    return content


def list_tree(folder: str | Path, hidden: bool = False) -> tuple[list[str], list[str]]:
    """(regular files at any depth, entries passed over) of a folder, as paths below it, in no order.

    A link stands for the file it leads to. Passed over are links to anything else, FIFOs, sockets and devices.

    Args:
        folder: any number of files and levels, as long as the system opens the longest path (``PATH_MAX``).
        hidden: also what has a name that begins with a dot, or lies in such a folder.

    Raises:
        OSError: a folder that cannot be listed, with its name.
    """
    files: list[str] = []
    others: list[str] = []
    folders = [""]
    while folders:  # no recursion: it would end after some hundred levels
        below = folders.pop()
        with os.scandir(os.path.join(folder, below)) as entries:
            for entry in entries:
                path = os.path.join(below, entry.name)
                if entry.name.startswith(".") and not hidden:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                else:
                    (files if _is_file(entry) else others).append(path)
    return files, others


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


def kind_of(path: str | Path, links: bool = False) -> str:
    """Kind of an entry of a folder, as a noun.

    Args:
        links: say what a link leads to.

    Raises:
        OSError: it is not there.
    """
    mode = os.stat(path, follow_symlinks=links).st_mode
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a FIFO"}
    kinds |= {stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode), "of an unknown kind")


def why_missing(path: str | Path) -> str:
    """Description of a path that does not exist, as the rest of a sentence that begins with it."""
    return f"is a link to {os.readlink(path)}, which does not exist" if os.path.islink(path) else "does not exist"


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are not there yet.

    Raises:
        OSError: it cannot be made; ``strerror`` names what is in its place.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        other = next((place for place in (path, *path.parents) if os.path.lexists(place) and not place.is_dir()), path)
        what = why_missing(other) if not other.exists() else "is not a folder"
        raise OSError(error.errno, f"{other} {what}") from None


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a regular file, in hexadecimal."""
    with open_regular(path, links=True) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def drop_output() -> None:
    """Send the rest of the output nowhere, after a ``BrokenPipeError``, so that Python's last flush does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
