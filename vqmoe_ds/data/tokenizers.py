"""Tokenizers of bytes, of SentencePiece (unigram or BPE) and of the words of WikiText; loads these and all others."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from vqmoe_ds.data.json_tokenizer import JsonTokenizer, read_json_tokenizer
from vqmoe_ds.data.tokenizer_base import (
    DESCRIPTION,
    MOST_IDS,
    SPACE_MARK,
    Tokenizer,
    cannot_encode,
    characters_to_bytes,
    checked_ids,
    read_file,
    require_utf8,
)
from vqmoe_ds.runtime.errors import DataError, shown
from vqmoe_ds.runtime.extras import library
from vqmoe_ds.runtime.files import why_missing

UNKNOWN, NEWLINE, END_OF_DOCUMENT = "<unk>", "<eos>", "<eod>"


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document."""

    kind, vocab_size, eod = "bytes", 257, 256
    # Never to change: prepared data and checkpoints are compared by it.
    checksum = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(require_utf8(text), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(checked_ids(ids, self)).decode(errors="replace")

    def pieces(self) -> list[bytes]:
        return [bytes([byte]) for byte in range(256)] + [b""]

    def _payload(self) -> None:
        return None


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; ``eod`` is its own end-of-sentence id, or one id past its pieces where it has none.

    Raises:
        DataError: ``model`` is not a SentencePiece model.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, name: str = "the SentencePiece model") -> None:
        library = sentencepiece()
        try:
            self._pieces = library.SentencePieceProcessor(model_proto=model)
            # An empty model counts as none given: the library loads nothing, and complains on stderr when it is asked.
            size = self._pieces.get_piece_size() if model else 0
            self._bytes = [i for i in range(size) if self._pieces.is_byte(i)]
            self._words = _word_cache(self._pieces, model) if len(self._bytes) == 256 else None
            spec = sentencepiece_proto(model).normalizer_spec
            self._puts_space, self._drops_spaces = spec.add_dummy_prefix, spec.remove_extra_whitespaces
        except Exception:  # whatever the libraries say of a damaged file
            size = 0
        if not 0 < size <= MOST_IDS:
            raise DataError(f"{name} is not a SentencePiece model, or is damaged; train or download it again")
        self._model = model
        self.checksum = hashlib.sha256(model).hexdigest()
        own_end = self._pieces.eos_id()
        self.eod = own_end if own_end >= 0 else size
        self.vocab_size = max(size, self.eod + 1)
        self.unknown_id = None if len(self._bytes) == 256 else self._pieces.unk_id()

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self._model,)

    def encode(self, text: str) -> np.ndarray:
        spelled = self._with_stand_ins(text)
        try:
            ids = self._encode(spelled)
        except RuntimeError as error:
            require_utf8(text)
            raise cannot_encode(self.kind, error) from None
        return ids if spelled is text else self._with_marks(ids, text)

    def _encode(self, text: str) -> np.ndarray:
        if self._words is not None:
            return self._words.encode(text)
        # One call per text: handing SentencePiece the whole batch is no faster, and lists of int are slower.
        return self._pieces.encode(text, return_type="numpy")

    def encode_pieces(self, texts: Sequence[str], before: Sequence[str]) -> list[np.ndarray]:
        return [self._inside(last, text).encode(text) for text, last in zip(texts, before, strict=True)]

    def _inside(self, before: str, text: str) -> SentencePieceTokenizer:
        """The model for text inside a document: a space is put in front only in place of one that it drops."""
        drops, puts = self._drops_spaces, self._puts_space
        wanted = puts if not before else drops and self._is_space(*self._with_stand_ins(before + text[:1]))
        return self if wanted == puts else self._other

    @cached_property
    def _other(self) -> SentencePieceTokenizer:
        """The same model that puts a space before a text where this one does not, and does not where this one does."""
        proto = sentencepiece_proto(self._model)
        proto.normalizer_spec.add_dummy_prefix = not self._puts_space
        return SentencePieceTokenizer(proto.SerializeToString())

    def _is_space(self, *characters: str) -> bool:
        """Whether one of them is a space to the model."""
        # Asked of its own normalizer, since a rule such as NFKC turns other white space into a space.
        spaced = self._pieces.normalize("a a")
        return any(self._pieces.normalize(f"a{c}a") == spaced for c in characters)

    def _with_stand_ins(self, text: str) -> str:
        """The text as a model with bytes for all symbols has to see it, which would take a ``SPACE_MARK`` for a space.

        A model without them cannot write the mark, and takes it for a space.
        """
        return text.replace(SPACE_MARK, self._stand_in) if SPACE_MARK in text and self.unknown_id is None else text

    @cached_property
    def _stand_in(self) -> str:
        """A symbol that the model writes in bytes, as many as ``SPACE_MARK`` has."""
        known = "".join(map(self._pieces.id_to_piece, range(self._pieces.get_piece_size())))
        private = map(chr, range(0xE000, 0xF900))
        return next(c for c in private if c not in known and c in self._pieces.normalize(c))

    def _with_marks(self, ids: np.ndarray, text: str) -> np.ndarray:
        """The ids of a text, from those of the text with stand-ins."""
        stand_in, mark = (
            np.array([self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in symbol.encode()], dtype=np.int32)
            for symbol in (self._stand_in, SPACE_MARK)
        )
        places = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(ids, len(mark)) == stand_in).all(axis=1))
        # The text may hold the other symbol itself.
        of_marks = [symbol == SPACE_MARK for symbol in re.findall(f"{SPACE_MARK}|{self._stand_in}", text)]
        ids = ids.copy()
        ids[places[of_marks][:, None] + np.arange(len(mark))] = mark
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._pieces.decode(checked_ids(ids, self))

    def pieces(self) -> list[bytes]:
        texts = [b""] * self.vocab_size
        for i in range(self._pieces.get_piece_size()):
            if not (self._pieces.is_control(i) or self._pieces.is_unknown(i) or self._pieces.is_unused(i)):
                texts[i] = self._pieces.id_to_piece(i).replace(SPACE_MARK, " ").encode()
        for i in self._bytes:
            texts[i] = bytes([int(self._pieces.id_to_piece(i)[1:-1], 16)])
        return texts

    def _told_starts(self, text: str) -> list[int]:
        return [piece.begin for piece in self._pieces.encode(self._with_stand_ins(text), return_type="proto").pieces]

    def _payload(self) -> tuple[str, bytes]:
        return "spm.model", self._model


