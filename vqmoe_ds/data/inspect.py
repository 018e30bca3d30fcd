"""Contents of prepared data, and whether it is whole."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vqmoe_ds.data.index_files import AGAIN, IndexHeader, check_index, check_prefix, chunks
from vqmoe_ds.data.tokenizer_base import Tokenizer
from vqmoe_ds.data.tokenizers import load_tokenizer
from vqmoe_ds.runtime.errors import DataError, reports_errors
from vqmoe_ds.runtime.files import read_small, sha256_of

_SHOWN = 300  # characters of a document
_READ = 2000  # tokens decoded for them
_BAR = 40


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", metavar="PREFIX", help="path of the data without .bin or .idx")
    parser.add_argument("--tokenizer", help="of data without PREFIX.tokenizer, such as Megatron's own tools make")
    parser.add_argument("--documents", type=int, default=3, help="how many documents to show")
    parser.add_argument("--verify", action="store_true", help="compare the SHA-256 of the files as well")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


@reports_errors
def main(options: argparse.Namespace) -> int:
    """Print the contents, or what is wrong in one sentence; the exit code."""
    found = inspect(options.prefix, options.tokenizer, options.documents, options.verify)
    print(json.dumps(found, indent=2, ensure_ascii=False) if options.json else _text(found))
    return 0


def inspect(prefix: str, tokenizer: str | None = None, documents: int = 3, verify: bool = False) -> dict[str, Any]:
    """Facts about prepared data, after reading every index entry and every token id.

    Args:
        tokenizer: anything that ``load_tokenizer`` takes; None for the one beside the data.
        documents: how many documents to decode.
        verify: compare the digests of ``PREFIX.json`` as well.

    Raises:
        DataError: whatever is wrong with the files: one sentence.
    """
    prefix = prefix.removesuffix(".bin").removesuffix(".idx")
    header = check_prefix(prefix)
    about = _description(prefix, header)
    known = _tokenizer(prefix, tokenizer, about)
    # Before the facts below, which follow its offsets and ends unchecked.
    check_index(header)
    largest = check_ids(header, known.vocab_size if known else None)
    checksum = _compare_digests(prefix, about) if verify else "not compared (--verify)" if about else "none kept"
    facts: dict[str, Any] = {
        "prefix": prefix,
        "dtype": str(header.dtype),
        "documents": header.documents,
        "tokens": header.tokens,
    }
    text_bytes = about.get("bytes")
    if text_bytes:
        facts |= {"bytes": text_bytes, "bytes_per_token": text_bytes / max(1, header.tokens)}
    kept: dict[str, Any] = {
        name: about[name] for name in ("sources", "skipped", "first_skipped", "unknown") if name in about
    }
    return {
        **facts,
        "sequences": header.sequences,
        "largest_id": largest,
        "tokenizer": known.describe() if known else None,
        "checksum": checksum,
        **kept,
        **_lengths(header),
        "first_documents": [_show(header, index, known) for index in range(min(documents, header.documents))],
    }


# ---------------------------------------------------------------- checks


def check_ids(header: IndexHeader, vocab_size: int | None) -> int:
    """Read all ids and return the largest.

    Raises:
        DataError: one lies outside the vocabulary, with its place.
    """
    largest, first = -1, 0
    for ids in chunks(header.ids, 4 << 20):
        top, bottom = int(ids.max()), int(ids.min())
        if bottom < 0 or (vocab_size is not None and top >= vocab_size):
            outside = ids < 0 if bottom < 0 else ids >= vocab_size
            where = int(np.argmax(outside))
            byte = (first + where) * header.dtype.itemsize
            # Right: of several that begin here only the last holds the token; those before it are empty.
            sequence = int(np.searchsorted(header.offsets, byte, side="right")) - 1
            document = int(np.searchsorted(header.ends, sequence, side="right")) - 1
            why = f"beyond the tokenizer's vocabulary of {vocab_size}; it was made with another tokenizer or is damaged"
            raise DataError(
                f"{header.prefix}.bin: token {first + where} (document {document}) has the id {int(ids[where])}, "
                + (f"which no tokenizer gives; {AGAIN}" if bottom < 0 else why)
            )
        largest, first = max(largest, top), first + len(ids)
    return largest


def _description(prefix: str, header: IndexHeader) -> dict[str, Any]:
    """``PREFIX.json``; empty for data of Megatron's own tools, which have none."""
    path = Path(f"{prefix}.json")
    if not os.path.exists(path):
        return {}
    try:
        about = json.loads(read_small(path))
        stated = about["documents"], about["sequences"], about["tokens"]
        sound = all(map(_is_count, stated)) and all(map(_is_count, (about.get("bytes", 0), about.get("unknown", 0))))
        sound &= all(isinstance(about[key][name], str) for key, name in _DIGESTS)
        skipped, first = about.get("skipped", {}), about.get("first_skipped", {})
        sound &= all(_is_count(count) and isinstance(first[reason], str) for reason, count in skipped.items())
    # All that bytes which somebody changed bring about: deep nesting ends in RecursionError, a list where an object
    # should be in TypeError or AttributeError.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise DataError(f"{path} is damaged; prepare the data again")
    if stated != (header.documents, header.sequences, header.tokens):
        raise DataError(
            f"{path} tells of {stated[0]:,} documents and {stated[2]:,} tokens, the .idx of {header.documents:,} and "
            f"{header.tokens:,}: they are not of one preparation; copy all files again or prepare them again"
        )
    return dict(about)


