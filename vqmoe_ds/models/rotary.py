"""Rotary positions (Su 2021) on the two halves of each head: (a, b) -> (a cos - b sin, b cos + a sin).

Legend: B batch, S sequence, A heads, K key-value heads, N = A + 2 K heads of a projection, H width of a head,
F = H / 2 angles of a position.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.config.schema import ModelConfig, RopeScaling
from vqmoe_ds.moe.derivatives import first_derivative_only
from vqmoe_ds.moe.kernels.triton_support import block_size, kernel, tl, triton, use_triton

# models/hf/attention_vqmoe.py has the same tables for exported folders, which lack this file: both change together.
LLAMA3_TURNS = (1, 4)
YARN_TURNS = (1, 32)
"""Turns within the original context below which a frequency is slowed down by the whole factor, and above which by
none."""
_BLOCK = 2048  # angles that a program turns at a time


def rotary_tables(config: ModelConfig, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of all positions of the context, float32 ``[S, F]``.

    Scaled as ``model.rope_scaling`` says: linear (Chen 2023, arXiv 2306.15595), Llama 3.1 (Dubey 2024, arXiv
    2407.21783) or YaRN (Peng 2023, arXiv 2309.00071), whose tables are longer than 1 to sharpen attention.
    """
    rates_F = config.rope_theta ** (-torch.arange(0, head_width, 2) / head_width)
    size = 1.0
    if config.rope_scaling is not RopeScaling.NONE:
        kept_F = _kept_share(rates_F, config)
        rates_F = rates_F * (kept_F + (1 - kept_F) / config.rope_factor)
        # YaRN's `sqrt(1 / t)`: queries and keys both take it from the tables, so scores are multiplied by its square.
        size = 0.1 * math.log(config.rope_factor) + 1 if config.rope_scaling is RopeScaling.YARN else 1.0
    angles = torch.arange(config.sequence_length).unsqueeze(1) * rates_F
    return angles.cos() * size, angles.sin() * size


def _kept_share(rates_F: Tensor, config: ModelConfig) -> Tensor:
    """How much of each frequency stays as it was; the rest is divided by the factor."""
    if config.rope_scaling is RopeScaling.LINEAR:
        return torch.zeros_like(rates_F)
    if config.rope_scaling is RopeScaling.LLAMA3:
        few, many = LLAMA3_TURNS
        turns_F = config.rope_original_length * rates_F / (2 * math.pi)
        return ((turns_F - few) / (many - few)).clamp(0, 1)
    width, length = 2 * len(rates_F), config.rope_original_length
    last, first = (
        width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta)) for turns in YARN_TURNS
    )
    low, high = max(math.floor(first), 0), min(math.ceil(last), width - 1)
    places_F = torch.arange(len(rates_F), dtype=torch.float32)
    # 0.001, as in transformers, where both ends of the ramp fall on one frequency.
    return 1 - ((places_F - low) / (high - low or 0.001)).clamp(0, 1)


