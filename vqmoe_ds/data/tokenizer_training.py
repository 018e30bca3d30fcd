"""Training a tokenizer on a bounded sample that is spread over the whole corpus.

The same sources, options and seed give the same tokenizer, byte for byte, on any number of cores.
"""

from __future__ import annotations

import argparse
import heapq
import io
import itertools
import logging
import math
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vqmoe_ds.data.documents import plan_units, read_unit
from vqmoe_ds.data.tokenizer_base import MOST_IDS, Tokenizer
from vqmoe_ds.data.tokenizers import (
    END_OF_DOCUMENT,
    NEWLINE,
    UNKNOWN,
    SentencePieceTokenizer,
    WordTokenizer,
    sentencepiece,
    sentencepiece_proto,
)
from vqmoe_ds.data.units import Skips, SourceOptions, Unit
from vqmoe_ds.runtime.errors import DataError, reason_of
from vqmoe_ds.runtime.files import why_missing
from vqmoe_ds.runtime.memory import check_room

logger = logging.getLogger(__name__)

KINDS = ("unigram", "bpe", "word")
READ_AT_MOST = 8
"""Bytes of text read per byte of sample; of a larger corpus only units at even distances are read."""
HELD_OUT_EVERY = 20
LONGEST_PART, LONGEST_LINE = 8192, 4096
"""Characters, at most, of what is drawn for the sample and of what SentencePiece gets at a time."""
SCORE_STEP = 1 / 32
"""Nats; a sum of -8 per byte of 64 KiB takes 24 bits, which is what float32 has."""
_A_BYTE = 4
"""Bytes of memory per byte of the sample: itself, in the lists that are made of it, and in SentencePiece."""
THREADS = 16
"""Threads of SentencePiece's trainer: not the machine's number of cores, since the model depends on it."""


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="file, folder, glob, recipe:NAME or hub:NAME")
    add("--output", required=True, metavar="FOLDER.tokenizer", help="folder to write")
    add("--kind", choices=KINDS, default="unigram", help="default unigram")
    add("--vocab_size", type=int, default=8192, help="ids, the end of a document included (default 8192)")
    add("--sample_mb", type=float, default=50, help="MB of text to train on (default 50; 0 for all)")
    add("--seed", type=int, default=0, help="of the draw of the sample (default 0)")
    add("--text_key", default="text", help="key or column that holds the text (default text)")
    add("--on_error", choices=("fail", "skip"), default="fail", help="what to do with unreadable text (default fail)")
    add("--cache_dir", metavar="FOLDER", help="where recipes and data sets of the hub are kept")
    return parser


def main(args: argparse.Namespace) -> int:
    """Train and save; returns the exit code. Raises as ``check_output`` and ``train_tokenizer``."""
    options = SourceOptions(text_key=args.text_key, on_error=args.on_error, cache_dir=args.cache_dir)
    folder = check_output(args.output)
    trained = train_tokenizer(args.sources, args.kind, args.vocab_size, args.sample_mb, args.seed, options)
    trained.tokenizer.save(folder)
    print(f"{folder}: {trained.report()}")
    return 0


@dataclass(frozen=True)
class TrainedTokenizer:
    """A trained tokenizer and its figures."""

    tokenizer: Tokenizer
    sample_bytes: int
    """UTF-8 bytes it was trained on."""
    held_out_bytes: int
    """UTF-8 bytes it was measured on; 0 where the sample was too short to spare any and it was measured on itself."""
    bytes_per_token: float
    unknown: float
    """Share of the measured tokens that stand for a symbol outside the vocabulary."""
    seconds: float
    skipped: dict[str, int]
    """Text left out of what was read, by reason; only with ``on_error="skip"``."""

    def report(self) -> str:
        """One line for the user."""
        measured = f"{self.held_out_bytes / 1e6:.2f} MB held out" if self.held_out_bytes else "the sample itself"
        unknown = f", {self.unknown:.2%} unknown" if self.tokenizer.unknown_id is not None else ""
        skipped = "".join(f"; left out: {count} ({reason})" for reason, count in self.skipped.items())
        return (
            f"vocabulary {self.tokenizer.vocab_size:,}, {self.bytes_per_token:.3f} bytes per token{unknown} "
            f"on {measured}, trained on {self.sample_bytes / 1e6:.2f} MB in {self.seconds:.1f} s{skipped}"
        )


