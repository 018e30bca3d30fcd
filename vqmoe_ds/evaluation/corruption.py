"""Damage to text, as lists of edits on its UTF-8 bytes.

The kinds, with the share that is changed unless a rate is given:

``word_swap`` (2.5 %)       words become ``AAA``; stop words never do. The rate is that of all words of a document.
``word_swap_line`` (2.5 %)  the same, line by line, as published for WikiText-103 (TextAttack's word swap, stop words
                            protected, in "Tight Clusters Make Specialized Experts"): ``max(int(rate * words), 1)``
                            words of every line that has one to swap, so more than the rate where lines are short.
``char_noise`` (5 %)        letters and digits are replaced by a random letter, left out, or followed by one.
``word_drop`` (5 %)         words are left out, stop words too, with the space before them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from vqmoe_ds.runtime.errors import ConfigError

REPLACEMENT = b"AAA"
LETTERS = b"abcdefghijklmnopqrstuvwxyz"
# Bytes from 0x80 on are parts of characters, none of which an edit may cut: tokenizers refuse what is no UTF-8.
_LETTER = rb"[0-9A-Za-z_\x80-\xff]"
_WORD = re.compile(_LETTER + rb"+(?:['-]" + _LETTER + rb"+)*")

PROTECTED = frozenset(
    b"""
    a an the this that these those each every either neither some any no none all both such other another same own
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves one who whom whose which what whoever whatever
    and or but nor so yet if then else than because as until while although though unless since whether
    of at by for with about against between into through during before after above below to from up down in out on off
    over under again further once upon within without toward towards among along across behind beyond near per via
    here there when where why how not only very too just also more most less least few many much now ever never
    am is are was were be been being have has had having do does did doing done can could will would shall should may
    might must ought s t d ll m o re ve
    isn't aren't wasn't weren't hasn't haven't hadn't doesn't don't didn't can't cannot couldn't won't wouldn't shan't
    shouldn't mightn't mustn't needn't i'm i've i'd i'll you're you've you'd you'll he's he'd he'll she's she'd she'll
    it's it'd it'll we're we've we'd we'll they're they've they'd they'll that's there's who's what's let's
    unk
    """.split()
)
"""Stop words of English (its function words), and the mark of words outside a vocabulary; compared in lower case."""


class Edit(NamedTuple):
    """Bytes ``start`` to ``end`` (not included, at least one) become ``replacement``."""

    start: int
    end: int
    replacement: bytes


class Damage(NamedTuple):
    """Edits of one document in order, without overlap, and how many words or characters there were to choose from."""

    edits: list[Edit]
    units: int


class Corruption(NamedTuple):
    """A kind of damage and the share of words or characters it is asked to change."""

    kind: str
    rate: float

    def __str__(self) -> str:
        return f"{self.kind} {self.rate:g}"

    def damage(self, text: bytes, seed: int, document: int = 0) -> Damage:
        """Edits of a text; a function of kind, rate, seed and the number of the document alone."""
        # A checksum, for ``hash`` of a string differs from process to process, and ranks must damage alike.
        generator = np.random.default_rng([seed, zlib.crc32(self.kind.encode()), document])
        return _KINDS[self.kind][0](text, self.rate, generator)


def apply(text: bytes, edits: list[Edit]) -> bytes:
    """The text with its edits."""
    parts, place = [], 0
    for start, end, replacement in edits:
        parts += [text[place:start], replacement]
        place = end
    return b"".join([*parts, text[place:]])


def parse_corruption(spec: str) -> Corruption:
    """``KIND`` or ``KIND:RATE``.

    Raises:
        ConfigError: unknown, or a rate that is no share.
    """
    kind, colon, rate = spec.partition(":")
    if kind not in _KINDS:
        raise ConfigError(f"--corrupt {spec}: the kind {kind!r} is unknown; known are {', '.join(_KINDS)}")
    try:
        share = float(rate) if colon else _KINDS[kind][1]
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"--corrupt {spec}: the rate {rate!r} is not a number from 0 to 1, such as {kind}:0.05")
    return Corruption(kind, share)


def all_corruptions() -> list[Corruption]:
    """Every kind at its own rate."""
    return [parse_corruption(kind) for kind in _KINDS]


# ---------------------------------------------------------------- the kinds


def _swap_words(text: bytes, rate: float, generator: np.random.Generator) -> Damage:
    words = list(_WORD.finditer(text))
    return Damage(list(_swaps(words, _share(rate, len(words), generator), generator)), len(words))


def _swap_words_by_line(text: bytes, rate: float, generator: np.random.Generator) -> Damage:
    edits: list[Edit] = []
    units = begin = 0
    while begin < len(text):
        end = text.find(b"\n", begin)
        end = len(text) if end < 0 else end
        words = list(_WORD.finditer(text, begin, end))
        # A rate of 0 is no damage, where the published rule would still swap one word.
        edits += _swaps(words, max(int(rate * len(words)), 1) if rate else 0, generator)
        units, begin = units + len(words), end + 1
    return Damage(edits, units)


def _swaps(words: list[re.Match[bytes]], count: int, generator: np.random.Generator) -> Iterator[Edit]:
    free = [word for word in words if word[0].lower() not in PROTECTED]
    for chosen in _choose(len(free), count, generator):
        yield Edit(free[chosen].start(), free[chosen].end(), REPLACEMENT)


def _drop_words(text: bytes, rate: float, generator: np.random.Generator) -> Damage:
    words = [word.span() for word in _WORD.finditer(text)]
    edits = []
    for chosen in _choose(len(words), _share(rate, len(words), generator), generator):
        start, end = words[chosen]
        # Never a line break: each counts as a word, and the published rule goes by lines.
        while start and text[start - 1] in b" \t":
            start -= 1
        edits.append(Edit(start, end, b""))
    return Damage(edits, len(words))


def _noise(text: bytes, rate: float, generator: np.random.Generator) -> Damage:
    sizes = _character_sizes(np.frombuffer(text, dtype=np.uint8))
    all_starts = np.flatnonzero(sizes)
    starts = all_starts[_choose(len(all_starts), _share(rate, len(all_starts), generator), generator)]
    ends = starts + sizes[starts]
    ways, letters = generator.integers(3, size=len(starts)), generator.integers(26, size=len(starts))
    edits = []
    for start, end, way, letter in zip(*(v.tolist() for v in (starts, ends, ways, letters)), strict=True):
        old = text[start:end]
        # A letter in place of itself would be told as a change that no model sees.
        if way == 0 and old == LETTERS[letter : letter + 1]:
            letter = (letter + 1) % 26
        new = LETTERS[letter : letter + 1]
        edits.append(Edit(start, end, (new, b"", old + new)[way]))
    return Damage(edits, len(all_starts))


def _character_sizes(raw: np.ndarray) -> np.ndarray:
    """Bytes of the letter, digit or character beyond ASCII that starts at each byte; 0 where none does."""
    sizes, follows = _CHARACTER_BYTES[raw], np.append(raw & 0xC0 == 0x80, [False] * 3)
    for place in (1, 2, 3):
        # In text that is not UTF-8 bytes beyond ASCII may start characters that are not there.
        sizes[(sizes > place) & ~follows[place : place + len(raw)]] = 0
    return sizes


def _character_bytes() -> np.ndarray:
    """Bytes of the letter, digit or character beyond ASCII that starts with each byte; 0 where none does."""
    sizes = np.zeros(256, dtype=np.int64)
    sizes[[byte for byte in range(128) if chr(byte).isalnum()]] = 1
    # First bytes of UTF-8; 0xC0, 0xC1 and those from 0xF5 on begin no character (RFC 3629).
    sizes[0xC2:0xE0], sizes[0xE0:0xF0], sizes[0xF0:0xF5] = 2, 3, 4
    return sizes


_CHARACTER_BYTES = _character_bytes()


def _share(rate: float, total: int, generator: np.random.Generator) -> int:
    """``rate * total``, rounded up or down by chance, so that short documents too have the rate on average."""
    return int(rate * total + generator.random())


def _choose(total: int, count: int, generator: np.random.Generator) -> np.ndarray:
    # Sorted: ``apply`` and ``texts.still_there`` take edits in the order of the text.
    return np.sort(generator.choice(total, min(count, total), replace=False)) if total else np.zeros(0, dtype=np.int64)


_KINDS: dict[str, tuple[Callable[[bytes, float, np.random.Generator], Damage], float]] = {
    "word_swap": (_swap_words, 0.025),
    "word_swap_line": (_swap_words_by_line, 0.025),
    "char_noise": (_noise, 0.05),
    "word_drop": (_drop_words, 0.05),
}
KINDS = tuple(_KINDS)
