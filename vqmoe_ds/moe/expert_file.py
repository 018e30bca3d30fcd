"""Frozen experts in a file without a name, for fine-tuning in bounded memory.

The parameters of the experts are views of that file, so whoever fills, saves or restores them does so as ever, and
their pages belong to the system, which takes them back at will. What computes never touches them: an ``ExpertStore``
reads experts from the same file into memory of its own.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from vqmoe_ds.moe.expert_store import PARTS, ExpertStore, Source, bind_store
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError


def experts_in_file(layers: Sequence[MoELayer], folder: Path, dtype: torch.dtype, budget: int) -> ExpertStore:
    """Give the parameters of ``StoredExperts`` their values in a file, and the layers a store that reads it.

    Args:
        layers: MoE layers of a model, with all experts on this rank.
        folder: where the file is made; it has no name, and is gone with the process.
        dtype: of the parameters.
        budget: bytes of experts that computing holds, at most.

    Raises:
        ConfigError: the folder has no room, or the budget is smaller than one expert.
    """
    first, count = layers[0].config, len(layers)
    width, hidden, experts = first.width, first.moe.expert_hidden, first.moe.num_experts
    values = hidden * width
    file = _nameless_file(folder, count * len(PARTS) * experts * values * dtype.itemsize)
    # Shared, as is mmap's default: what is written to the parameters must reach the file that `fetch` reads.
    pages = mmap.mmap(file.fileno(), 0)
    keys = [(layer, part) for layer in range(count) for part in PARTS]
    places = {key: number * experts * values * dtype.itemsize for number, key in enumerate(keys)}
    for (layer, part), place in places.items():
        stack = torch.frombuffer(pages, dtype=dtype, count=experts * values, offset=place)
        _replace(layers[layer].experts, part, stack)

    def fetch(layer: int, expert: int, part: str, out: Tensor) -> None:
        _read(file, places[layer, part] + expert * values * dtype.itemsize, out)

    store = ExpertStore(Source("this model", count, experts, width, hidden, dtype, fetch), budget)
    bind_store(layers, store)
    return store


def _nameless_file(folder: Path, size: int) -> IO[bytes]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open for as long as the store)
        os.posix_fallocate(file.fileno(), 0, size)  # else the disk could be full when a page is written, which kills
    except OSError as error:
        raise ConfigError(
            f"--expert_memory keeps {size:,} bytes of frozen experts in a file in {folder}, which cannot be made "
            f"({error.strerror}); make room, or take another --run_dir",
            local=True,  # every rank makes one of its own
        ) from None
    return file


def _read(file: IO[bytes], place: int, out: Tensor) -> None:
    """Fill a contiguous tensor from a place of the file."""
    rest = out.view(-1).view(torch.uint8).numpy().data
    try:
        while len(rest):
            # With a place of its own: several threads read through one descriptor, whose position they would share.
            count = os.preadv(file.fileno(), [rest], place)
            rest, place = rest[count:], place + count
    except OSError as error:
        raise CheckpointError(
            f"frozen experts cannot be read from their file ({error.strerror}); start again", local=True
        ) from None


def _replace(experts: nn.Module, part: str, values: Tensor) -> None:
    """Put values in the place of a parameter, with what others have noted at it."""
    old = getattr(experts, part)
    new = nn.Parameter(values.view(old.shape), requires_grad=False)
    vars(new).update(vars(old))
    setattr(experts, part, new)
