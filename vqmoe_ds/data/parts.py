"""Units -> parts -> one prepared corpus.

Every unit becomes one folder below ``PREFIX.parts``, named by the fingerprint of what it was made from and put there
by one rename when it is whole. A later run takes the parts that fit its plan and makes the others. The corpus is the
parts in the order of the plan, copied in a stream, so memory depends on neither its size nor its documents.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vqmoe_ds.data.documents import read_unit, text_before
from vqmoe_ds.data.index_files import HashedFile, smallest_dtype, write_index
from vqmoe_ds.data.tokenizer_base import Tokenizer
from vqmoe_ds.data.units import EMPTY, Piece, Place, Skips, Unit
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.files import own_mark, read_small, sha256_of, sync_folder

FORMAT = 1
"""Version of the layout of parts and of ``PREFIX.json``; raised when either changes, so that no old part is taken."""
_PIECES = 3
"""Version of the encoding, of parts alone: raised when a text gives other ids, or another count of unknown ones."""

BATCH_BYTES = 1 << 20
# A multiple of the size of every number that is read in blocks.
_BLOCK = 4 << 20
_FILES = _TOKENS, _LENGTHS, _ENDS = "tokens", "lengths", "ends"
_COUNTS = "counts.json"


@dataclass
class Counts:
    """Contents of a part, or of a whole corpus, in numbers."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    bytes: int = 0
    """UTF-8 bytes of text."""
    unknown: int = 0
    """Tokens that stand for a symbol the tokenizer lacks."""
    skipped: dict[str, int] = field(default_factory=dict)
    first: dict[str, Place] = field(default_factory=dict)
    """First place of each reason to skip."""
    cut: bool = False
    """Whether the unit holds more than its limit."""

    def add(self, other: Counts) -> None:
        for name in ("documents", "sequences", "tokens", "bytes", "unknown"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, count in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
            self.first.setdefault(reason, other.first[reason])
        self.cut |= other.cut


class Parts:
    """The parts of one corpus: ``folder`` is ``PREFIX.parts``."""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer) -> None:
        self.folder, self.tokenizer = Path(folder), tokenizer
        # By the vocabulary, not by the ids met: all parts of a corpus have one type.
        self.dtype = smallest_dtype(tokenizer.vocab_size)

    def path(self, unit: Unit) -> Path:
        return self.folder / unit.fingerprint(FORMAT, _PIECES, self.tokenizer.checksum)

    def counts(self, unit: Unit, verify: bool = False) -> Counts | None:
        """Counts of a part that is there and whole; None otherwise, or where it left out what is now to be refused.

        Args:
            verify: read it all and compare digests, as a part of an earlier run may not have outlived a power cut.
        """
        path = self.path(unit)
        try:
            kept = json.loads(read_small(path / _COUNTS))
            digests, counts = kept.pop("sha256"), Counts(**kept)
            counts.first = {reason: Place(*counts.first[reason]) for reason in counts.skipped}
            sizes = [os.path.getsize(path / name) for name in _FILES]
            if verify and digests != [sha256_of(path / name) for name in _FILES]:
                return None
            # int32 lengths and int64 ends, as _encode makes them.
            whole = sizes == [counts.tokens * self.dtype.itemsize, counts.sequences * 4, counts.documents * 8]
            whole &= all(type(number) is int for number in (counts.bytes, counts.unknown, *counts.skipped.values()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        # on_error is not in the fingerprint (Unit.fingerprint), so a part made with skip is found by a run with fail.
        refused = unit.options.on_error == "fail" and set(counts.skipped) - {EMPTY}
        return counts if whole and not refused else None

    def make(self, unit: Unit) -> Counts:
        """Read, tokenize and write one unit, or as much of it as its limit allows.

        One that is below its limit is kept as the part of the unit without a limit, which serves any other limit too.

        Raises:
            DataError: text that is to be refused; a full disk.
        """
        temporary = self.folder / f"{self.path(unit).name}.{own_mark()}.tmp"
        try:
            with disk_errors(str(self.folder)):
                temporary.mkdir()
                counts = self._write(unit, temporary)
                below = unit.limit is not None and not counts.cut and counts.tokens < unit.limit
                final = self.path(replace(unit, limit=None) if below else unit)
                # A rename does not replace a folder that holds something.
                shutil.rmtree(final, ignore_errors=True)  # one that is damaged or left out too much
                temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return counts

    def _write(self, unit: Unit, folder: Path) -> Counts:
        counts, skips = Counts(), Skips(unit.options.on_error)
        with ExitStack() as stack:
            # Not flushed: before a later run takes a part it compares digests (_make_parts).
            files = [stack.enter_context(HashedFile(f"{folder / name}", keep=False)) for name in _FILES]
            # A unit may begin inside a document, of which another process reads the beginning.
            before = text_before(unit)
            for batch in _batches(read_unit(unit, skips)):
                for file, array in zip(files, self._encode(batch, before, counts, unit.limit), strict=True):
                    file.write(array)
                if counts.cut:
                    break
                before = _after(batch[-1])
        counts.skipped, counts.first = skips.counts, skips.first
        digests = [file.sha256 for file in files]
        (folder / _COUNTS).write_text(json.dumps({**asdict(counts), "sha256": digests}), encoding="utf-8")
        return counts

    def _encode(
        self, batch: list[Piece], before: str, counts: Counts, limit: int | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids ``[tokens]``, lengths ``[sequences]``, ends ``[documents]``) of a batch, added to ``counts``.

        Args:
            before: the last character before it, if it begins inside a document.
            limit: tokens of the part, at most; None for all.
        """
        # Not encode_batch: a tokenizer that puts a space before a text would put one at every cut of a document.
        encoded = self.tokenizer.encode_pieces([p.text for p in batch], [before, *map(_after, batch[:-1])])
        if limit is not None:
            batch, encoded, counts.cut = _within(limit - counts.tokens, batch, encoded, before)
        texts = [piece.text for piece in batch]
        if self.tokenizer.unknown_id is not None:
            counts.unknown += sum(map(self.tokenizer.count_unknown, texts, encoded))
        end = np.array([self.tokenizer.eod], dtype=np.int32)
        ended = np.array([piece.ends_document for piece in batch], dtype=bool)
        arrays = [array for ids, last in zip(encoded, ended, strict=True) for array in ((ids, end) if last else (ids,))]
        # end[:0], as np.concatenate takes no empty list, which a batch beyond the limit is.
        ids = np.concatenate([end[:0], *arrays]).astype(self.dtype)
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int32) + ended
        kept = lengths > 0  # a piece of a document may hold no token at all
        # The .idx counts documents in sequences: only those that are written count.
        documents = counts.sequences + np.cumsum(kept, dtype=np.int64)[ended]
        counts.sequences += int(kept.sum())
        counts.documents += int(ended.sum())
        counts.tokens += len(ids)
        counts.bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        return ids, lengths[kept].astype(np.int32), documents

    def clean(self) -> None:
        """Remove what an earlier run left half-made."""
        for path in self.folder.glob("*.tmp"):
            shutil.rmtree(path, ignore_errors=True)

    def lengths(self, units: Iterable[Unit]) -> Iterator[np.ndarray]:
        """Tokens of every sequence, in chunks of int32."""
        for unit in units:
            yield from _numbers(self.path(unit) / _LENGTHS, np.int32)

    def ends(self, units: Iterable[Unit]) -> Iterator[np.ndarray]:
        """Sequences up to the end of every document, in chunks of int64."""
        before = 0
        for unit in units:
            path = self.path(unit)
            for chunk in _numbers(path / _ENDS, np.int64):
                yield chunk + before
            # Each part counts from its own first sequence.
            before += os.path.getsize(path / _LENGTHS) // 4

    def tokens(self, units: Iterable[Unit]) -> Iterator[bytes]:
        """Bytes of the .bin, in blocks."""
        for unit in units:
            with open(self.path(unit) / _TOKENS, "rb") as stream:
                while block := stream.read(_BLOCK):
                    yield block


def merge(parts: Parts, units: list[Unit], total: Counts, prefix: str, about: dict[str, Any]) -> None:
    """Write the corpus under temporary names, then rename: the .idx last, without which nothing takes it for whole.

    Raises:
        DataError: a full disk; what was at ``prefix`` before is then untouched.
    """
    temporary = {name: f"{prefix}.{name}.{own_mark()}.tmp" for name in ("tokenizer", "bin", "json", "idx")}
    try:
        with disk_errors(str(Path(prefix).parent)):
            _check_room(parts, total, prefix)
            with HashedFile(temporary["bin"]) as data:
                for block in parts.tokens(units):
                    data.write(block)
            with HashedFile(temporary["idx"]) as index:
                sizes = total.sequences, total.documents
                write_index(index, parts.dtype, *sizes, lambda: parts.lengths(units), lambda: parts.ends(units))
            parts.tokenizer.save(temporary["tokenizer"])
            with HashedFile(temporary["json"]) as description:
                digests = {"bin": data.sha256, "idx": index.sha256}
                description.write(_description(parts, total, digests, about))
            _publish(temporary, prefix)
    finally:
        for path in temporary.values():
            shutil.rmtree(path, ignore_errors=True) if os.path.isdir(path) else Path(path).unlink(missing_ok=True)


def _check_room(parts: Parts, total: Counts, prefix: str) -> None:
    # 12: a length and an offset of each sequence; 8: the end of each document.
    needed = total.tokens * parts.dtype.itemsize + 12 * total.sequences + 8 * total.documents
    free = shutil.disk_usage(Path(prefix).parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free")


def _description(parts: Parts, total: Counts, digests: dict[str, str], about: dict[str, Any]) -> bytes:
    counted = {name: getattr(total, name) for name in ("documents", "sequences", "tokens", "bytes", "unknown")}
    skipped = {reason: total.skipped[reason] for reason in sorted(total.skipped)}
    first = {reason: str(total.first[reason]) for reason in skipped}
    made = {"tokenizer": parts.tokenizer.describe(), "sha256": digests}
    rest = {**made, **about, "skipped": skipped, "first_skipped": first}
    return (json.dumps({"format": FORMAT, **counted, **rest}, indent=2) + "\n").encode()


def _publish(temporary: dict[str, str], prefix: str) -> None:
    # The .idx goes first and comes last: wherever the process dies, check_prefix finds no index of other files.
    for name in ("idx", "json"):
        Path(f"{prefix}.{name}").unlink(missing_ok=True)
    shutil.rmtree(f"{prefix}.tokenizer", ignore_errors=True)
    for name, path in temporary.items():
        os.rename(path, f"{prefix}.{name}")
        # After a power cut, too, the .idx is there only where the others are.
        sync_folder(Path(prefix).parent)


@contextmanager
def disk_errors(place: str) -> Iterator[None]:
    """Context in which a disk that is full or may not be written, or a name it cannot hold, is one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(
                f"no room left in {place} ({error.strerror}); free some and give the same command again: it goes on "
                "from the parts that are finished, and earlier output is untouched"
            ) from error
        raise DataError(f"{place} cannot be written ({error.strerror}); choose another --output") from error


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        # 100, so that the number of very short documents in a batch is bounded, too.
        size += len(piece.text) + 100
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _within(
    room: int, batch: list[Piece], encoded: list[np.ndarray], before: str
) -> tuple[list[Piece], list[np.ndarray], bool]:
    """(pieces from the first on that have at most ``room`` tokens, their ids, whether that leaves any out).

    A document that is cut ends with its last piece, and one whose earlier pieces are written with an empty one.
    """
    sizes = np.cumsum([len(ids) + piece.ends_document for ids, piece in zip(encoded, batch, strict=True)])
    # Room for one id more wherever a document goes on: if it is cut there, its end is still to be written.
    ends_to_come = np.array([not piece.ends_document for piece in batch])
    fits = int(np.cumprod(sizes + ends_to_come <= room).sum())
    if fits == len(batch):
        return batch, encoded, False
    if not fits:
        return ([Piece("", True)], [encoded[0][:0]], True) if before else ([], [], True)
    return [*batch[: fits - 1], batch[fits - 1]._replace(ends_document=True)], encoded[:fits], True


def _after(piece: Piece) -> str:
    """The character before the next piece in its document; "" where that piece begins one."""
    # Never "" inside a document, also after an empty piece: a tokenizer would put its space before what follows.
    return "" if piece.ends_document else piece.text[-1:] or "\n"


def _numbers(path: Path, dtype: type[np.number]) -> Iterator[np.ndarray]:
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            yield np.frombuffer(block, dtype)
