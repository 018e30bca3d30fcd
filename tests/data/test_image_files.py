"""Images of every kind are found and read; what is broken, hostile or of another shape is one clear sentence."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest

from tests.images import CLASSES, encoded, squares, write_folder, write_idx, write_packed, write_pickles
from vqmoe_ds.data import image_files, image_splits
from vqmoe_ds.data.image_files import find_images
from vqmoe_ds.data.image_pickles import read_pickle
from vqmoe_ds.data.image_published import are_images
from vqmoe_ds.data.image_splits import Wanted, remedy
from vqmoe_ds.runtime.errors import DataError

COLOUR, GREY = Wanted(8, 3, False), Wanted(8, 1, False)


def whole(split, wanted=COLOUR) -> np.ndarray:
    return np.stack([split.pixels(index).fit(wanted)[0] for index in range(len(split.labels_N))])


def test_a_folder_of_classes_is_read_in_the_order_of_names(tmp_path):
    found = find_images(str(write_folder(tmp_path)))
    images, labels = squares(30)
    order = np.argsort(labels, kind="stable")
    assert found.classes == CLASSES
    assert found.test is None
    assert found.train.labels_N.tolist() == labels[order].tolist()
    assert np.array_equal(whole(found.train), images[order])
    assert found.train.name(0).endswith("left/0000.png")


def test_train_and_test_folders_share_their_classes(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", 7, seed=1)
    found = find_images(str(tmp_path))
    assert len(found.train.labels_N) == 30
    assert np.bincount(found.test.labels_N).tolist() == [3, 2, 2]
    before = found.fingerprint()
    (tmp_path / "train/left/0000.png").rename(tmp_path / "train/right/0000.png")
    assert find_images(str(tmp_path)).fingerprint() != before
    (tmp_path / "test/upside_down").mkdir()
    (tmp_path / "test/upside_down/1.png").write_bytes(encoded(squares(1)[0][0]))
    with pytest.raises(DataError, match="a class that training lacks: 'upside_down'"):
        find_images(str(tmp_path))


def test_packed_jpegs_are_cut_at_their_offsets(tmp_path):
    images, labels = squares(12)
    write_packed(tmp_path / "cifar10_jpeg_train.npz", images, labels)
    write_packed(tmp_path / "cifar10_jpeg_test.npz", images[:4], labels[:4])
    found = find_images(str(tmp_path))
    assert (found.classes, len(found.test.labels_N)) == (CLASSES, 4)
    assert np.abs(whole(found.train).astype(int) - images).mean() < 20  # JPEG loses some
    assert find_images(str(tmp_path / "cifar10_jpeg_train.npz")).test is None


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": np.array([print], dtype=object)},  # a pickle
        {"offsets": np.array([0, 5], np.uint32)},
        {"labels": np.zeros((3, 3), np.uint8)},
        {"payload": np.zeros(3)},
    ],
)
def test_an_archive_that_does_not_fit_together_is_refused(changes, tmp_path):
    write_packed(tmp_path / "x.npz", *squares(3), **changes)
    with pytest.raises(DataError, match="is no archive of packed images"):
        find_images(str(tmp_path / "x.npz"))


def test_what_unpacks_to_more_than_anything_needs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "LARGEST_ARRAYS", 10_000)
    write_packed(tmp_path / "x.npz", *squares(3), payload=np.zeros(20_000, np.uint8))
    with pytest.raises(DataError, match="it unpacks to more than"):
        find_images(str(tmp_path / "x.npz"))
    monkeypatch.setattr(image_splits, "MOST_PIXELS", 63)
    with pytest.raises(ValueError, match="it has 8 x 8 pixels, too many to unpack"):
        find_images(str(write_folder(tmp_path / "a", 6))).train.pixels(0)


def test_pickles_of_cifar10_give_rows_of_three_planes(tmp_path):
    images, labels = squares(18, size=32)
    write_pickles(tmp_path / "cifar-10-batches-py", images, labels)
    found = find_images(str(tmp_path))
    assert found.classes == CLASSES
    assert np.array_equal(whole(found.train, Wanted(32, 3, False)), images[:12])
    assert np.array_equal(found.test.labels_N, labels[12:])


def python2(array: np.ndarray, labels: list[int]) -> bytes:
    """The bytes that Python 2's cPickle wrote: protocol 2, byte strings, numpy's names of then."""
    text = lambda s: b"U" + bytes([len(s)]) + s  # noqa: E731
    shape = b"".join(b"M" + struct.pack("<H", n) for n in array.shape)
    data = array.tobytes()
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2
    dtype += b"K\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
    state = b"(K\x01(" + shape + b"t" + dtype + b"\x89T" + struct.pack("<I", len(data)) + data + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"
    return b"\x80\x02}q\x01(" + text(b"data") + made + state + text(b"labels") + numbers + b"u."


def test_the_original_pickles_of_python_2_are_read(tmp_path):
    rows = np.arange(2 * 3072, dtype=np.int64).astype(np.uint8).reshape(2, 3072)
    (tmp_path / "batch").write_bytes(python2(rows, [1, 0]))
    plain = pickle.loads((tmp_path / "batch").read_bytes(), encoding="bytes")  # numpy's own answer
    found = read_pickle(tmp_path / "batch")
    assert np.array_equal(found[b"data"], rows) and np.array_equal(plain[b"data"], rows)
    assert found[b"labels"] == [1, 0]


class Runs:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "payload",
    [
        pickle.dumps({b"data": Runs()}, protocol=4),
        pickle.dumps({b"data": Runs()}, protocol=0),
        b"\x80\x02cnumpy\nndarray\n(K\x05tR.",  # an array by its class, of any size
        b"\x80\x02cbuiltins\neval\nU\x011\x85R.",
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # a memo of 16 GB
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00.",  # bytes of a size of their own choice
        python2(np.zeros((2, 3072), np.uint8), [1, 0])[:-40],
        b"",
    ],
)
def test_a_pickle_that_asks_for_more_is_refused_and_never_run(payload, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batch").write_bytes(payload)
    with pytest.raises(DataError, match="nothing of it was executed"):
        read_pickle(tmp_path / "batch")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_plain_and_compressed(packed, tmp_path):
    images, labels = squares(9, channels=1)
    for split in ("train", "t10k"):
        for name, array in (("images-idx3", images[..., 0]), ("labels-idx1", labels)):
            file = tmp_path / f"{split}-{name}-ubyte"
            write_idx(file, array)
            if packed:
                file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
                file.unlink()
    found = find_images(str(tmp_path))
    assert found.classes == ("0", "1", "2")
    assert np.array_equal(whole(found.test, GREY), images)
    file = next(tmp_path.glob("train-images*"))
    content = gzip.decompress(file.read_bytes()) if packed else file.read_bytes()
    file.write_bytes(gzip.compress(content[:-1]) if packed else content[:-1])
    with pytest.raises(DataError, match="is no idx file of 3 dimension.*cut off"):
        find_images(str(tmp_path))


def test_one_class_or_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="do not exist"):
        find_images(str(tmp_path / "nowhere"))
    (tmp_path / "text.txt").write_text("words")
    with pytest.raises(DataError, match="holds no labelled images that are known"):
        find_images(str(tmp_path))
    assert not are_images(str(tmp_path))
    write_folder(tmp_path / "one", 1)
    with pytest.raises(DataError, match=r"all of one class \(left\)"):
        find_images(str(tmp_path / "one"))
    assert are_images(str(write_folder(tmp_path / "two", 2)))


def test_hidden_files_and_folders_are_no_images(tmp_path):
    folder = write_folder(tmp_path / "a", 6)
    (folder / ".ipynb_checkpoints").mkdir()
    for copy in (folder / ".ipynb_checkpoints/0000.png", folder / "left/._0000.png"):
        copy.write_bytes((folder / "left/0000.png").read_bytes())
    found = find_images(str(folder))
    assert found.classes == CLASSES and len(found.train.labels_N) == 6


def test_a_link_that_leads_nowhere_and_a_name_without_end_are_refused(tmp_path):
    folder = write_folder(tmp_path / "a", 6)
    (folder / "left/a.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"image .*left/a.png cannot be read \(No such file or directory\); remove it"):
        find_images(str(folder)).fingerprint()
    with pytest.raises(DataError, match="do not exist; give a folder of images"):
        find_images("n" * 300)


def test_images_of_other_shapes_say_what_is_wrong(tmp_path):
    found = find_images(str(write_folder(tmp_path / "a", 6, size=6)))
    with pytest.raises(ValueError, match="it is 6 x 6 pixels, and model.image_size=8"):
        found.train.pixels(0).fit(COLOUR)
    assert found.train.pixels(0).fit(Wanted(8, 3, True))[0].shape == (8, 8, 3)
    with pytest.raises(ValueError, match="it has 3 channels, and model.channels=1"):
        found.train.pixels(0).fit(Wanted(6, 1, False))
    grey = find_images(str(write_folder(tmp_path / "g", 6, channels=1)))
    image, made_colour = grey.train.pixels(0).fit(COLOUR)
    assert made_colour and np.array_equal(image[..., 0], image[..., 2])
    assert grey.train.pixels(0).fit(GREY)[1] is False
    (tmp_path / "g/left/0000.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match="it is no image of PNG, JPEG"):
        grey.train.pixels(0)
    (tmp_path / "g/left/0000.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(ValueError, match="it is no image of PNG, JPEG"):  # Pillow would start Ghostscript
        grey.train.pixels(0)


def deep_png(image: np.ndarray) -> bytes:
    """RGB of 16 bits, which Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = image.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(image: np.ndarray, mode: str, **options: object) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_transparent_and_deeper_images_are_refused_whatever_mode_pillow_gives_them(tmp_path):
    image = squares(1)[0][0]
    folder = write_folder(tmp_path, 6)
    for blob in (
        saved(image, "RGBA"),
        saved(image, "P", transparency=3),
        saved(image, "RGB", transparency=(1, 2, 3)),
        saved(image, "L", transparency=3),
        b"P5 8 8 65535\n" + bytes(8 * 8 * 2),
        deep_png(image),
        b"P6 8 8 65535\n" + bytes(8 * 8 * 6),
        b"P3 1 1 256\n1 2 3\n",
    ):
        (folder / "left/0000.png").write_bytes(blob)
        split = find_images(str(folder)).train
        with pytest.raises(ValueError, match="it is transparent or of more than 8 bits"):
            split.pixels(0)
        assert "convert transparent and deeper ones to 8-bit RGB" in remedy(split)
    for blob in (saved(image, "P"), saved(image, "1"), b"P6 8 8 15\n" + bytes(8 * 8 * 3)):
        (folder / "left/0000.png").write_bytes(blob)
        assert find_images(str(folder)).train.pixels(0).fit(COLOUR)[0].shape == (8, 8, 3)


