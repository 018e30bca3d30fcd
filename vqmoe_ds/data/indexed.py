"""Prepared corpora for training: which ones, cut into which windows, in which order.

Everything is checked here from the small files alone; megatron-core, which reads the windows, is loaded by
``epochs.open_epoch`` when training starts.

Legend: B windows, S positions of a window (``sequence_length``), V vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqmoe_ds.config.schema import DataConfig, RunConfig
from vqmoe_ds.data.batches import MASKED, Batch, positions_in_documents
from vqmoe_ds.data.index_files import check_index, check_prefix
from vqmoe_ds.data.portions import HELD_OUT, Portion, Prefix
from vqmoe_ds.data.tokenizer_base import Tokenizer
from vqmoe_ds.data.tokenizers import load_tokenizer
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.extras import library
from vqmoe_ds.runtime.files import read_small

UNKNOWN = "unknown"
"""Checksum of a tokenizer that is not known."""

# Part of the order of the data: another value gives a resumed run other samples.
BLEND = 1 << 16
"""Samples after which the pattern of a weighted blend starts again."""

_WEIGHTED = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?(?:inf|nan)):(.+)")


class IndexedBatches:
    """Training windows of prepared corpora, dealt out by global sample number.

    Without weights all corpora form one portion, and sample ``i`` is entry ``i mod n`` of its epoch ``i div n``. With
    weights every corpus is a portion with epochs of its own, and a fixed pattern says whose turn it is. Micro-batch
    ``m`` of rank ``r`` takes block ``m * world + r`` of the global batch, which depends on the data, the seed and its
    first sample alone.

    Args:
        portions: what to read.
        weights: how often each is drawn, relative to the others; one for each portion.
        batch_size: windows per optimizer step, over all ranks.
        cache: folder of the shuffled indices.
        shared: other runs use the folder too, so that indices that this run no longer needs stay there.
    """

    masked = True

    def __init__(
        self,
        portions: list[Portion],
        weights: list[float],
        batch_size: int,
        seed: int,
        cache: Path,
        reader: Reader,
        shared: bool = True,
    ) -> None:
        self.shared = shared
        self.portions, self.batch_size, self.seed, self.cache = portions, batch_size, seed, cache
        self.reader = reader
        self._turns, self._numbers = _pattern(weights)
        self._drawn = np.bincount(self._turns, minlength=len(portions))
        self._open: dict[tuple[int, int], Any] = {}

    def places(self, first: int) -> list[tuple[int, int, int]]:
        """(portion, its epoch, entry of that epoch) of every sample of the global batch from ``first`` on, in order."""
        # Every number follows from the sample's own: there is no position to save, and none to go back to.
        answer = []
        for sample in range(first, first + self.batch_size):
            turn, place = divmod(sample, len(self._turns))
            portion = int(self._turns[place])
            number = turn * int(self._drawn[portion]) + int(self._numbers[place])
            answer.append((portion, *divmod(number, len(self.portions[portion]))))
        return answer

    def micro_batches(self, first: int, rank: int, world: int, size: int) -> list[Batch]:
        """All micro-batches of one rank, of the global batch from ``first`` on; all ranks call it, to build indices.

        Raises:
            DataError: an index that cannot be written, or ids beyond the vocabulary.
        """
        places = self.places(first)
        # Of the whole global batch, not of this rank's blocks: open_epoch is collective.
        self._open_epochs({(portion, epoch) for portion, epoch, _ in places})
        # Dealt out by micro-batch, not by rank, so that the same samples make a step on any number of ranks.
        blocks = [places[start : start + size] for start in range(rank * size, len(places), world * size)]
        return [self.reader.batch([self._open[p, e][entry] for p, e, entry in block]) for block in blocks]

    def epoch(self, samples: int) -> float:
        """``samples`` divided by the number of windows: epochs, where there are no weights."""
        return samples / sum(map(len, self.portions))

    def _open_epochs(self, wanted: set[tuple[int, int]]) -> None:
        from vqmoe_ds.data.epochs import open_epoch, remove_epoch

        # Closed before others are opened: no more epochs are mapped at a time than a batch has.
        through = self._open.keys() - wanted
        self._open = {key: dataset for key, dataset in self._open.items() if key in wanted}
        for portion, epoch in sorted(wanted - self._open.keys()):  # sorted: the same order on every rank
            self._open[portion, epoch] = open_epoch(
                self.portions[portion], (self.seed, portion, epoch), self.reader.eod, self.cache
            )
        # Every rank is: the step before, which all ranks ended together, was the last to read them. A resume that goes
        # back makes them again, the same.
        for portion, epoch in through if not self.shared else ():
            remove_epoch(self.portions[portion], (self.seed, portion, epoch), self.cache)


class IndexedWindows:
    """Held-out windows of prepared corpora, in an order that no seed changes."""

    def __init__(self, portion: Portion, cache: Path, reader: Reader) -> None:
        from vqmoe_ds.data.epochs import open_epoch

        self.sequence_length = portion.sequence_length
        self.reader = reader
        self._dataset = open_epoch(portion, HELD_OUT, self.reader.eod, cache)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, positions: np.ndarray) -> Batch:
        """Windows at ``positions`` with their targets."""
        return self.reader.batch([self._dataset[int(p)] for p in positions])


class Reader:
    """Reader of batches, made of megatron-core's samples.

    Args:
        tokenizer: the one that made the ids; None where it is unknown.
        vocab_size: of the model; ids past it or past the tokenizer's are refused.
        separate: whether batches tell documents apart (``data.separate_documents``).
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, separate: bool = False) -> None:
        self.separate = separate
        self.vocab_size = vocab_size if tokenizer is None else min(vocab_size, tokenizer.vocab_size)
        self.eod = tokenizer.eod if tokenizer is not None else None
        self._bytes_V = tokenizer.token_bytes() if tokenizer is not None else None

    def batch(self, samples: list[dict[str, Any]]) -> Batch:
        inputs_BS, labels_BS, kept_BS = (
            np.stack([sample[name].numpy() for sample in samples]) for name in ("tokens", "labels", "loss_mask")
        )
        largest, least = max(inputs_BS.max(), labels_BS.max()), min(inputs_BS.min(), labels_BS.min())
        # Before any use: an id below 0 would silently count from the end of _bytes_V, and one past the embedding would
        # stop a GPU with an assertion that names no data.
        if largest >= self.vocab_size or least < 0:
            outside = least if least < 0 else largest
            raise DataError(
                f"the prepared data has the id {outside}, past the vocabulary of {self.vocab_size}; it was made by "
                "another tokenizer than the one named for it (data.tokenizer, model.vocab_size), or is damaged",
                local=True,  # the other ranks read other windows
            )
        targets_BS = np.where(kept_BS > 0, labels_BS, MASKED)
        bytes_B = None
        if self._bytes_V is not None:
            bytes_B = (self._bytes_V[labels_BS] * (kept_BS > 0)).sum(axis=1, dtype=np.int64)
        positions_BS = None
        if self.separate:  # a target is masked where, and only where, a document or a stored sequence starts
            first_BS = np.concatenate([np.zeros_like(kept_BS[:, :1], dtype=bool), kept_BS[:, :-1] == 0], axis=1)
            positions_BS = positions_in_documents(first_BS)
        return Batch(inputs_BS, targets_BS, bytes_B, positions_BS=positions_BS)