class _WordCache(dict[str, bytes]):
    """BPE ids by word, as bytes of int32: SentencePiece merges each word anew, which text repeats a hundredfold.

    Exact, because ``_word_cache`` makes one only for models without a piece that reaches from one word into the next.
    """

    # It cuts where, by ``joins`` of _word_cache, no piece can reach across: change both together.
    WORD = re.compile(r" *[^ \n]+|\n| +")
    LONGEST, MOST = 64, 1 << 18  # characters and words, so that memory stays bounded

    def __init__(self, pieces: Any) -> None:
        super().__init__()
        self._pieces = pieces

    def __missing__(self, word: str) -> bytes:
        ids = self._pieces.encode(word, return_type="numpy").tobytes()
        if len(word) <= self.LONGEST and len(self) < self.MOST:
            self[word] = ids
        return ids

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(b"".join(map(self.__getitem__, self.WORD.findall(text))), dtype=np.int32)


def sentencepiece() -> Any:
    """The library, its protocol buffers loaded too.

    Raises:
        DataError: it is not installed, or protobuf is not.
    """
    library("sentencepiece.sentencepiece_model_pb2", "a SentencePiece tokenizer", DataError)
    return library("sentencepiece", "a SentencePiece tokenizer", DataError)


def sentencepiece_proto(model: bytes) -> Any:
    """A SentencePiece model, as its protocol buffer describes it."""
    return sentencepiece().sentencepiece_model_pb2.ModelProto.FromString(model)


