"""Images decoded once: uint8 arrays in a folder, made by the first rank, sealed, and mapped by all.

Legend: N images, H pixels a side, C channels.
"""

from __future__ import annotations

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch.distributed as dist

from vqmoe_ds.data.image_splits import ImageFiles, Split, Wanted, remedy
from vqmoe_ds.data.index_cache import Shapes, publish, read_array, why_unsound, work_folder
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.ranks import from_first

_TOGETHER = 1024
"""Images that are decoded before they are written."""
_NAMED = 3
"""Images that cannot be used which a sentence names."""


def decoded(files: ImageFiles, wanted: Wanted, cache: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """uint8 ``[N, H, H, C]`` of the splits, ``train`` and ``test`` if there is one, and notes for the user.

    All ranks call it together; the first one decodes, unless a sound cache is there.

    Raises:
        DataError: images are broken or of another size (how many, and the first of them), or the cache cannot be kept.
    """
    splits = {"train": files.train} | ({} if files.test is None else {"test": files.test})
    notes: list[str] = []
    refusal, name = None, ""
    if not (dist.is_initialized() and dist.get_rank()):
        try:
            shape = f"{wanted.size}x{wanted.channels}{'r' if wanted.resize else ''}"
            name = f"images-{files.fingerprint()}-{files.stamp()}-{shape}"
            notes = _make(splits, wanted, cache / name)
        except DataError as error:
            refusal = str(error)
        except OSError as error:
            refusal = f"the decoded images cannot be kept in {cache} ({error.strerror}); set data.cache_dir"
    # Also the sign for the others that the folder is whole. With its name: they may see copies with other times.
    refusal, name = from_first((refusal, name))  # the others would wait for ever
    if refusal is not None:
        raise DataError(refusal)
    folder = cache / name
    try:
        return {name: read_array(_file(folder, name)) for name in splits}, notes
    except OSError as error:
        raise DataError(
            f"the decoded images in {folder} cannot be read here ({error.strerror}); name a folder that every machine "
            "sees with data.cache_dir",
            local=True,
        ) from None


def _file(folder: Path, split: str) -> Path:
    # index_cache.why_unsound looks shapes up by what follows the last dash.
    return folder / f"{split}-images.npy"


def _make(splits: dict[str, Split], wanted: Wanted, folder: Path) -> list[str]:
    """Decode all splits into ``folder``, under another name until they are whole; returns the notes."""
    shapes: Shapes = {"images": [_shape(split, wanted) for split in splits.values()]}
    if why_unsound(folder, shapes) is None:
        return []
    work = work_folder(folder)
    try:
        grey = sum(_decode(split, wanted, _file(work, name)) for name, split in splits.items())
        if not publish(work, folder) and (reason := why_unsound(folder, shapes)):
            raise OSError(errno.EEXIST, f"{folder}: {reason}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return [f"{grey:,} grey-scale images are read as images of three equal channels"] if grey else []


def _shape(split: Split, wanted: Wanted) -> tuple[int, ...]:
    return len(split.labels_N), wanted.size, wanted.size, wanted.channels


def _decode(split: Split, wanted: Wanted, file: Path) -> int:
    """Write the images of a split; returns how many of them were grey-scale and are not any more."""
    images_NHHC = np.lib.format.open_memmap(file, "w+", np.uint8, _shape(split, wanted))
    bad: list[str] = []
    grey = 0

    def one(index: int) -> tuple[np.ndarray, bool] | str:
        try:
            return split.pixels(index).fit(wanted)
        except ValueError as error:
            return f"{split.name(index)}: {error}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders let other threads run
        # Executor.map submits all that it is given, and keeps results until they are asked for.
        for start in range(0, len(images_NHHC), _TOGETHER):
            rows = range(start, min(start + _TOGETHER, len(images_NHHC)))
            for row, found in zip(rows, pool.map(one, rows), strict=True):
                if isinstance(found, str):
                    bad.append(found)
                else:
                    images_NHHC[row], was_grey = found
                    grey += was_grey
    if bad:
        more = f"; and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else ""
        raise DataError(
            f"{len(bad):,} of {len(images_NHHC):,} images cannot be used ({'; '.join(bad[:_NAMED])}{more}); "
            f"{remedy(split)}"
        )
    # Before seal reads the file: POSIX does not promise that reading sees what is only in a mapping.
    images_NHHC.flush()
    return grey
