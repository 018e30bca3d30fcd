"""Where a test of Triton kernels runs: in the interpreter on CPU, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from vqmoe_ds.moe.kernels.triton_support import interpreted, interpreting, use_triton

_NO_INTERPRETER = "Triton is not installed, or was imported to compile for this machine's GPU"
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not interpreting(), reason=_NO_INTERPRETER)),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
    ),
]


@contextmanager
def kernels_on(device: str) -> Iterator[None]:
    """Inside, tensors of this device go to the kernels."""
    if device == "cuda":
        assert use_triton(torch.empty(1, device=device))
        yield
        return
    with interpreted():
        yield
