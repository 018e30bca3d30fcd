"""The patches that choose a code or an expert most, for people to look at.

Legend: B images, H pixels a side, C channels, T patches of all images, M choices.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqmoe_ds.data.images import ImageSet
from vqmoe_ds.evaluation.page import png_uri
from vqmoe_ds.evaluation.plots import pyplot

MOST, ACROSS, CLASSES = 16, 8, 3
"""Patches of a picture, those of one of its lines, and classes that are listed."""
SIDE = 60
"""Pixels of a patch with its surroundings on the page, at least."""
FRAME = np.array([213, 94, 0], np.uint8)
"""Vermillion of Okabe and Ito."""


def top_patches(
    choices_M: Tensor, patches_M: Tensor, scores_M: Tensor, count: int, labels_T: Tensor, images: ImageSet
) -> list[dict[str, Any]]:
    """The patches of each of ``count`` choices with the highest scores, one of each image, and their classes.

    Args:
        choices_M: expert or code.
        patches_M: number of the patch among those of all images.
        scores_M: how much it chose.
        labels_T: class of each patch's image.
        images: those that the patches are of.

    Returns:
        ``total`` patches; ``classes``, the three that are most over-represented, with their ``share`` of the patches
        and ``lift``, that over their share of all choices; ``patches``, each with ``image`` (its number in what was
        read), ``place`` within it, and ``score``.
    """
    order_M = scores_M.argsort(descending=True, stable=True)
    images_M, labels_M, classes = patches_M // images.patches, labels_T[patches_M], images.classes
    everywhere_C = torch.bincount(labels_M, minlength=len(classes)) / len(labels_M)
    answer = []
    for choice in range(count):
        rows = order_M[choices_M[order_M] == choice]
        here_C = torch.bincount(labels_M[rows], minlength=len(classes)) / max(1, len(rows))
        lift_C = here_C / everywhere_C.clamp_min(1e-12)
        best = [c for c in lift_C.argsort(descending=True, stable=True).tolist()[:CLASSES] if here_C[c] > 0]
        first = {int(images_M[row]): row for row in reversed(rows.tolist())}  # the best of each image stays
        kept = [row for row in rows.tolist() if first[int(images_M[row])] == row][:MOST]
        answer.append(
            {
                "total": len(rows),
                "classes": [
                    {"name": classes[c], "share": round(float(here_C[c]), 4), "lift": round(float(lift_C[c]), 3)}
                    for c in best
                ],
                "patches": [
                    {
                        "image": int(images_M[row]),
                        "place": int(patches_M[row]) % images.patches,
                        "score": round(float(scores_M[row]), 4),
                    }
                    for row in kept
                ],
            }
        )
    return answer


def draw_patches(patches: list[dict[str, Any]], images_BHHC: np.ndarray, side: int) -> str | None:
    """Patches in lines, each framed amid the patches around it, as a PNG in a URI; None where there are none.

    Args:
        patches: of ``top_patches``.
        images_BHHC: uint8.
        side: pixels a side of a patch.
    """
    if not patches:
        return None
    cuts = [_cut(images_BHHC[patch["image"]], patch["place"], side) for patch in patches]
    cuts += [np.full_like(cuts[0], 255)] * (-len(cuts) % ACROSS)
    lines = [np.concatenate(cuts[first : first + ACROSS], axis=1) for first in range(0, len(cuts), ACROSS)]
    stream = io.BytesIO()
    pyplot().imsave(stream, np.concatenate(lines), format="png")
    return png_uri(stream.getvalue())


def _cut(image_HHC: np.ndarray, place: int, side: int) -> np.ndarray:
    """A patch amid its surroundings, enlarged and framed, with a white line to the right and below."""
    scale = max(1, SIDE // (3 * side))
    row, column = divmod(place, image_HHC.shape[1] // side)
    framed = np.pad(image_HHC, ((side, side), (side, side), (0, 0)), constant_values=255)
    cut = framed[row * side : (row + 3) * side, column * side : (column + 3) * side]
    cut = cut.repeat(scale, axis=0).repeat(scale, axis=1)
    cut = np.broadcast_to(cut, (*cut.shape[:2], 3)).copy()  # grey becomes three equal channels
    low, high = scale * side - 1, 2 * scale * side
    cut[[low, high], low : high + 1] = FRAME
    cut[low : high + 1, [low, high]] = FRAME
    return np.pad(cut, ((0, 2), (0, 2), (0, 0)), constant_values=255)
