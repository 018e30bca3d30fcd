"""Rotary positions (Su 2021) on the two halves of each head: (a, b) -> (a cos - b sin, b cos + a sin).

Legend: B batch, S sequence, A heads, H width of a head, F = H / 2 angles of a position; ``3`` stands for queries, keys
and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqmoe_ds.moe.kernels.triton_support import block_size, kernel, tl, triton, use_triton

_BLOCK = 2048  # angles that a program turns at a time


def rotate_qkv(qkv_BS3AH: Tensor, cos_SF: Tensor, sin_SF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turned queries and keys, and the values, each ``[B, A, S, H]``, of one projection.

    The values are copied too, so that the projection itself need not be kept, and the gradients of all three are
    written into one tensor.

    Args:
        qkv_BS3AH: the projection.
        cos_SF: cosines of the angles of these S positions, float32.
        sin_SF: sines of the same.
    """
    q_BSAH, k_BSAH, v_BSAH = _RotateQKV.apply(qkv_BS3AH, cos_SF.contiguous(), sin_SF.contiguous())
    return q_BSAH.transpose(1, 2), k_BSAH.transpose(1, 2), v_BSAH.transpose(1, 2)


def rotate(q_BSAH: Tensor, k_BSAH: Tensor, cos_SF: Tensor, sin_SF: Tensor) -> tuple[Tensor, Tensor]:
    """Turned queries and keys, each ``[B, A, S, H]``; angles as of ``rotate_qkv``."""
    q, k = _Rotate.apply(q_BSAH, k_BSAH, cos_SF.contiguous(), sin_SF.contiguous())
    return q.transpose(1, 2), k.transpose(1, 2)


class _RotateQKV(torch.autograd.Function):
    """``[B, S, 3, A, H]`` -> three tensors ``[B, S, A, H]``; the gradient is turned back into one tensor."""

    @staticmethod
    def forward(ctx: Any, qkv_BS3AH: Tensor, cos_SF: Tensor, sin_SF: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos_SF, sin_SF)
        batch, length, _, heads, width = qkv_BS3AH.shape
        out_3BSAH = qkv_BS3AH.new_empty(3, batch, length, heads, width)
        _launch(qkv_BS3AH.unbind(2), out_3BSAH.unbind(0), cos_SF, sin_SF)
        return out_3BSAH[0], out_3BSAH[1], out_3BSAH[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        batch, length, heads, width = grads[0].shape
        g_BS3AH = grads[0].new_empty(batch, length, 3, heads, width)
        cos_SF, sin_SF = ctx.saved_tensors
        _launch(grads, g_BS3AH.unbind(2), cos_SF, sin_SF, back=True)
        return g_BS3AH, None, None


class _Rotate(torch.autograd.Function):
    """Queries and keys ``[B, S, A, H]``, turned."""

    @staticmethod
    def forward(ctx: Any, q_BSAH: Tensor, k_BSAH: Tensor, cos_SF: Tensor, sin_SF: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos_SF, sin_SF)
        return _turned((q_BSAH, k_BSAH), cos_SF, sin_SF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_SF, sin_SF = ctx.saved_tensors
        return *_turned(grads, cos_SF, sin_SF, back=True), None, None


def _turned(inputs: tuple[Tensor, ...], cos_SF: Tensor, sin_SF: Tensor, back: bool = False) -> tuple[Tensor, ...]:
    outputs = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
    _launch(inputs, outputs, cos_SF, sin_SF, back)
    return outputs


def _launch(
    inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], cos_SF: Tensor, sin_SF: Tensor, back: bool = False
) -> None:
    """Turn the first two inputs into the first two outputs and copy the third, all ``[B, S, A, H]``."""
    batch, length, heads, width = inputs[0].shape
    if not inputs[0].numel():
        return
    if not use_triton(inputs[0]):
        # The gradient of a rotation is the rotation by the opposite angle.
        return _turn_plainly(inputs, outputs, cos_SF, -sin_SF if back else sin_SF)
    # The kernel goes by one set of strides for all inputs, and by unit steps within a head.
    if any(x.stride() != inputs[0].stride() or x.stride(3) != 1 for x in inputs):
        inputs = tuple(x.contiguous() for x in inputs)
    third = (inputs[2], outputs[2]) if len(inputs) == 3 else (None, None)
    block_f = block_size(width // 2, _BLOCK)
    block_a = block_size(heads, _BLOCK // block_f)
    _turn_kernel[(batch * length, triton.cdiv(heads, block_a))](
        inputs[0],
        inputs[1],
        third[0],
        outputs[0],
        outputs[1],
        third[1],
        cos_SF,
        sin_SF,
        length,
        heads,
        width // 2,
        *inputs[0].stride()[:3],
        *outputs[0].stride()[:3],
        BACK=back,
        THIRD=len(inputs) == 3,
        BLOCK_A=block_a,
        BLOCK_F=block_f,
    )


def _turn_plainly(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], cos_SF: Tensor, sin_SF: Tensor) -> None:
    cos_S1F, sin_S1F = (table.to(inputs[0].dtype).unsqueeze(1) for table in (cos_SF, sin_SF))
    for x, out in zip(inputs[:2], outputs[:2], strict=True):
        (first, second), (turned_first, turned_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
        torch.mul(first, cos_S1F, out=turned_first).addcmul_(second, sin_S1F, value=-1)
        torch.mul(second, cos_S1F, out=turned_second).addcmul_(first, sin_S1F)
    for x, out in zip(inputs[2:], outputs[2:], strict=True):
        out.copy_(x)


@kernel
def _turn_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    q_out_ptr: tl.tensor,
    k_out_ptr: tl.tensor,
    v_out_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    length: tl.tensor,
    heads: tl.tensor,
    half: tl.tensor,
    stride_b: tl.tensor,
    stride_s: tl.tensor,
    stride_a: tl.tensor,
    out_stride_b: tl.tensor,
    out_stride_s: tl.tensor,
    out_stride_a: tl.tensor,
    BACK: tl.constexpr,
    THIRD: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    batch = (tl.program_id(0) // length).to(tl.int64)
    position = (tl.program_id(0) % length).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A))[:, None]
    angle = tl.arange(0, BLOCK_F)[None, :]
    inside = (head < heads) & (angle < half)
    cos = tl.load(cos_ptr + position * half + angle, mask=angle < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * half + angle, mask=angle < half, other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
    at = batch * stride_b + position * stride_s + head * stride_a + angle
    out = batch * out_stride_b + position * out_stride_s + head * out_stride_a + angle
    first = tl.load(q_ptr + at, mask=inside).to(tl.float32)
    second = tl.load(q_ptr + at + half, mask=inside).to(tl.float32)
    tl.store(q_out_ptr + out, first * cos - second * sin, mask=inside)
    tl.store(q_out_ptr + out + half, second * cos + first * sin, mask=inside)
    first = tl.load(k_ptr + at, mask=inside).to(tl.float32)
    second = tl.load(k_ptr + at + half, mask=inside).to(tl.float32)
    tl.store(k_out_ptr + out, first * cos - second * sin, mask=inside)
    tl.store(k_out_ptr + out + half, second * cos + first * sin, mask=inside)
    if THIRD:
        tl.store(v_out_ptr + out, tl.load(v_ptr + at, mask=inside), mask=inside)
        tl.store(v_out_ptr + out + half, tl.load(v_ptr + at + half, mask=inside), mask=inside)
