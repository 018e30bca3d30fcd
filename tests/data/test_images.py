"""Batches of images follow from (seed, samples consumed); the cache is whole or not there."""

from __future__ import annotations

import os

import numpy as np
import pytest

from tests.images import CLASSES, encoded, squares, write_folder
from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.schema import Augment
from vqmoe_ds.data import image_cache
from vqmoe_ds.data.image_augment import Mixing
from vqmoe_ds.data.image_splits import Encoded, ImageFiles, Stored, remedy
from vqmoe_ds.data.images import DecodedWhenRead, ImageBatches, ImageSet, mixed, open_images, shifted
from vqmoe_ds.runtime.errors import ConfigError, DataError

SMALL = {"model.image_size": 8, "train.batch_size": 8}


def config_of(path, **more):
    return load_config("vit-cifar", None, {**SMALL, "data.path": str(path), **more}).config


def image_set(count: int = 30) -> ImageSet:
    return ImageSet(*squares(count), np.arange(count), CLASSES, 4)


@pytest.mark.parametrize("mixing", [None, Mixing(0.8, 1.0, 3)], ids=("plain", "mixed"))
@pytest.mark.parametrize("augment", list(Augment))
def test_a_batch_does_not_depend_on_ranks_and_accumulation(augment, mixing):
    def step(first: int, world: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        data = ImageBatches(image_set(), 16, 5, augment, mixing)
        batches = [data.micro_batches(first, r, world, size) for r in range(world)]
        blocks = [batches[r][m] for m in range(len(batches[0])) for r in range(world)]
        return np.concatenate([b.inputs_BS for b in blocks]), np.concatenate([b.targets_BS for b in blocks])

    for first in (0, 16, 4000):  # within an epoch and across the end of one
        whole = step(first, 1, 16)
        for layout in ((1, 4), (2, 4), (4, 2)):
            assert all(map(np.array_equal, whole, step(first, *layout)))
    assert not np.array_equal(step(0, 1, 16)[0], step(16, 1, 16)[0])


def test_every_image_comes_once_an_epoch_and_changes_from_one_to_the_next():
    plain = ImageBatches(image_set(), 30, 5, Augment.NONE)
    for epoch in range(3):
        (batch,) = plain.micro_batches(30 * epoch, 0, 1, 30)
        assert sorted(image.tobytes() for image in batch.inputs_BS) == sorted(i.tobytes() for i in squares(30)[0])
        assert batch.tokens == 30 * 4
    assert plain.epoch(45) == 1.5
    assert not np.array_equal(*(plain.micro_batches(30 * epoch, 0, 1, 30)[0].targets_BS for epoch in (0, 1)))


def by_hand(image: np.ndarray, top: int, left: int, flip: bool, margin: int) -> np.ndarray:
    framed = np.pad(image, ((margin, margin), (margin, margin), (0, 0)))
    cut = framed[top : top + len(image), left : left + len(image)]
    return cut[:, ::-1] if flip else cut


def test_crops_and_flips_are_those_of_the_draws():
    images, margin = squares(64, size=16)[0], 2
    draws = mixed(3, np.arange(64))
    found = shifted(images, draws, Augment.CROP_FLIP)
    seen = set()
    for image, draw, changed in zip(images, draws.tolist(), found, strict=True):
        top, left, flip = draw % 5, (draw >> 24) % 5, bool(draw >> 63)
        seen.add((top, left, flip))
        assert np.array_equal(changed, by_hand(image, top, left, flip, margin))
    assert {flip for *_, flip in seen} == {False, True}
    assert {top for top, *_ in seen} == {left for _, left, _ in seen} == set(range(5))
    centre = 2 << 24  # which is 2 modulo 5
    assert np.array_equal(shifted(images[:1], np.array([centre], np.uint64), Augment.CROP), images[:1])


def test_draws_are_uniform_and_differ_by_seed():
    draws = mixed(1, np.arange(100_000))
    for shift in (0, 24, 63):
        share = ((draws >> np.uint64(shift)) & np.uint64(1)).mean()
        assert abs(share - 0.5) < 0.01
    assert len(np.unique(draws)) == 100_000
    assert (mixed(2, np.arange(1000)) != draws[:1000]).all()


def test_images_are_decoded_once_and_again_when_the_cache_is_altered(tmp_path, monkeypatch):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", 6, seed=1)
    config = config_of(tmp_path)
    cache = tmp_path / "cache"
    batches, held = open_images(config).open(config, cache)
    (folder,) = cache.iterdir()
    assert (len(batches.images), len(held)) == (30, 6)
    images, labels = squares(6, seed=1)
    read = held.read(np.argsort(np.argsort(labels, kind="stable")))
    assert np.array_equal(read.inputs_BS, images) and np.array_equal(read.targets_BS, labels)
    before = (folder / "train-images.npy").stat().st_mtime_ns
    open_images(config).open(config, cache)
    assert (folder / "train-images.npy").stat().st_mtime_ns == before
    with open(folder / "train-images.npy", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    open_images(config).open(config, cache)
    assert (folder / "train-images.npy").stat().st_mtime_ns != before
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_one_edited_file_of_many_is_decoded_again(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "images")
    config, before = config_of(folder), write_folder(tmp_path / "other", seed=1)
    monkeypatch.setattr(ImageFiles, "fingerprint", lambda _: "0123")  # of samples that miss the file
    open_images(config).open(config, tmp_path / "cache")
    (folder / "left/0003.png").write_bytes((before / "left/0003.png").read_bytes())
    batches, _ = open_images(config).open(config, tmp_path / "cache")
    assert np.array_equal(batches.images.images_NHHC[1], squares(30, seed=1)[0][3])


def test_broken_images_are_counted_named_and_leave_no_cache(tmp_path):
    folder = write_folder(tmp_path / "images")
    config = config_of(folder)
    for name in ("left/0003.png", "right/0005.png", "right/0008.png", "right/0011.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    found = open_images(config)
    with pytest.raises(DataError, match=r"4 of 30 images cannot be used \(\S*left/0003.png: .*; and 1 more\)"):
        found.open(config, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    lazily = DecodedWhenRead(found.files.train, found.wanted)
    with pytest.raises(DataError, match="left/0003.png cannot be used: .*; a broken file must go"):
        lazily[np.array([0, 1])]


def test_a_cache_that_only_the_first_rank_sees_is_named(tmp_path, monkeypatch):
    config = config_of(write_folder(tmp_path / "images"))
    monkeypatch.setattr(image_cache, "_make", lambda *_: [])  # as on another machine
    with pytest.raises(DataError, match="cannot be read here .No such file or directory.; name a folder .*cache_dir"):
        open_images(config).open(config, tmp_path / "cache")


def test_stored_images_of_another_size_are_not_told_to_be_resized():
    stored = Stored(np.zeros(2, np.int64), np.zeros((2, 8, 8, 3), np.uint8), "data_batch_1")
    assert "resize=true" not in remedy(stored) and "resize=true" in remedy(Encoded(stored.labels_N, str, bytes))


def test_grey_images_among_coloured_ones_are_counted(tmp_path):
    folder = write_folder(tmp_path / "images")
    (folder / "right/0002.png").write_bytes(encoded(squares(1, channels=1)[0][0]))
    config = config_of(folder)
    found = open_images(config)
    found.open(config, tmp_path / "cache")
    assert found.notes == ["1 grey-scale images are read as images of three equal channels"]


def test_without_a_test_set_a_share_is_held_out_by_index(tmp_path):
    folder = write_folder(tmp_path / "images", 60)
    found = open_images(config_of(folder, **{"data.holdout_every": 4}))
    train, held = found.sets(4, *(DecodedWhenRead(found.files.train, found.wanted),) * 2)
    assert len(train) + len(held) == 60 and 5 < len(held) < 25
    assert not set(train.rows) & set(held.rows)
    assert np.array_equal(held.rows, np.flatnonzero(mixed(0, np.arange(60)) % np.uint64(4) == 0))
    assert f"{len(train)} training and {len(held)} held-out images of 8 x 8, 3 classes" in found.summary()
    other = open_images(config_of(folder, **{"data.holdout_every": 5}))
    assert found.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"model.image_size": 16}, "it is 8 x 8 pixels, and model.image_size=16; give images of model.image_size"),
        ({"model.channels": 1}, "it has 3 channels, and model.channels=1"),
        ({"data.holdout_every": 1000}, "have no test set, and of 30 images data.holdout_every=1000 leaves none"),
        ({"data.valid_path": "x"}, "without data.valid_path"),
        ({"data.path": ["a", "b"]}, "give one file or folder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_decoded(more, sentence, tmp_path):
    config = config_of(write_folder(tmp_path), **more)
    with pytest.raises((DataError, ConfigError), match=sentence):
        open_images(config)
