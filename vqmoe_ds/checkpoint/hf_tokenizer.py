"""Tokenizer files that ``AutoTokenizer`` loads without code of ours, giving the ids that the model was trained on."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from vqmoe_ds.data.json_tokenizer import JsonTokenizer, byte_symbols
from vqmoe_ds.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, Tokenizer
from vqmoe_ds.errors import CheckpointError

END, PAD = "<|endofdocument|>", "<|pad|>"
UNUSED_BYTE = 255
"""No UTF-8 text holds this byte, so its id is free to stand for padding."""

PROBES = (
    "The quick brown fox, 3.14 + [x] = {y};\n\tdef f(a_b): return 'q'",
    "  two  spaces, a trailing one \n\n\n a line break\n",
    "\n first a line break, last spaces  ",
    "Ein Käfer, деревня, 日本語のテキスト, العربية, 🙂👩‍🚀, ½ ﬁ e\u0301",
)
"""Texts that a converted SentencePiece model must cut as the original does."""


def write_tokenizer(folder: Path, tokenizer: Tokenizer, vocab_size: int, max_length: int) -> dict[str, int]:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; returns the ids of special tokens for ``config.json``.

    Args:
        folder: where to.
        tokenizer: that of the training data.
        vocab_size: of the model; a byte model of 256 ids has no end of a document.
        max_length: the training context.

    Raises:
        CheckpointError: a kind of tokenizer, or a SentencePiece model, that has no equal there.
    """
    if isinstance(tokenizer, ByteTokenizer):
        fast, names = _byte_level(vocab_size > tokenizer.eod), {"pad_token": PAD}
        if vocab_size > tokenizer.eod:
            names["eos_token"] = END
    elif isinstance(tokenizer, SentencePieceTokenizer):
        fast, names = _from_sentencepiece(tokenizer)
    elif isinstance(tokenizer, JsonTokenizer):
        fast, names = _as_it_is(tokenizer)
    else:
        raise CheckpointError(
            f"a tokenizer of kind {tokenizer.kind} has no equal among Hugging Face tokenizers; export without one "
            "(--tokenizer none) and encode text with vqmoe_ds"
        )
    fast.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        # Text that spells a special token out stays text, as it was in training.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return {name + "_id": fast.token_to_id(token) for name, token in names.items()}


def _as_it_is(source: JsonTokenizer) -> tuple[Any, dict[str, str]]:
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str(source.content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = tokenizer.id_to_token(source.eod)
    if end is None:  # one id past all
        end = END
        tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return tokenizer, {"eos_token": end, "pad_token": end}


def _byte_level(with_end: bool) -> Any:
    """Ids 0 to 255 are bytes: the pre-tokenizer writes each as a printable symbol, and there is nothing to merge."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    symbols = byte_symbols()
    vocabulary = {symbols[b]: b for b in range(UNUSED_BYTE)} | {PAD: UNUSED_BYTE}
    if with_end:
        vocabulary[END] = 256
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, END] if with_end else [PAD]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _from_sentencepiece(source: SentencePieceTokenizer) -> tuple[Any, dict[str, str]]:
    """The same model for the ``tokenizers`` library, proven on a few texts.

    Raises:
        CheckpointError: it cuts one of the texts otherwise.
    """
    proto = import_module("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(source._model)
    tokenizer, names = _converted(proto, source)
    tokenizer.encode_special_tokens = True
    for text in PROBES:
        ours, theirs = source.encode(text).tolist(), tokenizer.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            raise CheckpointError(
                f"this SentencePiece model ({source.checksum[:12]}) has no exact equal in the tokenizers library (it "
                f"cuts {text[:20]!r} otherwise); export without it (--tokenizer none) and encode text with vqmoe_ds"
            )
    return tokenizer, names


def _converted(proto: Any, source: SentencePieceTokenizer) -> tuple[Any, dict[str, str]]:
    from tokenizers import AddedToken, Tokenizer, models

    trainer = proto.trainer_spec
    model: Any
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if trainer.model_type == trainer.UNIGRAM:
        model = models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    elif trainer.model_type == trainer.BPE:
        ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        unknown = pieces[trainer.unk_id][0] if trainer.unk_id >= 0 else None
        model = models.BPE(ids, _merges(proto), unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback)
    else:
        raise CheckpointError("only SentencePiece models of the types unigram and bpe have an equal elsewhere")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.decoder = _text_steps(proto)
    control = [piece.piece for piece in proto.pieces if piece.type == piece.CONTROL]
    end = source._pieces.id_to_piece(source.eod) if source.eod < len(pieces) else END
    if end == END:
        control.append(END)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    names = {"eos_token": end, "pad_token": end}
    if source.unknown_id is not None:
        names["unk_token"] = pieces[source.unknown_id][0]
    return tokenizer, names


def _merges(proto: Any) -> list[tuple[str, str]]:
    """All ways to make a piece of two others, best piece first: what BPE would have merged."""
    trained = {
        piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type in (piece.NORMAL, piece.USER_DEFINED)
    }
    merges = []
    for piece, i in trained.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [
            (-proto.pieces[i].score, trained[left], trained[right], left, right)
            for left, right in pairs
            if left in trained and right in trained
        ]
    return [(left, right) for *_, left, right in sorted(merges)]


def _text_steps(proto: Any) -> tuple[Any, Any]:
    """Normaliser and decoder, as the model's own specification says."""
    from tokenizers import Regex, decoders, normalizers

    steps: list[Any] = []
    spec = proto.normalizer_spec
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    steps.append(normalizers.Replace(" ", "\u2581"))
    undo = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        undo.append(decoders.Strip(content=" ", left=1))
    return normalizers.Sequence(steps), decoders.Sequence(undo)
