"""Parquet files of images as ``datasets`` writes them, and what is wrong with others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.images import CLASSES, encoded, squares
from vqmoe_ds.checkpoint.whereabouts import with_whole_paths
from vqmoe_ds.config.load import load_config
from vqmoe_ds.data.image_files import find_images
from vqmoe_ds.data.image_splits import Wanted
from vqmoe_ds.data.images import open_images
from vqmoe_ds.runtime.errors import DataError

IMAGES, LABELS = squares(30)


def write_table(file: Path, rows: slice = slice(None), group: int = 7, **columns) -> Path:
    """As ``datasets`` without the names of the classes; ``columns`` replace or add some."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": encoded(image), "path": None} for image in IMAGES[rows]]
    table = {"image": cells, "label": LABELS[rows], **columns}
    pq.write_table(
        pa.table({key: value for key, value in table.items() if value is not None}), file, row_group_size=group
    )
    return file


def whole(split) -> np.ndarray:
    return np.stack([split.pixels(index).fit(Wanted(8, 3, False))[0] for index in range(len(split.labels_N))])


@pytest.mark.parametrize("deeper", ["", "data"])
def test_what_datasets_writes_is_read(deeper, tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    told = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    for name, rows in (
        ("train-00000-of-00002", slice(0, 14)),
        ("train-00001-of-00002", slice(14, 24)),
        ("test", slice(24, 30)),
    ):
        cells = {"img": [Image.fromarray(image) for image in IMAGES[rows]], "label": LABELS[rows]}
        (tmp_path / deeper).mkdir(exist_ok=True)
        datasets.Dataset.from_dict(cells, features=told).to_parquet(str(tmp_path / deeper / f"{name}.parquet"))
    found = find_images(str(tmp_path))
    assert found.classes == CLASSES and len(found.files) == 3
    assert (
        found.train.labels_N.tolist() == LABELS[:24].tolist() and found.test.labels_N.tolist() == LABELS[24:].tolist()
    )
    assert np.array_equal(whole(found.train), IMAGES[:24]) and np.array_equal(whole(found.test), IMAGES[24:])
    config = load_config("vit-cifar", None, {"model.image_size": 8, "data.path": str(tmp_path)}).config
    batches, held = open_images(config).open(config, tmp_path / "cache")
    assert np.array_equal(held.read(np.arange(6)).inputs_BS, IMAGES[24:]) and len(batches.images) == 24


def hub_set(names: list[str] | None = None, **splits: slice):
    import datasets
    from PIL import Image

    label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    told = datasets.Features({"image": datasets.Image(), "label": label})

    def rows(part: slice):
        return {"image": [Image.fromarray(image) for image in IMAGES[part]], "label": LABELS[part]}

    return datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(rows(part), features=told) for name, part in splits.items()}
    )


def test_data_sets_of_the_hub_are_read_as_their_files_would_be(monkeypatch, tmp_path):
    import datasets

    asked = []
    loaded = hub_set(list(CLASSES), train=slice(0, 24), validation=slice(24, 27), test=slice(24, 30))
    monkeypatch.setattr(datasets, "load_dataset", lambda *told: asked.append(told) or loaded)
    found = find_images("hub:some/squares:plain")
    assert asked == [("some/squares", "plain")] and found.classes == CLASSES
    assert np.array_equal(whole(found.train), IMAGES[:24]) and np.array_equal(whole(found.test), IMAGES[24:])
    assert found.train.name(3) == "image 3 of hub:some/squares:plain, train"
    config = load_config("vit-cifar", None, {"model.image_size": 8, "data.path": "hub:some/squares"}).config
    assert with_whole_paths(config).data.path == "hub:some/squares"
    _, held = open_images(config).open(config, tmp_path / "cache")
    assert np.array_equal(held.read(np.arange(6)).inputs_BS, IMAGES[24:])
    before = find_images("hub:x").fingerprint()
    loaded = hub_set(list(CLASSES), train=slice(0, 23), test=slice(24, 30))
    assert find_images("hub:x").fingerprint() != before
    loaded["unsupervised"] = loaded["train"].remove_columns("label")
    assert len(find_images("hub:x").train.labels_N) == 23, "what is not read need have no labels"
    loaded = hub_set(all=slice(0, 30))
    found = find_images("hub:x")
    assert (found.classes, found.test, len(found.train.labels_N)) == (("0", "1", "2"), None, 30)


def test_what_the_hub_has_not_is_one_sentence(monkeypatch):
    import datasets

    def unreachable(*told: object) -> None:
        raise ConnectionError("no route\nto it")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"hub:x cannot be loaded \(ConnectionError: no route\); check name"):
        find_images("hub:x")
    other = hub_set(train=slice(0, 6)).rename_column("label", "kind")
    monkeypatch.setattr(datasets, "load_dataset", lambda *told: other)
    with pytest.raises(DataError, match="hub:x, train has no column label or labels or fine_label"):
        find_images("hub:x")


def test_one_file_without_names_has_numbers_for_classes(tmp_path):
    found = find_images(str(write_table(tmp_path / "squares.parquet")))
    assert (found.classes, found.test) == (("0", "1", "2"), None)
    assert found.train.name(9) == f"image 2 in row group 1 of {tmp_path}/squares.parquet"
    order = np.random.default_rng(0).permutation(30)
    with ThreadPoolExecutor(4) as pool:  # row groups come and go
        read = list(pool.map(lambda index: found.train.pixels(int(index)).fit(Wanted(8, 3, False))[0], order))
    assert np.array_equal(np.stack(read), IMAGES[order])


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"image": None, "picture": ["x"] * 30}, r"has no column image or img, only"),
        ({"label": None}, "has no column label or labels or fine_label"),
        ({"label": ["a"] * 30}, "has labels that are no whole numbers"),
        ({"label": [None, *LABELS[1:].tolist()]}, "has labels that are no whole numbers"),
        ({"label": LABELS - 1}, "have labels beyond their 2 classes"),
        ({"label": LABELS * 0}, "all of one class"),
        ({"label": LABELS * 10**9}, "has a label 2,000,000,000; number the classes 0, 1, 2, …, 65,536 at most"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(columns, sentence, tmp_path):
    write_table(tmp_path / "squares.parquet", **columns)
    with pytest.raises(DataError, match=sentence):
        find_images(str(tmp_path))


def test_damage_and_missing_parts_are_told(tmp_path):
    file = write_table(tmp_path / "a/train-00000-of-00002.parquet")
    with pytest.raises(DataError, match=r"has 1 of the 2 files train-\*.parquet; copy the others"):
        find_images(str(tmp_path / "a"))
    whole_file = file.read_bytes()
    file = tmp_path / "b.parquet"
    for content in (b"words", whole_file[:-20], whole_file[:100] + bytes(50) + whole_file[150:]):
        file.write_bytes(content)
        with pytest.raises((DataError, ValueError)):
            found = find_images(str(file))
            whole(found.train)
    rows = [{"bytes": None, "path": "somewhere.png"}] * 30
    found = find_images(str(write_table(tmp_path / "c.parquet", image=rows)))
    with pytest.raises(ValueError, match="its row has no bytes of an image"):
        found.train.pixels(3)
