"""The ``tokenizer.json`` of a Hugging Face folder as a ``Tokenizer``."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vqmoe_ds.data.tokenizer_base import (
    MOST_IDS,
    SPACE_MARK,
    Tokenizer,
    cannot_encode,
    characters_to_bytes,
    checked_ids,
    read_file,
    require_utf8,
)
from vqmoe_ds.runtime.errors import DataError, reason_of
from vqmoe_ds.runtime.extras import library
from vqmoe_ds.runtime.files import read_small

FILE = "tokenizer.json"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|endofdocument|>")
"""Usual names of the end of a text, where no file beside says which it is."""


class JsonTokenizer(Tokenizer):
    """Text to ids through the ``tokenizers`` library; special tokens, padding and truncation are never added.

    Args:
        content: of the file.
        eod: id that ends a document; None: one id past all.
        checksum: of the tokenizer that it was made of, if known; else that of the content.
        name: where it is, for errors.

    Raises:
        DataError: it is damaged.
    """

    kind = "json"

    def __init__(
        self, content: str, eod: int | None = None, checksum: str | None = None, name: str | Path = FILE
    ) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
        self._reader = library("tokenizers", "reading tokenizer.json", DataError).Tokenizer
        try:
            self._fast, options = self._reader.from_str(content), json.loads(content)
            self._read_options(options)
        except BaseException as error:
            if not _of_library(error):
                raise
            reason = reason_of(error, 200)
            raise DataError(f"{name} cannot be read as a tokenizer ({reason}); make or download it again") from None
        self.content, self.checksum = content, checksum or hashlib.sha256(content.encode()).hexdigest()
        self._name = name
        self._end_with(eod)

    def _read_options(self, options: dict[str, Any]) -> None:
        _as_text(self._fast)
        added = options.get("added_tokens") or []
        self._control = {token["id"] for token in added if token.get("special")}
        self._literal = {token["id"] for token in added} - self._control
        # Searched for in the text, as it may be a step of a decoder that is a sequence.
        self._byte_level = "ByteLevel" in json.dumps(options.get("decoder"))
        self._ids = self._fast.get_vocab()
        model = options.get("model") or {}
        # Unigram names it by its id, the others by its text, if at all.
        self.unknown_id = model.get("unk_id", self._ids.get(model.get("unk_token")))

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonTokenizer, (self.content, self.eod, self.checksum)

    def _end_with(self, eod: int | None) -> None:
        size = max(self._ids.values(), default=-1) + 1
        self.eod = size if eod is None else eod
        if size > MOST_IDS or type(self.eod) is not int or not 0 <= self.eod < MOST_IDS:
            raise DataError(
                f"tokenizer {self._name} has ids, or an end of document, that are no whole numbers from 0 to "
                f"{MOST_IDS - 1:,}; make or download it again"
            )
        self.vocab_size = max(size, self.eod + 1)

    def encode(self, text: str) -> np.ndarray:
        return self._encode(self._fast, text)

    def encode_pieces(self, texts: Sequence[str], before: Sequence[str]) -> list[np.ndarray]:
        return [
            self._encode(self._inside if last else self._fast, text) for text, last in zip(texts, before, strict=True)
        ]

    @cached_property
    def _inside(self) -> Any:
        """The same tokenizer that puts nothing before a text."""
        options = json.loads(self.content)
        parts = {name: _unprefixed(options.get(name)) for name in ("normalizer", "pre_tokenizer")}
        # A second tokenizer holds the vocabulary once more: made only where it would differ.
        if all(options.get(name) == part for name, part in parts.items()):
            return self._fast
        return _as_text(self._reader.from_str(json.dumps(options | parts)))

    def _encode(self, fast: Any, text: str) -> np.ndarray:
        try:
            return np.array(fast.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        except BaseException as error:
            if not _of_library(error):
                raise
            # Only now: the library refuses half a surrogate pair by itself, and a search would cost every text.
            require_utf8(text)
            raise cannot_encode(self.kind, error) from None

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._fast.decode(checked_ids(ids, self), skip_special_tokens=True))

    def pieces(self) -> list[bytes]:
        byte_of = {symbol: byte for byte, symbol in byte_symbols().items()}
        texts = [b""] * self.vocab_size
        for token, i in self._ids.items():
            byte = _BYTE.fullmatch(token)
            if i in self._control or i == self.eod:
                continue
            # Added tokens are kept as they are spelled, also where other pieces are in symbols that stand for bytes.
            if i in self._literal:
                texts[i] = token.encode()
            elif self._byte_level and byte_of.keys() >= set(token):
                texts[i] = bytes(byte_of[symbol] for symbol in token)
            else:
                texts[i] = bytes([int(byte[1], 16)]) if byte else token.replace(SPACE_MARK, " ").encode()
        return texts

    def _told_starts(self, text: str) -> list[int]:
        offsets = self._fast.encode(text, add_special_tokens=False).offsets
        return characters_to_bytes(text, [first for first, _ in offsets])

    def _payload(self) -> tuple[str, bytes]:
        return "huggingface.json", self.content.encode()


def _as_text(fast: Any) -> Any:
    """The library's tokenizer, set to take every text whole and as text, also one that spells a special token."""
    fast.encode_special_tokens = True
    fast.no_truncation()
    fast.no_padding()
    return fast


