"""A document that is tokenized piece by piece has the ids of its whole text, as far as that tells."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from vqmoe_ds.data.documents import plan_units
from vqmoe_ds.data.json_tokenizer import JsonTokenizer, byte_symbols
from vqmoe_ds.data.parts import Parts
from vqmoe_ds.data.tokenizer_base import Tokenizer
from vqmoe_ds.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, WordTokenizer
from vqmoe_ds.data.units import SourceOptions

LINES = "".join(f"alpha beta  gamma, delta {i} é日\n" for i in range(31_000))
TEXT = LINES + "one line " * 8_000 + "\n" + "noborder" * 10_000 + "日本" * 13_000
"""Pieces end after line breaks, after spaces and in the middle of words; units end inside the document."""


def _sentencepiece(**options: Any) -> SentencePieceTokenizer:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES.split("\n")[:1000]),
        model_writer=model,
        **{"model_type": "bpe", "vocab_size": 330, "byte_fallback": True, "minloglevel": 4, **options},
    )
    return SentencePieceTokenizer(model.getvalue())


def _json(**parts: Any) -> JsonTokenizer:
    """Byte fallback or byte level with no merges: what is put before a text shows, and nothing else is lost."""
    byte_level = isinstance(parts.get("pre_tokenizer"), pre_tokenizers.ByteLevel)
    symbols = byte_symbols().values() if byte_level else [f"<0x{b:02X}>" for b in range(256)] + ["▁"]
    fast = Fast(BPE({symbol: i for i, symbol in enumerate(symbols)}, [], byte_fallback=not byte_level))
    for name, part in parts.items():
        setattr(fast, name, part)
    return JsonTokenizer(fast.to_str())


SPACES = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _llama() -> JsonTokenizer:
    before = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _json(normalizer=before, decoder=SPACES)


EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": True}
TOKENIZERS = {
    "bytes": ByteTokenizer,
    "dummy prefix": lambda: _sentencepiece(**EXACT),
    "dummy prefix, unigram": lambda: _sentencepiece(**EXACT, **{"model_type": "unigram"}),
    "spaces dropped": lambda: _sentencepiece(add_dummy_prefix=True),
    "spaces dropped, no prefix": lambda: _sentencepiece(add_dummy_prefix=False),
    "Prepend": _llama,
    "Metaspace": lambda: _json(pre_tokenizer=pre_tokenizers.Metaspace(), decoder=SPACES),
    "ByteLevel": lambda: _json(pre_tokenizer=pre_tokenizers.ByteLevel(), decoder=decoders.ByteLevel()),
    "words": lambda: WordTokenizer([*dict.fromkeys(TEXT.split()[:200]), "日本"]),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("kind", ["t.txt", "t.jsonl"])
def test_no_cut_shows_in_a_document(name: str, kind: str, tmp_path: Path) -> None:
    tokenizer: Tokenizer = TOKENIZERS[name]()
    text = TEXT if kind == "t.txt" else TEXT[-300_000:]
    text = text[: text.rindex("\n") + 1] if name == "words" else text
    (tmp_path / kind).write_text(text if kind == "t.txt" else json.dumps({"text": text}), encoding="utf-8")
    units, parts = plan_units([str(tmp_path / kind)], SourceOptions()), Parts(tmp_path, tokenizer)
    assert (len(units) > 1) == (kind == "t.txt")
    for unit in units:
        parts.make(unit)
    ids = np.frombuffer(b"".join(parts.tokens(units)), parts.dtype).astype(np.int32)
    assert ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1]
    decoded = tokenizer.decode(ids)
    same = decoded == tokenizer.decode(tokenizer.encode(text))  # no difference of megabytes is to be shown
    assert same
    assert decoded.removeprefix(" ") == text or "dropped" in name or name == "words"


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name.startswith(("dummy", "spaces"))])
def test_the_mark_of_a_space_is_text_wherever_a_document_is_cut(name: str) -> None:
    text = "hello▁world ▁ ▁▁a b▁ \ue000\ue000▁\ue001 c"  # symbols that might stand in for the mark, too
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(tokenizer.starts(text, ids)) == len(ids)
    for cut in range(1, len(text)):
        parts = tokenizer.encode_pieces([text[:cut], text[cut:]], ["", text[cut - 1]])
        assert tokenizer.decode(np.concatenate(parts)) == text, text[:cut]
