"""Damage to images as in CIFAR-10-C (Hendrycks and Dietterich 2019, arXiv 1903.12261): fourteen kinds, five severities.

Constants and steps are those of the published ``make_cifar_c.py``, which are made for images of 32 x 32: distances in
pixels stay as they are for other sizes. Its fifteenth kind, frost, needs photographs and is left out. Where it calls
OpenCV, scikit-image or ImageMagick, the same is computed with NumPy and SciPy, so that values differ from the published
files by rounding, and by the random numbers: here they depend on the seed, the kind, the severity and the number of the
image alone, whatever the batch.

Legend: B images, H height, W width, C channels (1 or 3), T taps of a blur.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.runtime.extras import library

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Random = list[np.random.Generator]
"""One generator per image."""

GREY = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
KINDS = tuple(kind for kinds in GROUPS.values() for kind in kinds)
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(images_BHWC: Bytes, kind: str, severity: int, seed: int = 0, first: int = 0) -> Bytes:
    """Damaged copies of images.

    Args:
        images_BHWC: uint8.
        kind: one of ``KINDS``.
        severity: 1 (least) to 5.
        seed: of the random numbers.
        first: number of the first image in its set; each image's damage goes by its number.

    Raises:
        ConfigError: there is no such kind or severity, or Pillow is missing, which the digital kinds need.
    """
    if kind not in KINDS:
        raise ConfigError(f"there is no corruption {kind!r}; choose among {', '.join(KINDS)}")
    if severity not in SEVERITIES:
        raise ConfigError(f"severity {severity} of {kind} must be a whole number from 1 to 5")
    key = (seed, zlib.crc32(kind.encode()), severity)
    random = [np.random.default_rng((*key, first + i)) for i in range(len(images_BHWC))]
    damaged_BHWC = _APPLY[kind](images_BHWC / 255.0, random, severity - 1)
    # Cut off as the published program does, and not rounded.
    return (damaged_BHWC.clip(0, 1) * 255).astype(np.uint8)


def _drawn(random: Random, draw: Callable[[np.random.Generator], Any]) -> NDArray[Any]:
    return np.stack([draw(generator) for generator in random])


# ---------------------------------------------------------------- noise


def _gaussian_noise(x_BHWC: Floats, random: Random, level: int) -> Floats:
    scale = (0.04, 0.06, 0.08, 0.09, 0.10)[level]
    return x_BHWC + _drawn(random, lambda r: r.normal(scale=scale, size=x_BHWC.shape[1:]))


def _shot_noise(x_BHWC: Floats, random: Random, level: int) -> Floats:
    photons = (500, 250, 100, 75, 50)[level]
    return np.stack([r.poisson(x_HWC * photons) for r, x_HWC in zip(random, x_BHWC, strict=True)]) / photons


def _impulse_noise(x_BHWC: Floats, random: Random, level: int) -> Floats:
    amount = (0.01, 0.02, 0.03, 0.05, 0.07)[level]
    drawn_B2HWC = _drawn(random, lambda r: r.random((2, *x_BHWC.shape[1:])))
    return np.where(drawn_B2HWC[:, 0] < amount, drawn_B2HWC[:, 1] < 0.5, x_BHWC)


# ---------------------------------------------------------------- blur


def _defocus_blur(x_BHWC: Floats, random: Random, level: int) -> Floats:
    radius, alias_blur = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[level]
    kernel_HW = disk(radius, alias_blur)
    return ndimage.correlate(x_BHWC, kernel_HW[None, :, :, None], mode="mirror")


def disk(radius: float, alias_blur: float) -> Floats:
    """A disk of this radius as a kernel, float64 ``[7, 7]``, its edge softened by a Gaussian over three pixels."""
    at_H = np.arange(-3, 4)  # radii are at most 1.5, and softening adds one pixel
    disk_HW = (at_H[:, None] ** 2 + at_H**2 <= radius**2).astype(float)
    soft_3 = np.exp(-(np.arange(-1, 2) ** 2) / (2 * alias_blur**2))
    soft_33 = np.outer(soft_3, soft_3) / soft_3.sum() ** 2
    return ndimage.correlate(disk_HW / disk_HW.sum(), soft_33, mode="constant")


def _glass_blur(x_BHWC: Floats, random: Random, level: int) -> Floats:
    sigma, reach, rounds = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))[level]
    x_BHWC = np.floor(_gaussian(x_BHWC, sigma) * 255)
    batch, height, width, _ = x_BHWC.shape
    moved_BRHW2 = _drawn(random, lambda r: r.integers(-reach, reach, (rounds, height, width, 2)))
    every_B = np.arange(batch)
    for turn in range(rounds):
        for h in range(height - reach, reach, -1):
            for w in range(width - reach, reach, -1):
                down_B, right_B = moved_BRHW2[:, turn, h, w].T
                # The published program means to exchange the two, and copies one onto the other.
                x_BHWC[:, h, w] = x_BHWC[every_B, h + down_B, w + right_B]
    return _gaussian(x_BHWC / 255, sigma)


def _gaussian(x_BHWC: Floats, sigma: float) -> Floats:
    return ndimage.gaussian_filter(x_BHWC, (0, sigma, sigma, 0), mode="nearest")


def _motion_blur(x_BHWC: Floats, random: Random, level: int) -> Floats:
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[level]
    angles_B = _drawn(random, lambda r: r.uniform(-45, 45))
    return np.stack([smear(x, radius, sigma, angle) for x, angle in zip(x_BHWC, angles_B, strict=True)])


def smear(x_HWC: Floats, radius: int, sigma: float, angle: float) -> Floats:
    """One image blurred along a direction to one side, as ImageMagick's ``MotionBlurImage``; edges are repeated."""
    taps = 2 * radius + 1
    weights_T = np.exp(-(np.arange(taps) ** 2) / (2 * sigma**2))
    slope = math.radians(angle)
    height, width, _ = x_HWC.shape
    total_HWC = np.zeros_like(x_HWC)
    for i, weight in enumerate(weights_T / weights_T.sum()):
        down, right = math.ceil(i * math.sin(slope) - 0.5), math.ceil(i * math.cos(slope) - 0.5)
        rows_H = (np.arange(height) + down).clip(0, height - 1)
        total_HWC += weight * x_HWC[rows_H[:, None], (np.arange(width) + right).clip(0, width - 1)]
    return total_HWC


