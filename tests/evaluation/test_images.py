"""Images for a model that was trained on others, and on text: what is refused, and what the user is told of scores."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.images import CLASSES, squares, write_arrays, write_folder
from vqmoe_ds.config.load import load_config
from vqmoe_ds.evaluation.command import build_parser
from vqmoe_ds.evaluation.images import ImageEvaluation, open_split, refuse_images
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


def test_the_hardest_class_has_images_and_unequal_numbers_are_told():
    recalls = {"left": (0, 0.0), "middle": (3, 0.5), "right": (1, 1.0)}
    by_class = {name: {"images": images, "recall": recall} for name, (images, recall) in recalls.items()}
    clean = {"images": 4, "accuracy": 0.5, "loss": 1.0, "macro_f1": 0.4, "by_class": by_class}
    row = {"kind": "fog", "severity": 1, "group": "weather", "accuracy": 0.5, "drop": 0.0}
    model = {"checkpoint": "a", "step": 1, "router": "topk", "experts": 4}
    for images, told in ((4, False), (7, True)):
        result = ImageEvaluation(model, {"images": "squares"}, clean, [{**row, "images": images}])
        text = "\n".join(result.lines())
        assert "4 images of squares, 3 classes, 1 of them without images, whose F1 counts as 0" in text
        assert "the hardest class is middle, of which 50.00% are found" in text
        assert ("7 damaged images of some kinds, and 4 clean ones: a drop there" in text) is told


def test_an_option_that_is_given_twice_names_all_of_both():
    words = ["run", "--ood", "a", "b", "--ood", "noise", "--attacks", "fgsm", "--attacks", "pgd20", "--eps", "1"]
    words += ["--eps", "2", "--shift", "x", "--shift", "y", "--data", "p", "--data", "q"]
    found = build_parser("").parse_args(words)
    assert (found.ood, found.attacks, found.eps) == (["a", "b", "noise"], ["fgsm", "pgd20"], [1.0, 2.0])
    assert (found.shift, found.data) == (["x", "y"], ["p", "q"])
    assert build_parser("").parse_args(["run"]).ood == [], "the default is not what was given before"
