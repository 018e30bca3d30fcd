"""Damage to images, after the constants of CIFAR-10-C (Hendrycks 2019): 14 kinds in 5 severities.

Written anew with NumPy, SciPy and Pillow; the published code calls scikit-image, OpenCV and ImageMagick. What an image
becomes follows from (kind, severity, number of the image), whatever stands beside it. ``frost`` needs photographs and
is left out, and so are the four kinds that are not among the 15 of the published means (speckle noise, Gaussian blur,
spatter, saturate). Sizes in pixels are those for 32 x 32.

Legend: B images, H pixels a side, C channels, K side of a kernel.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from vqmoe_ds.data.image_published import PUBLISHED, SEVERITIES
from vqmoe_ds.runtime.errors import ConfigError, DataError, shown
from vqmoe_ds.runtime.extras import library

Draws = list[np.random.Generator]
"""A generator for each image."""


def gaussian_noise(x: np.ndarray, draws: Draws, scale: float) -> np.ndarray:
    return x + scale * np.stack([draw.normal(size=x.shape[1:]) for draw in draws])


def shot_noise(x: np.ndarray, draws: Draws, photons: float) -> np.ndarray:
    return np.stack([draw.poisson(image * photons) / photons for image, draw in zip(x, draws, strict=True)])


def impulse_noise(x: np.ndarray, draws: Draws, amount: float) -> np.ndarray:
    """Salt and pepper: ``amount`` of all values become 0 or 1, half of them each."""
    u = np.stack([draw.random(x.shape[1:]) for draw in draws])
    return np.where(u < amount / 2, 0.0, np.where(u < amount, 1.0, x))


def defocus_blur(x: np.ndarray, draws: Draws, radius: float, edge: float) -> np.ndarray:
    """The mean over a disk whose edge is smoothed by a Gaussian of 3 x 3."""
    # The published grid for radii up to 8.
    places = np.arange(-8, 9)
    disk_KK = (places[:, None] ** 2 + places**2 <= radius**2).astype(float)
    side = np.exp(-0.5 / edge**2)
    line = np.array([side, 1, side]) / (1 + 2 * side)
    kernel_KK = ndimage.convolve(disk_KK / disk_KK.sum(), np.outer(line, line), mode="constant")
    # OpenCV's default border (BORDER_REFLECT_101).
    return ndimage.correlate(x, kernel_KK[None, :, :, None], mode="mirror")


def glass_blur(x: np.ndarray, draws: Draws, sigma: float, reach: int, rounds: int) -> np.ndarray:
    """Each pixel, from the last on, takes the value of one near it; the published code means to swap, but copies."""
    # The published code keeps the blurred image in uint8, and so do snow's flakes below.
    x = np.floor(_smooth(x, sigma) * 255) / 255
    size, batch = x.shape[1], np.arange(len(x))
    for _ in range(rounds):
        places = range(size - reach, reach, -1)
        steps = np.stack([draw.integers(-reach, reach, (len(places), len(places), 2)) for draw in draws])
        # Place by place, for one may take what another took before it; only the images of a batch go together.
        for i, row in enumerate(places):
            for j, column in enumerate(places):
                across, down = steps[:, i, j, 0], steps[:, i, j, 1]
                x[:, row, column] = x[batch, row + down, column + across]
    return _smooth(x, sigma)


def motion_blur(x: np.ndarray, draws: Draws, radius: int, sigma: float) -> np.ndarray:
    return _streaks(x, radius, sigma, [draw.uniform(-45, 45) for draw in draws])


def zoom_blur(x: np.ndarray, draws: Draws, most: float) -> np.ndarray:
    """The mean of the image and of its centre enlarged by 1, 1.01, ... to under ``most``."""
    factors = np.arange(1, most, 0.01)
    return (x + sum(_enlarged(x, factor) for factor in factors)) / (len(factors) + 1)


def snow(
    x: np.ndarray,
    draws: Draws,
    mean: float,
    spread: float,
    zoom: float,
    least: float,
    radius: int,
    sigma: float,
    kept: float,
) -> np.ndarray:
    """Flakes that fall in streaks, on an image that is made paler; they lie there twice, once turned around."""
    flakes = np.stack([draw.normal(mean, spread, x.shape[1:3]) for draw in draws])[..., None]
    flakes = _enlarged(flakes, zoom)
    flakes[flakes < least] = 0
    flakes = np.floor(flakes.clip(0, 1) * 255) / 255
    flakes = _streaks(flakes, radius, sigma, [draw.uniform(-135, -45) for draw in draws])
    # OpenCV's weights of grey.
    grey = (x @ np.array([0.299, 0.587, 0.114]))[..., None] if x.shape[-1] == 3 else x
    pale = kept * x + (1 - kept) * np.maximum(x, grey * 1.5 + 0.5)
    return pale + flakes + np.rot90(flakes, 2, axes=(1, 2))


def fog(x: np.ndarray, draws: Draws, amount: float, decay: float) -> np.ndarray:
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    clouds = np.stack([_clouds(x.shape[1], decay, draw) for draw in draws])[..., None]
    return (x + amount * clouds) * brightest / (brightest + amount)


def brightness(x: np.ndarray, draws: Draws, more: float) -> np.ndarray:
    """A larger value in HSV: hue and saturation stay, so all channels grow by one factor; black becomes grey."""
    value = x.max(axis=-1, keepdims=True)
    raised = (value + more).clip(0, 1)
    return np.where(value > 0, x * raised / np.where(value > 0, value, 1), raised)


def contrast(x: np.ndarray, draws: Draws, kept: float) -> np.ndarray:
    mean = x.mean(axis=(1, 2), keepdims=True)
    return (x - mean) * kept + mean


def elastic_transform(x: np.ndarray, draws: Draws, reach: float, sigma: float, bend: float) -> np.ndarray:
    """An affine map that moves three points by up to ``bend`` of the size, and smooth shifts of every pixel."""
    size = x.shape[1]
    centre, arm = size // 2, size // 3
    corners = np.array(
        [[centre + arm, centre + arm], [centre + arm, centre - arm], [centre - arm, centre - arm]], float
    )
    places = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"))
    bent = []
    for image, draw in zip(x, draws, strict=True):
        moved = corners + draw.uniform(-bend * size, bend * size, corners.shape)
        ones = np.ones((3, 1))
        back = np.linalg.solve(
            np.hstack([moved, ones]), corners
        )  # of a place in the new image: [row, column, 1] @ back
        sources = np.tensordot(back[:2].T, places, axes=1) + back[2][:, None, None]
        # The borders of the published code: OpenCV's BORDER_REFLECT_101 here, SciPy's reflect for the shifts.
        turned = _sampled(image, sources, "mirror")
        shifts = draw.uniform(-1, 1, (2, size, size))
        if sigma:
            shifts = np.stack([ndimage.gaussian_filter(s, sigma * size, mode="reflect", truncate=3) for s in shifts])
        bent.append(_sampled(turned, places + reach * size * shifts, "reflect"))
    return np.stack(bent)


def pixelate(x: np.ndarray, draws: Draws, share: float) -> np.ndarray:
    pillow = library("PIL.Image", "this damage", DataError)
    size = x.shape[1]
    return _each(x, lambda image: image.resize((int(size * share),) * 2, pillow.BOX).resize((size, size), pillow.BOX))


def jpeg_compression(x: np.ndarray, draws: Draws, quality: int) -> np.ndarray:
    pillow = library("PIL.Image", "this damage", DataError)

    def compressed(image: Any) -> Any:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return pillow.open(buffer, formats=("JPEG",))

    return _each(x, compressed)


Damage = Callable[..., np.ndarray]
"""Of images, float64 ``[B, H, H, C]`` in [0, 1], a generator for each, and the constants of a severity."""
KINDS: dict[str, tuple[Damage, tuple[tuple[Any, ...], ...]]] = {
    "gaussian_noise": (gaussian_noise, ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,))),
    "shot_noise": (shot_noise, ((500,), (250,), (100,), (75,), (50,))),
    "impulse_noise": (impulse_noise, ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,))),
    "defocus_blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": (motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (zoom_blur, ((1.06,), (1.11,), (1.16,), (1.21,), (1.26,))),
    "snow": (
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,))),
    "contrast": (contrast, ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,))),
    "elastic_transform": (
        elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (pixelate, ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,))),
    "jpeg_compression": (jpeg_compression, ((80,), (65,), (58,), (50,), (40,))),
}
"""Kind -> (function, constants by severity)."""


class ImageCorruption(NamedTuple):
    """A kind of damage at one severity."""

    kind: str
    severity: int

    @property
    def group(self) -> str:
        return PUBLISHED[self.kind]

    def __call__(self, images_BHHC: np.ndarray, numbers_B: np.ndarray) -> np.ndarray:
        """Damaged images, uint8.

        Args:
            images_BHHC: uint8.
            numbers_B: of the images within their set: each is damaged in its own way.
        """
        damage, constants = KINDS[self.kind]
        # The place of a kind in KINDS is part of its seeds: in another order all images would be damaged otherwise.
        seeds = [[list(KINDS).index(self.kind), self.severity, int(number)] for number in numbers_B]
        draws = [np.random.default_rng(seed) for seed in seeds]
        x_BHHC = damage(images_BHHC / 255, draws, *constants[self.severity - 1])
        # A hair above, for a value that is a whole number of 255ths must not fall to the one below.
        return np.floor(x_BHHC.clip(0, 1) * 255 + 1e-6).astype(np.uint8)


def parse_image_corruption(spec: str) -> list[ImageCorruption]:
    """``KIND`` (all severities) or ``KIND:SEVERITY``.

    Raises:
        ConfigError: unknown.
    """
    kind, colon, severity = spec.partition(":")
    if kind not in KINDS or (colon and severity not in map(str, SEVERITIES)):
        raise ConfigError(
            f"--corrupt {shown(spec)} damages no image: give KIND or KIND:1 to KIND:5, of {', '.join(KINDS)}"
        )
    return [ImageCorruption(kind, int(severity))] if colon else [ImageCorruption(kind, s) for s in SEVERITIES]


class Damaged:
    """Images of a set, damaged as they are read; ``images_NHHC`` of an ``ImageSet``."""

    def __init__(self, images_NHHC: Any, corruption: ImageCorruption) -> None:
        self.images_NHHC, self.corruption = images_NHHC, corruption

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.corruption(self.images_NHHC[rows], rows)


# ---------------------------------------------------------------- parts


def _smooth(x: np.ndarray, sigma: float) -> np.ndarray:
    # scikit-image's default border.
    return ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest")


def _streaks(x: np.ndarray, radius: int, sigma: float, degrees: list[float]) -> np.ndarray:
    """Each image smeared along its own direction by one half of a Gaussian, as ImageMagick's motion blur does."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    size, angles_B = x.shape[1], np.radians(degrees)
    rows, columns = np.arange(size)[None, :, None], np.arange(size)[None, None, :]
    total = np.zeros_like(x)
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        down = np.rint(step * np.sin(angles_B)).astype(int)[:, None, None]
        across = np.rint(step * np.cos(angles_B)).astype(int)[:, None, None]
        places = (rows + down).clip(0, size - 1), (columns + across).clip(0, size - 1)
        total += weight * x[np.arange(len(x))[:, None, None], places[0], places[1]]
    return total


