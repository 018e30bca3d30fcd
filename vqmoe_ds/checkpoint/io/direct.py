"""Reads past the system's page cache, for data that would only push one another out of it.

Where a file is larger than the memory left, caching what is read costs more of a processor than reading it.
"""

from __future__ import annotations

import mmap
import os
import threading

import numpy as np
from torch import Tensor

from vqmoe_ds.checkpoint.io.archive import raw_bytes
from vqmoe_ds.runtime.files import open_regular

_BLOCK = 4096
"""Bytes that places, lengths and memory of such a read must be multiples of; disks ask for 512 or 4096."""
_MEMORY = 1 << 20
"""Bytes that each reading thread has for them."""


class _Thread(threading.local):
    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, _MEMORY)  # begins at a page, unlike a tensor


_thread = _Thread()


def read_past_cache(path: str, offset: int, out: Tensor) -> bool:
    """Fill a flat tensor with the bytes of a file from ``offset`` on.

    Returns:
        False where this file cannot be read so, whatever the reason: the caller reads it as usual, which either works
        (a file system without such reads) or has the right sentence. ``out`` may have been written to.
    """
    into, done = np.frombuffer(raw_bytes(out), np.uint8), 0
    memory = _thread.memory
    try:
        with open_regular(path, links=True, flags=os.O_DIRECT) as file:
            while done < len(into):
                skip = (offset + done) % _BLOCK
                size = min(_MEMORY, -(-(skip + len(into) - done) // _BLOCK) * _BLOCK)
                got = os.preadv(file.fileno(), [memoryview(memory)[:size]], offset + done - skip)
                new = min(got - skip, len(into) - done)
                if new <= 0:
                    return False
                # NumPy copies on this thread and lets the others run, as neither PyTorch nor a memoryview does.
                np.copyto(into[done : done + new], np.frombuffer(memory, np.uint8, new, skip))
                done += new
    except OSError:
        return False
    return True