@dataclass(frozen=True)
class IndexedText:
    """Prepared corpora that were found good: for training, for validation, and the tokenizer that made them."""

    train: Portion
    valid: Portion
    tokenizer: Tokenizer | None
    weighted: bool

    @property
    def vocab_size(self) -> int | None:
        return self.tokenizer.vocab_size if self.tokenizer is not None else None

    @property
    def tokenizer_sha256(self) -> str:
        return self.tokenizer.checksum if self.tokenizer is not None else UNKNOWN

    def summary(self) -> str:
        """Names and sizes, for the user."""
        weights = [p.weight for p in self.train.prefixes]
        total = sum(w or 0 for w in weights)
        shares = [f" ({w / total:.0%})" if w and len(weights) > 1 else "" for w in weights]
        names = ", ".join(p.path + share for p, share in zip(self.train.prefixes, shares, strict=True))
        kind = f"{self.tokenizer.kind} tokenizer" if self.tokenizer is not None else "unknown tokenizer"
        windows = f"{len(self.train)} training and {len(self.valid)} held-out windows of {self.train.sequence_length}"
        return f"{names}: {sum(self.train.tokens):,} training tokens of the {kind} ({windows})"

    def open(self, config: RunConfig, cache: Path) -> tuple[IndexedBatches, IndexedWindows]:
        """Training batches and held-out windows; all ranks call it together."""
        portions, weights = [self.train], [1.0]
        if self.weighted:
            portions = [Portion((p,), self.train.share, self.train.sequence_length) for p in self.train.prefixes]
            weights = [p.weight or 0.0 for p in self.train.prefixes]
        reader = Reader(self.tokenizer, config.model.vocab_size, config.data.separate_documents)
        train = config.train
        shared = config.data.cache_dir is not None
        batches = IndexedBatches(portions, weights, train.batch_size, train.seed, cache, reader, shared)
        return batches, IndexedWindows(self.valid, cache, reader)

    def encode(self, text: str) -> list[int] | None:
        """Ids of a text; None where the tokenizer is unknown."""
        return None if self.tokenizer is None else self.tokenizer.encode(text).tolist()

    def decode(self, ids: list[int]) -> str:
        assert self.tokenizer is not None
        return self.tokenizer.decode(ids)


