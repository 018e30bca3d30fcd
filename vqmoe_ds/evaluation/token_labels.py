"""Descriptions of tokens: readable text, position, kind, part of speech.

Legend: B windows, S positions, V vocabulary.
"""

from __future__ import annotations

import logging
import re
from typing import NamedTuple

import torch
from torch import Tensor

from vqmoe_ds.data.tokenizer_base import Tokenizer
from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.runtime.extras import library

logger = logging.getLogger(__name__)


class Labels(NamedTuple):
    """One label for each token of a probe."""

    ids_BS: Tensor
    """int64, into ``names``."""
    names: list[str]


def pieces_of(tokenizer: Tokenizer | None, vocab_size: int) -> list[bytes]:
    """The bytes that each id stands for; none where it stands for no text, or where that is unknown."""
    pieces = tokenizer.pieces() if tokenizer is not None else []
    return (pieces + [b""] * vocab_size)[:vocab_size]


def readable(pieces: list[bytes], end_of_document: int | None = None) -> list[str]:
    """Texts of ids without blanks or control characters: a space as ``␣``, a line break as ``\\n``."""
    names = []
    for i, piece in enumerate(pieces):
        text = piece.decode(errors="backslashreplace")
        shown = "".join("␣" if c == " " else c if c.isprintable() else ascii(c)[1:-1] for c in text)
        names.append(shown or ("<end of document>" if i == end_of_document else f"<id {i}>"))
    return names


# ---------------------------------------------------------------- kinds

KINDS = ["letter, begins a word", "letter, inside a word", "digit", "space", "line break", "punctuation", "other"]
_BEGINS, _INSIDE, _DIGIT, _SPACE, _BREAK, _PUNCTUATION, _OTHER = range(len(KINDS))


def kinds(tokens_BS: Tensor, pieces: list[bytes]) -> Labels:
    """The kind of each token by its first character that is no space; a word begins where no letter stands before."""
    kind_V = torch.tensor([_kind(piece) for piece in pieces])
    spaced_V = torch.tensor([piece[:1].isspace() for piece in pieces])
    letter_V = torch.tensor([_ends_in_letter(piece) for piece in pieces])
    kinds_BS = kind_V[tokens_BS]
    follows_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
    follows_BS[:, 1:] = letter_V[tokens_BS[:, :-1]]
    inside_BS = (kinds_BS == _BEGINS) & follows_BS & ~spaced_V[tokens_BS]
    return Labels(torch.where(inside_BS, _INSIDE, kinds_BS), KINDS)


def _kind(piece: bytes) -> int:
    text = piece.decode(errors="replace")
    first = text.strip()[:1]
    if not text or first == "\ufffd":
        return _OTHER
    if not first:
        return _BREAK if "\n" in text else _SPACE
    if first.isalpha():
        return _BEGINS
    if first.isdigit():
        return _DIGIT
    return _PUNCTUATION if first.isprintable() else _OTHER


def _ends_in_letter(piece: bytes) -> bool:
    return piece.decode(errors="replace")[-1:].isalpha()


# ---------------------------------------------------------------- parts of speech

PARTS = {
    **dict.fromkeys(("NN", "NNS", "NNP", "NNPS"), "noun"),
    **dict.fromkeys(("VB", "VBD", "VBG", "VBN", "VBP", "VBZ", "MD"), "verb"),
    **dict.fromkeys(("JJ", "JJR", "JJS"), "adjective"),
    **dict.fromkeys(("RB", "RBR", "RBS", "WRB"), "adverb"),
    **dict.fromkeys(("IN", "TO", "RP"), "preposition"),
    **dict.fromkeys(("DT", "PDT", "WDT"), "determiner"),
    **dict.fromkeys(("PRP", "PRP$", "WP", "WP$", "EX"), "pronoun"),
    "CC": "conjunction",
    "CD": "number",
}
"""Penn Treebank's tags in groups; all other words are "other", what is no word is "punctuation" or "space"."""

_WORD = re.compile(rb"[A-Za-z\x80-\xff]+(?:'[A-Za-z]+)?|\d+(?:[.,]\d+)*|[^\sA-Za-z\d\x80-\xff]")
_NAMES = ["space", "punctuation", "other", *dict.fromkeys(PARTS.values())]


def parts_of_speech(tokens_BS: Tensor, pieces: list[bytes]) -> Labels | None:
    """The part of speech of the word each token is of, by TextBlob's lexicon tagger; None where that is not installed.

    A token that spans more than one word has that of its first. The tagger knows English; its lexicon comes with the
    package, so nothing is downloaded.
    """
    try:
        library("textblob.en", "part of speech is left out, for it")
    except ConfigError as missing:
        logger.warning(missing)
        return None
    rows = [_tag_window([pieces[i] for i in row]) for row in tokens_BS.tolist()]
    return Labels(torch.tensor([[_NAMES.index(name) for name in row] for row in rows]), _NAMES)


def _tag_window(window: list[bytes]) -> list[str]:
    text = b"".join(window)
    # By byte, for tokens and words have other borders.
    part_of_byte = ["space"] * len(text)
    for sentence in _sentences(list(_WORD.finditer(text))):
        words = [match[0].decode(errors="replace") for match in sentence]
        for match, part in zip(sentence, _tag(words), strict=True):
            part_of_byte[match.start() : match.end()] = [part] * len(match[0])
    parts, place = [], 0
    for piece in window:
        blank = len(piece) - len(piece.lstrip())
        parts.append(part_of_byte[place + blank] if blank < len(piece) else "space")
        place += len(piece)
    return parts


def _sentences(words: list[re.Match[bytes]]) -> list[list[re.Match[bytes]]]:
    sentences: list[list[re.Match[bytes]]] = [[]]
    for word in words:
        sentences[-1].append(word)
        if word[0] in (b".", b"!", b"?"):
            sentences.append([])
    return [sentence for sentence in sentences if sentence]


def _tag(words: list[str]) -> list[str]:
    from textblob.en import tag

    found = tag(" ".join(words), tokenize=False)
    # Tags belong to words by their number: where the tagger cut otherwise none of them can be trusted.
    tags = [t for _, t in found] if len(found) == len(words) else ["?"] * len(words)
    return [PARTS.get(t, "other") if word[0].isalnum() else "punctuation" for word, t in zip(words, tags, strict=True)]
