"""Tokenizer files that ``AutoTokenizer`` loads without code of ours, giving the ids that the model was trained on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vqmoe_ds.checkpoint.formats.huggingface.llama_cpp import sentencepiece_model
from vqmoe_ds.data.json_tokenizer import JsonTokenizer, byte_symbols
from vqmoe_ds.data.tokenizer_base import SPACE_MARK, Tokenizer
from vqmoe_ds.data.tokenizer_training import sums_are_exact
from vqmoe_ds.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, sentencepiece_proto
from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.runtime.extras import library

END, PAD = "<|endofdocument|>", "<|pad|>"
UNUSED_BYTE = 255
"""No UTF-8 text holds this byte, so its id is free to stand for padding."""

PROBES = (
    "The quick brown fox, 3.14 + [x] = {y};\n\tdef f(a_b): return 'q'",
    "  two  spaces, a trailing one \n\n\n a line break\n",
    "\n first a line break, last spaces  ",
    "Ein Käfer, деревня, 日本語のテキスト, العربية, 🙂👩‍🚀, ½ ﬁ e\u0301",
)
PARTS = (
    *(" ", "  ", "   ", "\n", "\r\n", "\t", "\x0b\x0c", "\u0085", "\u00a0", "\u2003", "\u2028", "\u3000", "\u200b"),
    *(
        "\ufeff",
        "\u00ad",
        "\x01",
        "\x7f",
        "\ufffd",
        "\ufffe",
        "\U0010ffff",
        "\u0301",
        "e\u0301\u0323",
        "\u1100\u1161\u11a8",
    ),
    *("\u2581", "\u2581\u2581", " \u2581", "\u2581 ", "ſ", "Ⅷ", "㌔", "ﷺ", "ｶﾞ", "İ", "ß", "👩‍🚀", "🇩🇪", "नमस्ते", "ไทย"),
    *(
        "<unk>",
        "<s>",
        "</s>",
        "<pad>",
        "<0x41>",
        "<0x0A>",
        "<0xE2><0x96><0x81>",
        "<|endofdocument|>",
        "<",
        ">",
        "a",
        "1",
    ),
)
"""Texts that conversions are known to stumble over; probes are made of these and of the model's own pieces."""
MOST_PIECES, PROBE_LENGTH = 40_000, 40


