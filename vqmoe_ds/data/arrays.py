"""Arrays of numbers in ``.npy`` files, mapped and not read; arrays of objects, which are pickles, cannot be."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np

from vqmoe_ds.runtime.errors import reason_of


def mapped_array(path: str | Path, links: bool) -> np.ndarray:
    """The array of a file.

    Args:
        links: whether the file may be a symbolic link.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no array of numbers; the message is the reason.
    """
    try:
        # Opening a FIFO under this name would wait for a writer for ever.
        if not stat.S_ISREG(os.stat(path, follow_symlinks=links).st_mode):
            raise ValueError("it is not a regular file")
        # Not numpy.load: this reads neither pickles nor the zip of an .npz, whatever the bytes say.
        return np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # numpy parses the header as Python's syntax, with all that can go wrong there
        raise ValueError(reason_of(error, 200)) from None