def open_indexed_text(config: RunConfig) -> IndexedText | None:
    """The prepared corpora that ``data.path`` names; None where it names raw text.

    Raises:
        DataError: a name that cannot work, half a corpus, weights, tokenizers or a split that do not fit, or too
            little text for one window.
    """
    data, length = config.data, config.model.sequence_length
    entries, held_out = _entries(data.path, "data.path"), _entries(data.valid_path, "data.valid_path")
    if data.valid_path is not None and (entries is None) != (held_out is None):
        raise DataError(
            f"of data.path={data.path} and data.valid_path={data.valid_path} one is raw text and one prepared data, "
            "whose ids mean other things; prepare both with the same tokenizer"
        )
    if entries is None:
        return None
    prefixes = tuple(_open_prefix(path, weight) for path, weight in entries)
    others = tuple(_open_prefix(path, None) for path, _ in held_out or ())
    tokenizer = _common_tokenizer((*prefixes, *others), data.tokenizer)
    _check_weights(prefixes)
    train_share, valid_share = ((0.0, 1.0), (0.0, 1.0)) if others else split_shares(data.split)
    train = Portion(prefixes, train_share, length)
    for prefix, tokens, windows in zip(prefixes, train.tokens, train.windows, strict=True):
        if not windows:
            raise DataError(
                f"prepared data {prefix.path} has {tokens} training tokens in {len(prefix.lengths)} sequence(s), fewer "
                f"than the {length + 1} of one window (data.split={data.split}); give more text or a shorter "
                "model.sequence_length"
            )
    # megatron-core's BlendedDataset asserts that every corpus has a window.
    valid = Portion(others or prefixes, valid_share, length).without_empty()
    if not valid.prefixes:
        raise DataError(_nothing_held_out(data, length))
    return IndexedText(train, valid, tokenizer, prefixes[0].weight is not None)