def _zoom_blur(x_BHWC: Floats, random: Random, level: int) -> Floats:
    # Written as published: rounding gives the first two one factor more than they name.
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[level], 0.01)
    return (x_BHWC + sum(zoom_in(x_BHWC, factor) for factor in factors)) / (len(factors) + 1)


def zoom_in(x_BHWC: Floats, factor: float) -> Floats:
    """The middle of square images enlarged to their size: linear interpolation, ends upon ends."""
    size = x_BHWC.shape[1]
    part = math.ceil(size / factor)
    top, grown = (size - part) // 2, round(part * factor)
    weights_GP = _linear_weights(part, grown)
    trim = (grown - size) // 2
    weights_HP = weights_GP[trim : trim + size]
    inner_BCPP = np.ascontiguousarray(np.moveaxis(x_BHWC[:, top : top + part, top : top + part], -1, 1))
    return np.moveaxis(weights_HP @ inner_BCPP @ weights_HP.T, 1, -1)


def _linear_weights(size: int, grown: int) -> Floats:
    """Linear interpolation of ``size`` values at ``grown`` places as a matrix ``[grown, size]``."""
    at_G = np.linspace(0, size - 1, grown)
    return np.maximum(0, 1 - np.abs(at_G[:, None] - np.arange(size)))


# ---------------------------------------------------------------- weather


