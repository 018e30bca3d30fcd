"""The files of a prepared corpus: Megatron's ``PREFIX.bin`` and ``PREFIX.idx``, checked, read and written with numpy.

The .bin holds the token ids of all sequences end to end. The .idx holds a header (magic, version 1, code of the
number type, number of sequences S, number of document ends D), then int32 ``[S]`` lengths in tokens, int64 ``[S]``
offsets in bytes, int64 ``[D]`` document ends as counts of sequences, the first of them 0, and for data made with
modes int8 ``[S]``. All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.files import open_regular

MAGIC = b"MMIDIDX\x00\x00"
DTYPES: dict[int, type[np.number]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
# Also without padding, which native alignment would put between the fields.
_HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class IndexHeader:
    """Sizes and number type of ``PREFIX.bin``, as ``PREFIX.idx`` gives them."""

    prefix: str
    dtype: np.dtype
    sequences: int
    documents: int
    tokens: int

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int32 ``[sequences]``, mapped from the file."""
        return self._array(np.int32, _HEADER.size, self.sequences)

    @property
    def offsets(self) -> np.ndarray:
        """Offset in bytes of each sequence in the .bin, int64 ``[sequences]``, mapped from the file."""
        return self._array(np.int64, _HEADER.size + 4 * self.sequences, self.sequences)

    @property
    def ends(self) -> np.ndarray:
        """Sequences before and up to the end of each document, int64 ``[documents + 1]``, the first 0."""
        return self._array(np.int64, _HEADER.size + 12 * self.sequences, self.documents + 1)

    @property
    def ids(self) -> np.ndarray:
        """All token ids, ``[tokens]``, mapped from the .bin."""
        # An empty file cannot be mapped.
        if self.tokens == 0:
            return np.zeros(0, self.dtype)
        return np.memmap(f"{self.prefix}.bin", self.dtype, mode="r", shape=(self.tokens,))

    def _array(self, dtype: type[np.number], offset: int, count: int) -> np.ndarray:
        if count == 0:
            return np.zeros(0, dtype)
        return np.memmap(f"{self.prefix}.idx", dtype, mode="r", offset=offset, shape=(count,))


