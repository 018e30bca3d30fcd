"""Known and other images told apart: figures by hand, noise, and sets of other shapes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.images import CLASSES, squares, write_folder, write_idx
from vqmoe_ds.config.load import load_config
from vqmoe_ds.evaluation.classification import ClassScore
from vqmoe_ds.evaluation.out_of_distribution import SPREAD, line_of, open_others, told_apart
from vqmoe_ds.runtime.errors import DataError


def score(*probabilities: float) -> ClassScore:
    count, sure = len(probabilities), np.array(probabilities)
    return ClassScore(0.0, np.zeros(count, int), np.zeros(count, int), sure, -sure)


def test_figures_are_those_by_hand_with_ties():
    found = told_apart(score(0.9, 0.8, 0.5), score(0.8, 0.3))
    # Of 6 pairs the known image is higher in 4, and one is a tie; the energies are turned around.
    assert found["probability"]["auroc"] == pytest.approx((4 + 0.5) / 6)
    assert found["energy"]["auroc"] == pytest.approx((1 + 0.5) / 6)
    # From the top: .9 (recall 1/3, precision 1), .8 twice (2/3, 2/3), .5 (1, 3/4).
    assert found["probability"]["aupr_in"] == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 3 + 1 / 3 * 3 / 4)
    # From the bottom: .3 (recall 1/2, precision 1), .5 (1/2, 1/2), .8 twice (1, 2/4).
    assert found["probability"]["aupr_out"] == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 4)
    row = {"images": "noise", "count": 2, "changes": "", **found}
    assert line_of(row).startswith("told from 2 images of noise: by probability AUROC 75.00%, AUPR 80.56% in, 75.00%")


def test_equal_scores_tell_nothing():
    found = told_apart(score(0.5, 0.5, 0.5), score(0.5))["probability"]
    assert found == {"auroc": 0.5, "aupr_in": 0.75, "aupr_out": 0.25}


def model(channels: int = 3):
    told = {"model.image_size": 8, "model.channels": channels, "data.classes": list(CLASSES)}
    return SimpleNamespace(config=load_config("vit-cifar", None, told).config)


def test_noise_has_its_spread_and_follows_from_the_number():
    found = open_others(model(), "noise", 400)
    batch = found.images.read(np.arange(400))
    assert batch.inputs_BS.shape == (400, 8, 8, 3) and batch.inputs_BS.dtype == np.uint8
    middle = batch.inputs_BS[(batch.inputs_BS > 0) & (batch.inputs_BS < 255)] / 255
    assert middle.mean() == pytest.approx(0.5, abs=0.01)
    assert np.quantile(batch.inputs_BS / 255, 0.8413) == pytest.approx(0.5 + SPREAD, abs=0.01)
    assert np.array_equal(found.images.read(np.array([7])).inputs_BS[0], batch.inputs_BS[7])
    assert not np.array_equal(batch.inputs_BS[7], batch.inputs_BS[8])


def test_images_of_other_sizes_and_channels_are_converted(tmp_path):
    images, labels = squares(9, size=12, channels=1)
    for split in ("train", "t10k"):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte", images[..., 0])
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte", labels)
    found = open_others(model(), str(tmp_path), 5)
    assert found.changes == "made 8 x 8 x 3 from 12 x 12 x 1"
    batch = found.images.read(np.arange(5))
    scaled = Image.fromarray(images[8, ..., 0]).convert("RGB").resize((8, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(batch.inputs_BS[4], np.asarray(scaled)) and (batch.targets_BS == 0).all()
    assert "(made 8 x 8 x 3 from 12 x 12 x 1)" in line_of({**found.about(), **told_apart(score(1), score(0))})


def test_colours_become_grey_and_what_fits_is_left_alone(tmp_path):
    folder = write_folder(tmp_path, 6)
    (grey,) = open_others(model(1), str(folder), 1).images.read(np.zeros(1, int)).inputs_BS
    assert np.array_equal(grey[..., 0], np.asarray(Image.fromarray(squares(1)[0][0]).convert("L")))
    found = open_others(model(), str(folder), 100)
    assert (found.changes, len(found.images)) == ("", 6)
    assert np.array_equal(found.images.read(np.zeros(1, int)).inputs_BS[0], squares(1)[0][0])


def test_what_is_no_image_is_refused(tmp_path):
    with pytest.raises(DataError, match="do not exist"):
        open_others(model(), str(tmp_path / "nowhere"), 5)
    folder = write_folder(tmp_path, 6)
    (folder / "left/0000.png").write_bytes(b"words")
    with pytest.raises(DataError, match="left/0000.png cannot be used"):
        open_others(model(), str(folder), 5)