def write_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    vocab_size: int,
    max_length: int,
    stock: bool = False,
    inexact: bool = False,
) -> dict[str, int]:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, proven to give the ids of training.

    Returns the ids of special tokens for ``config.json``.

    Args:
        folder: where to.
        tokenizer: that of the training data.
        vocab_size: of the model; a byte model of 256 ids has no end of a document.
        max_length: the training context.
        stock: whether the model is a stock one; then with a ``tokenizer.model`` for llama.cpp, where one has equal ids.
        inexact: take a unigram model whose sums of scores are rounded, so that rare ties may be cut otherwise.

    Raises:
        CheckpointError: a kind of tokenizer, or a model, that has no equal there.
    """
    library("tokenizers", "a tokenizer for Hugging Face", CheckpointError)
    pieces: list[str] = []
    if isinstance(tokenizer, ByteTokenizer):
        fast, names = _byte_level(vocab_size > tokenizer.eod), {"pad_token": PAD}
        if vocab_size > tokenizer.eod:
            names["eos_token"] = END
    elif isinstance(tokenizer, SentencePieceTokenizer):
        fast, names, pieces = _from_sentencepiece(tokenizer, inexact)
    elif isinstance(tokenizer, JsonTokenizer):
        fast, names = _as_it_is(tokenizer)
        # get_vocab() promises no order, and the probes must be the same texts every time.
        pieces = sorted(fast.get_vocab())
    else:
        raise CheckpointError(
            f"a tokenizer of kind {tokenizer.kind} has no equal among Hugging Face tokenizers; export without one "
            "(--tokenizer none) and encode text with vqmoe_ds"
        )
    _prove(tokenizer, fast, pieces, names.get("eos_token"))
    fast.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        # Text that spells a special token out stays text, as it was in training.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        # generate() goes on from the last position of every row, so padding must stand before the text.
        "padding_side": "left",
        **(_for_llama_cpp(folder, tokenizer, names.get("eos_token", END), vocab_size) if stock else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return {name + "_id": fast.token_to_id(token) for name, token in names.items()}


def _for_llama_cpp(folder: Path, tokenizer: Tokenizer, end: str, vocab_size: int) -> dict[str, bool]:
    """Write ``tokenizer.model``; what ``tokenizer_config.json`` has to say of it."""
    if (proto := sentencepiece_model(tokenizer, end, vocab_size)) is None:
        return {}
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    # By default llama.cpp begins a text with a token of its own and a space.
    return {"add_bos_token": False, "add_prefix_space": proto.normalizer_spec.add_dummy_prefix}


def _as_it_is(source: JsonTokenizer) -> tuple[Any, dict[str, str]]:
    from tokenizers import AddedToken, Tokenizer

    # What it adds to a text (a beginning, an end) was not added in training.
    tokenizer = Tokenizer.from_str(json.dumps({**json.loads(source.content), "post_processor": None}))
    # A file may hold both as settings, which encode() obeys; JsonTokenizer switches them off, too.
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
        # ByteTokenizer.eod.
        vocabulary[END] = 256
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    # By default it puts a space before a text, a byte that training did not see.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, END] if with_end else [PAD]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _from_sentencepiece(source: SentencePieceTokenizer, inexact: bool) -> tuple[Any, dict[str, str], list[str]]:
    """The same model for the ``tokenizers`` library, and its pieces.

    Raises:
        CheckpointError: there is none, for a reason that is known.
    """
    proto = sentencepiece_proto(source._model)
    _refuse_what_is_known(proto, source)
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM and not (inexact or sums_are_exact(proto)):
        raise CheckpointError(
            f"this unigram tokenizer ({source.checksum[:12]}) has scores whose sums are rounded, in float32 here and "
            "in float64 in the tokenizers library, so that of two cuts which score alike each may choose another "
            "(about one token in a million); accept that with --inexact_tokenizer, export without a tokenizer "
            "(--tokenizer none), or train with one of tools/train_tokenizer.py, whose sums are exact"
        )
    return *_converted(proto, source), [piece.piece.replace(SPACE_MARK, " ") for piece in proto.pieces]


def _prove(source: Tokenizer, fast: Any, pieces: list[str], end: str | None) -> None:
    """Raises: CheckpointError: texts made to tell tokenizers apart are cut otherwise, or the end has another id."""
    # A token that is added there gets the number of those before it, whatever their ids are.
    if end is not None and fast.token_to_id(end) != source.eod:
        reason = f"the end of a document has id {source.eod}, and would have {fast.token_to_id(end)} there"
        raise _no_equal(source, reason)
    # tokenizer.json does not hold this setting: split_special_tokens of tokenizer_config.json stands for it there.
    fast.encode_special_tokens = True
    for text in _probes(pieces):
        ours, theirs = source.encode(text).tolist(), fast.encode(text).ids
        if ours != theirs:
            same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
            raise _no_equal(source, f"it cuts {source.decode(ours[same : same + 8])[:20]!r} otherwise")


def _no_equal(source: Tokenizer, reason: str) -> CheckpointError:
    return CheckpointError(
        f"this {source.kind} tokenizer ({source.checksum[:12]}) has no exact equal in the tokenizers library "
        f"({reason}); export without it (--tokenizer none) and encode text with vqmoe_ds, or train with one of "
        "tools/train_tokenizer.py"
    )


def _probes(pieces: list[str]) -> Iterator[str]:
    """``PROBES``, every piece (or, of more than ``MOST_PIECES``, evenly spaced ones) among others, and mixtures of
    pieces and ``PARTS``: always the same texts."""
    draw = random.Random(0)
    pieces = pieces[:: 1 + len(pieces) // MOST_PIECES]
    draw.shuffle(pieces)
    yield from PROBES
    for first in range(0, len(pieces), PROBE_LENGTH):
        chosen = pieces[first : first + PROBE_LENGTH]
        yield "".join(chosen)
        yield "".join(draw.choice(PARTS) + piece for piece in chosen)
    for _ in range(500):
        yield "".join(
            draw.choice(PARTS if draw.random() < 0.7 else pieces or PARTS) for _ in range(draw.randint(1, 12))
        )


def _converted(proto: Any, source: SentencePieceTokenizer) -> tuple[Any, dict[str, str]]:
    """Its pieces, with plain spaces, so that the symbol that stands for a space in them is text like any other."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    trainer, apart = proto.trainer_spec, ""
    model: Any
    pieces = [piece.piece.replace(SPACE_MARK, " ") for piece in proto.pieces]
    if trainer.model_type == trainer.UNIGRAM:
        scores, apart = _unigram_scores(proto, source)
        vocabulary = list(zip(pieces, scores, strict=True))
        model = models.Unigram(vocabulary, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    elif trainer.model_type == trainer.BPE:
        ids = {piece: i for i, piece in enumerate(pieces)}
        unknown = pieces[trainer.unk_id] if trainer.unk_id >= 0 else None
        # fuse_unk: SentencePiece writes a run of unknown characters as one <unk>.
        model = models.BPE(ids, _merges(proto), unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback)
    else:
        raise CheckpointError("only SentencePiece models of the types unigram and bpe have an equal elsewhere")
    tokenizer = Tokenizer(model)
    if apart:
        # By code points: characters such as ] and ^ have a meaning in a class.
        cut = Regex("[" + "".join(f"\\x{{{ord(symbol):x}}}" for symbol in apart) + "]")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(cut, "isolated")
    tokenizer.normalizer, tokenizer.decoder = _text_steps(proto, source.unknown_id is None)
    control = [piece.piece for piece in proto.pieces if piece.type == piece.CONTROL]
    # A model without an end of its own: SentencePieceTokenizer takes the id past its pieces, and that is the one which
    # add_special_tokens gives to the only token that the vocabulary lacks.
    end = source._pieces.id_to_piece(source.eod) if source.eod < len(pieces) else END
    if end == END:
        control.append(END)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    names = {"eos_token": end, "pad_token": end}
    if source.unknown_id is not None:
        names["unk_token"] = pieces[source.unknown_id]
    return tokenizer, names


def _unigram_scores(proto: Any, source: SentencePieceTokenizer) -> tuple[list[float], str]:
    """Scores, and characters to cut a text at, so that no text is cut into pieces SentencePiece keeps for itself.

    The tokenizers library looks for those (``</s>``, ``<unk>``, ``<0x41>``) in text too. Below the sum of its
    characters' scores such a piece is never chosen, unless one of them is unknown. Unknown characters become bytes by
    themselves, so a text can be cut around them. And as their score, 10 below the least of all, goes down too, a
    character must be unknown wherever it stands, or the number of unknown ones might be traded for scores.

    Raises:
        CheckpointError: the model is not like that.
    """
    kinds = type(proto).SentencePiece
    text = (kinds.NORMAL, kinds.USER_DEFINED)
    known, apart = {piece.piece for piece in proto.pieces if piece.type in text}, set()
    for piece in proto.pieces:
        lacking = set(piece.piece) - known
        if lacking and (piece.type in text or source.unknown_id is not None):
            raise _no_equal(source, f"{min(lacking)!r} of its piece {piece.piece!r} is none by itself")
        apart |= lacking
    least = min(piece.score for piece in proto.pieces if piece.type == kinds.NORMAL)
    longest = max(len(piece.piece) for piece in proto.pieces)
    # The characters of a piece score at least longest * least together, or 0 where all scores are positive.
    kept = longest * min(least, -1.0) - 1000.0
    return [piece.score if piece.type in text else kept for piece in proto.pieces], "".join(sorted(apart))


def _refuse_what_is_known(proto: Any, source: SentencePieceTokenizer) -> None:
    """Raises: CheckpointError: the model does something that the tokenizers library cannot, whatever probes show."""
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    texts = [piece.piece for piece in proto.pieces if piece.type in (piece.NORMAL, piece.USER_DEFINED)]
    # These are cut out of a text before all else, which changes nothing for characters that are in no other piece.
    defined = {piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED}
    long = next((text for text in texts if len(text) > 1 and defined & {*text, text}), None)
    reasons = {
        f"its rule {spec.name} is applied to other parts of a text there": bool(spec.precompiled_charsmap),
        "it leaves spaces as they are": not spec.escape_whitespaces,
        "it writes spaces after words": trainer.treat_whitespace_as_suffix,
        "some of its pieces are marked as unused": any(piece.type == piece.UNUSED for piece in proto.pieces),
        f"its piece {long!r} holds a symbol that a user defined": long is not None,
        "it has a piece with a plain space": any(" " in piece.piece for piece in proto.pieces),
    }
    for reason, holds in reasons.items():
        if holds:
            raise _no_equal(source, reason)


def _merges(proto: Any) -> list[tuple[str, str]]:
    """All ways to make a piece of two others, best piece first: what BPE would have merged."""
    trained = {
        piece.piece.replace(SPACE_MARK, " "): i
        for i, piece in enumerate(proto.pieces)
        if piece.type in (piece.NORMAL, piece.USER_DEFINED)
    }
    merges = []
    for piece, i in trained.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [
            # The library merges the first pair of this list that occurs, SentencePiece the one of the best score.
            (-proto.pieces[i].score, trained[left], trained[right], left, right)
            for left, right in pairs
            if left in trained and right in trained
        ]
    return [(left, right) for *_, left, right in sorted(merges)]


def _text_steps(proto: Any, whole: bool) -> tuple[Any, Any]:
    """Normaliser and decoder, as the model's own specification says.

    Args:
        proto: the model.
        whole: every text can be written. Its ``SPACE_MARK`` is then text; otherwise it is a space.
    """
    from tokenizers import Regex, decoders, normalizers

    steps: list[Any] = []
    spec = proto.normalizer_spec
    # Before the prefix is put there, which would be a leading space like any other.
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if not whole:
        steps.append(normalizers.Replace(SPACE_MARK, " "))
        if spec.remove_extra_whitespaces:
            steps.append(normalizers.Replace(Regex(r" +\z"), ""))
    undo = [decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        # After Fuse: it strips every token, and by then the text is one.
        undo.append(decoders.Strip(content=" ", left=1))
    return normalizers.Sequence(steps), decoders.Sequence(undo)
