"""Tokenizers: what goes in comes out, faster paths give the same ids, and damage is refused."""

from __future__ import annotations

import io
import json
import pickle
import random
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import models

from vqmoe_ds.data.json_tokenizer import JsonTokenizer
from vqmoe_ds.data.tokenizer_base import Tokenizer
from vqmoe_ds.data.tokenizers import SentencePieceTokenizer, WordTokenizer, load_tokenizer
from vqmoe_ds.runtime.errors import DataError

WIKITEXT = " \n = Homarus gammarus = \n \n A large <unk> , about 60 @.@ 5 cm ( 24 in ) . \n"
ODD = [
    "",
    " ",
    "  two  spaces \t tab\n\n\nlines\r\n ",
    "日本語 текст 👩‍🚀 é e\u0301",
    "\u2581 a\u2581b\u2581\u2581 \u2585\u2047",  # SentencePiece's own marks
    "\x00\x01\ufeff\u2028\x85</s><unk><s><0x41>",
    "x" * 70000,
]


def _sentences(count: int = 3000) -> list[str]:
    """Lines of invented words with the frequencies of a language."""
    draw = random.Random(3)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(1, 9))) for _ in range(800)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    return [" ".join(draw.choices(words, weights, k=draw.randint(1, 12))) + "." for _ in range(count)]


def _train(kind: str, **options: Any) -> bytes:
    from sentencepiece import SentencePieceTrainer

    lossless = {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "user_defined_symbols": ["\n", "\t"],
    }
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(_sentences()),
        model_writer=model,
        model_type=kind,
        **{"vocab_size": 500, "minloglevel": 4, **lossless, **options},
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    words = sorted({*WIKITEXT.split(), *" ".join(_sentences(200)).split()})
    return {
        "bytes": load_tokenizer("bytes"),
        "unigram": SentencePieceTokenizer(_train("unigram")),
        "bpe": SentencePieceTokenizer(_train("bpe")),
        "word": WordTokenizer(words),
        "json": JsonTokenizer(train_json_tokenizer()),
    }


