"""Triton where it is there and works; PyTorch's own operations everywhere else.

Kernels are decorated with ``kernel`` and launched only for tensors of which ``use_triton`` says yes. The CPU builds of
PyTorch come without Triton: a kernel stays a plain function there that nobody calls. Tests run kernels on CPU tensors
in Triton's interpreter, inside ``interpreted()``; TRITON_INTERPRET=1 must be set before Triton is first imported.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

_interpreted = False


def kernel(function: Callable[..., None]) -> Any:
    """Decorator of a Triton kernel: ``triton.jit`` where Triton is installed.

    Triton reads annotations and takes ``int`` for a 64-bit number, even of an address: it is shown ``tl.constexpr``
    alone. Kernels follow ``from __future__ import annotations``, for ``tl`` may be None.
    """
    if triton is None:
        return function
    shown = {name: hint for name, hint in function.__annotations__.items() if "constexpr" in hint}
    function.__annotations__ = shown
    return triton.jit(function)


def use_triton(tensor: Tensor) -> bool:
    """Whether kernels take this tensor: on the current GPU where Triton works, on CPU inside ``interpreted()``."""
    if tensor.is_cuda:
        # Triton launches on the current device, whatever the tensor's.
        return why_no_triton() is None and tensor.device.index == torch.cuda.current_device()
    # Asked by name, for a meta tensor is not on CUDA either and has no memory for a kernel.
    return _interpreted and tensor.device.type == "cpu"


def block_size(width: int, largest: int, smallest: int = 1) -> int:
    """Columns that a program holds: all of a row where they fit. Blocks are powers of two."""
    return max(smallest, min(1 << max(0, width - 1).bit_length(), largest))


@functools.cache
def why_no_triton() -> str | None:
    """The reason for which kernels cannot run on the current CUDA device, as a clause; None if they can.

    Triton compiles a launcher with the machine's C compiler at the first launch, which may fail in many ways: one tiny
    kernel is tried once per process, and its failure leaves everything to PyTorch with one line in the log.
    """
    reason = "Triton is not installed"
    if triton is not None:
        try:
            _probe[(1,)](torch.empty(1, device="cuda"))
            return None
        except Exception as error:  # whatever Triton, the compiler or the driver raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = f"Triton cannot run a kernel here ({lines[0]})"
    logging.getLogger(__name__).warning("GPU kernels run in PyTorch's own operations: %s", reason)
    return reason


@kernel
def _probe(out_ptr: tl.tensor) -> None:
    tl.store(out_ptr, 1.0)


def interpreting() -> bool:
    """Whether Triton was imported for its interpreter."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, kernels take CPU tensors too. For tests: the interpreter is thousands of times slower than PyTorch.

    Raises:
        RuntimeError: if Triton was imported to compile.
    """
    global _interpreted
    if not interpreting():
        raise RuntimeError("Triton's interpreter needs TRITON_INTERPRET=1 before Triton is first imported")
    before, _interpreted = _interpreted, True
    try:
        yield
    finally:
        _interpreted = before
