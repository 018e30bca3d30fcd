"""SwiGLU's elementwise half, silu(gate) * up, in one pass over memory each way.

Legend: P rows, H expert hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.moe.kernels.triton_support import kernel, tl, triton, use_triton

_BLOCK = 1024  # elements a program


def swiglu(gate_PH: Tensor, up_PH: Tensor) -> Tensor:
    """silu(gate) * up, contiguous ``[P, H]``; computed in float32 and rounded once (float64 stays as it is)."""
    if not use_triton(gate_PH):
        return (F.silu(_wide(gate_PH)) * _wide(up_PH)).to(gate_PH.dtype)
    hidden_PH = torch.empty_like(gate_PH)
    if size := gate_PH.numel():
        _forward_kernel[(triton.cdiv(size, _BLOCK),)](gate_PH, up_PH, hidden_PH, size, BLOCK=_BLOCK)
    return hidden_PH


def swiglu_backward(g_PH: Tensor, gate_PH: Tensor, up_PH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``swiglu`` by its inputs, and its output once more, which the weight gradient of w2 needs.

    Args:
        g_PH: gradient of the output, contiguous; **consumed**: its memory holds the gradient of the gate afterwards.
        gate_PH: as given to ``swiglu``.
        up_PH: as given to ``swiglu``.

    Returns:
        Gradients of gate and of up, and the output, all ``[P, H]``.
    """
    if not use_triton(gate_PH):
        g, gate, up = _wide(g_PH), _wide(gate_PH), _wide(up_PH)
        sigmoid, silu = gate.sigmoid(), F.silu(gate)
        g_up_PH, hidden_PH = (g * silu).to(g_PH.dtype), (silu * up).to(g_PH.dtype)
        # Last: in float32 g is g_PH itself.
        return g_PH.copy_(g * up * (sigmoid * (1 + gate * (1 - sigmoid)))), g_up_PH, hidden_PH
    g_up_PH, hidden_PH = torch.empty_like(g_PH), torch.empty_like(g_PH)
    if size := g_PH.numel():
        grid = (triton.cdiv(size, _BLOCK),)
        _backward_kernel[grid](g_PH, gate_PH, up_PH, g_up_PH, hidden_PH, size, BLOCK=_BLOCK)
    return g_PH, g_up_PH, hidden_PH


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.element_size() < 4 else x


@kernel
def _forward_kernel(
    gate_ptr: tl.tensor, up_ptr: tl.tensor, hidden_ptr: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr
) -> None:
    # 64 bits, for P * H may pass 2^31.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden_ptr + at, gate * tl.sigmoid(gate) * up, mask=inside)


@kernel
def _backward_kernel(
    g_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    g_up_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    # In place: no other program reads these elements.
    tl.store(g_ptr + at, g * up * (sigmoid * (1 + gate * (1 - sigmoid))), mask=inside)
    tl.store(g_up_ptr + at, g * silu, mask=inside)
    tl.store(hidden_ptr + at, silu * up, mask=inside)