def _word_cache(pieces: Any, model: bytes) -> _WordCache | None:
    """A cache for BPE models that leave the text as it is and never join two words or a word and a line break."""
    proto = sentencepiece_proto(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    changes_text = (
        normalizer.precompiled_charsmap
        or normalizer.add_dummy_prefix
        or normalizer.remove_extra_whitespaces
        or not normalizer.escape_whitespaces
    )
    joins = re.compile(f"[^{SPACE_MARK}]{SPACE_MARK}|[^\n]\n|\n[^\n]|\n\n| ")
    if trainer.model_type != trainer.BPE or changes_text or any(joins.search(piece.piece) for piece in proto.pieces):
        return None
    return _WordCache(pieces)


class WordTokenizer(Tokenizer):
    """Words between white space, as in the token files of WikiText; a line break is a token of its own.

    Decoding puts a space before every token, as those files do: they come back exactly, other text up to its spaces.
    The symbols ``<unk>``, ``<eos>`` (line break) and ``<eod>`` are added to a vocabulary without them.
    """

    kind = "word"

    def __init__(self, words: Sequence[str], name: str = "the vocabulary") -> None:
        # Symbols behind the words of the file, whose ids stay as they are.
        self.words = [*words, *(symbol for symbol in (UNKNOWN, NEWLINE, END_OF_DOCUMENT) if symbol not in words)]
        self._ids = {word: i for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            twice = next(word for i, word in enumerate(self.words) if self._ids[word] != i)
            raise DataError(f"{name} has the word {twice!r} twice; keep one line for each word")
        broken = next((i for i, word in enumerate(self.words) if word.split() != [word]), None)
        if broken is not None:
            raise DataError(f"{name} has an empty line or a space in line {broken + 1}; put one word on each line")
        self.vocab_size = len(self.words)
        self.checksum = hashlib.sha256(self._payload()[1]).hexdigest()
        # A document cannot end itself, nor break a line, by spelling these symbols out.
        self.eod, newline = self._ids.pop(END_OF_DOCUMENT), self._ids.pop(NEWLINE)
        self.unknown_id = self._ids[UNKNOWN]
        self._newline = np.array([newline], dtype=np.int32)

    def __reduce__(self) -> tuple[Any, ...]:
        return WordTokenizer, (self.words,)

    def encode(self, text: str) -> np.ndarray:
        first, *rest = (self._encode_line(line) for line in text.split("\n"))
        return np.concatenate([first, *(part for line in rest for part in (self._newline, line))])

    def _encode_line(self, line: str) -> np.ndarray:
        words = line.split()
        return np.fromiter(map(self._ids.get, words, repeat(self.unknown_id)), dtype=np.int32, count=len(words))

    def count_unknown(self, text: str, ids: np.ndarray) -> int:
        """Number of unknown symbols; ``<unk>`` in the text itself, which WikiText is full of, does not count."""
        unknown = super().count_unknown(text, ids)
        return unknown - text.split().count(UNKNOWN) if unknown else 0

    def decode(self, ids: Iterable[int]) -> str:
        newline = int(self._newline[0])
        return "".join(" \n" if i == newline else f" {self.words[i]}" for i in checked_ids(ids, self))

    def pieces(self) -> list[bytes]:
        texts = [f" {word}".encode() for word in self.words]
        texts[int(self._newline[0])], texts[self.eod] = b" \n", b""
        return texts

    def _told_starts(self, text: str) -> list[int]:
        return characters_to_bytes(text, [token.start() for token in re.finditer(r"[^\S\n]*(?:\n|\S+)", text)])

    def _payload(self) -> tuple[str, bytes]:
        return "vocab.txt", "".join(f"{word}\n" for word in self.words).encode()


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer that ``source`` names: "bytes", a ``*.tokenizer`` or Hugging Face folder, or a file.

    Files are a SentencePiece ``.model``, a ``tokenizer.json`` of Hugging Face (any ``.json``) and a word list ``.txt``.

    Raises:
        DataError: nothing there, another kind of file, damaged, or changed since it was saved.
    """
    if str(source) == "bytes":
        return ByteTokenizer()
    path = Path(source)
    if os.path.isdir(path):
        return _load_folder(path)
    if not os.path.exists(path):
        raise DataError(
            f"tokenizer {source} {why_missing(path)}; give bytes, a folder of tools/train_tokenizer.py or of a Hugging "
            "Face model, a SentencePiece .model, a tokenizer.json or a vocabulary .txt"
        )
    if path.suffix == ".model":
        return SentencePieceTokenizer(read_file(path), str(path))
    if path.suffix == ".json":
        return read_json_tokenizer(path)
    if path.suffix == ".txt":
        return WordTokenizer(_read_words(path), str(path))
    raise DataError(
        f"tokenizer file {path} is neither a SentencePiece .model, a tokenizer.json nor a vocabulary .txt; rename or "
        "convert it"
    )


def _load_folder(folder: Path) -> Tokenizer:
    description = folder / DESCRIPTION
    if not os.path.exists(description):
        raise DataError(f"tokenizer folder {folder} has no {DESCRIPTION}; make one with tools/train_tokenizer.py")
    try:
        kept = json.loads(read_file(description))
        # Ours and Hugging Face's have the same name.
        if "model" in kept and "kind" not in kept:
            return read_json_tokenizer(folder)
        kind, checksum, eod = kept["kind"], kept["checksum"], kept.get("eod")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{description} is damaged; make the tokenizer again with tools/train_tokenizer.py") from error
    tokenizer: Tokenizer
    if kind == ByteTokenizer.kind:
        tokenizer = ByteTokenizer()
    elif kind == SentencePieceTokenizer.kind:
        tokenizer = SentencePieceTokenizer(read_file(folder / "spm.model"), str(folder / "spm.model"))
    elif kind == WordTokenizer.kind:
        tokenizer = WordTokenizer(_read_words(folder / "vocab.txt"), str(folder / "vocab.txt"))
    elif kind == JsonTokenizer.kind:
        # Bytes that are not UTF-8 show in the checksum below.
        content = read_file(folder / "huggingface.json").decode(errors="replace")
        # The end of a document is kept with it, as config.json, which told it, is not in this folder.
        tokenizer = JsonTokenizer(content, eod, name=folder / "huggingface.json")
    else:
        raise DataError(
            f"{description} names the tokenizer kind {shown(kind)}; known are bytes, sentencepiece, json and word"
        )
    if tokenizer.checksum != checksum:
        raise DataError(f"tokenizer folder {folder} was changed after it was saved (checksum differs); restore it")
    return tokenizer


def are_bytes(checksum: str | None, vocab_size: int) -> bool:
    """Whether a model's ids are bytes, by its tokenizer's checksum (None of raw text) and its vocabulary."""
    return checksum == ByteTokenizer.checksum or (checksum is None and vocab_size in (256, 257))


def nothing_known(checksum: str | None, vocab_size: int) -> bool:
    """Whether weights came without a tokenizer (``checksum``) and are not of bytes: any ids may be theirs."""
    return checksum is None and not are_bytes(checksum, vocab_size)


def _read_words(path: Path) -> list[str]:
    try:
        words = read_file(path).decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"vocabulary {path} is not UTF-8 (byte {error.start}); convert it") from error
    if len(words) > MOST_IDS:
        raise DataError(f"vocabulary {path} has {len(words):,} lines, more than the {MOST_IDS:,} ids there may be")
    return [word.removesuffix("\r") for word in words]
