"""Fingerprints of what a run reads: a resumed run must not go on at a sample number of other data.

Paths do not count, for data may be moved. Of up to ``WHOLE`` bytes everything counts; of more, sizes and ``BLOCKS``
blocks spread evenly over them, so that terabytes cost no more than a second.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vqmoe_ds.data.corpus import FilePiece
from vqmoe_ds.data.indexed import IndexedText
from vqmoe_ds.data.labelled_batches import LabelledTexts
from vqmoe_ds.data.portions import Portion
from vqmoe_ds.data.raw_text import RawText

WHOLE = 16 << 20
BLOCKS, BLOCK = 256, 64 << 10
HELD_OUT = "share of the text held out (data.holdout_every)"


def of_data(data: Any) -> dict[str, str]:
    """Fingerprints of training and held-out data, by name (raw text, prepared corpora or images)."""
    # Manifests of checkpoints keep names and digests: with another name or rule a run of before would be refused as
    # one of other data.
    if isinstance(data, RawText):
        return {
            "training text": of_pieces(data.train.corpus.pieces),
            "held-out text": of_pieces(data.valid.corpus.pieces),
            HELD_OUT: str(data.holdout_every),
        }
    if not isinstance(data, IndexedText):
        found: dict[str, str] = data.fingerprint()
        return found
    weights = [prefix.weight for prefix in data.train.prefixes] if data.weighted else None
    return {
        "prepared training data": _of_portion(data.train),
        "prepared held-out data": _of_portion(data.valid),
        "weights of the corpora": _digest([repr(weights).encode()]),
        "shares of the split (data.split)": _digest([repr([data.train.share, data.valid.share]).encode()]),
    }


def of_optimizer(deepspeed: dict[str, Any]) -> dict[str, str]:
    """The entries of a DeepSpeed JSON that give moments and schedule their meaning; numbers and layout may change."""
    scheduler = json.dumps(deepspeed.get("scheduler"), sort_keys=True)
    return {"optimizer.type": str(deepspeed["optimizer"]["type"]).lower(), "scheduler": scheduler}


def of_labelled(texts: LabelledTexts) -> str:
    """Fingerprint of all texts of a split, their labels and the names of the classes."""
    rows = (f"{label} {len(text)} {text}".encode() for text, label in zip(texts.texts, texts.labels, strict=True))
    return _digest([repr(texts.classes).encode(), *rows])


def of_checkpoint(path: Path) -> str:
    """Fingerprint of the weights that a run started from: of their manifest, or else of the files."""
    manifest = path / "manifest.json"
    if manifest.is_file():
        return _digest([manifest.read_bytes()])
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return of_pieces([FilePiece(str(file), os.stat(file).st_size) for file in files])


def _of_portion(portion: Portion) -> str:
    files = [FilePiece(f"{prefix.path}.bin", os.stat(f"{prefix.path}.bin").st_size) for prefix in portion.prefixes]
    # The same ids, cut into other sequences, are shuffled into other windows.
    lengths = [np.ascontiguousarray(prefix.lengths).tobytes() for prefix in portion.prefixes]
    return _digest([of_pieces(files).encode(), *lengths])


def of_pieces(pieces: Sequence[np.ndarray | FilePiece]) -> str:
    """Fingerprint of the bytes of all pieces, one after the other."""
    sizes = [len(piece) for piece in pieces]
    total = sum(sizes)
    if total <= WHOLE:
        return _digest([repr(sizes).encode(), *(piece.tobytes() for piece in pieces)])
    ends = np.cumsum(sizes, dtype=np.int64)
    blocks = []
    for start in np.linspace(0, total - 1, BLOCKS).astype(np.int64):
        # Right: the piece that holds the byte, past empty ones that end at the same place.
        piece = int(np.searchsorted(ends, start, side="right"))
        begin = int(start) - (int(ends[piece - 1]) if piece else 0)
        blocks.append(pieces[piece][begin : begin + BLOCK].tobytes())
    return _digest([np.array(sizes, dtype=np.int64).tobytes(), *blocks])


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        # With its length: "ab", "c" are not "a", "bc".
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]
