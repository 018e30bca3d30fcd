"""Compressed files, read as they are decompressed, and files whose bytes are not what their names say."""

from __future__ import annotations

import bz2
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.extras import library
from vqmoe_ds.runtime.files import open_regular

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes of the compressions that text may have."""
DAMAGES = (OSError, EOFError, zlib.error, lzma.LZMAError, MemoryError)
"""Errors that reading a compressed file may raise."""

_BLOCK, _MOST = 64 << 10, 1 << 20  # bytes that go in and come out at a time
_STARTS = {
    ".gz": rb"\x1f\x8b\x08",
    # Text may begin with BZh9; then follow the digits of pi (a block) or of its root (the end of an empty stream).
    ".bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    ".xz": rb"\xfd7zXZ\x00|\x5d\x00\x00.{2}[\x00-\x0f\xff]",
    ".zst": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    ".lz4": rb"\x04\x22\x4d\x18",
    ".Z": rb"\x1f\x9d",
    ".lz": rb"LZIP\x01",
    ".zip": rb"PK\x03\x04",
    ".7z": rb"7z\xbc\xaf\x27\x1c",
    ".rar": rb"Rar!\x1a\x07",
    ".parquet": rb"PAR1",
}
"""First bytes of the files of each kind."""
_ARCHIVE = re.compile(r"\.(zip|7z|rar|(tar|cpio)(\.(gz|bz2|xz|zst|lz4|Z))?|t(gz|bz2?|xz|zst))$")
_POINTER = b"version https://git-lfs.github.com/spec/"
_HEAD = 256


class WindowTooLarge(OSError):
    """The stream is sound, and was compressed with a window that is too large to be read here."""


class Misnamed(DataError):
    """The bytes of a file are of another kind than its name says."""


def suffix_of(path: str | Path) -> str:
    """The one of ``SUFFIXES`` that a name ends with; "" for none."""
    return next((end for end in SUFFIXES if str(path).endswith(end)), "")


def without_suffix(path: str | Path) -> str:
    """The name of a file without its compression's suffix."""
    return str(path).removesuffix(suffix_of(path))


def kind_of_bytes(head: bytes) -> str:
    """The suffix that a file beginning with ``head`` should have; "" where its bytes are of no known kind."""
    # DOTALL: a byte that is any may also be 10, the line break.
    return next((kind for kind, start in _STARTS.items() if re.match(start, head, re.DOTALL)), "")


def check_content(path: str | Path) -> None:
    """Refuse a regular file whose bytes are of another kind than its name says.

    Raises:
        Misnamed: with the name that it should have, or what to do with it.
        OSError: it cannot be read.
    """
    with open_regular(path, links=True) as file:
        head = file.read(_HEAD)
    # By the name, before the bytes are asked: those of a .tar.gz are sound gzip, and its tar would pass for text.
    if _ARCHIVE.search(str(path)):
        raise Misnamed(f"{path} is an archive of files; unpack it and give its folder")
    if re.search(r"\.parquet\.(gz|bz2|xz|zst)$", str(path)):
        raise Misnamed(f"{path} is a table that was compressed once more; unpack it")
    if head.startswith(_POINTER):
        raise Misnamed(f"{path} is a Git LFS pointer, not the file itself; fetch that with git lfs pull")
    found, named = kind_of_bytes(head), os.path.splitext(path)[1]
    if found and found not in _NAMES:
        raise Misnamed(f"{path} is compressed ({found}), which is not read; unpack it, and give the text within")
    if found and found != named:
        says = f"{path} holds {_NAMES[found]} data, which its name does not say"
        raise Misnamed(f"{says}; rename it so that it ends in {found}")
    if named in SUFFIXES and head and not found:
        says = f"{path} is not {_NAMES[named]} data, as its name says"
        raise Misnamed(f"{says}; fetch it again, or take {named} off its name if it is plain text")
    if named in SUFFIXES:
        _check_inner(path)


def _check_inner(path: str | Path) -> None:
    try:
        with open_plain(path) as stream:
            inner = kind_of_bytes(stream.read(_HEAD))
    except DAMAGES:  # whoever reads it all says so
        return
    if inner:
        says = f"{path} holds {_NAMES.get(inner, inner)} data within, so that it was compressed twice"
        raise Misnamed(f"{says}; unpack it once, to a name that ends in {inner}")


_NAMES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".parquet": "parquet"}


@contextmanager
def open_plain(path: str | Path) -> Iterator[io.BufferedReader]:
    """A regular file, decompressed while it is read where its name says that it is compressed.

    Reading raises one of ``DAMAGES`` where the stream is cut short or damaged, ``WindowTooLarge`` among them.
    """
    with open_regular(path, links=True) as file:
        yield decompressed(file, suffix_of(path))


def decompressed(file: Any, kind: str) -> io.BufferedReader:
    """Decompress a stream of any number of gzip members, bzip2 or xz streams or zstd frames, padded with zeros or not.

    Args:
        kind: of ``SUFFIXES``; "" for plain bytes, which are returned as they are.
    """
    if not kind:
        return file
    return io.BufferedReader(_Blocks(_zstd(file) if kind == ".zst" else _streams(file, _ENGINES[kind])), _MOST)


class _Blocks(io.RawIOBase):
    """Blocks of bytes as a stream."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._left = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


_ENGINES: dict[str, Callable[[], Any]] = {
    # 16 asks for gzip's header, in place of zlib's own; 15 is the largest window.
    ".gz": partial(zlib.decompressobj, 31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
}


def _streams(file: BinaryIO, new_engine: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress stream after stream: Python's own readers stop silently at padding, or damage, between two of them."""
    data, first = b"", True
    while data := _after_padding(data, file):
        engine = new_engine()
        try:
            while not engine.eof:
                # bz2 and lzma keep input that they have not used, and are asked on with nothing; zlib hands it back.
                hungry = getattr(engine, "needs_input", True)
                data = data or (file.read(_BLOCK) if hungry else b"")
                # At most so much at a time: kilobytes may decompress to gigabytes.
                block = engine.decompress(data, _MOST)
                if hungry and not data and not block and not engine.eof:
                    raise EOFError("it is cut short")
                data = getattr(engine, "unconsumed_tail", b"")
                if block:
                    yield block
        except MemoryError:
            # lzma allocates the dictionary that a header asks for, which may be 4 GiB.
            raise WindowTooLarge("more than this machine has memory for") from None
        except (OSError, zlib.error, lzma.LZMAError) as error:
            raise error if first else OSError(f"what follows after its end is no such stream: {error}") from None
        data, first = engine.unused_data, False


def _after_padding(data: bytes, file: BinaryIO) -> bytes:
    """The beginning of the next stream; empty at the end of the file."""
    while not (data := data.lstrip(b"\0")):
        if not (data := file.read(_BLOCK)):
            return b""
    return data


def _zstd(file: BinaryIO) -> Iterator[bytes]:
    pa = library("pyarrow", "reading Zstandard", DataError)
    try:
        with pa.input_stream(file, compression="zstd") as stream:
            while block := stream.read(_MOST):
                yield block
    except OSError as error:
        if "too much memory" in str(error):  # libzstd's limit, unless told otherwise
            raise WindowTooLarge("more than 128 MiB, as of zstd --long=28 and above") from None
        if "Unknown frame" in str(error):
            raise OSError("what follows after its end is no zstd frame") from None
        raise
