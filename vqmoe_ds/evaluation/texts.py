"""Documents to be scored: their tokens, the bytes of each, and which tokens of a damaged text are still there.

Legend: N tokens of a document, clean or damaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vqmoe_ds.checkpoint.load_model import LoadedModel
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.corpus import open_corpus
from vqmoe_ds.data.index_files import check_prefix
from vqmoe_ds.data.indexed import UNKNOWN, IndexedText, open_indexed_text
from vqmoe_ds.data.portions import members
from vqmoe_ds.data.raw_text import Split, split_corpus
from vqmoe_ds.data.tokenizer_base import Tokenizer
from vqmoe_ds.data.tokenizers import ByteTokenizer
from vqmoe_ds.evaluation.corruption import Corruption, Damage, Edit, apply
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.memory import check_room

_A_UNIT = 24
"""Bytes of memory per byte of raw text (itself, twice, its id and its offset) or stored token (its id, its offset and
its text)."""


@dataclass(frozen=True)
class Text:
    """One document.

    Attributes:
        ids_N: tokens, int64.
        raw: the text they stand for; None where the tokenizer is unknown.
        starts_N: byte of ``raw`` where each token begins, in order; the end of a document begins at its end.
        tokenizer: what makes tokens of text.
        end: id that closes the document, if any.
    """

    ids_N: np.ndarray
    raw: bytes | None = None
    starts_N: np.ndarray | None = None
    tokenizer: Tokenizer | None = None
    end: int | None = None

    def bytes_of_tokens(self) -> np.ndarray | None:
        """UTF-8 bytes of the text that each token stands for, int64 ``[N]``; None where they are not known."""
        if self.raw is None or self.starts_N is None:
            return None
        return np.diff(self.starts_N, append=len(self.raw))

    def words(self) -> int | None:
        """Words between white space, and line breaks as one word each, as WikiText's perplexity counts them."""
        return None if self.raw is None else len(self.raw.split()) + self.raw.count(b"\n")

    def first(self, tokens: int) -> Text:
        """Its first tokens alone, but for those of a character that would be cut where text has to be UTF-8."""
        if len(self.ids_N) <= tokens or self.raw is None or self.starts_N is None:
            return replace(self, ids_N=self.ids_N[:tokens])
        if not isinstance(self.tokenizer, ByteTokenizer):
            while tokens and _within_character(self.raw, self.starts_N[tokens]):
                tokens -= 1
        # Without ``end``: ``damaged`` would put it behind a document that was cut before it.
        raw, starts_N = self.raw[: self.starts_N[tokens]], self.starts_N[:tokens]
        return replace(self, ids_N=self.ids_N[:tokens], raw=raw, starts_N=starts_N, end=None)

    def damage(self, corruption: Corruption, seed: int, number: int) -> Damage:
        """Edits that a corruption makes to its text, which is document ``number``."""
        assert self.raw is not None
        return corruption.damage(self.raw, seed, number)

    def damaged(self, edits: list[Edit]) -> Text:
        """The tokens of its text after the edits."""
        assert self.raw is not None and self.tokenizer is not None
        return encode(self.tokenizer, apply(self.raw, edits), self.end)


def encode(tokenizer: Tokenizer, raw: bytes, end: int | None = None) -> Text:
    """The tokens of a text.

    Args:
        end: id that closes the document, if any.

    Raises:
        DataError: not UTF-8, which only bytes need not be.
    """
    if isinstance(tokenizer, ByteTokenizer):
        ids, starts = np.frombuffer(raw, dtype=np.uint8).astype(np.int64), np.arange(len(raw))
    else:
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"the text is not UTF-8 (byte {error.start}), as a {tokenizer.kind} tokenizer needs; convert it"
            ) from None
        ids = tokenizer.encode(text).astype(np.int64)
        starts = tokenizer.starts(text, ids)
    if end is not None:
        ids, starts = np.append(ids, end), np.append(starts, len(raw))
    return Text(ids, raw, starts, tokenizer, end)


