"""Shares of prepared corpora, of which training and validation read one each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

HELD_OUT = (0, 0, 0)
"""The (seed, portion, epoch) of the text that is validated on."""


@dataclass(frozen=True)
class Prefix:
    """One prepared corpus, ``PREFIX.bin`` and ``PREFIX.idx``."""

    path: str
    weight: float | None
    lengths: np.ndarray = field(repr=False)
    """Tokens of each stored sequence, int32, memory-mapped."""
    tokenizer: dict[str, Any] | None
    """Its description in ``PREFIX.json``."""

    def tokens_of(self, share: tuple[float, float]) -> int:
        """Tokens of the stored sequences of a share."""
        return int(self.lengths[members(len(self.lengths), share)].sum(dtype=np.int64))


def members(count: int, share: tuple[float, float]) -> np.ndarray:
    """The stored sequences of a share, int32, in order: as many as megatron-core takes, but spread over the corpus.

    Its own shares are stretches, so that the end of a joined corpus, another kind of text with other lengths, would be
    all that is validated on. Multiples of the golden ratio spread evenly whatever the shares are.
    """
    if share == (0.0, 1.0):
        return np.arange(count, dtype=np.int32)
    # Rounded as in epochs._shapes, by which the length of an index is checked.
    first, last = round(share[0] * float(count)), round(share[1] * float(count))
    order = np.argsort(np.arange(count) * ((5**0.5 - 1) / 2) % 1, kind="stable")
    return np.sort(order[first:last]).astype(np.int32)


@dataclass(frozen=True)
class Portion:
    """The same share of one or more corpora, read together: one epoch has every window of all of them once.

    The last tokens of a corpus, too few for a window, are left out; other ones every epoch, as sequences are shuffled.
    """

    prefixes: tuple[Prefix, ...]
    share: tuple[float, float]
    sequence_length: int

    @cached_property
    def windows(self) -> list[int]:
        """Windows of each corpus."""
        # A window needs one token more than it has inputs, its last target, which is the first input of the next.
        return [max(0, (tokens - 1) // self.sequence_length) for tokens in self.tokens]

    @cached_property
    def tokens(self) -> list[int]:
        return [prefix.tokens_of(self.share) for prefix in self.prefixes]

    def __len__(self) -> int:
        return sum(self.windows)

    def without_empty(self) -> Portion:
        """The same portion with only the corpora that have a window."""
        kept = tuple(p for p, n in zip(self.prefixes, self.windows, strict=True) if n)
        return Portion(kept, self.share, self.sequence_length)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything that decides the order of the windows, seed and epoch aside."""
        # "spread" names the rule of members: an index that another rule made must not be found under this name.
        digest = hashlib.sha256(repr(["spread", self.share, self.sequence_length]).encode())
        for prefix in self.prefixes:
            digest.update(repr([prefix.path, len(prefix.lengths)]).encode())
            digest.update(prefix.lengths.data)
        return digest.hexdigest()[:16]