def _enlarged(x: np.ndarray, factor: float) -> np.ndarray:
    """The centre of each image, enlarged to its size."""
    size = x.shape[1]
    # Rounded up: enlarged, the cut is never smaller than the image.
    cut = int(np.ceil(size / factor))
    first = (size - cut) // 2
    grown = ndimage.zoom(x[:, first : first + cut, first : first + cut], (1, factor, factor, 1), order=1)
    first = (grown.shape[1] - size) // 2
    return grown[:, first : first + size, first : first + size]


def _sampled(image_HHC: np.ndarray, sources_2HH: np.ndarray, mode: str) -> np.ndarray:
    """Values between pixels, at a row and a column for each pixel of the result."""
    channels = np.moveaxis(image_HHC, -1, 0)
    return np.stack([ndimage.map_coordinates(plane, sources_2HH, order=1, mode=mode) for plane in channels], axis=-1)


def _each(x: np.ndarray, change: Callable[[Any], Any]) -> np.ndarray:
    """Every image as Pillow's, changed."""
    pillow = library("PIL.Image", "this damage", DataError)
    images = (x * 255).round().astype(np.uint8)
    # Pillow takes grey images without their axis of channels alone.
    changed = [
        np.asarray(change(pillow.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image))) for image in images
    ]
    return np.stack(changed).reshape(x.shape) / 255


def _clouds(size: int, decay: float, draw: np.random.Generator) -> np.ndarray:
    """A fractal height map in [0, 1], ``[size, size]``, by the diamond-square algorithm on a torus."""
    # The grid is halved until its step is 1, so the side is a power of two.
    side = 1 << (size - 1).bit_length()
    heights, step, wobble = np.zeros((side, side)), side, 100.0

    def mean(total: np.ndarray) -> np.ndarray:
        # ``wobble`` stands twice, as published: at each level the noise falls by the square of ``decay``.
        return total / 4 + wobble * draw.uniform(-wobble, wobble, total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        heights[half::step, half::step] = mean(pairs + np.roll(pairs, -1, axis=1))
        middles = heights[half::step, half::step]
        heights[::step, half::step] = mean(
            middles + np.roll(middles, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        )
        heights[half::step, ::step] = mean(
            middles + np.roll(middles, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        )
        step, wobble = half, wobble / decay
    heights -= heights.min()
    return (heights / heights.max())[:size, :size]