def still_there(clean: Text, damaged: Text, edits: Sequence[Edit]) -> np.ndarray:
    """The clean token that each token of the damaged text stands in for, int64 ``[N]`` of the damaged one; -1: none.

    A clean token is asked for wherever a damaged one begins at its place: every token of what was left alone, and the
    first one of what was changed, for what stands before it can be read. The rest of a changed word, or a word that is
    gone, cannot be asked for.
    """
    assert clean.starts_N is not None and damaged.starts_N is not None
    starts_N, order_N = clean.starts_N, _place_among_equals(clean.starts_N)
    firsts, ends = (np.array([edit[side] for edit in edits], dtype=np.int64) for side in (0, 1))
    growth = np.array([len(edit.replacement) for edit in edits], dtype=np.int64) - (ends - firsts)
    shift = np.concatenate([[0], np.cumsum(growth)])
    # Where a token begins in the damaged text: every edit that ends at or before it has moved it.
    key_N = _key(starts_N + shift[np.searchsorted(ends, starts_N, side="right")], order_N)
    kept_N = np.ones(len(starts_N), dtype=bool)
    if len(edits):
        edit_N = np.searchsorted(firsts, starts_N, side="right") - 1
        within_N = (edit_N >= 0) & (starts_N < ends[edit_N])
        kept_N = ~within_N | ((starts_N == firsts[edit_N]) & (order_N == 0))
    wanted = _key(damaged.starts_N, _place_among_equals(damaged.starts_N))
    source = np.full(len(wanted), -1, dtype=np.int64)
    if not len(wanted):
        return source
    token = np.flatnonzero(kept_N)
    place = np.minimum(np.searchsorted(wanted, key_N[token]), len(wanted) - 1)
    met = wanted[place] == key_N[token]
    source[place[met]] = token[met]  # of two, the later: before a word that is gone stands the one after it
    return source


def _place_among_equals(starts_N: np.ndarray) -> np.ndarray:
    # Several tokens may begin at one byte: the end of a document, or parts of a character that a tokenizer spells out.
    return np.arange(len(starts_N)) - np.searchsorted(starts_N, starts_N, side="left")


def _key(starts_N: np.ndarray, order_N: np.ndarray) -> np.ndarray:
    # One number to search by; int64 holds it for texts of up to 2^51 bytes.
    return starts_N * 4096 + np.minimum(order_N, 4095)


# ---------------------------------------------------------------- where they come from


def open_texts(
    loaded: LoadedModel, paths: Sequence[str] | None, split: str = "auto", max_tokens: int | None = None
) -> list[Text]:
    """The documents that ``--data`` and ``--split`` mean.

    A raw file is one document, a stored sequence of a prepared corpus is one; a held-out stretch of raw text is one.

    Args:
        paths: raw files or folders, or prepared prefixes; None for the data of the run itself.
        split: ``all``, ``valid`` (the held-out share that training with this configuration leaves), or ``auto``: all
            of raw text that is named, the held-out share of anything else.
        max_tokens: read no more than these, from the first document on.

    Raises:
        DataError: nothing there, empty, of another tokenizer, or with ids beyond the model's vocabulary.
        CheckpointError: raw text, and the model's tokenizer is unknown.
    """
    if paths is None:
        loaded.need_data()
    # All are opened before one is read: a wrong path is refused also where the texts before it are enough.
    wanted: Sequence[str | None] = paths or [None]
    sources = [_open(loaded, path, split, max_tokens) for path in wanted]
    units = sum(source.units for source in sources)
    left = units if max_tokens is None else max_tokens
    # Before there are tokens: all documents are held in memory, for damage looks at them again.
    most = min(units, left + max(source.largest for source in sources))
    remedy = "read less (--max_tokens), or a part of it"
    check_room(_A_UNIT * most, f"scoring {most:,} bytes or tokens of the data", remedy, DataError)
    texts = []
    for text in chain.from_iterable(source.texts for source in sources):
        if len(text.ids_N) < 2:
            continue
        texts.append(text if max_tokens is None else text.first(left))
        left -= len(text.ids_N)
        # What comes after them is not even read.
        if max_tokens is not None and left < 2:
            break
    if not texts:
        raise DataError("the data has no document of two or more tokens to score; give more text")
    return texts


class _Source(NamedTuple):
    """The data of one path, found good but not read yet.

    Attributes:
        units: bytes of raw text, or stored tokens.
        largest: of them, those that are read at once before it shows that they are enough.
        texts: its documents.
    """

    units: int
    largest: int
    texts: Iterator[Text]


def _open(loaded: LoadedModel, path: str | None, split: str, max_tokens: int | None) -> _Source:
    """``open_texts`` of one path; None for the run's own data."""
    data = loaded.config.data
    if path is not None:
        data = data.model_copy(update={"path": path, "valid_path": None})
    if split == "all":
        # Of a validation path of its own ``open_indexed_text`` holds out everything.
        data = data.model_copy(update={"valid_path": data.path})
    config = loaded.config.model_copy(update={"data": data})
    prepared = open_indexed_text(config)
    if prepared is not None:
        check_same_tokenizer(loaded, prepared)
        largest = max(int(prefix.lengths.max(initial=0)) for prefix in prepared.valid.prefixes)
        return _Source(sum(prepared.valid.tokens), largest, _prepared(loaded, prepared))
    return _raw(loaded, config, split == "all" or (split == "auto" and path is not None), max_tokens)


