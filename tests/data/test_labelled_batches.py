"""Labelled texts: what is held out and drawn, the order of an epoch, and how little is padded."""

from __future__ import annotations

import numpy as np
import pytest

from vqmoe_ds.data.batches import PADDING
from vqmoe_ds.data.labelled import LabelledSet, has_split
from vqmoe_ds.data.labelled_batches import (
    LabelledBatches,
    LabelledTexts,
    draw_shots,
    encode_texts,
    hold_out,
    rare_classes,
)
from vqmoe_ds.data.tokenizers import ByteTokenizer, WordTokenizer
from vqmoe_ds.runtime.errors import ConfigError, DataError


def texts_of(count: int, classes: int = 2, longest: int = 60, seed: int = 0) -> LabelledTexts:
    """Texts whose first id is their own number."""
    rng = np.random.default_rng(seed)
    ids = [np.concatenate([[n], rng.integers(1, 50, rng.integers(0, longest))]) for n in range(count)]
    names = tuple(f"class {c}" for c in range(classes))
    return LabelledTexts([str(n) for n in range(count)], ids, np.arange(count) % classes, names, np.zeros(count, bool))


def stream(batches: LabelledBatches, steps: int, world: int, size: int) -> list[int]:
    """Numbers of the texts that ``steps`` global batches are made of, sorted within each."""
    seen: list[int] = []
    for step in range(steps):
        first = step * batches.batch_size
        parts = [b for r in range(world) for b in batches.micro_batches(first, r, world, size)]
        seen += sorted(int(row[0]) for batch in parts for row in batch.inputs_BS)
    return seen


def test_every_epoch_has_every_text_once_in_an_order_of_its_own_and_batches_run_over_its_end():
    batches = LabelledBatches(texts_of(50), 8, seed=3)
    epochs = [[int(batches.rows(50 * e + i, 1)[0]) for i in range(50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert sorted(batches.rows(48, 8)) == sorted([*epochs[0][48:], *epochs[1][:6]])
    assert batches.epoch(75) == 1.5


@pytest.mark.parametrize(("world", "size"), [(1, 8), (1, 2), (2, 2), (4, 1)])
def test_the_global_batch_does_not_depend_on_ranks_and_micro_batches(world, size):
    texts = texts_of(50)
    here, there = (LabelledBatches(texts, 8, seed=3) for _ in range(2))
    there.rows(5000, 8)  # a resume far ahead leaves no trace
    assert stream(there, 14, world, size) == stream(here, 14, 1, 4)


def test_texts_of_like_lengths_share_a_batch_in_every_epoch():
    texts = texts_of(1003, longest=200)
    shuffled = np.random.default_rng(0).permutation(1003)[:1000].reshape(-1, 8)
    plain = 1 - texts.lengths.sum() / sum(8 * texts.lengths[row].max() for row in shuffled)
    batches = LabelledBatches(texts, 8, seed=1)
    assert batches.padding(8) < 0.1 < 0.4 < plain
    second = [texts.lengths[batches.rows(first, 8)] for first in range(1000 + 8, 2000, 8)]
    assert np.mean([row.max() - row.min() for row in second]) < 20


def test_a_batch_is_padded_on_the_right_and_counts_its_real_tokens():
    texts = texts_of(3)
    batch = texts.read(np.array([2, 0]))
    lengths = [len(texts.ids[2]), len(texts.ids[0])]
    assert batch.inputs_BS.shape == (2, max(lengths))
    for row, length in zip(batch.inputs_BS, lengths, strict=True):
        assert (row[:length] != PADDING).all()
        assert (row[length:] == PADDING).all()
    assert batch.tokens == sum(lengths)
    assert batch.targets_BS.tolist() == [0, 0]


def test_held_out_texts_are_a_share_of_every_class_and_follow_from_the_seed():
    texts = texts_of(100, classes=3)
    rest, held = hold_out(texts, 0.1, seed=5, split=1)
    assert np.bincount(held.labels).tolist() == [3, 3, 3]
    assert sorted(rest.texts + held.texts) == sorted(texts.texts)
    assert hold_out(texts, 0.1, 5, 1)[1].texts == held.texts
    assert hold_out(texts, 0.1, 6, 1)[1].texts != held.texts
    assert hold_out(texts, 0.1, 5, 2)[1].texts != held.texts


def test_a_class_of_one_text_is_learned_and_nothing_of_it_held_out():
    texts = texts_of(9, classes=5)
    rest, held = hold_out(texts, 0.1, 0, 1)
    assert rare_classes(texts) == ["class 4"] and 4 in rest.labels and sorted(held.labels) == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="no class has two training texts"):
        hold_out(texts_of(3, classes=3), 0.1, 0, 1)


def test_shots_are_balanced_drawn_by_the_seed_and_nested():
    texts = texts_of(100, classes=3)
    few, many = draw_shots(texts, 2, seed=1), draw_shots(texts, 8, seed=1)
    assert np.bincount(few.labels).tolist() == [2, 2, 2]
    assert set(few.texts) < set(many.texts)
    assert draw_shots(texts, 2, seed=2).texts != few.texts
    with pytest.raises(ConfigError, match="40 shots are more than the 34 training texts of class 'class 0'"):
        draw_shots(texts, 40, 1)


def test_of_a_text_longer_than_the_context_the_first_tokens_count_and_it_is_counted():
    labelled = LabelledSet("x", ["abc", "abcdefgh"], np.array([0, 1]), ["a", "b"])
    texts = encode_texts(labelled, ByteTokenizer(), 5)
    assert bytes(texts.ids[1].tolist()) == b"abcde"
    assert texts.cut.tolist() == [False, True]
    empty = LabelledSet("x", ["hello", "   "], np.array([0, 1]), ["a", "b"])
    with pytest.raises(DataError, match="a text without any token"):
        encode_texts(empty, WordTokenizer(["hello"]), 5)


def test_which_splits_a_set_has_is_known_before_it_is_read(tmp_path):
    assert has_split("sst2", "validation")
    assert not has_split("imdb", "validation")
    (tmp_path / "train.csv").write_text("text,label\n")
    (tmp_path / "dev-0-of-2.jsonl.gz").write_text("")
    (tmp_path / "test.md").write_text("")  # no file that a set is read from
    spec = f"mine={tmp_path}"
    assert [has_split(spec, split) for split in ("train", "validation", "test")] == [True, True, False]
    assert not has_split(str(tmp_path / "train.csv"), "test")
    with pytest.raises(DataError, match="does not exist"):
        has_split("nothing_here", "train")
