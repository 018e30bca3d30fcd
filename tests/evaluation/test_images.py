"""Images for a model that was trained on others, and on text: what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.images import CLASSES, write_folder
from vqmoe_ds.config.load import load_config
from vqmoe_ds.evaluation.images import open_split
from vqmoe_ds.runtime.errors import DataError


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