_DIGESTS = (("tokenizer", "checksum"), ("sha256", "bin"), ("sha256", "idx"))


def _is_count(value: Any) -> bool:
    # Not isinstance, to which true and false are numbers.
    return type(value) is int and 0 <= value < 1 << 63


def _tokenizer(prefix: str, named: str | None, about: dict[str, Any]) -> Tokenizer | None:
    own = f"{prefix}.tokenizer"
    if named is None and not os.path.exists(own):
        if about:
            raise DataError(f"{own} is missing; copy it from where the data was made, or name it with --tokenizer")
        return None
    tokenizer = load_tokenizer(named or own)
    if about and tokenizer.checksum != about["tokenizer"]["checksum"]:
        checksums = f"{about['tokenizer']['checksum']:.12} and {tokenizer.checksum:.12}"
        raise DataError(
            f"{prefix} was made with another tokenizer than {named or own} (checksums {checksums}); name the right one "
            "with --tokenizer or prepare the data again"
        )
    return tokenizer


def _compare_digests(prefix: str, about: dict[str, Any]) -> str:
    if not about:
        raise DataError(f"{prefix}.json is missing, so there is no checksum to --verify; leave --verify out")
    for name in ("bin", "idx"):
        if sha256_of(f"{prefix}.{name}") != about["sha256"][name]:
            raise DataError(f"{prefix}.{name} has changed since it was made (SHA-256 differs); {AGAIN}")
    return "verified"


# ---------------------------------------------------------------- facts


def _document_lengths(header: IndexHeader) -> Iterator[np.ndarray]:
    """Tokens of each document, in chunks of int64."""
    offsets, ends = header.offsets, header.ends
    for start in range(0, header.documents, 1 << 20):
        borders = ends[start : start + (1 << 20) + 1]
        # There is no offset past the last sequence: a document that ends there ends with the last token.
        tokens, inside = np.full(len(borders), header.tokens), borders < header.sequences
        tokens[inside] = offsets[borders[inside]] // header.dtype.itemsize
        yield np.diff(tokens)


def _lengths(header: IndexHeader) -> dict[str, Any]:
    """Documents by length in tokens, in powers of two."""
    counts = np.zeros(64, dtype=np.int64)
    longest = 0
    for lengths in _document_lengths(header):
        counts += np.bincount(np.frexp(lengths)[1], minlength=64)[:64]  # 2**(e-1) <= length < 2**e
        longest = max(longest, int(lengths.max(initial=0)))
    bins = [{"from": 1 << e >> 1, "to": (1 << e) - 1, "documents": int(n)} for e, n in enumerate(counts) if n]
    mean = header.tokens / max(1, header.documents)
    return {"mean_tokens": round(mean, 1), "longest_tokens": longest, "lengths": bins}


def _show(header: IndexHeader, document: int, tokenizer: Tokenizer | None) -> str:
    first, after = (int(end) for end in header.ends[document : document + 2])
    if first == after:
        return ""
    # One slice for several sequences: check_index has seen that they lie end to end.
    start = int(header.offsets[first]) // header.dtype.itemsize
    count = int(header.lengths[first:after][:64].sum())
    ids = np.asarray(header.ids[start : start + min(count, _READ)])
    text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids[:60]))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _text(found: dict[str, Any]) -> str:
    per_token = (
        f", {found['bytes']:,} bytes of text ({found['bytes_per_token']:.2f} a token)" if "bytes" in found else ""
    )
    tokenizer = found["tokenizer"]
    named = (
        "{kind}, {vocab_size:,} ids, end of document {eod}, {checksum:.12}".format(**tokenizer)
        if tokenizer
        else "not known"
    )
    lines = [
        f"{found['prefix']}: {found['documents']:,} documents, {found['tokens']:,} tokens ({found['dtype']})"
        + per_token,
        f"tokenizer: {named}; largest id {found['largest_id']:,}",
        f"checksum: {found['checksum']}",
    ]
    lines += [
        f"left out: {n:,} x {reason} (first: {found['first_skipped'][reason]})"
        for reason, n in found.get("skipped", {}).items()
    ]
    lines += [f"unknown symbols: {found['unknown']:,} tokens"] if found.get("unknown") else []
    lines += ["", f"tokens of a document: {found['mean_tokens']:,} on average, {found['longest_tokens']:,} at most"]
    most = max((row["documents"] for row in found["lengths"]), default=1)
    for row in found["lengths"]:
        bar = "#" * max(1, round(_BAR * row["documents"] / most))
        lines.append(f"{row['from']:>12,} to {row['to']:<12,} {row['documents']:>12,} {bar}")
    for index, text in enumerate(found["first_documents"]):
        lines += ["", f"document {index}:", text]
    return "\n".join(lines)
