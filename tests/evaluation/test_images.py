"""Images for a model that was trained on others, and on text: what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.images import CLASSES, squares, write_arrays, write_folder
from vqmoe_ds.config.load import load_config
from vqmoe_ds.evaluation.images import open_split, refuse_images
from vqmoe_ds.runtime.errors import DataError


def test_images_of_any_kind_are_refused_for_a_model_of_text(tmp_path):
    write_folder(tmp_path / "one", 1)
    write_arrays(tmp_path / "damaged", {"fog": squares(15)[0]}, squares(15)[1])
    for name in ("one", "damaged"):
        with pytest.raises(DataError, match=f"{name} holds images, and runs/a is a model of text; give text, or"):
            refuse_images(SimpleNamespace(path="runs/a"), ["words.txt", str(tmp_path / name)])


@pytest.mark.parametrize(
    ("known", "sentence"),
    [
        ((*CLASSES[:2], "zebra"), "than runs/a knows .'right' is only on one side.; give images of these, all of them"),
        (CLASSES[::-1], "than runs/a knows .they are in another order."),
    ],
)
def test_the_class_that_differs_is_named(known, sentence, tmp_path):
    config = load_config("vit-cifar", None, {"model.image_size": 8, "data.classes": list(known)}).config
    with pytest.raises(DataError, match=sentence):
        open_split(SimpleNamespace(config=config, path="runs/a"), [str(write_folder(tmp_path))], "auto")
