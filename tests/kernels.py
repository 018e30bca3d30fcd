"""Where a test of Triton kernels runs: in the interpreter on CPU, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch

from vqmoe_ds.moe.kernels.triton_support import interpreted, interpreting, use_triton


def why_not_interpreted() -> str | None:
    """Why kernels cannot run in the interpreter here; None where they can."""
    if not interpreting():
        return "Triton is not installed, or was imported to compile for this machine's GPU"
    old = tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
    if old and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        return "the interpreter of Triton before 3.7 does not run with numpy 2.4 or later"
    return None


DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(why_not_interpreted() is not None, reason=str(why_not_interpreted()))),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
    ),
]


BY = [
    "pytorch",
    *(pytest.param(by.values[0], marks=by.marks, id=name) for by, name in zip(DEVICES, ["triton", "gpu"], strict=True)),
]
"""By PyTorch's operations, by kernels in the interpreter, by kernels on a GPU."""


def by_each() -> Any:
    """A fixture that runs every test of its file by each of ``BY``, and new tensors are where that computes."""

    @pytest.fixture(params=BY, autouse=True)
    def computed(request: pytest.FixtureRequest) -> Iterator[str]:
        by = request.param
        with nullcontext() if by == "pytorch" else kernels_on(by), torch.device("cpu" if by == "pytorch" else by):
            yield by

    return computed


@contextmanager
def kernels_on(device: str) -> Iterator[None]:
    """Inside, tensors of this device go to the kernels."""
    if device == "cuda":
        assert use_triton(torch.empty(1, device=device))
        yield
        return
    with interpreted():
        yield
