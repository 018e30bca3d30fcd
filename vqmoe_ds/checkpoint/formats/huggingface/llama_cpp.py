"""The way on to llama.cpp: what its converter makes of a stock folder, and the tokenizer file that it makes it of.

``convert_hf_to_gguf.py`` prefers ``tokenizer.model``, a SentencePiece model, which llama.cpp reads as BPE: it merges
the pair of the best score, and writes bytes for the rest (``llm_tokenizer_spm_session`` in ``src/llama-vocab.cpp``).
Without that file it looks into ``tokenizer.json``, where it takes every BPE model with byte fallback for Llama's, and
a byte-level one only if it knows the ids of a certain text.
"""

from __future__ import annotations

import json
from typing import Any

from vqmoe_ds.checkpoint.formats.huggingface.names import ARCHITECTURES
from vqmoe_ds.checkpoint.formats.huggingface.stock import why_not_stock
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.json_tokenizer import JsonTokenizer
from vqmoe_ds.data.tokenizer_base import SPACE_MARK, Tokenizer
from vqmoe_ds.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, sentencepiece, sentencepiece_proto
from vqmoe_ds.runtime.errors import DataError


def why_no_gguf(config: RunConfig, arch: str, tokenizer: Tokenizer | None) -> str | None:
    """Why llama.cpp cannot take the folder; None where its converter can be asked.

    Args:
        config: of the run.
        arch: of the folder.
        tokenizer: of the folder.
    """
    if arch == "vqmoe":
        form = next((stock for stock in ARCHITECTURES[1:] if why_not_stock(config, stock) is None), None)
        other = f"it reads this model in another form (`--to hf --arch {form}`)"
        return other if form else "no model there is equal to it"
    if config.model.sliding_window:
        return f"there Mixtral attends to all tokens, and here to {config.model.sliding_window}"
    if tokenizer is None:
        return "its converter wants a tokenizer, and this folder has none"
    return why_no_tokenizer(tokenizer)


def why_no_tokenizer(tokenizer: Tokenizer) -> str | None:
    """Why llama.cpp would not cut text as training did; None where it does, or its converter judges for itself."""
    if isinstance(tokenizer, JsonTokenizer):
        model = json.loads(tokenizer.content)["model"]
        if model.get("type", "BPE") != "BPE":
            return f"its converter knows no {model['type']} tokenizer here"
        return "its converter loses the merges of a BPE with byte fallback" if model.get("byte_fallback") else None
    try:
        sentencepiece()
    except DataError as error:
        return str(error)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return None
    proto = sentencepiece_proto(tokenizer._model)
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        return "there it reads SentencePiece models as BPE, and this one is unigram"
    if tokenizer.unknown_id is not None:
        return "it writes what a vocabulary lacks in bytes, and this vocabulary has none"
    return "it keeps spaces that this tokenizer drops" if proto.normalizer_spec.remove_extra_whitespaces else None


def sentencepiece_model(tokenizer: Tokenizer, end: str, vocab_size: int) -> Any:
    """The protocol buffer of ``tokenizer.model``; None where none has equal ids.

    Args:
        tokenizer: that of the training data.
        end: text of its end of a document.
        vocab_size: of the model.
    """
    if isinstance(tokenizer, JsonTokenizer) or why_no_tokenizer(tokenizer) is not None:
        return None
    if isinstance(tokenizer, ByteTokenizer):
        return _of_bytes(end if vocab_size > tokenizer.eod else None)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    proto = sentencepiece_proto(tokenizer._model)
    # The id past all pieces is the end of models that have none; here it has to be a piece.
    if len(proto.pieces) == tokenizer.eod:
        proto.pieces.add(piece=end, score=0.0, type=proto.SentencePiece.CONTROL)
    return proto


def _of_bytes(end: str | None) -> Any:
    """A model of bytes alone. llama.cpp writes a space as ``SPACE_MARK`` before it looks for pieces: id 32 is that."""
    proto = sentencepiece().sentencepiece_model_pb2.ModelProto()
    kinds, trainer, spec = proto.SentencePiece, proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback = trainer.BPE, True
    spec.name, spec.add_dummy_prefix, spec.remove_extra_whitespaces = "identity", False, False
    pieces = [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    space, pieces[ord(" ")] = pieces[ord(" ")], (SPACE_MARK, kinds.NORMAL)
    ends = [] if end is None else [(end, kinds.CONTROL)]
    # SentencePiece loads no model without the last two; no text holds them.
    for piece, kind in [*pieces, *ends, ("<unk>", kinds.UNKNOWN), space]:
        proto.pieces.add(piece=piece, score=0.0, type=kind)
    return proto