def train_json_tokenizer() -> str:
    """A byte-level BPE of the ``tokenizers`` library, as GPT-2 has, with settings that text must not feel."""
    from tokenizers import AddedToken, decoders, pre_tokenizers, processors, trainers

    made = Fast(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(_sentences(), trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    made.add_special_tokens(["<|endoftext|>", "</s>"])
    made.add_tokens([AddedToken("  ", normalized=False)])
    made.post_processor = processors.TemplateProcessing("</s> $A </s>", special_tokens=[("</s>", 501)])
    made.enable_truncation(5)
    made.enable_padding()
    return made.to_str()


KINDS = ("bytes", "unigram", "bpe", "word", "json")


@pytest.mark.parametrize("kind", ("bytes", "unigram", "bpe", "json"))
def test_any_text_comes_back(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer, pieces = tokenizers[kind], tokenizers[kind].pieces()
    for text in [*ODD, *_sentences(20), "\n".join(_sentences(50))]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert tokenizer.decode(ids) == text
        assert b"".join(pieces[i] for i in ids) == text.encode()
        assert tokenizer.unknown_id is None and tokenizer.count_unknown(text, ids) == 0


def test_bytes_are_the_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert tokenizer.decode([0xC3]) == "\ufffd"  # the window of a batch may start inside a character


@pytest.mark.parametrize("kind", KINDS)
def test_end_of_document_is_an_id_that_no_text_gives(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    assert 0 <= tokenizer.eod < tokenizer.vocab_size
    assert tokenizer.eod not in tokenizer.encode(" ".join(["</s>", "<s>", "<eod>", "<eos>", *ODD]))
    ids = tokenizer.encode("one.")
    assert tokenizer.decode(np.append(ids, tokenizer.eod)) == tokenizer.decode(ids)
    assert tokenizer.token_bytes()[tokenizer.eod] == 0
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,) and tokenizer.token_bytes().dtype == np.int32


@pytest.mark.parametrize("kind", KINDS)
def test_batches_copies_and_saved_ones_encode_alike(
    tokenizers: dict[str, Tokenizer], kind: str, tmp_path: Path
) -> None:
    tokenizer, texts = tokenizers[kind], [*ODD, *_sentences(30)]
    folder = tmp_path / "x.tokenizer"
    tokenizer.save(folder)
    assert json.loads((folder / "tokenizer.json").read_text()) == tokenizer.describe()
    assert not list(folder.glob(".*"))
    want = [tokenizer.encode(text) for text in texts]
    for other in (tokenizer, pickle.loads(pickle.dumps(tokenizer)), load_tokenizer(str(folder))):
        assert other.describe() == tokenizer.describe()
        assert all(np.array_equal(a, b) for a, b in zip(other.encode_batch(texts), want, strict=True))


@pytest.mark.parametrize("options", [{}, {"allow_whitespace_only_pieces": True}, {"split_by_whitespace": False}])
@pytest.mark.parametrize("kind", ("unigram", "bpe"))
def test_ids_are_those_of_sentencepiece(kind: str, options: dict[str, Any]) -> None:
    from sentencepiece import SentencePieceProcessor

    model = _train(kind, **options)
    tokenizer, reference = SentencePieceTokenizer(model), SentencePieceProcessor(model_proto=model)
    draw = random.Random(1)
    parts = ["the", "a", " ", "  ", "\n", "\t", "日", "é", "\x00", ".", *_sentences(20)]
    for _ in range(2000):
        text = "".join(draw.choices(parts, k=draw.randint(0, 25)))
        assert tokenizer.encode(text).tolist() == reference.encode(text)


def test_a_model_made_elsewhere_keeps_its_habits(tmp_path: Path) -> None:
    options = {"byte_fallback": False, "add_dummy_prefix": True, "remove_extra_whitespaces": True, "eos_id": -1}
    path = tmp_path / "given.model"
    path.write_bytes(_train("bpe", **options, vocab_size=300))
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.vocab_size, tokenizer.eod) == (301, 300)  # it has no end of its own: one id more
    text = "hello  日 you 日"
    ids = tokenizer.encode(text)
    assert tokenizer.unknown_id is not None and tokenizer.count_unknown(text, ids) == 2
    assert tokenizer.decode(np.append(ids, 300)).startswith("hello ")


def test_wikitext_comes_back_exactly_and_other_text_up_to_its_spaces(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["word"]
    ids = tokenizer.encode(WIKITEXT)
    assert tokenizer.decode(ids) == WIKITEXT
    assert tokenizer.token_bytes()[ids].sum() == len(WIKITEXT.encode())
    assert len(ids) == len(WIKITEXT.split()) + WIKITEXT.count("\n")
    assert tokenizer.decode(tokenizer.encode("A  large\tcm\n.")) == " A large cm \n ."


def test_words_outside_the_vocabulary_are_counted_without_those_of_the_text_itself() -> None:
    tokenizer = WordTokenizer(["a", "b"])
    text = "a <unk> zebra b\n<eos> <eod>"
    ids = tokenizer.encode(text)
    assert tokenizer.count_unknown(text, ids) == 3  # a text cannot spell out the symbols of ends
    assert tokenizer.decode(ids) == " a <unk> <unk> b \n <unk> <unk>"
    assert tokenizer.vocab_size == 5


def test_vocabulary_file(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("<eos>\r\nthe\r\n<unk>\r\nof\r\n", newline="")
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("of the\nx").tolist() == [3, 1, 0, 2] and tokenizer.eod == 4
    for content, problem in ((b"a\n\nb\n", "line 2"), (b"a\nb\na\n", "'a' twice"), (b"a\xff\n", "not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=problem):
            load_tokenizer(path)


@pytest.mark.parametrize(
    ("beside", "end"),
    [
        ({}, 500),
        ({"config.json": {"eos_token_id": [501, 7]}}, 501),
        ({"tokenizer_config.json": {"eos_token": {"content": "</s>"}}}, 501),
        ({"config.json": {"eos_token_id": 600}}, 600),
    ],
    ids=["a usual name", "model", "tokenizer", "past all"],
)
def test_the_tokenizer_of_a_hugging_face_folder(tmp_path: Path, beside: dict[str, Any], end: int) -> None:
    for name, content in beside.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "tokenizer.json").write_text(train_json_tokenizer())
    tokenizer, file = load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.describe() == file.describe()
    assert (tokenizer.eod, tokenizer.vocab_size) == (end, max(end + 1, 503))
    text = "<|endoftext|>  a</s>"
    assert tokenizer.decode([*tokenizer.encode(text), end]) == text


@pytest.mark.parametrize(
    ("model", "unknown"),
    [
        (models.BPE({"None": 0, "a": 1}, []), None),
        (models.BPE({"a": 0, "?": 1}, [], unk_token="?"), 1),
        (models.Unigram([("a", -1.0), ("?", -9.0)], unk_id=1), 1),
        (models.Unigram([("a", -1.0)]), None),
        (models.WordLevel({"?": 0, "a": 1}, unk_token="?"), 0),
    ],
)
def test_a_tokenizer_json_counts_what_its_model_names_unknown(model: models.Model, unknown: int | None) -> None:
    tokenizer = JsonTokenizer(Fast(model).to_str())
    assert tokenizer.unknown_id == unknown
    if unknown is not None:
        assert tokenizer.count_unknown("日", tokenizer.encode("日")) == 1


def test_half_a_surrogate_pair_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("bytes", "unigram", "bpe", "json"):
        with pytest.raises(DataError, match="surrogate pair .* character 1"):
            tokenizers[kind].encode("a\ud800")


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_another_tokenizer_are_refused(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    for wrong in (-1, tokenizers[kind].vocab_size):
        with pytest.raises(DataError, match=f"id {wrong} is outside"):
            tokenizers[kind].decode([0, wrong])


def test_damage_is_refused_in_a_sentence(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    folder = tmp_path / "x.tokenizer"

    def refused(source: Path | str, problem: str) -> None:
        with pytest.raises(DataError, match=problem):
            load_tokenizer(source)

    refused("nowhere.model", "does not exist")
    (tmp_path / "t.bin").write_bytes(b"")
    refused(tmp_path / "t.bin", "neither")
    folder.mkdir()
    refused(folder, "has no tokenizer.json")
    tokenizers["word"].save(folder)
    (folder / "vocab.txt").write_text("other\n")
    refused(folder, "changed after it was saved")
    tokenizers["bpe"].save(folder)
    model = (folder / "spm.model").read_bytes()
    for damaged in (b"", b"text", model[: len(model) // 2]):
        (folder / "spm.model").write_bytes(damaged)
        refused(folder, "not a SentencePiece model|changed after")
    (folder / "spm.model").unlink()
    refused(folder, "cannot be read")
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "damaged")
    (folder / "tokenizer.json").write_text(json.dumps({"kind": "other", "checksum": ""}))
    refused(folder, "kind 'other'")
