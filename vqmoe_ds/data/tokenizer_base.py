"""The interface of all tokenizers, and what they share.

A tokenizer is kept beside the data it made, as a folder with ``tokenizer.json`` (kind, vocab_size, eod, checksum) and
its payload: ``spm.model``, ``vocab.txt``, ``huggingface.json``, or nothing for bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vqmoe_ds.runtime.errors import DataError, reason_of
from vqmoe_ds.runtime.files import make_folder, read_small, write_atomically, write_json

DESCRIPTION = "tokenizer.json"
SPACE_MARK = "\u2581"
"""SentencePiece writes a space as this symbol, and would read it back as a space."""
MOST_IDS = 1 << 22
"""Ids of a vocabulary, at most: sixteen times the largest public one, as tables grow with what a file asks for."""


class Tokenizer(ABC):
    """Text to ids and back. Objects can be pickled and are cheap to send to a worker process."""

    kind: str
    vocab_size: int
    eod: int
    """Id of the end of a document, below ``vocab_size``; ``encode`` never gives it."""
    checksum: str
    """SHA-256 of the definition, in hexadecimal."""
    unknown_id: int | None = None
    """Id of symbols outside the vocabulary; None where every text can be written."""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 ``[n]``, without the end of the document.

        Raises:
            DataError: the text holds half a surrogate pair, which no UTF-8 file can.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; the end of a document and other control symbols show as nothing."""

    @abstractmethod
    def pieces(self) -> list[bytes]:
        """The UTF-8 text, or part of a character, that each id stands for; empty for control symbols."""

    @abstractmethod
    def _payload(self) -> tuple[str, bytes] | None:
        """File name and content of the definition."""

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, int32 ``[vocab_size]``; 0 for control symbols."""
        return np.array([len(piece) for piece in self.pieces()], dtype=np.int32)

    def starts(self, text: str, ids: np.ndarray) -> np.ndarray:
        """Offset in the UTF-8 of ``text`` of each of ``ids``, its encoding, int64 ``[n]``; in order.

        White space belongs to the token after it, as far as the tokenizer leaves that open.
        """
        pieces = self._all_pieces
        sizes = np.array([len(pieces[i]) for i in ids], dtype=np.int64)
        if b"".join(pieces[i] for i in ids) == text.encode():
            return np.cumsum(sizes) - sizes
        return np.array(self._told_starts(text), dtype=np.int64)

    @cached_property
    def _all_pieces(self) -> list[bytes]:
        return self.pieces()

    def _told_starts(self, text: str) -> Sequence[int]:
        """``starts`` for text that the ids do not give back exactly."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, as ``encode`` gives them."""
        return [self.encode(text) for text in texts]

    def encode_pieces(self, texts: Sequence[str], before: Sequence[str]) -> list[np.ndarray]:
        """Ids of texts that are parts of documents, so that a document's ids stand for its text exactly.

        Args:
            before: the last character that precedes each in its document; "" where it begins one.
        """
        return self.encode_batch(texts)

    def count_unknown(self, text: str, ids: np.ndarray) -> int:
        """Number of ``ids``, the encoding of ``text``, that stand for a symbol that the vocabulary lacks."""
        return 0 if self.unknown_id is None else int(np.count_nonzero(ids == self.unknown_id))

    @property
    def size(self) -> int:
        """Bytes of its definition."""
        return len((self._payload() or ("", b""))[1])

    def describe(self) -> dict[str, Any]:
        """kind, vocab_size, eod and checksum, as ``tokenizer.json`` and the data's description hold them."""
        return {"kind": self.kind, "vocab_size": self.vocab_size, "eod": self.eod, "checksum": self.checksum}

    def save(self, folder: str | Path) -> None:
        """Write the ``*.tokenizer`` folder; its description comes last, so that a half-written one cannot be loaded."""
        folder = Path(folder)
        try:
            make_folder(folder)
            payload = self._payload()
            if payload:
                write_atomically(folder / payload[0], payload[1])
            write_json(folder / DESCRIPTION, self.describe(), indent=2)
        except OSError as error:
            raise DataError(f"tokenizer folder {folder} cannot be written ({error.strerror})") from error


def read_file(path: Path) -> bytes:
    """Content of a tokenizer's file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return read_small(path)
    except OSError as error:
        raise DataError(f"tokenizer file {path} cannot be read ({error.strerror})") from error


def characters_to_bytes(text: str, places: Sequence[int]) -> list[int]:
    """Places in a text, counted in characters, counted in bytes of UTF-8."""
    ends = np.cumsum([0, *(len(character.encode()) for character in text)])
    return ends[np.asarray(places, dtype=np.int64)].tolist()


def require_utf8(text: str) -> bytes:
    """UTF-8 of a text.

    Raises:
        DataError: it holds half a surrogate pair.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"a text holds half a surrogate pair ({text[error.start]!r} at character {error.start}), "
            "which UTF-8 cannot write; repair the source"
        ) from error


def cannot_encode(kind: str, error: BaseException) -> DataError:
    """The error for a tokenizer whose file was read, and which then fails on a text."""
    reason = reason_of(error, 200)
    return DataError(f"the {kind} tokenizer fails on a text ({reason}); its file is damaged, make or download it again")


def checked_ids(ids: Iterable[int], tokenizer: Tokenizer) -> list[int]:
    """The ids as Python numbers without the ends of documents.

    Raises:
        DataError: one is outside the vocabulary.
    """
    numbers = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
    outside = numbers[(numbers < 0) | (numbers >= tokenizer.vocab_size)]
    if len(outside):
        raise DataError(
            f"id {outside[0]} is outside the tokenizer's vocabulary of {tokenizer.vocab_size}; "
            "the ids were made with another tokenizer"
        )
    return numbers[numbers != tokenizer.eod].tolist()
