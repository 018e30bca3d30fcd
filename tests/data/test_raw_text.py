"""Batches: the same global batch however it is shared, every window once an epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.corpus import Corpus
from vqmoe_ds.data.raw_text import Split, TrainingBatches, open_raw_text

WINDOWS, BATCH = 21, 8


def _batches(seed: int = 5, batch_size: int = BATCH) -> TrainingBatches:
    """Windows of two bytes, each telling its index."""
    text = np.arange(WINDOWS + 1).astype(np.uint8)
    return TrainingBatches(Split(Corpus("test", (text,), (len(text),)), 1, np.arange(WINDOWS)), batch_size, seed)


def _windows(batches: TrainingBatches, step: int, micro: int, rank: int, world: int, size: int) -> np.ndarray:
    batch = batches.micro_batches(step * batches.batch_size, rank, world, size)[micro]
    return np.concatenate([batch.inputs_BS, batch.targets_BS[:, -1:]], axis=1)


def _global_batch(step: int, world: int, accumulation: int) -> np.ndarray:
    size = BATCH // (world * accumulation)
    parts = []
    for micro in range(accumulation):
        for rank in range(world):  # each rank has an object of its own
            parts.append(_windows(_batches(), step, micro, rank, world, size))
    return np.concatenate(parts)


@pytest.mark.parametrize("world, accumulation", [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (1, 8)])
def test_global_batch_does_not_depend_on_who_shares_it(world: int, accumulation: int) -> None:
    for step in (0, 2, 5):  # step 2 crosses into the second epoch
        assert np.array_equal(_global_batch(step, world, accumulation), _global_batch(step, 1, 1))


def test_every_window_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    batches = _batches()
    steps = 2 * WINDOWS  # 16 epochs
    stream = np.concatenate([_windows(batches, step, 0, 0, 1, BATCH)[:, 0] for step in range(steps)])
    epochs = stream.reshape(-1, WINDOWS)
    assert len(epochs) == 16
    assert all(sorted(epoch) == list(range(WINDOWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 16


def test_any_step_can_be_read_first() -> None:
    running = _batches()
    for step in range(9):
        _windows(running, step, 0, 0, 1, BATCH)
    for step in (9, 3):  # forward, then back an epoch
        fresh = _windows(_batches(), step, 0, 0, 1, BATCH)
        assert np.array_equal(_windows(running, step, 0, 0, 1, BATCH), fresh)


def test_seed_and_epochs() -> None:
    assert not np.array_equal(_windows(_batches(5), 0, 0, 0, 1, 8), _windows(_batches(6), 0, 0, 0, 1, 8))
    assert _batches().epoch(0) == 0
    assert _batches().epoch(8 * WINDOWS) == pytest.approx(8.0)


def test_micro_batches_are_inputs_with_their_targets() -> None:
    batch = _windows(_batches(), 0, 1, 1, 2, 2)
    assert batch.shape == (2, 2) and batch.dtype == np.int64
    assert np.array_equal(batch[:, 1], batch[:, 0] + 1)


def test_a_rank_reads_the_micro_batches_of_a_step_together() -> None:
    together = _batches().micro_batches(3 * BATCH, 1, 2, 2)
    assert len(together) == 2
    for micro, batch in enumerate(together):
        batches = _batches()
        windows = batches.split.batch(batches.rows(3 * BATCH + (micro * 2 + 1) * 2, 2))
        assert np.array_equal(batch.inputs_BS, windows[:, :-1])
        assert np.array_equal(batch.targets_BS, windows[:, 1:])
        assert list(batch.bytes_B) == [1, 1]


def test_a_batch_larger_than_the_corpus_goes_round() -> None:
    batch = _windows(_batches(batch_size=50), 0, 0, 0, 1, 50)
    assert np.bincount(batch[:, 0], minlength=WINDOWS).min() >= 2


@pytest.mark.parametrize("held_out", [False, True])
def test_files_are_told_apart_only_when_asked(tmp_path: Path, held_out: bool) -> None:
    sizes = np.random.default_rng(0).integers(1, 9, 80).tolist()
    for number, size in enumerate(sizes):  # every byte tells where in its file it stands
        (tmp_path / f"{number:03}.txt").write_bytes(bytes(range(size)))
    for separate in (False, True):
        data = {"path": str(tmp_path), "separate_documents": separate, "holdout_every": 2}
        data |= {"valid_path": str(tmp_path)} if held_out else {}
        text = open_raw_text(RunConfig(model={"sequence_length": 6}, train={"batch_size": 8}, data=data))
        valid = text.valid.read(np.arange(len(text.valid)))
        [train] = TrainingBatches(text.train, 8, 0).micro_batches(0, 0, 1, 8)
        for batch in (train, valid):
            if not separate:
                assert batch.positions_BS is None
                continue
            places_BS, inputs_BS = batch.positions_BS, batch.inputs_BS
            begun_BS = np.maximum.accumulate(inputs_BS == 0, axis=1)
            assert np.array_equal(places_BS[begun_BS], inputs_BS[begun_BS]) and begun_BS.any()
            assert np.array_equal(np.where(begun_BS, 0, places_BS), np.where(begun_BS, 0, np.arange(6)))
