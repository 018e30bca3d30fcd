"""``tools/classify.py``: the classes of new texts, by a fine-tuned classifier.

Legend: B texts, C classes.
"""

from __future__ import annotations

import argparse
import json
import sys
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqmoe_ds.config.routers import add_plugin_option
from vqmoe_ds.data.compressed import DAMAGES, check_content, open_plain
from vqmoe_ds.data.json_lines import read_json
from vqmoe_ds.data.labelled import joined
from vqmoe_ds.runtime.errors import CheckpointError, DataError, reports_errors

if TYPE_CHECKING:
    from vqmoe_ds.checkpoint.reader import CheckpointReader
    from vqmoe_ds.data.tokenizer_base import Tokenizer
    from vqmoe_ds.models.classifier import Classifier

TEXTS_AT_ONCE = 32
LONGEST_LINE = 16 << 20
"""Bytes of a row of ``--file``."""


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="run folder of a fine-tuning (its best validation), or a checkpoint")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--text", nargs="+", metavar="TEXT", help="texts to classify")
    texts.add_argument("--file", metavar="FILE", help="JSONL, a text in each row; -: standard input")
    add(
        "--text_key",
        default="text",
        metavar="KEY",
        help="key of the text in --file, or several with commas (default text)",
    )
    add("--tokenizer", metavar="TOKENIZER", help="of the model, where it is not found: bytes, a folder, .model or .txt")
    add_plugin_option(parser)
    return parser


@reports_errors
def main(options: argparse.Namespace) -> int:
    """Print a JSON line for each text, as they come; the exit code."""
    for found in predict(*load_classifier(options.checkpoint, options.tokenizer), _texts(options)):
        print(json.dumps(found, ensure_ascii=False), flush=True)
    return 0


def load_classifier(path: str | Path, tokenizer: str | None = None) -> tuple[Classifier, Tokenizer]:
    """A classifier in evaluation mode, adapters merged in, and its tokenizer.

    Args:
        path: anything ``open_checkpoint`` takes.
        tokenizer: as of ``load_model``.

    Raises:
        CheckpointError: nothing there, damaged, a language model, or no tokenizer.
        DataError: the tokenizer named cannot be read.
    """
    from vqmoe_ds.checkpoint.open import open_checkpoint
    from vqmoe_ds.checkpoint.reader import sound
    from vqmoe_ds.checkpoint.views.adapters import merged

    reader = merged(open_checkpoint(path))
    with sound(reader.path):
        return _build(reader, tokenizer)


def _build(reader: CheckpointReader, tokenizer: str | None) -> tuple[Classifier, Tokenizer]:
    from vqmoe_ds.checkpoint.formats.huggingface.folder import run_config
    from vqmoe_ds.checkpoint.load_model import build_model, require_tokenizer
    from vqmoe_ds.checkpoint.reader import require_text
    from vqmoe_ds.models.classifier import Classifier

    require_text(reader, "classifying texts")
    config = run_config(reader.config, reader.path)
    found = require_tokenizer(reader, config, tokenizer)
    if not config.finetune.classes:
        raise CheckpointError(f"{reader.path} is a language model; fine-tune it with launchers/finetune.py first")
    model = build_model(reader, config)
    assert isinstance(model, Classifier)
    return model, found


def predict(model: Classifier, tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Likeliest class, its probability, and the text, of each text as they come.

    Raises:
        DataError: the tokenizer finds nothing in a text.
    """
    import numpy as np
    import torch

    from vqmoe_ds.data.labelled import LabelledSet
    from vqmoe_ds.data.labelled_batches import encode_texts

    classes, stream = list(model.config.finetune.classes), iter(texts)
    while chunk := list(islice(stream, TEXTS_AT_ONCE)):
        unlabelled = LabelledSet("to classify", chunk, np.zeros(len(chunk), np.int64), classes)
        encoded = encode_texts(unlabelled, tokenizer, model.config.model.sequence_length)
        with torch.no_grad():
            logits_BC, _ = model(torch.from_numpy(encoded.read(np.arange(len(chunk))).inputs_BS))
        # In float64, as evaluation/classification.py scores: probabilities are those of predictions.csv.
        best = logits_BC.double().softmax(dim=-1).max(dim=-1)
        for text, number, sure in zip(chunk, best.indices.tolist(), best.values.tolist(), strict=True):
            yield {"label": classes[number], "probability": round(sure, 4), "text": text}


def _texts(options: argparse.Namespace) -> Iterator[str]:
    named = options.text and ((f"--text {number}", text) for number, text in enumerate(options.text, 1))
    for place, text in named or _rows(options.file, options.text_key):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{place} holds no text; leave it out")
        yield text


def _rows(path: str, key: str) -> Iterator[tuple[str, Any]]:
    """Place and value of every row of a JSONL file."""
    try:
        if path != "-":
            check_content(path)
        # Standard input is not ours to close.
        with nullcontext(sys.stdin.buffer) if path == "-" else open_plain(path) as lines:
            for number in count(1):
                line, place = lines.readline(LONGEST_LINE), f"{path}, line {number}"
                if not line:
                    return
                if len(line) == LONGEST_LINE:
                    raise DataError(f"{place} has more than {LONGEST_LINE >> 20} MiB; give a JSON object a line")
                if number == 1:
                    line = line.removeprefix(BOM_UTF8)
                if line.strip():
                    yield place, _value(line, key, place)
    except DAMAGES as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _value(line: bytes, key: str, place: str) -> Any:
    try:
        row = read_json(line.decode())
        return row[key] if key in row else joined([row[name.strip()] for name in key.split(",")])
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8 (byte {error.start}); convert it (iconv -t UTF-8)") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{place}: no JSON object with the key {key!r}; name another with --text_key") from None