def train_tokenizer(
    sources: Iterable[str],
    kind: str,
    vocab_size: int,
    sample_mb: float = 50,
    seed: int = 0,
    options: SourceOptions | None = None,
) -> TrainedTokenizer:
    """Train a tokenizer of ``kind`` ("unigram", "bpe" or "word").

    SentencePiece models are lossless: no normalisation, white space kept, unseen symbols written as bytes.

    Args:
        vocab_size: ids, that of the end of a document included.
        sample_mb: millions of UTF-8 bytes to train on; 0 for all of the corpus, with nothing held out.

    Raises:
        DataError: unreadable sources, an empty sample, or a vocabulary that does not fit it.
    """
    if kind not in KINDS:
        raise DataError(f"there is no tokenizer kind {kind!r} to train; known are {', '.join(KINDS)}")
    if not 4 <= vocab_size <= MOST_IDS or not 0 <= sample_mb < 1e9:
        raise DataError(
            f"vocab_size={vocab_size} must lie between 4 and {MOST_IDS:,}, and sample_mb={sample_mb} between 0 and 1e9"
        )
    start = time.perf_counter()
    options = options or SourceOptions()
    skips = Skips(options.on_error)
    units, limit = plan_units(sources, options), int(sample_mb * 1e6)
    size = min(limit or math.inf, sum(unit.size for unit in units))
    check_room(_A_BYTE * size, f"a sample of {size / 1e6:,.0f} MB", "give a smaller --sample_mb", DataError)
    pieces = sample_pieces(units, limit, seed, skips)
    training, held_out = split_sample(pieces) if sample_mb else (pieces, [])
    if not any(text.strip() for text in training):
        raise DataError("the sources hold no text to train a tokenizer on; give more, or another --text_key")
    size = sum(len(text.encode()) for text in training)
    logger.info(f"training a {kind} vocabulary of {vocab_size:,} on {size / 1e6:.2f} MB")
    tokenizer = train_words(training, vocab_size) if kind == "word" else train_pieces(training, kind, vocab_size)
    per_token, unknown = _measured(tokenizer, held_out or training)
    return TrainedTokenizer(
        tokenizer=tokenizer,
        sample_bytes=size,
        held_out_bytes=sum(len(text.encode()) for text in held_out),
        bytes_per_token=per_token,
        unknown=unknown,
        seconds=time.perf_counter() - start,
        skipped=skips.counts,
    )


