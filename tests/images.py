"""Small labelled images: squares whose place is their class, as files of every kind."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = ("left", "middle", "right")


def squares(count: int, seed: int = 0, size: int = 8, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """uint8 ``[count, size, size, channels]`` of noise with a bright column where the label says, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    images = rng.integers(0, 90, (count, size, size, channels), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        first = (size // 3) * label
        image[:, first : first + 2] += 150
    return images, labels


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, kind)
    return buffer.getvalue()


def write_folder(folder: Path, count: int = 30, seed: int = 0, **shape: int) -> Path:
    """``CLASS/NAME.png``."""
    for number, (image, label) in enumerate(zip(*squares(count, seed, **shape), strict=True)):
        (folder / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        (folder / CLASSES[label] / f"{number:04}.png").write_bytes(encoded(image))
    return folder


def write_packed(file: Path, images: np.ndarray, labels: np.ndarray, /, **changes: Any) -> None:
    """JPEGs end to end behind a header of two bytes that they share."""
    blobs = [encoded(image, "JPEG") for image in images]
    assert len({blob[:2] for blob in blobs}) == 1
    arrays = {
        "prefix": np.frombuffer(blobs[0][:2], np.uint8),
        "payload": np.frombuffer(b"".join(blob[2:] for blob in blobs), np.uint8),
        "offsets": np.cumsum([0, *(len(blob) - 2 for blob in blobs)]).astype(np.uint32),
        "labels": labels.astype(np.uint8),
        "classes": np.array(CLASSES),
    }
    np.savez(file, **{**arrays, **changes})


def write_idx(file: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    file.write_bytes(header + array.astype(np.uint8).tobytes())


def write_pickles(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """As CIFAR-10's: two training batches, a test batch and the names."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    for name, part in (("data_batch_1", slice(0, 6)), ("data_batch_2", slice(6, 12)), ("test_batch", slice(12, 18))):
        (folder / name).write_bytes(pickle.dumps({b"data": rows[part], b"labels": labels[part].tolist()}, protocol=4))
    names = [name.encode() for name in CLASSES]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=4))


def write_arrays(folder: Path, kinds: dict[str, np.ndarray], labels: np.ndarray) -> Path:
    """As CIFAR-10-C: ``KIND.npy`` of five severities one after the other, and ``labels.npy``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in {**kinds, "labels": labels.astype(np.uint8)}.items():
        np.save(folder / f"{name}.npy", array)
    return folder
