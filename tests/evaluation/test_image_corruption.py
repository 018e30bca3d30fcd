import io

import numpy as np
import pytest
from scipy import ndimage

from vqmoe_ds.evaluation.image_corruption import KINDS, SEVERITIES, corrupt, disk, plasma, smear, zoom_in
from vqmoe_ds.runtime.errors import ConfigError

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def pictures():
    """Smooth pictures, uint8 [3, 32, 32, 3]."""
    drawn = np.random.default_rng(0).normal(size=(3, 32, 32, 3))
    smooth = ndimage.gaussian_filter(drawn, (0, 3, 3, 0))
    return ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_grows_and_goes_by_the_number_of_an_image_alone(kind, pictures):
    damaged = {severity: corrupt(pictures, kind, severity, first=5) for severity in SEVERITIES}
    assert all(images.shape == pictures.shape and images.dtype == np.uint8 for images in damaged.values())
    assert np.array_equal(corrupt(pictures[1:2], kind, 3, first=6), damaged[3][1:2])
    distance = {s: np.abs(images.astype(int) - pictures).mean() for s, images in damaged.items()}
    # The published severities of the elastic kind move pixels less and shake them more.
    assert 0 < distance[1] < distance[5] or (kind == "elastic_transform" and min(distance.values()) > 1)
    assert corrupt(pictures[..., :1], kind, 5).shape == (3, 32, 32, 1)


@pytest.mark.parametrize("kind", ["gaussian_noise", "snow", "elastic_transform"])
def test_another_seed_damages_otherwise(kind, pictures):
    assert not np.array_equal(corrupt(pictures, kind, 3), corrupt(pictures, kind, 3, seed=1))


def test_noise_has_the_published_strength():
    grey = np.full((8, 32, 32, 3), 128, np.uint8)
    assert corrupt(grey, "gaussian_noise", 5).std() / 255 == pytest.approx(0.10, rel=0.03)
    # Of a Poisson number of x c photons over c, the variance is x / c.
    assert corrupt(grey, "shot_noise", 5).std() / 255 == pytest.approx((128 / 255 / 50) ** 0.5, rel=0.03)
    salted = corrupt(grey, "impulse_noise", 5)
    assert (salted == 255).mean() == pytest.approx(0.035, rel=0.1)
    assert (salted == 0).mean() == pytest.approx(0.035, rel=0.1)
    assert ((salted == 255) | (salted == 0) | (salted == 128)).all()


def test_contrast_and_brightness_by_hand():
    halves = np.zeros((1, 2, 2, 3), np.uint8)
    halves[:, 1] = 255
    # Mean 0.5, of the distance to it 0.15 is left: 0.425 and 0.575 of 255.
    assert corrupt(halves, "contrast", 5)[0, :, 0, 0].tolist() == [108, 146]
    pixels = np.array([100, 50, 0, 0, 0, 0, 250, 10, 10, 255, 255, 255], np.uint8).reshape(1, 2, 2, 3)
    # 100/255 + 0.3 is 1.765 times 100/255; black gets grey; 250/255 + 0.3 is cut to 1.
    expected = [[176, 88, 0], [76, 76, 76], [255, 10, 10], [255, 255, 255]]
    assert corrupt(pixels, "brightness", 5).reshape(4, 3).tolist() == expected


def test_kernels_by_hand():
    kernel = disk(1, 0.2)  # a plus of five pixels, which a Gaussian of 0.2 pixels leaves nearly alone
    assert kernel.sum() == pytest.approx(1)
    assert kernel[3, 2:5] == pytest.approx(0.2, abs=1e-4)
    assert kernel[2, 2] == pytest.approx(0, abs=1e-4)
    point = np.zeros((1, 20, 1))
    point[0, 10] = 1
    weights = np.exp([0, -0.5, -2])
    weights /= np.exp(-(np.arange(13) ** 2) / 2).sum()
    assert smear(point, 6, 1, 0)[0, 8:11, 0] == pytest.approx(weights[::-1])
    assert smear(point, 6, 1, 0)[0, 11:].sum() == 0  # one side alone
    assert smear(point, 6, 1, 90)[0, 10] == pytest.approx(1)  # along the edge, which is repeated


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.06, 1.25, 1.75, 2.25])
def test_zoom_is_that_of_scipy(factor, pictures):
    part = int(np.ceil(32 / factor))
    top = (32 - part) // 2
    inner = pictures[:, top : top + part, top : top + part].astype(float)
    grown = ndimage.zoom(inner, (1, factor, factor, 1), order=1)
    trim = (grown.shape[1] - 32) // 2
    assert zoom_in(pictures.astype(float), factor) == pytest.approx(grown[:, trim : trim + 32, trim : trim + 32])


def test_zoom_blur_takes_the_published_factors(pictures):
    zoomed = [zoom_in(pictures / 255, 1 + percent / 100) for percent in range(7)]
    assert np.abs(corrupt(pictures, "zoom_blur", 1) - (pictures / 255 + sum(zoomed)) / 8 * 255).max() <= 1.001


def test_clouds_by_hand():
    noise = np.array([[[9.0, 0.5], [-0.25, 1.0]]])
    # The middle of one square between four equal corners of 0, then its neighbours between two middles and two corners.
    middle = 100.0**2 * 1.0
    right, below = middle / 2 + 100**2 * 0.5, middle / 2 - 100**2 * 0.25
    assert plasma(noise, 3.0) == pytest.approx(np.array([[[0, right], [below, middle]]]) / middle)


def test_one_colour_stays_where_nothing_is_added():
    plain = np.full((2, 32, 32, 3), 77, np.uint8)
    for kind in ("defocus_blur", "motion_blur", "zoom_blur", "contrast", "elastic_transform", "pixelate"):
        assert np.abs(corrupt(plain, kind, 5).astype(int) - 77).max() <= 1, kind


def test_digital_kinds_are_those_of_pillow(pictures):
    file = io.BytesIO()
    Image.fromarray(pictures[0]).save(file, "JPEG", quality=40)
    assert np.array_equal(corrupt(pictures[:1], "jpeg_compression", 5)[0], np.asarray(Image.open(file)))
    coarse = Image.fromarray(pictures[0]).resize((20, 20), Image.Resampling.BOX)
    assert np.array_equal(
        corrupt(pictures[:1], "pixelate", 5)[0], np.asarray(coarse.resize((32, 32), Image.Resampling.BOX))
    )


def test_unknown_kinds_and_severities_are_refused(pictures):
    with pytest.raises(ConfigError, match="no corruption 'frost'; choose among gaussian_noise"):
        corrupt(pictures, "frost", 1)
    with pytest.raises(ConfigError, match="severity 6 of fog must be a whole number from 1 to 5"):
        corrupt(pictures, "fog", 6)
