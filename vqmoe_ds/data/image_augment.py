"""Changes of training images that follow from numbers drawn for each: RandAugment, mixup and cutmix.

Written anew with Pillow and NumPy: torchvision's draw from one generator for the whole process, so that what an image
becomes would depend on those before it.

Legend: B images of a batch, H pixels a side, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import betaincinv

from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.extras import library

# ---------------------------------------------------------------- RandAugment

OPERATIONS, STRENGTH = 2, 0.3
"""Operations on each image, and their magnitude as a share of the largest (9 of 30)."""


def rand_augment(images_BHHC: np.ndarray, draws_B: np.ndarray) -> np.ndarray:
    """RandAugment (Cubuk 2020, arXiv 1909.13719): two of 14 operations on each image, in either direction.

    Args:
        images_BHHC: uint8.
        draws_B: uint64, uniform and independent.
    """
    pillow = library("PIL.Image", "data.augment=rand", DataError)
    operations = _operations(pillow, images_BHHC.shape[1])
    changed = []
    for array_HHC, draw in zip(images_BHHC, draws_B.tolist(), strict=True):
        image = pillow.fromarray(array_HHC.squeeze(-1) if array_HHC.shape[-1] == 1 else array_HHC)
        for step in range(OPERATIONS):
            sign = 1 - 2 * (draw >> 62 + step & 1)
            image = operations[(draw >> 20 * step) % len(operations)](image, sign)
        changed.append(np.asarray(image).reshape(array_HHC.shape))
    return np.stack(changed)


def _operations(pillow: Any, size: int) -> list[Callable[[Any, int], Any]]:
    """The operations of the paper, at the magnitudes of torchvision; new corners are black."""
    ops = library("PIL.ImageOps", "data.augment=rand", DataError)
    enhance = library("PIL.ImageEnhance", "data.augment=rand", DataError)
    lean, shift = 0.3 * STRENGTH, 150 / 331 * size * STRENGTH

    def moved(image: Any, *matrix: float) -> Any:
        return image.transform(image.size, pillow.Transform.AFFINE, matrix)

    return [
        lambda image, sign: image,
        lambda image, sign: moved(image, 1, sign * lean, 0, 0, 1, 0),
        lambda image, sign: moved(image, 1, 0, 0, sign * lean, 1, 0),
        lambda image, sign: moved(image, 1, 0, sign * shift, 0, 1, 0),
        lambda image, sign: moved(image, 1, 0, 0, 0, 1, sign * shift),
        lambda image, sign: image.rotate(sign * 30 * STRENGTH),
        lambda image, sign: enhance.Brightness(image).enhance(1 + sign * 0.9 * STRENGTH),
        lambda image, sign: enhance.Color(image).enhance(1 + sign * 0.9 * STRENGTH),
        lambda image, sign: enhance.Contrast(image).enhance(1 + sign * 0.9 * STRENGTH),
        lambda image, sign: enhance.Sharpness(image).enhance(1 + sign * 0.9 * STRENGTH),
        lambda image, sign: ops.posterize(image, 8 - round(4 * STRENGTH)),
        lambda image, sign: ops.solarize(image, 255 * (1 - STRENGTH)),
        lambda image, sign: ops.autocontrast(image),
        lambda image, sign: ops.equalize(image),
    ]


# ---------------------------------------------------------------- mixup and cutmix


@dataclass(frozen=True)
class Mixing:
    """Mixes every image with the next one, and their labels by the same shares.

    Attributes:
        mixup, cutmix: parameter of the Beta distribution of the shares; 0: never. With both, one of them by chance for
            each image.
        classes: K, logits of the model.
    """

    mixup: float
    cutmix: float
    classes: int

    def __call__(
        self, images: np.ndarray, labels: np.ndarray, draws_B: np.ndarray, places_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images, uint8 ``[B, H, H, C]``, and shares of the classes, float32 ``[B, K]``.

        mixup (Zhang 2018, arXiv 1710.09412) takes ``l a + (1 - l) b`` with ``l ~ Beta(alpha, alpha)``; cutmix (Yun
        2019, arXiv 1905.04899) puts a box of b, ``sqrt(1 - l)`` of the sides and cut off at the edges, into a.

        Args:
            images: uint8 ``[B + 1, H, H, C]``.
            labels: int64 ``[B + 1]``.
            draws_B, places_B: uint64, uniform and independent.
        """
        size = images.shape[1]
        # Bit 63 is none of those that _boxes places by: 0 to 15 and 24 to 39.
        cut_B = (
            (places_B >> np.uint64(63) == 1) if self.mixup and self.cutmix else np.full(len(draws_B), self.cutmix > 0)
        )
        alphas_B = np.where(cut_B, self.cutmix, self.mixup)
        # The inverse of the distribution function takes one number for one share; Generator.beta rejects some, so that
        # shares would depend on those before them. 53 bits are what a float64 holds: uniform in [0, 1).
        shares_B = betaincinv(alphas_B, alphas_B, (draws_B >> np.uint64(11)) * 2.0**-53)
        box_BHH = _boxes(shares_B, places_B, size)
        # Boxes are cut off at the edges and rounded to pixels: labels follow the pixels that were pasted.
        shares_B = np.where(cut_B, 1 - box_BHH.mean(axis=(1, 2)), shares_B)
        first_BHHC, second_BHHC = images[:-1], images[1:]
        weights_B111 = shares_B[:, None, None, None]
        blended = np.rint(weights_B111 * first_BHHC + (1 - weights_B111) * second_BHHC).astype(np.uint8)
        pasted = np.where(box_BHH[..., None], second_BHHC, first_BHHC)
        one_hot = np.eye(self.classes)[labels]
        targets_BK = shares_B[:, None] * one_hot[:-1] + (1 - shares_B[:, None]) * one_hot[1:]
        return np.where(cut_B[:, None, None, None], pasted, blended), targets_BK.astype(np.float32)


def _boxes(shares_B: np.ndarray, places_B: np.ndarray, size: int) -> np.ndarray:
    """Squares of ``sqrt(1 - share)`` of the side around centres anywhere, bool ``[B, H, H]``."""
    half_B1 = ((size * np.sqrt(1 - shares_B)).astype(np.int64) // 2)[:, None]
    centres = [(places_B >> np.uint64(shift) & np.uint64(0xFFFF)) % np.uint64(size) for shift in (0, 24)]
    inside = []
    for centre_B in centres:
        offset_BH = np.arange(size) - centre_B.astype(np.int64)[:, None]
        inside.append((offset_BH >= -half_B1) & (offset_BH < half_B1))
    rows_BH, columns_BH = inside
    return rows_BH[:, :, None] & columns_BH[:, None, :]
