import numpy as np
import pytest
import torch

from vqmoe_ds.evaluation.attacks import ATTACKS, attack
from vqmoe_ds.runtime.errors import ConfigError

EPS = 4 / 255


def draws(seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng((seed, image)) for image in range(3)]


@pytest.fixture
def images():
    return torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def slopes(images):
    """Slopes of a linear loss, one of each value."""
    return torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["fgsm", "pgd20"])
def test_the_gradient_attacks_find_the_corner_of_a_linear_loss(name, images, slopes):
    moved = attack(name, lambda x: (x * slopes).flatten(1).sum(1), images, EPS, draws())
    assert torch.allclose(moved, (images + EPS * slopes.sign()).clamp(0, 1), atol=1e-6)


def test_spsa_climbs_a_loss_that_has_no_gradient(images, slopes):
    def loss(x):
        return (x.detach() * slopes).flatten(1).sum(1)

    moved = attack("spsa20", loss, images, EPS, draws())
    best = loss((images + EPS * slopes.sign()).clamp(0, 1)) - loss(images)
    assert (loss(moved) - loss(images) > 0.5 * best).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_stays_within_its_bounds_and_goes_by_its_seed(name, images, slopes):
    def loss(x):
        return ((x - 0.5) * slopes).flatten(1).sum(1).square()

    moved = attack(name, loss, images, EPS, draws())
    assert (moved - images).abs().max() <= EPS + 1e-6
    assert moved.min() >= 0 and moved.max() <= 1
    assert torch.equal(moved, attack(name, loss, images, EPS, draws()))
    assert (loss(moved) > loss(images)).all()


def test_unknown_attacks_and_sizes_are_refused(images):
    with pytest.raises(ConfigError, match="no attack 'cw'; choose among fgsm, pgd20, spsa20"):
        attack("cw", lambda x: x.flatten(1).sum(1), images, EPS, draws())
    with pytest.raises(ConfigError, match="largest change, 8, must lie between 0 and 1"):
        attack("fgsm", lambda x: x.flatten(1).sum(1), images, 8, draws())
