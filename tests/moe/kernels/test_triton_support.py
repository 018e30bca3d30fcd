"""Where kernels run, and that nothing is lost where they cannot."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from vqmoe_ds.moe.kernels import triton_support
from vqmoe_ds.moe.kernels.triton_support import block_size, interpreted, interpreting, use_triton, why_no_triton


class _Refuses:
    """A kernel whose launch fails."""

    def __getitem__(self, grid: object) -> object:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")


def test_a_failing_launch_leaves_cuda_to_pytorch_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton_support, "triton", object())
    monkeypatch.setattr(triton_support, "_probe", _Refuses())
    why_no_triton.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not any(use_triton(SimpleNamespace(is_cuda=True)) for _ in range(3))
    finally:
        why_no_triton.cache_clear()
    (record,) = caplog.records
    assert record.getMessage() == (
        "GPU kernels run in PyTorch's own operations: Triton cannot run a kernel here (Failed to find C compiler.)"
    )


def test_a_tensor_of_another_gpu_than_the_current_one_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "why_no_triton", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    tensors = [SimpleNamespace(is_cuda=True, device=torch.device("cuda", number)) for number in range(3)]
    assert [use_triton(tensor) for tensor in tensors] == [False, True, False]


def test_cpu_tensors_stay_with_pytorch_outside_of_the_interpreter() -> None:
    assert not use_triton(torch.empty(1))
    if interpreting():
        with interpreted():
            assert use_triton(torch.empty(1))
            assert not use_triton(torch.empty(1, device="meta"))
        assert not use_triton(torch.empty(1))
    else:
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), interpreted():
            pass


def test_without_triton() -> None:
    """All modules with kernels import and compute."""
    script = """
import sys
sys.modules["triton"] = None  # import fails
import torch
from vqmoe_ds.models import loss, rotary
from vqmoe_ds.moe.kernels import codes, combine, grouped, swiglu, triton_support
assert triton_support.triton is None and not triton_support.use_triton(torch.empty(1))
assert swiglu.swiglu(torch.ones(2, 8), torch.ones(2, 8)).shape == (2, 8)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_block_size() -> None:
    assert [block_size(width, 64) for width in (0, 1, 2, 3, 24, 64, 65, 5000)] == [1, 1, 2, 4, 32, 64, 64, 64]