def _snow(x_BHWC: Floats, random: Random, level: int) -> Floats:
    mean, spread, zoom, floor, radius, sigma, kept = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[level]
    flakes_BHW1 = _drawn(random, lambda r: r.normal(mean, spread, (*x_BHWC.shape[1:3], 1)))
    flakes_BHW1 = zoom_in(flakes_BHW1, zoom)
    flakes_BHW1 = np.where(flakes_BHW1 < floor, 0, flakes_BHW1.clip(0, 1))
    angles_B = _drawn(random, lambda r: r.uniform(-135, -45))
    falling = [smear(x, int(radius), sigma, angle) for x, angle in zip(flakes_BHW1, angles_B, strict=True)]
    falling_BHW1 = np.stack(falling)
    grey_BHW1 = _grey(x_BHWC)
    whitened_BHWC = kept * x_BHWC + (1 - kept) * np.maximum(x_BHWC, grey_BHW1 * 1.5 + 0.5)
    return whitened_BHWC + falling_BHW1 + falling_BHW1[:, ::-1, ::-1]


def _grey(x_BHWC: Floats) -> Floats:
    return x_BHWC if x_BHWC.shape[-1] == 1 else (x_BHWC @ GREY)[..., None]


def _fog(x_BHWC: Floats, random: Random, level: int) -> Floats:
    thickness, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[level]
    height, width = x_BHWC.shape[1:3]
    side = 1 << (max(height, width) - 1).bit_length()
    fog_BHW = plasma(_drawn(random, lambda r: r.uniform(-1, 1, (side, side))), decay)[:, :height, :width]
    brightest_B111 = x_BHWC.max(axis=(1, 2, 3), keepdims=True)
    return (x_BHWC + thickness * fog_BHW[..., None]) * brightest_B111 / (brightest_B111 + thickness)


def plasma(noise_BSS: Floats, decay: float) -> Floats:
    """Clouds by the diamond-square algorithm on a torus, scaled to 0 … 1.

    Args:
        noise_BSS: one number from -1 to 1 for each point; S is a power of two.
        decay: what the noise is divided by at each finer grid.
    """
    map_BSS = np.zeros_like(noise_BSS)
    step, wobble = noise_BSS.shape[1], 100.0
    while step >= 2:
        half = step // 2
        corners = map_BSS[:, ::step, ::step]
        rows = corners + np.roll(corners, -1, axis=1)
        _set(map_BSS, noise_BSS, wobble, half, half, step, rows + np.roll(rows, -1, axis=2))
        middles = map_BSS[:, half::step, half::step]
        across = middles + np.roll(middles, 1, axis=1) + corners + np.roll(corners, -1, axis=2)
        _set(map_BSS, noise_BSS, wobble, 0, half, step, across)
        down = middles + np.roll(middles, 1, axis=2) + corners + np.roll(corners, -1, axis=1)
        _set(map_BSS, noise_BSS, wobble, half, 0, step, down)
        step, wobble = half, wobble / decay
    map_BSS -= map_BSS.min(axis=(1, 2), keepdims=True)
    return map_BSS / map_BSS.max(axis=(1, 2), keepdims=True)


def _set(map_BSS: Floats, noise_BSS: Floats, wobble: float, row: int, column: int, step: int, four: Floats) -> None:
    """Every ``step``-th point from here on: the mean of its four neighbours, and noise of ``wobble`` squared."""
    here = np.s_[:, row::step, column::step]
    map_BSS[here] = four / 4 + wobble**2 * noise_BSS[here]


def _brightness(x_BHWC: Floats, random: Random, level: int) -> Floats:
    added = (0.05, 0.1, 0.15, 0.2, 0.3)[level]
    value_BHW1 = x_BHWC.max(axis=-1, keepdims=True)
    brighter_BHW1 = (value_BHW1 + added).clip(0, 1)
    # Hue and saturation stay where all channels grow by one factor; black becomes grey.
    factor_BHW1 = np.divide(brighter_BHW1, value_BHW1, out=np.zeros_like(value_BHW1), where=value_BHW1 > 0)
    return np.where(value_BHW1 > 0, x_BHWC * factor_BHW1, brighter_BHW1)