def _unprefixed(part: Any) -> Any:
    """A normalizer or pre-tokenizer without what it puts before a text."""
    if not isinstance(part, dict) or part.get("type") == "Prepend":
        return None
    kept: dict[str, Any] = {"prepend_scheme": "never"} if part.get("type") == "Metaspace" else {}
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            kept[name] = [each for each in map(_unprefixed, part[name]) if each is not None]
    return part | kept | ({"add_prefix_space": False} if part.get("add_prefix_space") else {})


def read_json_tokenizer(path: str | Path, checksum: str | None = None) -> JsonTokenizer:
    """A ``tokenizer.json``, or that of a folder; config.json or tokenizer_config.json beside it say what ends a text.

    Args:
        checksum: of the tokenizer it was made of, if known.

    Raises:
        DataError: it cannot be read.
    """
    file = Path(path) / FILE if os.path.isdir(path) else Path(path)
    try:
        content = read_file(file).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"tokenizer file {file} cannot be read ({error})") from None
    found = JsonTokenizer(content, None, checksum, file)
    # Afterwards, as a name is looked up in the vocabulary: so the file is parsed once.
    found._end_with(_end_of_document(file.parent, found._ids))
    return found


def data_of_folder(folder: Path) -> dict[str, str]:
    """``data.tokenizer`` and ``data.tokenizer_sha256`` for a Hugging Face model; empty where it has no tokenizer.

    That is its tokenizer.json, or else its SentencePiece tokenizer.model; the checksum of either is that of its file.
    """
    file = next((folder / name for name in (FILE, "tokenizer.model") if os.path.exists(folder / name)), None)
    if file is None:
        return {}
    # Equal to the checksum of the loaded tokenizer, which data and checkpoints are compared by, but nothing is parsed.
    return {"tokenizer": str(file.resolve()), "tokenizer_sha256": hashlib.sha256(read_file(file)).hexdigest()}


def _end_of_document(folder: Path, ids: dict[str, int]) -> int | None:
    end = _read(folder / "config.json").get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    if type(end) is int:
        return end
    named = _read(folder / "tokenizer_config.json").get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    return next((ids[name] for name in (named, *_ENDS) if isinstance(name, str) and name in ids), None)


def _read(path: Path) -> dict[str, Any]:
    try:
        options = json.loads(read_small(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return options if isinstance(options, dict) else {}


def _of_library(error: BaseException) -> bool:
    """Whether the tokenizers library raised it, which raises nothing narrower and panics with a ``BaseException``."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def byte_symbols() -> dict[int, str]:
    """The printable symbol that a byte-level tokenizer.json writes for each byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    # As GPT-2's bytes_to_unicode: printable bytes of Latin-1 stand for themselves, the others from U+0100 on.
    printable = [b for b in range(256) if chr(b) in ByteLevel.alphabet()]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + place) for place, b in enumerate(others)}
