"""Prepared corpora for tests, written by Megatron's own builder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from vqmoe_ds.data.tokenizers import load_tokenizer


def write_sequences(prefix: Path, sequences: Sequence[Sequence[int]], dtype: type = np.uint16) -> str:
    """One document of one sequence each, as Megatron's preprocessing leaves them: no tokenizer is named."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in sequences:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def write_texts(prefix: Path, texts: Sequence[str], tokenizer: str = "bytes") -> str:
    """Encoded texts, each closed by the end of a document, with the tokenizer and its description beside them."""
    coder = load_tokenizer(tokenizer)
    write_sequences(prefix, [[*coder.encode(text).tolist(), coder.eod] for text in texts])
    coder.save(f"{prefix}.tokenizer")
    Path(f"{prefix}.json").write_text(json.dumps({"format": 1, "tokenizer": coder.describe()}))
    return str(prefix)