def test_labels_count_where_only_samples_of_the_files_do(tmp_path, monkeypatch):
    images, labels = squares(9, channels=1)
    write_idx(tmp_path / "train-images-idx3-ubyte", images[..., 0])

    def fingerprint(labels: np.ndarray) -> str:
        write_idx(tmp_path / "train-labels-idx1-ubyte", labels)
        return find_images(str(tmp_path)).fingerprint()

    whole = fingerprint(labels)
    monkeypatch.setattr(image_splits, "of_pieces", lambda _: "samples")
    assert fingerprint(labels) == fingerprint(2 - labels), "checkpoints know the digest of small files without labels"
    monkeypatch.setattr(image_splits, "WHOLE", 0)
    assert fingerprint(labels) not in (fingerprint(2 - labels), whole)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("empty", "train/zebra holds no images and would be a class without any; add some, or move"),
        ("nested", "train/zebra holds no images"),
        ("gif", "train/zebra/a.GIF is no image of a kind that is read; convert .GIF files to PNG"),
        ("gif among others", "train/left/a.gif is no image of a kind that is read"),
        ("link", "train/zebra is a link to nowhere, which does not exist; remove it"),
        ("test", "test/left holds no images"),
        ("deeper", "left/more/0.png is not where the other images of .*train/left are; move all into one folder"),
        ("beside", "left/[^/]*png is not where the other images of .*train/left are"),
    ],
)
def test_no_class_and_no_image_is_left_out_without_a_word(how, sentence, tmp_path):
    for split in ("train", "test"):
        write_folder(tmp_path / split, 6)
    zebra, blob = tmp_path / "train/zebra", b"GIF89a"
    if how == "link":
        zebra.symlink_to("nowhere")
    elif how == "gif among others":
        (tmp_path / "train/left/a.gif").write_bytes(blob)
    elif how in ("deeper", "beside"):
        inner = tmp_path / "train/left" / {"deeper": "more", "beside": "images"}[how]
        inner.mkdir()
        next((tmp_path / "train/left").glob("*.png")).rename(inner / "0.png")
    elif how == "test":
        for file in (tmp_path / "test/left").iterdir():
            file.unlink()
    else:
        (zebra / "deeper").mkdir(parents=True)
        (zebra / {"gif": "a.GIF", "nested": "deeper/a.png", "empty": ".a.png"}[how]).write_bytes(blob)
    with pytest.raises(DataError, match=sentence):
        find_images(str(tmp_path))


def test_a_class_without_a_name_in_utf8_is_refused(tmp_path):
    folder = write_folder(tmp_path, 6)
    (folder / "left").rename(os.fsdecode(os.fsencode(folder) + b"/\xff"))
    with pytest.raises(DataError, match=r"have a class whose name is no UTF-8, '.udcff'; rename it"):
        find_images(str(folder))


def test_a_missing_file_is_named(tmp_path):
    write_pickles(tmp_path, *squares(18, size=32))
    (tmp_path / "test_batch").unlink()
    with pytest.raises(DataError, match="test_batch cannot be read: No such file or directory; copy them again"):
        find_images(str(tmp_path))