def rotate_qkv(qkv_BSNH: Tensor, cos_SF: Tensor, sin_SF: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Turned queries ``[B, A, S, H]`` and keys, and the values, each ``[B, K, S, H]``, of one projection.

    The values are copied too, so that the projection itself need not be kept, and the gradients of all three are
    written into one tensor.

    Args:
        qkv_BSNH: the projection: heads of queries, of keys, of values.
        cos_SF: cosines of the angles of these S positions, float32.
        sin_SF: sines of the same.
        kv_heads: K.
    """
    q_BSAH, k_BSKH, v_BSKH = _RotateQKV.apply(qkv_BSNH, cos_SF.contiguous(), sin_SF.contiguous(), kv_heads)
    return q_BSAH.transpose(1, 2), k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2)


def split_heads(qkv_BSNH: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, S, A, H]``, keys and values, each ``[B, S, K, H]``, of one projection."""
    q_BSAH, k_BSKH, v_BSKH = qkv_BSNH.split([qkv_BSNH.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)
    return q_BSAH, k_BSKH, v_BSKH


def rotate(q_BSAH: Tensor, k_BSKH: Tensor, cos_SF: Tensor, sin_SF: Tensor) -> tuple[Tensor, Tensor]:
    """Turned queries ``[B, A, S, H]`` and keys ``[B, K, S, H]``; angles as of ``rotate_qkv``."""
    q, k = _Rotate.apply(q_BSAH, k_BSKH, cos_SF.contiguous(), sin_SF.contiguous())
    return q.transpose(1, 2), k.transpose(1, 2)


class _RotateQKV(torch.autograd.Function):
    """``[B, S, N, H]`` -> ``[B, S, A, H]`` and twice ``[B, S, K, H]``; the gradient is turned back into one tensor."""

    @staticmethod
    def forward(ctx: Any, qkv_BSNH: Tensor, cos_SF: Tensor, sin_SF: Tensor, kv_heads: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos_SF, sin_SF)
        ctx.kv_heads = kv_heads
        return _turned(split_heads(qkv_BSNH, kv_heads), cos_SF, sin_SF)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        batch, length, heads, width = grads[0].shape
        g_BSNH = grads[0].new_empty(batch, length, heads + 2 * ctx.kv_heads, width)
        cos_SF, sin_SF = ctx.saved_tensors
        _launch(grads, split_heads(g_BSNH, ctx.kv_heads), cos_SF, sin_SF, back=True)
        return g_BSNH, None, None, None


class _Rotate(torch.autograd.Function):
    """Queries ``[B, S, A, H]`` and keys ``[B, S, K, H]``, turned."""

    @staticmethod
    def forward(ctx: Any, q_BSAH: Tensor, k_BSKH: Tensor, cos_SF: Tensor, sin_SF: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos_SF, sin_SF)
        return _turned((q_BSAH, k_BSKH), cos_SF, sin_SF)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_SF, sin_SF = ctx.saved_tensors
        return *_turned(grads, cos_SF, sin_SF, back=True), None, None


def _turned(inputs: tuple[Tensor, ...], cos_SF: Tensor, sin_SF: Tensor, back: bool = False) -> tuple[Tensor, ...]:
    # Contiguous: the kernel writes all outputs by the strides of the first.
    outputs = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
    _launch(inputs, outputs, cos_SF, sin_SF, back)
    return outputs


def _launch(
    inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], cos_SF: Tensor, sin_SF: Tensor, back: bool = False
) -> None:
    """Turn the first two inputs into the first two outputs and copy the third, ``[B, S, A, H]`` or fewer heads."""
    batch, length, heads, width = inputs[0].shape
    if not inputs[0].numel():
        return
    if not use_triton(inputs[0]):
        # The gradient of a rotation is the rotation by the opposite angle.
        return _turn_plainly(inputs, outputs, cos_SF, -sin_SF if back else sin_SF)
    if len(inputs) > 1 and inputs[1].shape[2] != heads:  # grouped queries: the kernel goes by one number of heads
        for x, out in zip(inputs[:2], outputs[:2], strict=True):
            _launch((x,), (out,), cos_SF, sin_SF, back)
        for x, out in zip(inputs[2:], outputs[2:], strict=True):
            out.copy_(x)
        return
    # The kernel goes by one set of strides for all inputs, and by unit steps within a head.
    if any(x.stride() != inputs[0].stride() or x.stride(3) != 1 for x in inputs):
        inputs = tuple(x.contiguous() for x in inputs)
    second = (inputs[1], outputs[1]) if len(inputs) > 1 else (None, None)
    third = (inputs[2], outputs[2]) if len(inputs) == 3 else (None, None)
    block_f = block_size(width // 2, _BLOCK)
    block_a = block_size(heads, _BLOCK // block_f)
    _turn_kernel[(batch * length, triton.cdiv(heads, block_a))](
        inputs[0],
        second[0],
        third[0],
        outputs[0],
        second[1],
        third[1],
        cos_SF,
        sin_SF,
        length,
        heads,
        width // 2,
        *inputs[0].stride()[:3],
        *outputs[0].stride()[:3],
        BACK=back,
        SECOND=len(inputs) > 1,
        THIRD=len(inputs) == 3,
        BLOCK_A=block_a,
        BLOCK_F=block_f,
    )


def _turn_plainly(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], cos_SF: Tensor, sin_SF: Tensor) -> None:
    # In the type of the heads, as exported models turn them. `out=` suits autograd functions alone, which record
    # nothing.
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
    SECOND: tl.constexpr,
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
    if SECOND:
        first = tl.load(k_ptr + at, mask=inside).to(tl.float32)
        second = tl.load(k_ptr + at + half, mask=inside).to(tl.float32)
        tl.store(k_out_ptr + out, first * cos - second * sin, mask=inside)
        tl.store(k_out_ptr + out + half, second * cos + first * sin, mask=inside)
    if THIRD:
        tl.store(v_out_ptr + out, tl.load(v_ptr + at, mask=inside), mask=inside)
        tl.store(v_out_ptr + out + half, tl.load(v_ptr + at + half, mask=inside), mask=inside)
