"""The ``tokenizer.json`` of a Hugging Face folder as a tokenizer of ours."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vqmoe_ds.data.tokenizers import (
    SPACE_MARK,
    Tokenizer,
    characters_to_bytes,
    checked_ids,
    read_file,
    require_utf8,
)
from vqmoe_ds.errors import DataError

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
        from tokenizers import Tokenizer as Fast

        try:
            self._fast, options = Fast.from_str(content), json.loads(content)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{name} cannot be read as a tokenizer ({error}); make or download it again") from None
        self._fast.encode_special_tokens = True  # text that spells a special token out stays text
        self._fast.no_truncation()
        self._fast.no_padding()
        added = options.get("added_tokens") or []
        self._control = {token["id"] for token in added if token.get("special")}
        self._literal = {token["id"] for token in added} - self._control
        self._byte_level = "ByteLevel" in json.dumps(options.get("decoder"))
        self.content, self.checksum = content, checksum or hashlib.sha256(content.encode()).hexdigest()
        self._ids = self._fast.get_vocab()
        self._end_with(eod)
        self.unknown_id = self._ids.get(str((options.get("model") or {}).get("unk_token")))

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonTokenizer, (self.content, self.eod, self.checksum)

    def _end_with(self, eod: int | None) -> None:
        size = max(self._ids.values(), default=-1) + 1
        self.eod = size if eod is None else eod
        self.vocab_size = max(size, self.eod + 1)

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.array(self._fast.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        except TypeError:
            require_utf8(text)
            raise

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._fast.decode(checked_ids(ids, self), skip_special_tokens=True))

    def pieces(self) -> list[bytes]:
        byte_of = {symbol: byte for byte, symbol in byte_symbols().items()}
        texts = [b""] * self.vocab_size
        for token, i in self._ids.items():
            byte = _BYTE.fullmatch(token)
            if i in self._control or i == self.eod:
                continue
            if i in self._literal:
                texts[i] = token.encode()
            elif self._byte_level:
                texts[i] = bytes(byte_of[symbol] for symbol in token)
            else:
                texts[i] = bytes([int(byte[1], 16)]) if byte else token.replace(SPACE_MARK, " ").encode()
        return texts

    def _told_starts(self, text: str) -> list[int]:
        offsets = self._fast.encode(text, add_special_tokens=False).offsets
        return characters_to_bytes(text, [first for first, _ in offsets])

    def _payload(self) -> tuple[str, bytes]:
        return "huggingface.json", self.content.encode()


def read_json_tokenizer(path: str | Path, checksum: str | None = None) -> JsonTokenizer:
    """A ``tokenizer.json``, or that of a folder; config.json or tokenizer_config.json beside it say what ends a text.

    Args:
        checksum: of the tokenizer it was made of, if known.

    Raises:
        DataError: it cannot be read.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        content = read_file(file).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"tokenizer file {file} cannot be read ({error})") from None
    found = JsonTokenizer(content, None, checksum, file)
    found._end_with(_end_of_document(file.parent, found._ids))
    return found


def data_of_folder(folder: Path) -> dict[str, str]:
    """``data.tokenizer`` and ``data.tokenizer_sha256`` for a Hugging Face model; empty where it has no tokenizer.

    That is its tokenizer.json, or else its SentencePiece tokenizer.model; the checksum of either is that of its file.
    """
    file = next((folder / name for name in (FILE, "tokenizer.model") if (folder / name).exists()), None)
    if file is None:
        return {}
    return {"tokenizer": str(file.resolve()), "tokenizer_sha256": hashlib.sha256(read_file(file)).hexdigest()}


def _end_of_document(folder: Path, ids: dict[str, int]) -> int | None:
    end = _read(folder / "config.json").get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    if isinstance(end, int):
        return end
    named = _read(folder / "tokenizer_config.json").get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    return next((ids[name] for name in (named, *_ENDS) if name in ids), None)


def _read(path: Path) -> dict[str, Any]:
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return options if isinstance(options, dict) else {}


def byte_symbols() -> dict[int, str]:
    """The printable symbol that a byte-level tokenizer.json writes for each byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    printable = [b for b in range(256) if chr(b) in ByteLevel.alphabet()]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + place) for place, b in enumerate(others)}
