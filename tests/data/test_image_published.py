"""Folders of damaged images as they are published, and what is wrong with others."""

from __future__ import annotations

import numpy as np
import pytest

from tests.images import CLASSES, squares, write_arrays, write_folder, write_idx, write_packed, write_pickles
from vqmoe_ds.data.image_published import EXTRA, PUBLISHED, are_images, find_published
from vqmoe_ds.data.image_splits import Wanted
from vqmoe_ds.evaluation.image_damage import KINDS
from vqmoe_ds.runtime.errors import DataError


def test_arrays_hold_five_severities_one_after_the_other(tmp_path):
    images, labels = squares(30)
    write_arrays(tmp_path, {"fog": images, "spatter": images[::-1], "shot_noise": 255 - images}, labels)
    found = find_published(str(tmp_path), CLASSES)
    assert [(part.kind, part.severity, part.group) for part in found] == [
        *(("shot_noise", s, "noise") for s in range(1, 6)),
        *(("fog", s, "weather") for s in range(1, 6)),
        *(("spatter", s, EXTRA) for s in range(1, 6)),
    ]
    third = found[7].load()  # fog
    assert third.labels_N.tolist() == labels[12:18].tolist()
    assert np.array_equal(third.pixels(4).fit(Wanted(8, 3, False))[0], images[16])
    assert third.name(4) == f"image 4 of {tmp_path}/fog.npy, severity 3"


@pytest.mark.parametrize("deeper", ["", "weather"])
def test_folders_of_classes_lie_under_kind_and_severity(tmp_path, deeper):
    for severity in (1, 4):
        write_folder(tmp_path / deeper / "fog" / str(severity), 6, seed=severity)
    first, fourth = find_published(str(tmp_path), CLASSES)
    assert (first.severity, fourth.kind, fourth.severity) == (1, "fog", 4)
    split = fourth.load()
    assert split.labels_N.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(split.pixels(0).fit(Wanted(8, 3, False))[0], squares(6, seed=4)[0][0])


def test_other_folders_and_files_are_none(tmp_path):
    write_folder(tmp_path / "a/snow")  # a class of pictures of snow
    np.save(tmp_path / "b.npy", squares(5)[0])
    for path in ("a", "a/snow", "b.npy", "nowhere"):
        assert find_published(str(tmp_path / path), CLASSES) is None


IMAGES, LABELS = squares(15)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"fog": IMAGES}, "has images of damage and no labels.npy"),
        ({"fog": IMAGES, "labels": LABELS + 1}, r"has labels 1 to 3, and the model 3 classes"),
        ({"fog": IMAGES, "labels": LABELS.clip(0, 1)}, r"has labels 0 to 1, and the model 3 classes"),
        ({"fog": IMAGES, "labels": LABELS[:10]}, "fog.npy has 15 images, and labels.npy 10"),
        ({"fog": IMAGES[:14], "labels": LABELS[:14]}, r"uint8 of shape \(14, 8, 8, 3\), and not .* 5 severities"),
        ({"fog": IMAGES / 255, "labels": LABELS}, "is float64 of shape"),
        ({"fog": IMAGES[..., 0], "labels": LABELS}, r"of shape \(15, 8, 8\)"),
        ({"fog": IMAGES, "labels": LABELS / 2}, "holds no list of whole numbers"),
        ({"fog": IMAGES, "labels": LABELS, "rain": IMAGES}, "rain.npy is none of the 19 published kinds"),
        ({"fog": np.array([print], dtype=object), "labels": LABELS}, "fog.npy is no array of numbers"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(files, sentence, tmp_path):
    for name, array in files.items():
        np.save(tmp_path / f"{name}.npy", array)
    with pytest.raises(DataError, match=sentence):
        find_published(str(tmp_path), CLASSES)


def test_an_array_that_is_cut_off_is_refused(tmp_path):
    write_arrays(tmp_path, {"fog": IMAGES}, LABELS)
    whole = (tmp_path / "fog.npy").read_bytes()
    for content in (whole[:-1], whole[:20], b"words"):
        (tmp_path / "fog.npy").write_bytes(content)
        with pytest.raises(DataError, match="fog.npy is no array of numbers .*copy it again"):
            find_published(str(tmp_path), CLASSES)


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    write_arrays(tmp_path, {"fog": IMAGES}, LABELS)
    (tmp_path / "frost.npy").symlink_to("nowhere")
    with pytest.raises(DataError, match="frost.npy cannot be read: No such file or directory; copy them again"):
        find_published(str(tmp_path), CLASSES)


def test_folders_of_other_classes_are_refused(tmp_path):
    write_folder(tmp_path / "fog/1", 2)
    with pytest.raises(DataError, match="has 2 classes and the model 3; 'right' is only on one side"):
        find_published(str(tmp_path), CLASSES)


def test_folders_without_images_and_kinds_that_lie_there_twice_are_refused(tmp_path):
    for name in CLASSES:
        (tmp_path / "empty/fog/1" / name).mkdir(parents=True)
    with pytest.raises(DataError, match="fog/1 holds no images; unpack them again"):
        find_published(str(tmp_path / "empty"), CLASSES)
    write_folder(tmp_path / "twice/fog/1", 3)
    write_folder(tmp_path / "twice/weather/fog/1", 3)
    with pytest.raises(DataError, match="has fog 1 twice: .*fog/1 and .*weather/fog/1; move one elsewhere"):
        find_published(str(tmp_path / "twice"), CLASSES)


def test_damage_that_is_made_here_is_among_the_published():
    assert {kind for kind in KINDS if PUBLISHED[kind] != EXTRA} == set(KINDS)
    assert sum(group != EXTRA for group in PUBLISHED.values()) == 15


def test_images_are_told_from_text_also_where_they_would_be_refused(tmp_path):
    write_folder(tmp_path / "one", 1)
    (tmp_path / "gifs/a").mkdir(parents=True)
    (tmp_path / "gifs/a/1.GIF").write_bytes(b"GIF89a")
    write_arrays(tmp_path / "damaged", {"fog": IMAGES[:3]}, LABELS)
    write_pickles(tmp_path / "pickles/cifar-10-batches-py", *squares(18, size=32))
    (tmp_path / "idx").mkdir()
    write_idx(tmp_path / "idx/train-images-idx3-ubyte", IMAGES[..., 0])
    (tmp_path / "packed").mkdir()
    write_packed(tmp_path / "packed/cifar10_jpeg_train.npz", IMAGES, LABELS)
    for name in ("damaged", "pickles", "idx", "packed"):
        (tmp_path / name / "readme.html").write_text("words")
    for name in ("one", "one/left/0000.png", "gifs", "damaged", "pickles", "idx", "packed"):
        assert are_images(str(tmp_path / name)), name


def test_text_with_pictures_and_other_arrays_are_no_images(tmp_path):
    docs = write_folder(tmp_path / "docs", 30)
    for number in range(8):
        (docs / f"{number}.md").write_text("words")
    (tmp_path / "arrays").mkdir()
    for name in ("labels", "embeddings"):
        np.save(tmp_path / f"arrays/{name}.npy", LABELS)
    (tmp_path / "empty").mkdir()
    for name in ("docs", "docs/1.md", "arrays", "empty", "nowhere.png"):
        assert not are_images(str(tmp_path / name)), name
