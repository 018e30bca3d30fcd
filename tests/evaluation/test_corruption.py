"""Damage is as large as asked, where it may be, and drawn anew by the seed alone."""

from __future__ import annotations

import re

import pytest

from vqmoe_ds.evaluation.corruption import (
    KINDS,
    PROTECTED,
    REPLACEMENT,
    Corruption,
    all_corruptions,
    apply,
    parse_corruption,
)
from vqmoe_ds.runtime.errors import ConfigError

LINE = (
    "The old captain of the harbour had never seen a ship like that before, and he said so to his brother's friends.\n"
)
TEXT = (LINE * 60 + "Käfer und Mäuse liefen über die Brücke, 42 times.\n" * 20).encode()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_edits_are_in_order_without_overlap_and_follow_from_the_seed(kind, rate, encoding):
    corruption, text = Corruption(kind, rate), TEXT.decode().encode(encoding)
    edits, units = corruption.damage(text, 3)
    ends = [0, *(edit.end for edit in edits)]
    assert all(end <= edit.start < edit.end <= len(text) for end, edit in zip(ends, edits, strict=False))
    assert corruption.damage(text, 3) == (edits, units)
    if rate == 0.0:
        assert edits == [] and apply(text, edits) == text
    if rate == 0.1:
        assert corruption.damage(text, 4)[0] != edits != corruption.damage(text, 3, document=1)[0]
    apply(text, edits).decode(encoding)  # characters are never cut


@pytest.mark.parametrize("kind", ["word_swap", "char_noise", "word_drop"])
@pytest.mark.parametrize("rate", [0.025, 0.2])
def test_the_rate_is_the_share_that_is_changed(kind, rate):
    edits, units = Corruption(kind, rate).damage(TEXT, 0)
    assert abs(len(edits) - rate * units) < 1
    changed = sum(len(Corruption(kind, rate).damage(b"other small text", seed).edits) for seed in range(400))
    assert abs(changed / 400 - rate * (14 if kind == "char_noise" else 3)) < 0.1, "on average, in short text too"
    letters = sum(character.isalnum() for character in TEXT.decode())
    assert units == (letters if kind == "char_noise" else len(re.findall(r"[\w']+", TEXT.decode())))


def test_stop_words_are_never_swapped_and_everything_else_can_be():
    edits, units = Corruption("word_swap", 1.0).damage(TEXT, 0)
    swapped = {TEXT[edit.start : edit.end].decode() for edit in edits}
    assert {"captain", "harbour", "Käfer", "42", "brother's"} <= swapped
    assert not {word.encode() for word in map(str.lower, swapped)} & PROTECTED
    left = set(re.findall(rb"[\w']+", apply(TEXT, edits))) - {REPLACEMENT}
    assert {b"The", b"had", b"and"} <= left and all(word.lower() in PROTECTED for word in left)
    assert len(edits) < units and all(edit.replacement == REPLACEMENT for edit in edits)


def test_the_published_rule_swaps_at_least_one_word_a_line():
    text = b"a harbour\n\n the of \n" + b" ".join([b"ship"] * 100) + b"\nlast harbour line"
    edits, _ = Corruption("word_swap_line", 0.025).damage(text, 1)
    lines = apply(text, edits).split(b"\n")
    assert lines[0] == b"a AAA" and lines[1:3] == [b"", b" the of "]
    assert lines[3].count(REPLACEMENT) == 2 and lines[4].count(REPLACEMENT) == 1


def test_words_are_dropped_with_the_space_before_them_and_lines_stay():
    edits, _ = Corruption("word_drop", 1.0).damage(b"one two,  three\nfour", 0)
    assert apply(b"one two,  three\nfour", edits) == b",\n"


def test_noise_replaces_leaves_out_and_adds_letters_and_nothing_else():
    text = ("ä" * 300 + " ").encode()
    edits, units = Corruption("char_noise", 1.0).damage(text, 0)
    assert units == len(edits) == 300
    kinds = {len(edit.replacement) for edit in edits}
    assert kinds == {0, 1, 3}  # left out, a letter, the character and a letter
    letters = re.findall(r"[a-z]", apply(text, edits).decode())
    assert len(letters) == sum(len(edit.replacement) > 0 for edit in edits)
    edits, _ = Corruption("char_noise", 1.0).damage(b"e" * 400, 0)
    assert all(edit.replacement != b"e" for edit in edits)


def test_bytes_that_are_no_text_are_left_in_peace():
    for kind in KINDS:
        edits, _ = Corruption(kind, 0.5).damage(b"\xff\xfe \x80\x80 caf\xc3", 0)
        assert all(edit.end <= 10 for edit in edits)


def test_specs():
    assert parse_corruption("word_swap") == Corruption("word_swap", 0.025)
    assert parse_corruption("char_noise:0.2") == Corruption("char_noise", 0.2)
    assert [corruption.kind for corruption in all_corruptions()] == list(KINDS)
    for spec, sentence in (
        ("typos", "the kind 'typos' is unknown; known are word_swap,"),
        ("word_swap:1.5", "the rate '1.5' is not a number from 0 to 1"),
        ("word_swap:-0.1", "the rate '-0.1' is not a number from 0 to 1"),
        ("word_swap:", "the rate '' is not a number from 0 to 1"),
        ("word_swap:nan", "the rate 'nan' is not a number from 0 to 1"),
    ):
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            parse_corruption(spec)