def split_shares(split: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Training's and validation's (begin, end) of Megatron's ratios: "90,10,0" -> (0, 0.9), (0.9, 1).

    Raises:
        DataError: not one to three numbers, or nothing to train on.
    """
    try:
        ratios = [float(part) for part in split.split(",")]
        good = len(ratios) <= 3 and all(0 <= r < math.inf for r in ratios) and ratios[0] > 0
    except ValueError:
        good = False
    if not good:
        raise DataError(
            f"data.split={split} is not two or three ratios for training, validation and test with a positive first "
            "one, such as 90,10,0"
        )
    total = sum(ratios)
    first, second = ratios[0] / total, sum(ratios[1:2]) / total
    return (0.0, first), (first, first + second)


def _nothing_held_out(data: DataConfig, length: int) -> str:
    if data.valid_path is not None:
        return f"data.valid_path {data.valid_path} has no window of {length + 1} tokens; give more text"
    return (
        f"data.split={data.split} leaves no window of {length + 1} tokens to validate on; give validation a larger "
        "share, or other text with data.valid_path"
    )


def _entries(path: str | list[str] | None, name: str) -> list[tuple[str, float | None]] | None:
    """(prefix, weight) of every entry; None for raw text."""
    if path is None:
        return None
    entries = [_entry(text) for text in ([path] if isinstance(path, str) else path)]
    if not entries:
        raise DataError(f"{name} is an empty list; give a path or a prefix")
    indexed = [is_indexed(prefix) for prefix, _ in entries]
    if isinstance(path, str) and not any(indexed) and entries[0][1] is None:
        return None
    for (prefix, _), found in zip(entries, indexed, strict=True):
        if not found and os.path.exists(prefix):
            raise DataError(
                f"{name}: {prefix} is raw text, which can be given alone and without a weight only; prepare it with "
                "tools/prepare_data.py to blend it"
            )
        if not found:
            raise DataError(f"{name}: neither {prefix}.idx nor {prefix} exists; give the prefix of a prepared corpus")
    return entries


def _entry(text: str) -> tuple[str, float | None]:
    if os.path.exists(text) and is_indexed(text):
        raise DataError(
            f"{text} is both raw text and a prepared corpus; give {text}.idx for the latter, or move one of them"
        )
    prefix, written = weighted_entry(text)
    if written is None:
        return without_ending(text), None
    weight = float(written)
    if not 0 < weight < math.inf:
        raise DataError(f"the weight of {prefix} is {written}; weights of a blend are positive numbers")
    return without_ending(prefix), weight


def weighted_entry(text: str) -> tuple[str, str | None]:
    """(PREFIX, WEIGHT as it is written) of ``WEIGHT:PREFIX``; None for the weight of what is there by that name."""
    match = None if os.path.exists(text) or is_indexed(text) else _WEIGHTED.fullmatch(text)
    return (text, None) if match is None else (match[2], match[1])


def with_changed(path: Any, change: Callable[[str], str]) -> Any:
    """``data.path`` or its like with every source or prefix changed; weights stay as they are written."""

    def changed(text: str) -> str:
        source, weight = weighted_entry(text)
        return change(source) if weight is None else f"{weight}:{change(source)}"

    return [changed(text) for text in path] if isinstance(path, list) else path and changed(path)


def without_ending(text: str) -> str:
    """``PREFIX.idx`` and ``PREFIX.bin`` mean the prefix where both files are there."""
    stem = text.removesuffix(".idx").removesuffix(".bin")
    return stem if os.path.exists(f"{stem}.idx") and os.path.exists(f"{stem}.bin") else text


def is_indexed(prefix: str) -> bool:
    """Whether a prepared corpus, or half of one, has this prefix."""
    return os.path.exists(f"{prefix}.idx") or os.path.exists(f"{prefix}.bin")


def _open_prefix(path: str, weight: float | None) -> Prefix:
    header = check_prefix(path)
    try:
        check_index(header)
        return Prefix(path, weight, header.lengths, described_tokenizer(path))
    except OSError as error:
        raise DataError(f"prepared data {path} cannot be read ({error.strerror}); check its permissions") from None


def described_tokenizer(path: str) -> dict[str, Any] | None:
    """What ``PREFIX.json`` says of the tokenizer of prepared data, its checksum among it; None without that file.

    Raises:
        DataError: it is damaged.
    """
    description = f"{path}.json"
    if not os.path.exists(description):
        return None
    try:
        answer: dict[str, Any] = json.loads(read_small(description))["tokenizer"]
        if isinstance(answer, dict) and isinstance(answer["checksum"], str):
            return answer
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise DataError(f"{description} is damaged; prepare {path} again")


def _common_tokenizer(prefixes: tuple[Prefix, ...], given: str | None) -> Tokenizer | None:
    """The one tokenizer of all corpora; None where it is unknown."""
    described = [p for p in prefixes if p.tokenizer is not None]
    if given is None and not described:
        return None
    source = given if given is not None else f"{described[0].path}.tokenizer"
    tokenizer = load_tokenizer(source)
    for prefix in prefixes:
        if prefix.tokenizer is None and given is None:
            raise DataError(
                f"prepared data {prefix.path} has no {prefix.path}.json that names its tokenizer, while others have; "
                "name the one of all with data.tokenizer"
            )
        if prefix.tokenizer is not None and prefix.tokenizer["checksum"] != tokenizer.checksum:
            raise DataError(
                f"prepared data {prefix.path} was made by the tokenizer {prefix.tokenizer['checksum'][:12]} "
                f"({prefix.tokenizer.get('kind')}), not by {tokenizer.checksum[:12]} ({tokenizer.kind}) of {source}; "
                "prepare it with the same"
            )
    return tokenizer


def _check_weights(prefixes: tuple[Prefix, ...]) -> None:
    weights = [p.weight for p in prefixes if p.weight is not None]
    if not weights:
        return
    if len(weights) != len(prefixes):
        bare = next(p.path for p in prefixes if p.weight is None)
        raise DataError(f"{bare} has no weight while others have; give every prefix one, or none")
    # The pattern rounds to whole samples: a corpus below this share might get no turn in it.
    rare = min(prefixes, key=lambda p: p.weight or 0)
    if min(weights) / sum(weights) < 2 / BLEND:
        raise DataError(
            f"the weight of {rare.path} is under {2 / BLEND:.0e} of all: it would not be read; leave it out"
        )


def _pattern(weights: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """(portion, int16; that portion's turns before it, int64) of every sample until the blend starts again."""
    if len(weights) == 1:
        return np.zeros(1, dtype=np.int16), np.zeros(1, dtype=np.int64)
    # The compiled helper fills arrays of these types; of any other type it would fill a copy.
    helpers = library("megatron.core.datasets.helpers", "blending prepared data", DataError)
    turns, numbers = np.zeros(BLEND, dtype=np.int16), np.zeros(BLEND, dtype=np.int64)
    shares = np.array(weights) / sum(weights)
    # Whose samples so far are furthest behind (share * place) is next: shares must add up to 1.
    helpers.build_blending_indices(turns, numbers, shares, len(weights), BLEND, False)
    return turns, numbers
