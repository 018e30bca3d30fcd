"""The routing report of images: patches that are those of a count by hand, pictures that show them, and the page."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.huggingface import ModelReader
from tests.images import CLASSES, squares, write_folder
from tests.models.test_vision import config_of
from vqmoe_ds.checkpoint.formats.portable import write_portable
from vqmoe_ds.data.images import ImageSet
from vqmoe_ds.evaluation import routing_report
from vqmoe_ds.evaluation.image_patches import FRAME, SIDE, draw_patches, top_patches
from vqmoe_ds.experiments import jacobian_report
from vqmoe_ds.models.build import build_model
from vqmoe_ds.runtime.files import new_folder


def image_set(count: int) -> ImageSet:
    return ImageSet(*squares(count), np.arange(count), CLASSES, 4)


def test_patches_are_the_best_of_each_image_and_classes_those_of_a_count():
    labels_T = torch.tensor([0, 1, 2]).repeat_interleave(4)
    choices = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1])
    scores = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.3, 0.2, 0.1, 0.4, 0.7, 0.6, 0.8, 0.75])
    first, second, third = top_patches(choices, torch.arange(12), scores, 3, labels_T, image_set(3))
    assert (first["total"], second["total"]) == (3, 9)
    found = [(patch["image"], patch["place"], round(patch["score"], 2)) for patch in first["patches"]]
    assert found == [(0, 1, 0.9), (1, 0, 0.3)]
    assert [(patch["image"], patch["place"]) for patch in second["patches"]] == [(2, 2), (0, 2), (1, 3)]
    assert first["classes"] == [
        {"name": "left", "share": round(2 / 3, 4), "lift": 2.0},
        {"name": "middle", "share": round(1 / 3, 4), "lift": 1.0},
    ]
    assert third == {"total": 0, "classes": [], "patches": []}


def test_no_more_than_sixteen_are_kept_and_rows_may_name_a_patch_twice():
    patches_M = torch.arange(80).repeat(2)
    (found,) = top_patches(
        torch.zeros(160, dtype=int), patches_M, torch.ones(160), 1, torch.zeros(80, dtype=int), image_set(20)
    )
    assert [patch["image"] for patch in found["patches"]] == list(range(16)) and found["total"] == 160


def picture(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_shows_the_framed_patch_amid_its_surroundings(channels):
    images = squares(2, channels=channels)[0]
    shown = picture(draw_patches([{"image": 1, "place": 6, "score": 0.0}], images, 2))  # row 1, column 2 of 4
    scale = SIDE // 6
    assert shown.shape == (SIDE + 2, 8 * (SIDE + 2), 3)
    for row in range(6):
        for column in range(6):
            middle = shown[row * scale + scale // 2, column * scale + scale // 2]
            assert middle.tolist() == np.broadcast_to(images[1, row, 2 + column], 3).tolist()
    low, high = 2 * scale - 1, 4 * scale
    for edge in (shown[low, low : high + 1], shown[high, low : high + 1], shown[low : high + 1, low]):
        assert (edge == FRAME).all()
    corner = picture(draw_patches([{"image": 0, "place": 0, "score": 0.0}] * 9, images, 2))
    assert corner.shape[0] == 2 * (SIDE + 2) and (corner[: 2 * scale - 1, :SIDE] == 255).all()
    assert draw_patches([], images, 2) is None


def save(folder: Path, seed: int = 0, **more) -> str:
    told = {"data.classes": list(CLASSES), "model.sequence_length": 16, "train.seed": 1, **more}
    model = build_model(config_of(**told)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    with new_folder(folder, False) as into:
        write_portable(ModelReader(model), into)
    return str(folder)


def report(module, *arguments: object) -> int:
    return module.main(module.build_parser("").parse_args([str(a) for a in arguments]))


@pytest.mark.parametrize("more", [{}, {"codebook.source": "token_embedding"}, {"moe.router": "expert_choice"}], ids=str)
def test_a_report_of_images_from_checkpoint_to_page(more, tmp_path, capsys):
    now, before = save(tmp_path / "now", **more), save(tmp_path / "before", 1, **more)
    images = write_folder(tmp_path / "images", 12)
    told = (now, "--data", images, "--against", before, "--tokens", 150, "--out", tmp_path / "out")
    assert report(routing_report, *told) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "routing.json").read_text())
    page = (tmp_path / "out" / "routing.html").read_text()
    assert found["probe"]["tokens"] == 160 and "160 patches of" in page and "in 10 images of 16" in page
    assert "pictures" not in found
    kinds = ["expert"] if "moe.router" in more else ["expert", "code"]
    strips = 0
    for row in found["layers"]:
        for kind in kinds:
            total = sum(entry["total"] for entry in row[f"{kind}_patches"])
            assert total == sum(row["codes" if kind == "code" else "experts"]["counts"])
            for entry in row[f"{kind}_patches"]:
                scores = [patch["score"] for patch in entry["patches"]]
                assert scores == sorted(scores, reverse=True) and all(patch["image"] < 10 for patch in entry["patches"])
                strips += bool(scores)
        assert set(row["information"]["expert"]) == {"class", "place"} and "expert_tokens" not in row
        assert "fluctuation" in row
    assert page.count("data:image/png;base64,") == 3 + strips and "http" not in re.sub('base64,[^"]*', "", page)


def test_dense_models_and_jacobians_of_images_are_refused(tmp_path, capsys):
    dense, routed = save(tmp_path / "dense", **{"moe.router": "dense"}), save(tmp_path / "vq")
    images = write_folder(tmp_path / "images", 12)
    (tmp_path / "words.txt").write_text("words " * 100)
    for module, checkpoint, data, sentence in (
        (routing_report, dense, images, "is a dense model"),
        (routing_report, routed, tmp_path / "words.txt", "holds no labelled images"),
        (jacobian_report, routed, images, "needs a model of text"),
    ):
        arguments = [checkpoint, *([checkpoint] if module is jacobian_report else [])]
        assert report(module, *arguments, "--data", data, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
