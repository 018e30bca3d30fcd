"""Counts what would make the host wait for a GPU, while the same code runs on a CPU."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vqmoe_ds.moe.experts import StackedExperts
from vqmoe_ds.moe.kernels.grouped import grouped_experts

PACKAGE = Path(__file__).resolve().parent.parent / "vqmoe_ds"
METHODS = ("tolist", "numpy", "cpu")
"""On a CPU they are no operators; scalars are read by ``_local_scalar_dense``."""
OPERATORS = (
    *("_local_scalar_dense", "nonzero", "bincount", "masked_select", "equal"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
)


class HostReads:
    """Where the package read values of tensors: ``file:line operation``, one entry each time."""

    def __init__(self) -> None:
        self.places: list[str] = []

    def note(self, operation: str) -> None:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(str(PACKAGE))]
        if frames:  # what DeepSpeed and the tests read is not ours
            place = f"{Path(frames[-1].filename).relative_to(PACKAGE)}:{frames[-1].lineno} {operation}"
            self.places.append(place)


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype is torch.bool for index in args[1]
        )
        counted = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in OPERATORS or masks or counted:
            self.reads.note(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostReads]:
    """Run experts as on a GPU, by grouped products, and count."""
    with monkeypatch.context() as patch:
        patch.setattr(
            StackedExperts,
            "forward",
            lambda self, x_PD, ends_E: grouped_experts(x_PD, self.w1, self.w2, self.w3, ends_E),
        )
        reads = HostReads()
        for name in METHODS:
            patch.setattr(Tensor, name, _noting(reads, name))
        with _Operators(reads):
            yield reads


def _noting(reads: HostReads, name: str) -> Any:
    method = getattr(Tensor, name)

    def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        reads.note(name)
        return method(tensor, *args, **kwargs)

    return noted
