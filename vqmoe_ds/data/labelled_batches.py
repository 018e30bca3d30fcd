"""Labelled texts as ids: held out, drawn, cut to the context, and dealt out in batches that need little padding.

Legend: B texts, S positions of the longest of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vqmoe_ds.data.batches import PADDING, Batch, ShuffledBatches
from vqmoe_ds.data.labelled import LabelledSet
from vqmoe_ds.data.tokenizer_base import Tokenizer
from vqmoe_ds.runtime.errors import ConfigError, DataError

POOL = 32
"""Batches whose texts are sorted by length together."""


@dataclass(frozen=True)
class LabelledTexts:
    """Encoded texts of one split, readable by row (a ``Windows`` of texts)."""

    texts: list[str]
    ids: list[np.ndarray]
    labels: np.ndarray
    """int64 ``[len(texts)]``"""
    classes: tuple[str, ...]
    cut: np.ndarray
    """bool ``[len(texts)]``: the text was longer than the context."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.ids], dtype=np.int64)

    @property
    def sequence_length(self) -> int:
        return int(self.lengths.max())

    def read(self, positions: np.ndarray) -> Batch:
        """The texts at ``positions``, padded on the right to the longest of them, and their labels."""
        rows = [self.ids[p] for p in positions]
        inputs_BS = np.full((len(rows), max(map(len, rows))), PADDING, dtype=np.int64)
        for row, ids in zip(inputs_BS, rows, strict=True):
            row[: len(ids)] = ids
        return Batch(inputs_BS, self.labels[positions], None)

    def take(self, rows: np.ndarray) -> LabelledTexts:
        """The texts of ``rows`` alone, in their order."""
        texts, ids = [self.texts[r] for r in rows], [self.ids[r] for r in rows]
        return replace(self, texts=texts, ids=ids, labels=self.labels[rows], cut=self.cut[rows])


def encode_texts(labelled: LabelledSet, tokenizer: Tokenizer, sequence_length: int) -> LabelledTexts:
    """Ids of every text; of one longer than ``sequence_length`` the first tokens.

    Raises:
        DataError: the tokenizer finds nothing in a text.
    """
    whole = tokenizer.encode_batch(labelled.texts)
    for text, ids in zip(labelled.texts, whole, strict=True):
        # The classifier takes the mean over a text's own positions, and would divide by none.
        if not len(ids):
            raise DataError(f"labelled set {labelled.name} has a text without any token: {text[:40]!r}; leave it out")
    kept = [np.asarray(row[:sequence_length], dtype=np.int64) for row in whole]
    cut = np.array([len(row) > sequence_length for row in whole])
    return LabelledTexts(labelled.texts, kept, labelled.labels, tuple(labelled.classes), cut)


def hold_out(texts: LabelledTexts, share: float, seed: int, split: int) -> tuple[LabelledTexts, LabelledTexts]:
    """(the rest, ``share`` of every class, at least one text), drawn by (seed, split).

    Classes of one text alone stay in training (``rare_classes``).

    Raises:
        ConfigError: all are.
    """
    chosen = []
    for label in range(len(texts.classes)):
        rows = np.flatnonzero(texts.labels == label)
        if len(rows) < 2:
            continue
        # A generator for each class, so that texts added to one leave what is drawn of the others.
        draw = np.random.default_rng([seed, split, label]).permutation(rows)
        chosen.append(draw[: min(len(rows) - 1, max(1, round(share * len(rows))))])
    if not chosen:
        raise ConfigError("no class has two training texts, of which one could be held out; add some")
    held = np.sort(np.concatenate(chosen))
    return texts.take(np.setdiff1d(np.arange(len(texts)), held)), texts.take(held)


def rare_classes(texts: LabelledTexts) -> list[str]:
    """Classes of which ``hold_out`` holds nothing out."""
    counts = np.bincount(texts.labels, minlength=len(texts.classes))
    return [name for name, count in zip(texts.classes, counts, strict=True) if count < 2]


def draw_shots(texts: LabelledTexts, shots: int, seed: int) -> LabelledTexts:
    """``shots`` texts of each class, drawn by the seed; of one class and seed, few shots are among more shots.

    Raises:
        ConfigError: a class has fewer.
    """
    chosen = []
    for label, name in enumerate(texts.classes):
        rows = np.flatnonzero(texts.labels == label)
        if len(rows) < shots:
            raise ConfigError(
                f"{shots} shots are more than the {len(rows)} training texts of class {name!r}; ask fewer"
            )
        chosen.append(np.random.default_rng([seed, label]).permutation(rows)[:shots])
    return texts.take(np.sort(np.concatenate(chosen)))


class LabelledBatches(ShuffledBatches):
    """Shuffled training texts, of which those of like lengths come together.

    The order of an epoch also follows from batch size and lengths: a permutation in which, pool by pool, batches are
    made of texts of like lengths and then shuffled.
    """

    def __init__(self, texts: LabelledTexts, batch_size: int, seed: int) -> None:
        super().__init__(len(texts), batch_size, seed)
        self.texts, self._lengths = texts, texts.lengths

    def padding(self, size: int) -> float:
        """Share of the positions of one epoch's micro-batches of ``size`` texts that are padding."""
        starts = range(0, len(self.texts) - size + 1, size)
        lengths = [self._lengths[self.rows(start, size)] for start in starts]
        return 1 - sum(int(row.sum()) for row in lengths) / max(1, sum(size * int(row.max()) for row in lengths))

    def _draw(self, epoch: int) -> np.ndarray:
        rng, total, size = np.random.default_rng([self.seed, epoch]), self.count, self.batch_size
        order = rng.permutation(total)
        begun = min(-epoch * total % size, total)  # these complete the batch that the epoch before began
        end = begun + (total - begun) // size * size
        for start in range(begun, end, POOL * size):
            pool = order[start : min(start + POOL * size, end)]
            # Stable: which of two equal lengths comes first is the same on every rank and in every resume.
            by_length = pool[np.argsort(self._lengths[pool], kind="stable")].reshape(-1, size)
            order[start : start + len(pool)] = rng.permutation(by_length).flatten()
        return order

    def _batch(self, first: int, rows: np.ndarray) -> Batch:
        return self.texts.read(rows)