def _measured(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[float, float]:
    """UTF-8 bytes per token, and the share of tokens that stand for a symbol outside the vocabulary."""
    ids = tokenizer.encode_batch(texts)
    tokens = max(sum(map(len, ids)), 1)
    unknown = sum(tokenizer.count_unknown(text, i) for text, i in zip(texts, ids, strict=True))
    return sum(len(text.encode()) for text in texts) / tokens, unknown / tokens


def sample_pieces(units: Sequence[Unit], limit: int, seed: int, skips: Skips | None = None) -> list[str]:
    """Parts of ``units``, at most ``limit`` bytes (0: no limit) in all, drawn evenly and given in corpus order."""
    # A string seeds by its SHA-512, the same in every process, and apart from the draw of _spread.
    draw = random.Random(f"pieces {seed}")
    kept: list[tuple[float, int, int, str]] = []  # a heap with the largest draw (as its negative) on top
    size, border = 0, 1.0
    for number, text in enumerate(_texts(_spread(units, limit, seed), skips)):
        drawn = draw.random()
        # Kept is what drew least: nothing at or above a draw that was dropped comes in later, or short texts would slip
        # into the room that a longer one left.
        if drawn >= border:
            continue
        heapq.heappush(kept, (-drawn, number, len(text.encode()), text))
        size += len(text.encode())
        while limit and size > limit and len(kept) > 1:
            negative, _, dropped, _ = heapq.heappop(kept)
            size, border = size - dropped, -negative
    return [text for _, _, _, text in sorted(kept, key=lambda entry: entry[1])]


def _spread(units: Sequence[Unit], limit: int, seed: int) -> list[Unit]:
    """Units to read for ``limit`` bytes: of a large corpus those that a mark at even distances falls into."""
    total = sum(unit.size for unit in units)
    if not limit or total <= READ_AT_MOST * limit:
        return list(units)
    # So many marks that units of mean size have READ_AT_MOST * limit bytes together, and at least READ_AT_MOST marks.
    distance = min(total / len(units) * total / (READ_AT_MOST * limit), total / READ_AT_MOST)
    ends = itertools.accumulate((unit.size for unit in units), initial=random.Random(seed).random() * distance)
    return [
        unit
        for unit, (start, end) in zip(units, itertools.pairwise(ends), strict=True)
        if start // distance != end // distance
    ]


def _texts(units: Sequence[Unit], skips: Skips | None) -> Iterator[str]:
    total = sum(unit.size for unit in units)
    with tqdm(total=total, unit="B", unit_scale=True, desc="sampling", disable=None, leave=False) as bar:
        for unit in units:
            for piece in read_unit(unit, skips):
                yield from _cut(piece.text, LONGEST_PART)
            bar.update(unit.size)


def split_sample(pieces: Sequence[str]) -> tuple[list[str], list[str]]:
    """(training, held out): every 20th piece is held out, none of a sample with fewer."""
    held_out = list(pieces[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    return [piece for i, piece in enumerate(pieces) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1], held_out


def train_words(texts: Iterable[str], vocab_size: int) -> WordTokenizer:
    """The most frequent words, most frequent first; ties by spelling."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.split())
    symbols = (UNKNOWN, NEWLINE, END_OF_DOCUMENT)
    ranked = sorted((word for word in counts if word not in symbols), key=lambda word: (-counts[word], word))
    if len(ranked) + len(symbols) < vocab_size:
        raise DataError(
            f"the sample has {len(ranked):,} words, too few for --vocab_size {vocab_size}; "
            f"give {len(ranked) + len(symbols)} or less, or a larger sample"
        )
    return WordTokenizer([*symbols, *ranked[: vocab_size - len(symbols)]])


def train_pieces(texts: Iterable[str], kind: str, vocab_size: int) -> SentencePieceTokenizer:
    """A lossless SentencePiece model: ``decode(encode(text)) == text`` for every text."""
    model = io.BytesIO()
    try:
        _interruptible(
            sentencepiece().SentencePieceTrainer.train,
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            # _lines takes the line breaks out, so that the trainer cannot learn them.
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            # What SentencePieceTokenizer ends a document with.
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=THREADS,
            # In bytes, of which a character has up to four: longer lines would be left out without a word.
            max_sentence_length=LONGEST_LINE * 4,
            minloglevel=4,
        )
    except RuntimeError as error:
        reason = reason_of(error, 200)
        other = DataError(f"SentencePiece cannot train a {kind} vocabulary of {vocab_size} ({reason}); try other text")
        raise _size_error(str(error), kind, vocab_size) or other from error
    return SentencePieceTokenizer(with_exact_sums(model.getvalue()) if kind == "unigram" else model.getvalue())


def with_exact_sums(model: bytes) -> bytes:
    """A unigram model with the scores of its pieces rounded to multiples of ``SCORE_STEP``.

    Their sums are then exact in float32 and float64 for texts of up to 64 KiB. Else the rounding of sums decides
    between two cuts that score alike (``X II I``, ``X I II``), and two libraries decide differently.
    """
    proto = sentencepiece_proto(model)
    for piece in proto.pieces:
        if piece.type == piece.NORMAL:
            piece.score = round(piece.score / SCORE_STEP) * SCORE_STEP
    return bytes(proto.SerializeToString())


def sums_are_exact(proto: Any) -> bool:
    """Whether the scores of a unigram model's pieces are multiples of ``SCORE_STEP``."""
    return all((piece.score / SCORE_STEP).is_integer() for piece in proto.pieces if piece.type == piece.NORMAL)


def _interruptible(work: Callable[..., Any], **options: Any) -> None:
    """Make a long call of a library in a thread of its own: Python runs signal handlers only between its own steps."""
    with ThreadPool(1) as pool:
        pool.apply_async(work, (), options).get()


def _size_error(message: str, kind: str, vocab_size: int) -> DataError | None:
    """SentencePiece's complaint about the size of the vocabulary, as a sentence."""
    # SentencePiece has no codes for its errors: these are words of its messages.
    if most := re.search(r"value <= (\d+)", message):
        return DataError(
            f"the sample is too small for a {kind} vocabulary of --vocab_size {vocab_size}; "
            f"give {most[1]} or less, or a larger sample"
        )
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"--vocab_size {vocab_size} is too small: the 256 bytes and the characters of the sample alone take "
            f"{least[1]}; give more"
        )
    return None


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines without their breaks, the long ones in parts."""
    for text in texts:
        for line in text.split("\n"):
            yield from _cut(line, LONGEST_LINE)


def _cut(text: str, longest: int) -> Iterator[str]:
    """Parts of at most ``longest`` characters, cut before a line break, else a space, else anywhere."""
    while len(text) > longest:
        end = max(text.rfind("\n", 1, longest), 0) or max(text.rfind(" ", 1, longest), 0) or longest
        yield text[:end]
        text = text[end:]
    if text:
        yield text


def check_output(folder: str | Path) -> Path:
    """The folder to write to, refused before the long work if it cannot be.

    Raises:
        DataError: it is a file, a folder with other things in it, or cannot be written.
    """
    path = Path(folder)
    if os.path.exists(path) and not path.is_dir():
        raise DataError(f"--output {path} is a file; name a folder")
    if os.path.islink(path) and not os.path.exists(path):
        raise DataError(f"--output {path} {why_missing(path)}; remove the link, or name another folder")
    above = next(parent for parent in (path.absolute(), *path.absolute().parents) if os.path.exists(parent))
    if path.is_dir() and os.access(path, os.R_OK) and os.listdir(path) and not (path / "tokenizer.json").exists():
        raise DataError(f"--output {path} is a folder with other things in it; name a new one")
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise DataError(f"--output {path} cannot be written, because {above} is no folder of yours; name another")
    return path