# ---------------------------------------------------------------- digital


def _contrast(x_BHWC: Floats, random: Random, level: int) -> Floats:
    kept = (0.75, 0.5, 0.4, 0.3, 0.15)[level]
    mean_B11C = x_BHWC.mean(axis=(1, 2), keepdims=True)
    return (x_BHWC - mean_B11C) * kept + mean_B11C


def _elastic_transform(x_BHWC: Floats, random: Random, level: int) -> Floats:
    # Of the side: strength and smoothness of the displacement, and how far the corners of a triangle move.
    shares = ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))[level]
    return np.stack([_stretched(x_HWC, r, *shares) for x_HWC, r in zip(x_BHWC, random, strict=True)])


def _stretched(x_HWC: Floats, random: np.random.Generator, strength: float, smooth: float, moved: float) -> Floats:
    height, width, _ = x_HWC.shape
    middle, third = np.array([height, width]) // 2, min(height, width) // 3
    before_32 = middle + third * np.array([[1, 1], [1, -1], [-1, -1]])
    after_32 = before_32 + random.uniform(-moved * height, moved * height, (3, 2))
    # The map from the moved points back: where each pixel of the result is read.
    back_32 = np.linalg.solve(np.column_stack([after_32, np.ones(3)]), before_32)
    at_HW2 = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    from_HW2 = at_HW2 @ back_32[:2] + back_32[2]
    x_HWC = _read(x_HWC, from_HW2, "mirror")
    shift_2HW = random.uniform(-1, 1, (2, height, width))
    if smooth:
        shift_2HW = ndimage.gaussian_filter(shift_2HW, (0, smooth * height, smooth * height), truncate=3)
    return _read(x_HWC, at_HW2 + strength * height * np.moveaxis(shift_2HW, 0, -1), "reflect")


def _read(x_HWC: Floats, at_HW2: Floats, mode: str) -> Floats:
    places = np.moveaxis(at_HW2, -1, 0)
    return np.stack([ndimage.map_coordinates(x, places, order=1, mode=mode) for x in np.moveaxis(x_HWC, -1, 0)], -1)


def _pixelate(x_BHWC: Floats, random: Random, level: int) -> Floats:
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[level]

    def smaller(image: Any) -> Any:
        coarse = image.resize((int(image.width * share), int(image.height * share)), box)
        return coarse.resize(image.size, box)

    box = library("PIL.Image", "corruptions of images").Resampling.BOX
    return _by_pillow(x_BHWC, smaller)


def _jpeg_compression(x_BHWC: Floats, random: Random, level: int) -> Floats:
    quality = (80, 65, 58, 50, 40)[level]
    pillow = library("PIL.Image", "corruptions of images")

    def compressed(image: Any) -> Any:
        file = BytesIO()
        image.save(file, "JPEG", quality=quality)
        return pillow.open(file)

    return _by_pillow(x_BHWC, compressed)


def _by_pillow(x_BHWC: Floats, change: Callable[[Any], Any]) -> Floats:
    pillow = library("PIL.Image", "corruptions of images")

    def changed() -> Iterator[Bytes]:
        for x_HWC in (x_BHWC * 255).round().astype(np.uint8):
            image = pillow.fromarray(x_HWC.squeeze(-1) if x_HWC.shape[-1] == 1 else x_HWC)
            yield np.asarray(change(image), dtype=np.uint8).reshape(x_HWC.shape)

    # Half a step more, for whole numbers are cut off again.
    return (np.stack(list(changed())) + 0.5) / 255


_APPLY: dict[str, Callable[[Floats, Random, int], Floats]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
