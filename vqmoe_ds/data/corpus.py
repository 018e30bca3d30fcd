"""Text as bytes: a file, a folder, or the documentation that every CPython carries.

Files are never read whole, and few are open at a time; only the bytes of a batch are touched.
"""

from __future__ import annotations

import bisect
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedReader

import numpy as np

from vqmoe_ds.data.compressed import DAMAGES, WindowTooLarge, check_content, open_plain, suffix_of
from vqmoe_ds.runtime.errors import DataError, one_line
from vqmoe_ds.runtime.files import list_tree, open_regular, why_missing
from vqmoe_ds.runtime.memory import free_bytes

_BLOCK = 1 << 20


@dataclass(frozen=True)
class FilePiece:
    """The bytes of a file, read where they are asked for: a file that is mapped and cut short kills its reader."""

    path: str
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> np.ndarray:
        """Bytes of a stretch, uint8.

        Raises:
            DataError: the file can no longer be read, or has become shorter.
        """
        first, last, _ = part.indices(self.size)
        content = np.empty(max(0, last - first), dtype=np.uint8)
        rest = content.data
        try:
            while len(rest):  # Linux gives no more than 2 GiB at a time
                # By offset, as all pieces of a path share one descriptor.
                count = os.preadv(_opened(self.path).fileno(), [rest], last - len(rest))
                if not count:
                    raise DataError(f"data file {self.path} became shorter while it was in use; restore it", local=True)
                rest = rest[count:]
        except OSError as error:
            sentence = f"data file {self.path} can no longer be read ({error.strerror}); restore it"
            raise DataError(sentence, local=True) from None
        return content

    def tobytes(self) -> bytes:
        return self[:].tobytes()


# What falls out of the cache is closed with its last reference: use a descriptor at once, and from one thread.
@lru_cache(maxsize=64)
def _opened(path: str) -> BufferedReader:
    return open_regular(path, links=True)


@dataclass(frozen=True)
class Corpus:
    """Pieces of bytes, read as if they stood end to end.

    Windows of ``sequence_length + 1`` bytes start every ``sequence_length`` bytes, so that every byte but the first
    is a target once an epoch.
    """

    name: str
    pieces: Sequence[np.ndarray | FilePiece]
    ends: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.ends[-1] if self.ends else 0

    def num_windows(self, sequence_length: int) -> int:
        return max(0, (self.num_bytes - 1) // sequence_length)

    def window(self, index: int, sequence_length: int) -> np.ndarray:
        """Bytes of one window, uint8 ``[sequence_length + 1]``."""
        start, length = index * sequence_length, sequence_length + 1
        parts, piece = [], bisect.bisect_right(self.ends, start)
        while length > 0:
            begin = start - (self.ends[piece - 1] if piece else 0)
            part = self.pieces[piece][begin : begin + length]
            parts.append(part)
            start, length, piece = start + len(part), length - len(part), piece + 1
        return np.concatenate(parts) if len(parts) > 1 else np.asarray(parts[0])

    def starts(self, index: int, sequence_length: int) -> np.ndarray:
        """Whether each byte of a window but the last is the first of a file, bool ``[sequence_length]``."""
        start, answer = index * sequence_length, np.zeros(sequence_length, dtype=bool)
        # Left, where window() looks right: a file that ends where the window starts has its successor begin at place 0.
        piece = bisect.bisect_left(self.ends, start)
        # The last end stops it, for a window has one more byte than places.
        while self.ends[piece] < start + sequence_length:
            answer[self.ends[piece] - start] = True
            piece += 1
        return answer


def open_corpus(path: str | None) -> Corpus:
    """The corpus at ``path``: a file, every file of a folder in the order of their paths, or the texts of ``hub:NAME``.

    None gives the documentation of the running Python (``stdlib_text``).

    Raises:
        DataError: nothing there, unreadable, or empty.
    """
    if path is None:
        from vqmoe_ds.data.stdlib_text import stdlib_text

        text = np.frombuffer(stdlib_text(), dtype=np.uint8)
        version = ".".join(map(str, sys.version_info[:3]))
        return Corpus(f"documentation of CPython {version}'s standard library", (text,), (len(text),))
    if path.startswith("hub:"):
        from vqmoe_ds.data.tables import hub_texts

        return _joined(path, hub_texts(path))
    if not os.path.exists(path):
        raise DataError(f"data path {path} {why_missing(path)}; give a text file or a folder of text files")
    files, others = _files_of(path) if os.path.isdir(path) else ([path], [])
    pieces = [piece for piece in map(_piece, files) if len(piece)]
    passed_over = f" ({len(others):,} that are no regular files passed over, {others[0]} the first)" if others else ""
    if not pieces:
        raise DataError(f"data path {path} holds no bytes{passed_over}; give a text file or a folder of text files")
    return _joined(f"{path}{passed_over}", pieces)


def _joined(name: str, pieces: Sequence[np.ndarray | FilePiece]) -> Corpus:
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    return Corpus(name, tuple(pieces), tuple(ends.tolist()))


def _files_of(folder: str) -> tuple[list[str], list[str]]:
    """Files in the order of their paths, and what was passed over; hidden ones are left out."""
    try:
        files, others = list_tree(folder)
    except OSError as error:
        raise DataError(f"data folder {error.filename} cannot be listed ({error.strerror}); give another") from None
    # By parts: as texts, a-b/c would come before a/c. The order decides which bytes a sample number stands for.
    return [os.path.join(folder, file) for file in sorted(files, key=lambda file: file.split(os.sep))], sorted(others)


def _piece(path: str) -> FilePiece | np.ndarray:
    try:
        check_content(path)
        if path.endswith(".parquet"):
            raise DataError(
                f"data file {path} is a table, not text; name a tokenizer of its texts (--tokenizer bytes), or "
                "prepare it (tools/prepare_data.py)"
            )
        if suffix_of(path):
            return _decompressed(path)
        with open_regular(path, links=True) as file:
            return FilePiece(path, os.fstat(file.fileno()).st_size)
    except WindowTooLarge as error:
        raise DataError(f"data file {path} has too large a window, {error}; unpack it, and give the text") from None
    except DAMAGES as error:
        reason = one_line(str(getattr(error, "strerror", None) or error or "no memory is left"), 200)
        raise DataError(f"data file {path} cannot be read ({reason}); check what it is") from None


def _decompressed(path: str) -> np.ndarray:
    """The text of a compressed file, uint8, decompressed as a whole so that it can be read from any offset."""
    text, most = bytearray(), free_bytes() // 2  # growing, it is copied
    with open_plain(path) as stream:
        while block := stream.read(_BLOCK):
            text += block
            if len(text) > most:
                raise DataError(
                    f"data file {path} holds more text than this machine has memory for; unpack it, or prepare it "
                    "(tools/prepare_data.py)"
                )
    return np.frombuffer(text, dtype=np.uint8)
