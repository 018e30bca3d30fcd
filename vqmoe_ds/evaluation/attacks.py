"""Attacks on a classifier of images: small changes within ``eps`` of each value that raise its loss.

``fgsm``    one step along the sign of the gradient (Goodfellow 2015, arXiv 1412.6572).
``pgd20``   20 steps of 0.15 eps along it, from a random start (Madry 2018, arXiv 1706.06083; steps as in "Tight
            Clusters Make Specialized Experts").
``spsa20``  the same steps, the gradient estimated from losses alone (Uesato 2018, arXiv 1802.05666): choices of
            experts and codes have no gradient, and cannot hide from it behind that.

Legend: B images, then any other dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vqmoe_ds.runtime.errors import ConfigError

Loss = Callable[[Tensor], Tensor]
"""Loss of each image, float ``[B]``, of images float32 ``[B, ...]`` with values from 0 to 1."""
Draws = list[np.random.Generator]
"""A generator for each image."""

STEPS, STEP = 20, 0.15
"""Steps of an attack, and their length as a share of ``eps``."""
PROBES, PROBE = 16, 0.01
"""Pairs of probes of which SPSA estimates a gradient, and how far they change each value."""


def attack(name: str, loss: Loss, images: Tensor, eps: float, draws: Draws) -> Tensor:
    """Attacked copies of images, float32, within ``eps`` of them and from 0 to 1.

    Args:
        name: one of ``ATTACKS``.
        loss: of the model in evaluation mode; see ``Loss``.
        images: float32 ``[B, ...]``, values from 0 to 1.
        eps: largest change of a value.
        draws: of random starts and probes.

    Raises:
        ConfigError: there is no such attack, or ``eps`` is not between 0 and 1.
    """
    if name not in ATTACKS:
        raise ConfigError(f"there is no attack {name!r}; choose among {', '.join(ATTACKS)}")
    if not 0 < eps < 1:
        raise ConfigError(f"an attack's largest change, {eps:g}, must lie between 0 and 1, e.g. 1/255")
    return ATTACKS[name](loss, images, eps, draws)


def _fgsm(loss: Loss, images: Tensor, eps: float, draws: Draws) -> Tensor:
    return (images + eps * _gradient(loss, images).sign()).clamp(0, 1)


def _pgd(loss: Loss, images: Tensor, eps: float, draws: Draws) -> Tensor:
    return _climb(images, eps, draws, lambda moved: _gradient(loss, moved))


def _spsa(loss: Loss, images: Tensor, eps: float, draws: Draws) -> Tensor:
    return _climb(images, eps, draws, lambda moved: _estimate(loss, moved, draws))


def _climb(images: Tensor, eps: float, draws: Draws, gradient: Callable[[Tensor], Tensor]) -> Tensor:
    noise = _drawn(images, draws, lambda draw: draw.uniform(-1, 1, images.shape[1:]))
    moved = (images + eps * noise).clamp(0, 1)
    for _ in range(STEPS):
        moved = moved + STEP * eps * gradient(moved).sign()
        # In this order both bounds hold: the image lies between 0 and 1, so the second clamp leads back towards it.
        moved = (images + (moved - images).clamp(-eps, eps)).clamp(0, 1)
    return moved


def _gradient(loss: Loss, images: Tensor) -> Tensor:
    images = images.detach().requires_grad_()
    # Images are attacked as they are read, under the ``no_grad`` of who scores them.
    with torch.enable_grad():
        # The sum has the gradient of each image's own loss: what a router takes from a batch has none.
        (gradient,) = torch.autograd.grad(loss(images).sum(), images)
    return gradient


@torch.no_grad()
def _estimate(loss: Loss, images: Tensor, draws: Draws) -> Tensor:
    """Mean over random directions of ±1 of the loss's slope along them, times the direction (Spall 1992)."""
    total = torch.zeros_like(images)
    for _ in range(PROBES):
        direction = _drawn(images, draws, lambda draw: draw.integers(0, 2, images.shape[1:]) * 2 - 1)
        # Probes may leave [0, 1]: cut off there, the two would no longer lie at equal distances from the image.
        slope_B = (loss(images + PROBE * direction) - loss(images - PROBE * direction)) / (2 * PROBE)
        total += slope_B.view(-1, *[1] * (images.dim() - 1)) * direction
    return total / PROBES


def _drawn(images: Tensor, draws: Draws, draw: Callable[[np.random.Generator], np.ndarray]) -> Tensor:
    # By NumPy and image by image: neither the device nor what shares the batch changes what is drawn.
    return torch.from_numpy(np.stack([draw(each) for each in draws])).to(images)


# ``images.Attacked`` seeds its draws by the place in this table: another order is another attack.
ATTACKS: dict[str, Callable[[Loss, Tensor, float, Draws], Tensor]] = {
    "fgsm": _fgsm,
    "pgd20": _pgd,
    "spsa20": _spsa,
}
