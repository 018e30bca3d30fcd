"""Files that are there whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary name, flush to disk and rename: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def drop_output() -> None:
    """After a ``BrokenPipeError``: the reader has seen enough (``| head``), and Python's last flush shall not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
