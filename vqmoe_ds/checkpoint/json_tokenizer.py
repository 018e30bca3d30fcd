"""The ``tokenizer.json`` of a Hugging Face folder as a tokenizer of ours."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vqmoe_ds.checkpoint.hf_tokenizer import byte_symbols
from vqmoe_ds.data.tokenizers import SPACE_MARK, Tokenizer, characters_to_bytes
from vqmoe_ds.errors import DataError

FILE = "tokenizer.json"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class JsonTokenizer(Tokenizer):
    """Text to ids through the ``tokenizers`` library, special tokens never added.

    Args:
        folder: with tokenizer.json; ``eos_token_id`` of its config.json ends a document (one id past all without it).
        checksum: of the tokenizer it was made of, if known; else that of the file.

    Raises:
        DataError: the file is damaged, or the library is missing.
    """

    kind = "json"

    def __init__(self, folder: str | Path, checksum: str | None = None) -> None:
        path = Path(folder) / FILE
        try:
            from tokenizers import Tokenizer as Fast
        except ModuleNotFoundError:
            raise DataError(f"{path} needs the Python package tokenizers; pip install 'vqmoe_ds[hf]'") from None
        try:
            content = path.read_text()
            self._fast, options = Fast.from_str(content), json.loads(content)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{path} cannot be read as a tokenizer ({error}); export the model again") from None
        self._fast.encode_special_tokens = True  # text that spells a special token out stays text
        self._control = {t["id"] for t in options.get("added_tokens", []) if t.get("special")}
        self._byte_level = "ByteLevel" in json.dumps(options.get("decoder"))
        self._content, self.checksum = content, checksum or hashlib.sha256(content.encode()).hexdigest()
        size = self._fast.get_vocab_size()
        self.eod = _end_of_document(Path(folder), size)
        self.vocab_size = max(size, self.eod + 1)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._fast.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._fast.decode([int(i) for i in ids if i != self.eod], skip_special_tokens=True))

    def pieces(self) -> list[bytes]:
        byte_of = {symbol: byte for byte, symbol in byte_symbols().items()}
        texts = [b""] * self.vocab_size
        for token, i in self._fast.get_vocab().items():
            if i in self._control:
                continue
            if self._byte_level:
                texts[i] = bytes(byte_of[symbol] for symbol in token)
            else:
                byte = _BYTE.fullmatch(token)
                texts[i] = bytes([int(byte[1], 16)]) if byte else token.replace(SPACE_MARK, " ").encode()
        return texts

    def _told_starts(self, text: str) -> list[int]:
        offsets = self._fast.encode(text, add_special_tokens=False).offsets
        return characters_to_bytes(text, [first for first, _ in offsets])

    def _payload(self) -> tuple[str, bytes]:
        return FILE, self._content.encode()


def _end_of_document(folder: Path, size: int) -> int:
    try:
        options: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return size
    end = options.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    return int(end) if isinstance(end, int) else size
