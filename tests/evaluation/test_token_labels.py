"""Texts, kinds and parts of speech of tokens, of bytes and of pieces of words."""

from __future__ import annotations

import sys

import torch

from vqmoe_ds.checkpoint.formats.huggingface.tokenizer import write_tokenizer
from vqmoe_ds.data.json_tokenizer import read_json_tokenizer
from vqmoe_ds.data.tokenizers import ByteTokenizer, WordTokenizer
from vqmoe_ds.evaluation.token_labels import kinds, parts_of_speech, pieces_of, readable

BYTES = pieces_of(ByteTokenizer(), 257)


def _of(labels, row=0):
    return [labels.names[i] for i in labels.ids_BS[row]]


def test_nothing_a_reader_cannot_see_is_shown_as_itself():
    shown = readable([b" the", b"\n", b"\x00", b"\xe2", "é".encode(), "\u200b".encode(), b"<b>", b""], 7)
    assert shown == ["␣the", "\\n", "\\x00", "\\xe2", "é", "\\u200b", "<b>", "<end of document>"]
    assert readable([b""]) == ["<id 0>"]


def test_pieces_of_every_tokenizer_are_the_bytes_of_its_tokens():
    for tokenizer, text in ((ByteTokenizer(), "a é\n"), (WordTokenizer(["a", "é"]), " a é \n")):
        pieces = tokenizer.pieces()
        assert b"".join(pieces[i] for i in tokenizer.encode(text)) == text.encode()
        assert pieces[tokenizer.eod] == b"" and [len(p) for p in pieces] == tokenizer.token_bytes().tolist()
    assert pieces_of(None, 3) == [b"", b"", b""]


def test_pieces_of_an_exported_tokenizer_are_those_of_its_source(tmp_path):
    write_tokenizer(tmp_path, ByteTokenizer(), 257, 16)
    (tmp_path / "config.json").write_text('{"eos_token_id": 256}')
    # Of all bytes one, which no text holds, stands for padding there.
    assert read_json_tokenizer(tmp_path).pieces() == [b"" if i == 255 else piece for i, piece in enumerate(BYTES)]


def test_kinds_of_bytes_and_of_pieces():
    text = b"to, 42\n\tb\xc3\xa9"
    found = _of(kinds(torch.tensor([list(text)]), BYTES))
    begins, inside = "letter, begins a word", "letter, inside a word"
    assert found[:6] == [begins, inside, "punctuation", "space", "digit", "digit"]
    assert found[6:] == ["line break", "space", begins, "other", "other"]
    pieces = [b" un", b"happy", b" and", b".", b"\n\n", b" 7"]
    assert _of(kinds(torch.arange(6).unsqueeze(0), pieces)) == [
        *(begins, inside, begins, "punctuation", "line break", "digit")
    ]


def test_every_byte_of_a_word_has_its_part_of_speech():
    text = b"The quick dogs were running, and 3 cats! Two."
    found = _of(parts_of_speech(torch.tensor([list(text)]), BYTES))
    words = {
        word: text.find(word.encode()) for word in ("The", "quick", "dogs", "were", "running", ",", "and", "3", "!")
    }
    expected = [
        "determiner",
        "adjective",
        "noun",
        "verb",
        "verb",
        "punctuation",
        "conjunction",
        "number",
        "punctuation",
    ]
    for (word, start), part in zip(words.items(), expected, strict=True):
        assert found[start : start + len(word)] == [part] * len(word), word
    assert {found[i] for i, byte in enumerate(text) if byte == 32} == {"space"}


def test_pieces_of_words_share_the_words_part_and_broken_text_is_no_error():
    pieces = [b"The", b" quick", b" do", b"gs", b" ", b"\xff\xc3", b""]
    found = _of(parts_of_speech(torch.arange(7).unsqueeze(0), pieces))
    assert found[:5] == ["determiner", "adjective", "noun", "noun", "space"] and found[6] == "space"


def test_without_a_tagger_there_are_no_parts_of_speech(monkeypatch):
    monkeypatch.setitem(sys.modules, "textblob.en", None)
    assert parts_of_speech(torch.tensor([[97]]), BYTES) is None