def _raw(loaded: LoadedModel, config: RunConfig, whole: bool, max_tokens: int | None) -> _Source:
    tokenizer, path = loaded.need_tokenizer(), config.data.path
    held_out = config.data.valid_path
    assert not isinstance(path, list) and not isinstance(held_out, list)
    corpus = open_corpus(path if held_out is None else held_out)
    if whole or held_out is not None:
        # The first tokens of other tokenizers may depend on what follows them.
        most = max_tokens if isinstance(tokenizer, ByteTokenizer) else None
        largest = max(map(len, corpus.pieces)) if most is None else 0
        return _Source(corpus.num_bytes, largest, (encode(tokenizer, p[:most].tobytes()) for p in corpus.pieces))
    split = split_corpus(corpus, config.model.sequence_length, config.data.holdout_every)[1]
    stretches = _stretches(split, config.data.separate_documents)
    return _Source(len(split) * split.sequence_length, 0, (encode(tokenizer, piece) for piece in stretches))


def _stretches(split: Split, separate: bool) -> Iterator[bytes]:
    """The held-out stretches of raw text, or of each the parts of files that it holds.

    The targets of whole ones are those of the trainer's windows.
    """
    ends = np.array(split.corpus.ends if separate else (), dtype=np.int64)
    runs = np.split(split.indices, np.flatnonzero(np.diff(split.indices) > 1) + 1)
    for run in runs:
        windows = [split.corpus.window(int(index), split.sequence_length) for index in run]
        # Neighbouring windows share a byte: the last target of one is the first input of the next.
        stretch = np.concatenate([*(window[:-1] for window in windows), windows[-1][-1:]])
        cuts = ends - run[0] * split.sequence_length
        yield from (part.tobytes() for part in np.split(stretch, cuts[(cuts > 0) & (cuts < len(stretch))]))


def _prepared(loaded: LoadedModel, data: IndexedText) -> Iterator[Text]:
    pieces = data.tokenizer.pieces() if data.tokenizer is not None else []
    for prefix in data.valid.prefixes:
        header = check_prefix(prefix.path)
        ids, firsts = header.ids, header.offsets // header.dtype.itemsize
        # As ``Portion`` takes them: other members would score text that was trained on.
        for sequence in members(len(header.lengths), data.valid.share):
            first = int(firsts[sequence])
            stored = np.asarray(ids[first : first + int(header.lengths[sequence])]).astype(np.int64)
            stored = _within_vocabulary(stored, data.tokenizer, loaded.config.model.vocab_size, prefix.path)
            yield from _documents(stored, data.tokenizer, pieces)


def _within_vocabulary(ids_N: np.ndarray, tokenizer: Tokenizer | None, vocab_size: int, path: str) -> np.ndarray:
    """The ids, without the ends of documents where the model has none (one of raw bytes)."""
    known = vocab_size
    if tokenizer is not None:
        known = min(vocab_size, tokenizer.vocab_size)
        ids_N = ids_N[ids_N != tokenizer.eod] if tokenizer.eod >= vocab_size else ids_N
    if len(ids_N) and (ids_N.max() >= known or ids_N.min() < 0):
        outside = ids_N.min() if ids_N.min() < 0 else ids_N.max()
        raise DataError(
            f"prepared data {path} has the id {outside}, past the vocabulary of {known}; it was made by another "
            "tokenizer than the model's, or is damaged"
        )
    return ids_N


def _documents(stored: np.ndarray, tokenizer: Tokenizer | None, pieces: list[bytes]) -> Iterator[Text]:
    """A stored sequence, cut where a document ends within it."""
    if tokenizer is None:
        yield Text(stored)
        return
    # The end belongs to the document that it closes, where it is learned.
    for ids_N in np.split(stored, np.flatnonzero(stored == tokenizer.eod) + 1):
        sizes = np.array([len(pieces[i]) for i in ids_N], dtype=np.int64)
        end = tokenizer.eod if len(ids_N) and ids_N[-1] == tokenizer.eod else None
        yield Text(ids_N, b"".join(pieces[i] for i in ids_N), np.cumsum(sizes) - sizes, tokenizer, end)


def _within_character(raw: bytes, place: int) -> bool:
    """Whether the byte there begins no character; behind the last one starts a token without bytes, such as the end."""
    return place < len(raw) and raw[place] & 0xC0 == 0x80


def check_same_tokenizer(loaded: LoadedModel, data: IndexedText) -> None:
    """Refuse prepared data whose ids mean something else than those the model was trained on, as far as is known.

    Raises:
        DataError: they do.
    """
    ours, theirs = loaded.tokenizer_checksum, data.tokenizer_sha256
    if theirs != UNKNOWN and ours not in (None, theirs):
        names = [Path(prefix.path).name for prefix in data.valid.prefixes]
        raise DataError(
            f"prepared data {', '.join(names)} was made by the tokenizer {theirs[:12]}, the model of {loaded.path} was "
            f"trained with {ours[:12]}; prepare it with the model's tokenizer"
        )
