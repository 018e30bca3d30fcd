"""Damage to images against values by hand; each image is damaged in its own way, whatever stands beside it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tests.images import squares
from vqmoe_ds.data.image_published import SEVERITIES
from vqmoe_ds.evaluation.image_damage import KINDS, ImageCorruption, parse_image_corruption
from vqmoe_ds.runtime.errors import ConfigError


def flat(value: int, count: int = 40, size: int = 32) -> np.ndarray:
    return np.full((count, size, size, 3), value, np.uint8)


def damaged(images: np.ndarray, kind: str, severity: int = 1) -> np.ndarray:
    return ImageCorruption(kind, severity)(images, np.arange(len(images)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_alone_is_damaged_as_among_others_and_more_by_a_higher_severity(kind, channels):
    images = squares(6, size=32, channels=channels)[0]
    before = images.copy()
    for severity in SEVERITIES:
        corruption = ImageCorruption(kind, severity)
        together = corruption(images, np.arange(10, 16))
        assert together.shape == images.shape and together.dtype == np.uint8
        assert np.array_equal(together[3:4], corruption(images[3:4], np.array([13])))
    assert np.array_equal(images, before)
    error = [np.abs(damaged(images, kind, s).astype(int) - images).mean() for s in (1, 5)]
    assert 0 < error[0] < error[1] or kind == "elastic_transform"


def test_random_damage_differs_from_image_to_image():
    images = np.repeat(squares(1, size=32)[0], 2, axis=0)
    fixed = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    for kind in KINDS:
        first, second = damaged(images, kind, 3)
        assert np.array_equal(first, second) == (kind in fixed), kind


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_the_published_size(severity):
    grey, scale = flat(128), (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    assert (damaged(grey, "gaussian_noise", severity) / 255).std() == pytest.approx(scale, rel=0.02)
    photons = (500, 250, 100, 75, 50)[severity - 1]
    shot = (128 / 255 / photons) ** 0.5  # Poisson: the variance of n / c is its mean over c
    assert (damaged(grey, "shot_noise", severity) / 255).std() == pytest.approx(shot, rel=0.02)
    amount = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    pepper = damaged(grey, "impulse_noise", severity)
    assert (pepper == 0).mean() == pytest.approx(amount / 2, rel=0.1)
    assert (pepper == 255).mean() == pytest.approx(amount / 2, rel=0.1)
    assert ((pepper == 128) | (pepper == 0) | (pepper == 255)).all()


def test_blurs_leave_flat_images_and_spread_a_dot():
    for kind in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"):
        assert np.abs(damaged(flat(200, 3), kind, 5).astype(int) - 200).max() <= 1, kind
    dot = flat(0, 1)
    dot[0, 16, 16] = 255
    found = damaged(dot, "defocus_blur", 1)[0, ..., 0]  # a disk of one pixel under a Gaussian of 3 x 3, sigma 0.4
    side = np.exp(-0.5 / 0.4**2)
    line = np.array([side, 1, side]) / (1 + 2 * side)
    assert np.array_equal(found[15:18, 15:18], np.floor(255 * np.outer(line, line) + 1e-6))
    assert found.astype(int).sum() == found[15:18, 15:18].astype(int).sum()
    streak = damaged(dot, "motion_blur", 5)[0, ..., 0]
    assert streak.max() < 110 and 3 <= (streak > 0).sum() <= 19


def test_what_is_a_formula_is_that_formula():
    images = squares(4, size=32)[0]
    x = images / 255
    mean = x.mean(axis=(1, 2), keepdims=True)
    assert np.array_equal(damaged(images, "contrast", 4), np.floor(((x - mean) * 0.3 + mean) * 255 + 1e-6))
    pixel = np.zeros((1, 32, 32, 3), np.uint8)
    pixel[0, 0, 0] = (100, 50, 0)  # value 100 / 255; severity 2 adds 0.1: all channels grow by 125.5 / 100
    assert damaged(pixel, "brightness", 2)[0, 0, 0].tolist() == [125, 62, 0]
    assert damaged(pixel, "brightness", 2)[0, 1, 1].tolist() == [25, 25, 25]
    buffer = io.BytesIO()
    Image.fromarray(images[0]).save(buffer, "JPEG", quality=58)
    assert np.array_equal(damaged(images, "jpeg_compression", 3)[0], np.asarray(Image.open(buffer)))
    small = Image.fromarray(images[0]).resize((20, 20), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
    assert np.array_equal(damaged(images, "pixelate", 5)[0], np.asarray(small))


def test_fog_pales_and_snow_whitens_by_what_they_must():
    images = squares(8, size=32)[0]
    foggy = damaged(images, "fog", 1) / 255
    brightest = images.max(axis=(1, 2, 3), keepdims=True) / 255
    least, most = images / 255 * brightest / (brightest + 0.2), (images / 255 + 0.2) * brightest / (brightest + 0.2)
    assert (foggy >= least - 0.005).all() and (foggy <= most + 0.005).all()
    assert damaged(images, "snow", 5).mean() > images.mean() + 20


def test_the_elastic_map_of_severity_one_is_affine():
    rows = np.broadcast_to(np.arange(0, 256, 8, dtype=np.uint8)[:, None, None], (32, 32, 3))
    found = damaged(np.stack([rows] * 4), "elastic_transform", 1)[:, 11:21, 11:21, 0].astype(float)
    assert len({image.tobytes() for image in found}) == 4
    for image in found:  # a slope stays a slope: no second differences, but for the rounding down
        assert np.abs(np.diff(image, 2, axis=0)).max() <= 2 and np.abs(np.diff(image, 2, axis=1)).max() <= 2


def test_kinds_and_severities_are_named():
    assert parse_image_corruption("fog:2") == [ImageCorruption("fog", 2)]
    assert [c.severity for c in parse_image_corruption("snow")] == [1, 2, 3, 4, 5]
    assert {c.group for kind in KINDS for c in parse_image_corruption(kind)} == {"noise", "blur", "weather", "digital"}
    for wrong in ("frost", "fog:6", "fog:", "fog:x"):
        with pytest.raises(ConfigError, match="give KIND or KIND:1 to KIND:5, of gaussian_noise"):
            parse_image_corruption(wrong)