def check_prefix(prefix: str) -> IndexHeader:
    """The header of prepared data, after the checks that take no time: call it before any long work.

    Both files are there, the .idx is one and as long as its header says, its documents end with its last sequence, and
    the .bin is exactly as long as the .idx says. No token is read (``inspect.verify`` reads them all), nor each entry
    of the .idx (``check_index`` does); neither torch nor megatron-core is imported; files made by Megatron's own tools
    pass.

    Raises:
        DataError: one sentence with the file, what is wrong and the remedy.
    """
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    _check_there(prefix, index, data)
    try:
        header = _read_header(prefix, index)
        size = os.path.getsize(data)
    except OSError as error:
        raise DataError(f"prepared data {prefix} cannot be read ({error.strerror}); check its permissions") from None
    ends = header.ends
    if header.documents < 0 or ends[0] != 0 or ends[-1] != header.sequences:
        raise DataError(f"{index}: its documents do not end with its last sequence; it is damaged, prepare it again")
    expected = 0
    if header.sequences:
        expected = int(header.offsets[-1]) + int(header.lengths[-1]) * header.dtype.itemsize
    if size < expected:
        raise DataError(
            f"{data} has {size:,} bytes and {index.name} points to {expected:,}: the .bin is truncated or belongs to "
            "another .idx; copy both again or prepare them again"
        )
    if size > expected:
        raise DataError(
            f"{data} has {size:,} bytes but {index.name} ends at {expected:,}: they are not of one preparation; "
            "copy both again or prepare them again"
        )
    return IndexHeader(prefix, header.dtype, header.sequences, header.documents, size // header.dtype.itemsize)


def _check_there(prefix: str, index: Path, data: Path) -> None:
    if os.path.isfile(index) and os.path.isfile(data):
        return
    if os.path.isdir(f"{prefix}.parts"):
        raise DataError(f"the preparation of {prefix} did not finish; run its tools/prepare_data.py command again")
    missing = [path.name for path in (index, data) if not os.path.isfile(path)]
    raise DataError(
        f"prepared data {prefix} has no {' and no '.join(missing)}; give the path without .bin or .idx, or make it "
        "with tools/prepare_data.py"
    )


def _read_header(prefix: str, index: Path) -> IndexHeader:
    """Read the header alone, its tokens not counted."""
    with open_regular(index, links=True) as stream:
        size, raw = os.fstat(stream.fileno()).st_size, stream.read(_HEADER.size)
    if raw[: len(MAGIC)] != MAGIC:
        raise DataError(f"{index} is not an index of Megatron's IndexedDataset (its first bytes are {raw[:9]!r})")
    if len(raw) < _HEADER.size:
        raise DataError(f"{index} is truncated within its header; copy it again or prepare it again")
    _, version, code, sequences, ends = _HEADER.unpack(raw)
    if version != 1 or code not in DTYPES:
        raise DataError(f"{index} has version {version} and number type {code}; known are version 1 and types 1 to 8")
    expected = _HEADER.size + 12 * sequences + 8 * ends
    if ends < 1 or size not in (expected, expected + sequences):  # the latter with a mode for each sequence
        raise DataError(
            f"{index} has {size:,} bytes where {sequences:,} sequences and {ends - 1:,} documents take {expected:,}; "
            "it is truncated or damaged: copy it again or prepare it again"
        )
    if size > expected:
        _refuse_other_modes(index, expected)
    return IndexHeader(prefix, np.dtype(DTYPES[code]), sequences, ends - 1, 0)


def _refuse_other_modes(index: Path, start: int) -> None:
    """Refuse modes other than 0 (text), as Megatron's multimodal preparation gives them to sequences.

    Raises:
        DataError: a sequence has one.
    """
    with open_regular(index, links=True) as stream:
        stream.seek(start)
        while part := stream.read(1 << 20):
            if any(part):
                raise DataError(f"{index} is of a multimodal preparation, not of text alone; prepare its text")


def check_index(header: IndexHeader) -> None:
    """Check that sequences lie end to end, that documents come in order, and that the number type can hold ids.

    Raises:
        DataError: they do not, and what is built on them would reach past the files.
    """
    if header.dtype.kind == "f":
        raise DataError(f"{header.prefix}.bin holds {header.dtype} numbers, not token ids; prepare it again")
    where, place = 0, f"{header.prefix}.idx"
    size = header.tokens * header.dtype.itemsize
    lengths = chunks(header.lengths)
    first = 0
    for offset in chunks(header.offsets):
        # In int64 before it is multiplied: lengths are int32, and sizes in bytes may pass that.
        length = next(lengths).astype(np.int64) * header.dtype.itemsize
        # The length is taken off the size, not added to the offset, which a forged one would wrap around.
        past = (length < 0) | (offset < 0) | (offset > size - length)
        if past.any():
            raise DataError(
                f"{place}: sequence {first + int(np.argmax(past))} points past the end of the .bin; {AGAIN}"
            )
        wrong = offset != where + np.cumsum(length) - length
        if wrong.any():
            number = first + int(np.argmax(wrong))
            raise DataError(f"{place}: sequence {number} starts at a wrong byte; {AGAIN}")
        where, first = int(offset[-1] + length[-1]), first + len(offset)
    before = 0
    for ends in chunks(header.ends):
        if (ends < np.concatenate([[before], ends[:-1]])).any() or ends[-1] > header.sequences:
            raise DataError(f"{place}: its documents are out of order or end after the last sequence; {AGAIN}")
        before = int(ends[-1])


AGAIN = "it is damaged, copy it again or prepare it again"


def smallest_dtype(vocab_size: int) -> np.dtype:
    """Number type of the token ids, by Megatron's rule (``DType.optimal_dtype``)."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class HashedFile:
    """A file that is written from front to back; it knows the SHA-256 of what it holds.

    Args:
        keep: wait until it is on the disk when it is closed, so that it outlives a power cut.
    """

    def __init__(self, path: str, keep: bool = True) -> None:
        self.keep = keep
        self._digest = hashlib.sha256()
        self._stream: BinaryIO = open(path, "wb")  # noqa: SIM115  closed by __exit__

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._stream.flush()
            if self.keep:
                # parts.merge renames the file next: the new name could else reach the disk before the bytes.
                os.fsync(self._stream.fileno())
        finally:
            self._stream.close()

    def write(self, data: bytes | np.ndarray) -> None:
        raw = data.tobytes() if isinstance(data, np.ndarray) else data
        self._digest.update(raw)
        self._stream.write(raw)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def write_index(
    file: HashedFile,
    dtype: np.dtype,
    sequences: int,
    documents: int,
    lengths: Callable[[], Iterable[np.ndarray]],
    ends: Callable[[], Iterable[np.ndarray]],
) -> None:
    """Write an .idx from chunks, so that the whole is never in memory.

    Args:
        lengths: gives int32 chunks, the tokens of each of ``sequences``; called twice.
        ends: gives int64 chunks, the sequences up to the end of each of ``documents``, without the first 0.
    """
    code = next(code for code, kind in DTYPES.items() if dtype == kind)
    file.write(_HEADER.pack(MAGIC, 1, code, sequences, documents + 1))
    for chunk in lengths():
        file.write(chunk.astype("<i4"))
    start = 0
    for chunk in lengths():
        after = start + np.cumsum(chunk, dtype=np.int64) * dtype.itemsize
        file.write((after - chunk.astype(np.int64) * dtype.itemsize).astype("<i8"))
        start = int(after[-1]) if len(after) else start
    file.write(struct.pack("<q", 0))
    for chunk in ends():
        file.write(chunk.astype("<i8"))


def chunks(array: np.ndarray, size: int = _CHUNK) -> Iterator[np.ndarray]:
    """Stretches of a mapped array that fit in memory."""
    for start in range(0, len(array), size):
        yield np.asarray(array[start : start + size])
