"""RandAugment, mixup and cutmix: each operation by hand, shares of pixels and labels, and their distributions."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.images import CLASSES, squares, write_folder
from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.schema import Augment
from vqmoe_ds.data.image_augment import Mixing, rand_augment
from vqmoe_ds.data.images import ImageBatches, ImageSet, mixed, open_images, shifted
from vqmoe_ds.runtime.errors import ConfigError

COUNT = 4000


def draws(stream: int, count: int = COUNT) -> np.ndarray:
    return mixed(stream, np.arange(count))


def pairs(count: int = COUNT, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Random images, whose values are all below 128 or all above by turns, and labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 120, (count + 1, size, size, 3), dtype=np.uint8)
    images[1::2] += 128
    return images, np.arange(count + 1) % 3


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_blends_images_and_labels_by_shares_of_the_beta_distribution(alpha):
    images, labels = pairs()
    found, shares = Mixing(alpha, 0, 4)(images, labels, draws(1), draws(2))
    assert shares.shape == (COUNT, 4) and shares.dtype == np.float32
    assert shares.sum(axis=1) == pytest.approx(np.ones(COUNT)) and (shares[:, 3] == 0).all()
    share = shares[np.arange(COUNT), labels[:-1]].astype(float)
    assert shares[np.arange(COUNT), labels[1:]] == pytest.approx(1 - share, abs=1e-6)
    blended = share[:, None, None, None] * images[:-1] + (1 - share[:, None, None, None]) * images[1:]
    assert np.abs(found - blended).max() <= 0.5 + 1e-3
    assert (share.mean(), share.var()) == (pytest.approx(0.5, abs=0.02), pytest.approx(1 / (8 * alpha + 4), rel=0.05))


def test_cutmix_puts_a_square_of_the_next_image_into_each():
    images, labels = pairs()
    found, shares = Mixing(0, 1.0, 3)(images, labels, draws(1), draws(2))
    sizes, places = set(), set()
    for k, (image, first, second) in enumerate(zip(found, images[:-1], images[1:], strict=True)):
        theirs = (image == second).all(axis=-1)
        assert np.array_equal(image, np.where(theirs[..., None], second, first))
        assert shares[k, labels[k]] == pytest.approx(1 - theirs.mean())
        rows, columns = np.flatnonzero(theirs.any(axis=1)), np.flatnonzero(theirs.any(axis=0))
        assert theirs.sum() == len(rows) * len(columns)
        sizes.add((len(rows), len(columns)))
        places |= {(int(row), int(column)) for row in rows for column in columns}
    assert {(0, 0), (2, 2), (4, 4), (6, 6)} <= sizes and (3, 2) in sizes  # cut off at an edge
    assert len(places) == 64


def test_with_both_each_image_has_one_of_them():
    images, labels = pairs()
    found, _ = Mixing(0.8, 1.0, 3)(images, labels, draws(1), draws(2))
    whole = (found == images[:-1]) | (found == images[1:])
    cut = whole.all(axis=(1, 2, 3)).mean()
    assert 0.45 < cut < 0.6  # some shares of mixup are nearly 0 or 1


def test_a_sample_is_mixed_with_the_next_one_of_the_order():
    images = ImageSet(*squares(10), np.arange(10), CLASSES, 4)
    told = images, 4, 7, Augment.NONE
    plain = ImageBatches(*told)
    (batch,) = ImageBatches(*told, Mixing(0, 1.0, 3)).micro_batches(8, 0, 1, 4)  # across the end of an epoch
    first, second = (plain.micro_batches(start, 0, 1, 4)[0] for start in (8, 9))
    assert not np.array_equal(first.targets_BS, second.targets_BS)
    own = (batch.inputs_BS == first.inputs_BS).all(axis=-1)
    assert (own | (batch.inputs_BS == second.inputs_BS).all(axis=-1)).all() and 0 < own.mean() < 1
    share = own.mean(axis=(1, 2))[:, None]
    expected = share * np.eye(3)[first.targets_BS] + (1 - share) * np.eye(3)[second.targets_BS]
    assert batch.targets_BS == pytest.approx(expected) and batch.tokens == 4 * 4


def chosen(operation: int, up: bool = True) -> np.ndarray:
    """A draw of which RandAugment makes one operation, in one direction, and then leaves the image alone."""
    high = -(-(0 if up else 1 << 42) // 14) * 14 << 20
    return np.array([high + (operation - high) % 14], np.uint64)


def one(image: np.ndarray, operation: int, up: bool = True) -> np.ndarray:
    return rand_augment(image[None], chosen(operation, up))[0].astype(int)


def test_operations_are_those_of_the_paper():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    x, pillow = image.astype(int), Image.fromarray(image)
    assert np.array_equal(one(image, 0), x)
    assert np.array_equal(one(image, 10), x & 0b11111110)
    assert np.array_equal(one(image, 11), np.where(x < 178.5, x, 255 - x))
    assert np.array_equal(one(image, 12), ImageOps.autocontrast(pillow))
    assert np.array_equal(one(image, 13), ImageOps.equalize(pillow))
    assert np.abs(one(image, 6) - (x * 1.27).clip(0, 255)).max() <= 1
    assert np.abs(one(image, 6, False) - x * 0.73).max() <= 1
    grey = np.rint(x @ np.array([0.299, 0.587, 0.114]))[..., None]
    assert np.abs(one(image, 7) - (grey + 1.27 * (x - grey)).clip(0, 255)).max() <= 2
    assert np.abs(one(image, 8, False) - (grey.mean() + 0.73 * (x - grey.mean()))).max() <= 2


def test_places_move_by_the_magnitudes_of_torchvision():
    image = np.random.default_rng(0).integers(1, 256, (32, 32, 3), dtype=np.uint8)
    x = image.astype(int)
    for operation, axis in ((3, 1), (4, 0)):  # 150 / 331 x 32 x 0.3 = 4.35 pixels
        there = np.moveaxis(one(image, operation), axis, 0)
        assert np.array_equal(there[:-5], np.moveaxis(x, axis, 0)[4:-1]) and (there[-4:] == 0).all()
        back = np.moveaxis(one(image, operation, False), axis, 0)
        assert np.array_equal(back[5:], np.moveaxis(x, axis, 0)[1:-4]) and (back[:4] == 0).all()
    for operation in (1, 2):  # 0.09 of the way from the corner: 2.79 pixels in the last line
        lines = one(image, operation) if operation == 1 else one(image, operation).swapaxes(0, 1)
        plain = x if operation == 1 else x.swapaxes(0, 1)
        assert np.array_equal(lines[0], plain[0]) and np.array_equal(lines[30, :25], plain[30, 3:28])
    assert np.array_equal(one(image, 5), Image.fromarray(image).rotate(9))
    assert not np.array_equal(one(image, 5), one(image, 5, False))


@pytest.mark.parametrize("channels", [1, 3])
def test_two_operations_follow_from_the_draw_alone(channels):
    images, numbers = squares(300, size=16, channels=channels)[0], draws(3, 300)
    together = rand_augment(images, numbers)
    assert together.shape == images.shape and together.dtype == np.uint8
    assert np.array_equal(rand_augment(images[7:9], numbers[7:9]), together[7:9])
    twice = rand_augment(rand_augment(images[:1], chosen(6)), chosen(11))
    both = next(d for d in range(11 << 20, 10**9) if d % 14 == 6 and (d >> 20) % 14 == 11)
    assert np.array_equal(rand_augment(images[:1], np.array([both], np.uint64)), twice)
    batches = ImageBatches(ImageSet(images, np.zeros(300, int), np.arange(300), CLASSES, 4), 8, 1, Augment.RAND)
    (found,) = batches.micro_batches(0, 0, 1, 8)
    cropped = shifted(images[batches.rows(0, 8)], mixed(1, np.arange(8)), Augment.CROP_FLIP)
    assert np.array_equal(found.inputs_BS, rand_augment(cropped, mixed(1, np.arange(8) + (1 << 48))))


def test_a_run_mixes_what_its_options_say(tmp_path):
    told = {"model.image_size": 8, "train.batch_size": 8, "data.path": str(write_folder(tmp_path / "images", 60))}
    config = load_config("vit-cifar", None, {**told, "data.cutmix": 1.0, "model.vocab_size": 3}).config
    batches, held = open_images(config).open(config, tmp_path / "cache")
    assert batches.mixing == Mixing(0.0, 1.0, 3)
    assert held.read(np.arange(2)).targets_BS.ndim == 1
    for name in ("mixup", "cutmix"):
        with pytest.raises(ConfigError, match=f"data.{name} is for images"):
            load_config("base", None, {f"data.{name}": 0.5})
